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
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplear.errors import ExistingFileError, SystemRefusedError, UserError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system answers when a disk takes no more; other errors are the program's own."""
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What the system answers where a file cannot have a second name."""
TEMPORARY_MARK = ".tmp-"
ENDED = ("Z", "X")
"""States of a process in Linux's /proc: a zombie, and one that is about to go."""
READABLE = 200
"""Characters of a setting in a message."""
LOOKS, SECONDS_BETWEEN_LOOKS = 5, 0.1
"""At settings that another process may be writing, where the file system has no links."""

_HOST = socket.gethostname()


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


def temporary_name(path: Path) -> Path:
    """Where this thread writes what will get the name `path`; `remove_abandoned` knows whose it was."""
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{_HOST}-{os.getpid()}.{threading.get_ident()}")


def remove_abandoned(directory: Path) -> None:
    """Remove temporary files of processes of this machine that have ended; others may still be writing theirs."""
    for temporary in directory.glob(f".*{TEMPORARY_MARK}*"):
        made_by = re.fullmatch(rf"{re.escape(_HOST)}-(\d+)(\.\d+)?", temporary.name.rpartition(TEMPORARY_MARK)[2])
        if made_by and not is_running(int(made_by[1])):
            with suppress(FileNotFoundError, PermissionError):  # another user's
                temporary.unlink()


def is_running(process: int) -> bool:
    """Whether a process of this machine, perhaps another user's, has not ended; a zombie has."""
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


def create_file(path: Path, content: bytes) -> None:
    """Write a file that appears complete. Of several processes at once one makes it.

    Raises:
        FileExistsError: there is one already; it stays as it is.
        OSError: the disk takes no more; names the file.
    """
    partial = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            sync(partial)
            os.link(partial, path)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            _create_without_link(path, content)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def _create_without_link(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def claim_directory(file: Path, settings: Mapping[str, Any]) -> None:
    """Make the directory of ``file`` one of these settings, or make sure that it is already; ``file`` keeps them.

    So work that goes on after a stop is not mixed with work of other settings. Of several processes that claim a new
    directory at once one writes its settings, and the others are held against those.

    Args:
        file: JSON, in a directory that is made if missing.
        settings: whatever decides what the directory holds; JSON values.

    Raises:
        ValueError: the directory was begun with other settings; names the first that differs.
    """
    if not file.exists():
        with suppress(FileExistsError):
            create_file(file, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    found = difference(_settings(file), settings)
    if found is None:
        return
    if found.of_another_version:
        raise UserError(
            f"{file.parent} was begun by another version of simplear, which describes {found.of_another_version} in "
            f"another way ({found.key}): finish it with that version, or use another directory. A finished one can be "
            "trained on as it is."
        )
    raise UserError(f"{file.parent} was begun with {found}: use the same setting, or another directory.")


def _settings(file: Path, looks: int = LOOKS) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (ValueError, RecursionError) as error:
        if looks == 1:
            raise UserError(
                f"{file} holds no settings ({error}): name another directory, or remove this one."
            ) from error
    time.sleep(SECONDS_BETWEEN_LOOKS)
    return _settings(file, looks - 1)


@dataclass(frozen=True)
class Difference:
    """The first setting that differs."""

    key: str
    """Such as "filters.0.minimum"."""
    before: Any
    now: Any
    of_another_version: str | None = None
    """Class that is described by other keys than this version's, so that the descriptions cannot be compared."""

    def __str__(self) -> str:
        return f"{self.key} = {shortened(self.before)}, not {shortened(self.now)}"


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> Difference | None:
    """The first difference of two settings, JSON values, by name; a setting that is None and one left out are alike.

    One that only another version could make comes first.
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    for key in differing:
        kind = f"{key.rpartition('.')[0]}.class"
        if (key in old) != (key in new) and kind in old and old[kind] == new.get(kind):
            return Difference(key, old.get(key), new.get(key), str(old[kind]))
    return Difference(differing[0], old.get(differing[0]), new.get(differing[0])) if differing else None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names; lists of objects by their numbers."""
    if isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        settings = {str(number): value for number, value in enumerate(settings)}
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def shortened(value: Any) -> str:
    """A value in a message, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= READABLE else f"{text[: READABLE // 2]} … {text[-READABLE // 2 :]}"


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
