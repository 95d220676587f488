"""Files and directories that appear complete or not at all, whatever is killed or full when.

What a write replaces stays as it was until the new one is complete. Where the system takes no more (full disk, quota,
read-only), the error names the path and the remedy, and the half-written rest is removed, for it takes up the room.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from simplear.errors import ExistingFileError, SystemRefusedError, UserError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system answers when a disk takes no more; other errors are the program's own."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Writes of `path` within the block: a refusal of the disk becomes an OSError with path and remedy.

    Libraries that write by themselves (torch, safetensors, torch.distributed.checkpoint) wrap what the system said, so
    it is looked for behind their errors too.
    """
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint's is no Exception
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
        if code is None and (said := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))):
            code = int(said[1] or said[2])
        if code in REFUSALS:
            return code
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def whole_file(path: str | Path, partial: Path | None = None) -> Iterator[Path]:
    """A path to write a file to, which gets the name `path` when the block ends well; one that has it goes then.

    Args:
        path: in a directory that is made if missing.
        partial: the path to write to, beside `path`; needed where several processes write files of one name.

    Raises OSError, naming the file, when the disk takes no more.
    """
    path = Path(path)
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    sync(path.parent)


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """An empty directory to fill, which gets the name `directory` when the block ends well.

    One that has the name already goes only then; as no rename replaces a directory, there is for a moment none.

    Raises OSError, naming the directory, when the disk takes no more.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    replaced = directory.with_name(f".{directory.name}.replaced")
    try:
        with writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)  # safetensors writes for the owner alone
                sync(file)
            sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a directory, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_directory(file: Path, settings: Mapping[str, Any], partial: Path | None = None) -> None:
    """Make the directory of ``file`` one of these settings, or make sure that it is already; ``file`` keeps them.

    So work that goes on after a stop is not mixed with work of other settings. Several processes may claim at once.

    Args:
        file: JSON, in a directory that is made if missing.
        settings: whatever decides what the directory holds; JSON values.
        partial: the path to write to, beside `file`; if not given, one that no other process of this machine has.

    Raises:
        ValueError: the directory was begun with other settings; names the first that differs.
    """
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        with whole_file(file, partial or file.with_name(f".{file.name}.{os.getpid()}.partial")) as path:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    try:
        present = _flat(json.loads(file.read_text()))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} holds no settings ({error}): name another directory, or remove this one.") from error
    wanted = _flat(settings)
    for key in sorted(present.keys() | wanted.keys()):
        if present.get(key) != wanted.get(key):
            raise UserError(
                f"{file.parent} was begun with {key} = {present.get(key)!r}, not {wanted.get(key)!r}: use the same "
                "setting, or another directory."
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def require_replaceable(directory: str | Path, what: str, key: str) -> None:
    """As `require_writable`, for a directory that `whole_directory` will make: no file may have its name."""
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ExistingFileError(
            f"{what} cannot be saved in {directory}, which is a file: move it, or name another ({key})."
        )
    require_writable(Path(directory).absolute().parent, what, key)


def require_writable(directory: str | Path, what: str, key: str) -> None:
    """Make sure before the work that its result can be saved: make the directory and a file in it.

    Args:
        directory: where to.
        what: what is to be saved there, for the message.
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
