"""Files and directories that appear complete or not at all, even if the process is killed or the disk is full.

Everything is written under a temporary name, synced and renamed, so whatever had the name before stays until the new
content is complete. If the system refuses a write (full disk, quota, read-only), the error names the path and the
remedy, and the incomplete file is removed to free its space.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from simplear.errors import ExistingFileError, SystemRefusedError, UserError
from simplear.text_files import read_object

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""System errors of a disk that accepts no more data; other errors are the program's own."""
TEMPORARY_MARK = ".tmp-"
ENDED = ("Z", "X")
"""States of a process in Linux's /proc: a zombie, and one that is about to disappear."""
READABLE = 200
"""Characters of a setting in a message."""

_HOST = socket.gethostname()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within the block, a refusal of the disk becomes an OSError that names `path` and the remedy.

    Libraries that write files (torch, safetensors, torch.distributed.checkpoint) wrap the system's error, so their
    errors are searched for it too.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's is not an Exception
        code = _refusal(error)
        if code is None:
            raise
        raise SystemRefusedError(
            code,
            f"{path} could not be written ({os.strerror(code)}). What had that name before is still there: free space "
            "or name another directory, and run the same again.",
        ) from error


def _refusal(error: BaseException | None) -> int | None:
    """The number of the system error behind an exception, if it is one of `REFUSALS`."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (quoted := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))):
            code = int(quoted[1] or quoted[2])
        if code in REFUSALS:
            return code
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write a file to; it is renamed to `path` if the block succeeds, and replaces an older file.

    The directory is created if it is missing. Raises OSError, naming the file, when the disk accepts no more data.
    """
    path = Path(path)
    partial = temporary_name(path)
    replaced = partial.with_name(f"{partial.name}.replaced")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
    except BaseException:
        _remove(partial)
        raise
    if partial.is_dir() and path.exists():  # a rename cannot replace a directory
        path.rename(replaced)
    partial.replace(path)
    sync(path.parent)
    _remove(replaced)


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """An empty directory to fill; it is renamed to `directory` if the block succeeds.

    An older directory is removed only then; for a moment none has the name.

    Raises OSError, naming the directory, when the disk accepts no more data.
    """
    with whole_file(directory) as partial:
        remove_abandoned(partial.parent)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
            sync(file)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it was a directory or missing, or is another user's file
        path.unlink()


def sync(path: Path) -> None:
    """Write a file's content, or the names in a directory, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where this process writes what will be renamed to `path`; the name tells `remove_abandoned` which process."""
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{_HOST}-{os.getpid()}")


def remove_abandoned(directory: Path) -> None:
    """Remove temporary files and directories of processes of this machine that have ended."""
    for temporary in directory.glob(f".*{TEMPORARY_MARK}*"):
        process = re.fullmatch(rf"{re.escape(_HOST)}-(\d+)(\..*)?", temporary.name.rpartition(TEMPORARY_MARK)[2])
        if process and not is_running(int(process[1])):
            _remove(temporary)


def is_running(process: int) -> bool:
    """Whether a process of this machine, perhaps another user's, has not ended; a zombie has ended."""
    with suppress(OSError):  # no such process, or a system without /proc
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ENDED:
            return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def claim_directory(file: Path, settings: Mapping[str, Any]) -> None:
    """Reserve the directory of `file` for work with these settings, or check that it was begun with the same ones.

    So work that is resumed cannot be mixed with results of other settings. What killed processes left is removed.

    Args:
        file: JSON file that keeps the settings; its directory is created if missing.
        settings: JSON values; everything that determines what the directory holds.

    Raises:
        ValueError: the directory was begun with other settings; names the first that differs.
    """
    if not file.exists():
        with whole_file(file) as partial:
            partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    remove_abandoned(file.parent)
    try:
        before = read_object(file)
    except UserError as error:
        raise UserError(f"{file} holds no settings ({error}): name another directory, or remove this one.") from error
    if change := difference(before, settings):
        raise UserError(f"{file.parent} was begun with {change}: use the same setting, or another directory.")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that differs, such as "filters.0.minimum = 5, not 6"; None if all are equal.

    Settings are JSON values; one that is None equals one that is missing.
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} = {shortened(old.get(key))}, not {shortened(new.get(key))}"
    return None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their full names; lists of objects are numbered."""
    if isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        settings = {str(number): value for number, value in enumerate(settings)}
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def shortened(value: Any) -> str:
    """A value in a message, without its middle if it is long."""
    text = repr(value)
    return text if len(text) <= READABLE else f"{text[: READABLE // 2]} … {text[-READABLE // 2 :]}"


def require_replaceable(directory: str | Path, what: str, key: str) -> None:
    """As `require_writable`, for a directory that `whole_directory` will create: its name must not be a file's."""
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ExistingFileError(
            f"{what} cannot be saved in {directory}, which is a file: move it, or name another ({key})."
        )
    require_writable(Path(directory).absolute().parent, what, key)


def require_writable(directory: str | Path, what: str, key: str) -> None:
    """Check before the work that its result can be saved: create the directory, and a file in it.

    What killed processes left there is removed.

    Args:
        directory: where to.
        what: what will be saved there, for the message.
        key: the setting that names the directory.

    Raises OSError naming directory, reason and setting.
    """
    try:
        with suppress(FileExistsError):
            Path(directory).mkdir(parents=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise SystemRefusedError(
            error.errno,
            f"{what} cannot be saved in {directory} ({error.strerror}): make it a directory that can be written, or "
            f"name another ({key}).",
        ) from error
    remove_abandoned(Path(directory))
