"""A directory of token shards made usable again: ``simplear data repair``.

What is whole stays where it is. A shard that is not as its sidecar says goes into ``damaged/``, with its sidecar, and
nothing there is ever replaced; as its unit is then no longer committed, the command that made the directory makes it
anew, and no other. A lost sidecar comes back from the manifest where the shard agrees with it, and a lost or stale
manifest from the sidecars. Each step is one rename or one whole file, so a repair that was killed is run again.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from simplear.atomic import remove_abandoned, sync
from simplear.data.shards.format import MANIFEST_FILE, SETTINGS_FILE, all_entries, read_json
from simplear.data.shards.verify import Findings, examine
from simplear.data.shards.writer import manifest_of, write_json
from simplear.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)

DAMAGED_DIRECTORY = "damaged"


@contextmanager
def sole_keeper(directory: Path) -> Iterator[None]:
    """Within the block no other repair or merge works in the directory.

    The lock is the system's and ends with the process, however that ends. Where the file system has none, a line says
    so and the work goes on.

    Raises ValueError when another one is at work.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process repairs {directory} or merges into it: wait until it ends.") from error
        except OSError as error:
            logger.warning(
                "%s has no locks (%s): make sure that no other process repairs or merges there",
                directory,
                error.strerror,
            )
        yield
    finally:
        os.close(descriptor)


def repair(directory: str, *, workers: int = 1) -> None:
    """Set damaged token shards aside and write the manifest of those that are whole; nothing is deleted.

    Damaged ones go into ``damaged/``; run the command that made the directory again and it makes exactly those anew.
    Not to be run while that command is at work in the directory.

    Args:
        directory: Token shards, finished or not.
        workers: Processes that read.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: another repair is at work; shards of another format version; neither settings nor a manifest.
    """
    path = Path(directory)
    if not path.is_dir():
        raise MissingFileError(f"no token shards at {directory}: name a directory that `simplear tokenize` wrote.")
    with sole_keeper(path):
        remove_abandoned(path)
        found = examine(path, workers=workers, progress=True)
        if found.settings is None:
            raise UserError(
                f"{path} has lost {SETTINGS_FILE} and {MANIFEST_FILE}, so nothing says what its codes were made with: "
                "run the same `simplear tokenize` again, which writes the settings anew and keeps the shards."
            )
        for problem in found.problems:
            print(problem)
        _restore_settings(found)
        for name in sorted(found.restorable):
            write_json(path / f"{name}.json", found.sidecars[name])
            print(f"{path / name}.json is written anew from the manifest")
        for name in found.damaged:
            for moved in set_aside(path, name):
                print(f"moved to {moved}")
        missing = _write_manifest(found)
    for name in found.unfinished:
        print(f"{path / name}.arrow has no sidecar and is left where it is: the command that made it writes it anew")
    rows = sum(found.sidecars[name]["rows"] for name in found.whole)
    print(f"{path}: {len(found.whole)} whole shards, {rows} rows")
    if missing:
        print(f"{len(missing)} shards are missing: run the same `{found.maker}` again, which makes those alone")
    elif found.manifest is None:
        print(f"only the same `{found.maker}` can say whether these are all: run it again")


def set_aside(directory: Path, name: str) -> list[Path]:
    """Move a unit's shard, and then its sidecar, into ``damaged/``, under names that are free; returns these."""
    aside = directory / DAMAGED_DIRECTORY
    aside.mkdir(exist_ok=True)
    moved = []
    # The shard first: its sidecar, left alone by a kill in between, still says that there is something to move.
    for file in (directory / f"{name}.arrow", directory / f"{name}.json"):
        if not file.exists():
            continue
        free, number = aside / file.name, 0
        while free.exists():
            number += 1
            free = aside / f"{file.stem}.{number}{file.suffix}"
        file.rename(free)
        moved.append(free)
    sync(aside)
    sync(directory)
    return moved


def _restore_settings(found: Findings) -> None:
    path = found.directory / SETTINGS_FILE
    try:
        read_json(path)
    except (FileNotFoundError, ValueError):
        assert found.settings is not None
        write_json(path, found.settings)
        print(f"{path} is written anew from the manifest")


def _write_manifest(found: Findings) -> Sequence[str]:
    """Write the manifest of the whole units unless it is there already; returns the units that are missing."""
    assert found.settings is not None
    before = found.manifest or {}
    known = all_entries(before)
    # The order of the rows is the manifest's; what it does not name comes after, by name.
    others = sorted(found.whole - known.keys() - set(found.left_out))
    names = [name for name in known if name in found.whole] + others
    missing = sorted({*known, *before.get("missing", []), *found.damaged} - found.whole - set(found.left_out))
    shards = [found.sidecars[name] for name in names]
    if not shards:
        logger.warning("%s holds no whole shard, so it gets no manifest", found.directory)
        return missing
    # What is set aside keeps its place and its numbers of rows, so that training does not come into another order.
    set_aside = {
        name: {"place": place, "rows": entry["rows"], "grids": entry["grids"]}
        for place, (name, entry) in enumerate(known.items())
        if name not in found.whole
    }
    left_out = [name for name in found.left_out if name in found.whole]
    manifest = manifest_of(found.settings, shards, missing=missing, set_aside=set_aside, left_out=left_out)
    if found.manifest is None or {k: v for k, v in before.items() if k != "drops"} != manifest:
        write_json(found.directory / MANIFEST_FILE, manifest)
        print(f"{found.directory / MANIFEST_FILE} is written anew")
    return missing
