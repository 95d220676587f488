"""A disk that fills up: a real one where the tests may mount it, else a limit on the size of files."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOM = 24 * 1024
"""Bytes of the disk, and of a file under the limit."""

FullDisk = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[None]:
    """A small file system of its own at `directory`; skips the test where the system mounts none."""
    made = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(directory)], capture_output=True)
    if made.returncode:
        pytest.skip("this needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Within the block no file of this process may grow beyond `ROOM` bytes; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["disk", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, FullDisk]]:
    """A directory, and a block within which it takes some more kilobytes and then refuses."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if request.param == "limit":
        yield directory, small_files
        return

    @contextlib.contextmanager
    def filled() -> Iterator[None]:
        filler = directory / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with filler.open("rb+") as file:
            file.truncate(filler.stat().st_size - ROOM)
        yield
        filler.unlink()

    with mounted(directory, "-o", "size=4m"):
        yield directory, filled
