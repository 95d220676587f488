"""What is wrong with a directory of token shards: ``simplear data verify``.

Every file is held against the one that vouches for it: a shard against its sidecar (bytes, SHA-256, rows, the checksum
of each row, grids, codes), sidecars against the settings and the manifest. All that is wrong is listed, with file, row
and remedy, and nothing is changed; `simplear.data.shards.repair` takes the same findings.

Shards are looked at one by one, in this process or in several. Nothing here knows of pictures or of training.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simplear.atomic import TEMPORARY_MARK
from simplear.data.shards.format import (
    MANIFEST_FILE,
    OWN_FILES,
    SETTINGS_FILE,
    is_foreign,
    read_json,
    require_version,
    settings_of,
)
from simplear.data.shards.reader import Columns, Damage, stated_shard
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of
from simplear.progress import progress_bar
from simplear.visual_tokenizer import load_visual_tokenizer

SIDECAR_KEYS = ("file", "rows", "bytes", "sha256", "grids")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: Path
    what: str
    rows: str = ""
    """Such as "row 5" or "rows 2-4, 9"; empty: the file as a whole."""

    def __str__(self) -> str:
        return f"{self.file}{', ' * bool(self.rows)}{self.rows}: {self.what}"


@dataclass
class Findings:
    """The units of a directory, by what has to be done about them."""

    directory: Path
    settings: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    sidecars: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of units that have a readable one, or whose lost one the manifest holds and the shard agrees with."""
    whole: set[str] = field(default_factory=set)
    """Units whose shard is as its sidecar says; `restorable` ones included."""
    restorable: dict[str, Problem] = field(default_factory=dict)
    """Units whose sidecar is lost or cut short, and stands in the manifest."""
    damaged: dict[str, list[Problem]] = field(default_factory=dict)
    """Units that have to be made anew."""
    unfinished: list[str] = field(default_factory=list)
    """Shards without a sidecar that no manifest names: what a stopped tokenization leaves, or one that runs."""
    temporaries: list[Path] = field(default_factory=list)
    """Files that a process writes, or that a killed one left."""
    others: list[Problem] = field(default_factory=list)
    """Of settings and manifest."""

    @property
    def problems(self) -> list[Problem]:
        """All of them, in the order of the files."""
        found = [*self.others, *self.restorable.values(), *(one for many in self.damaged.values() for one in many)]
        return sorted(found, key=lambda problem: str(problem.file))

    @property
    def left_out(self) -> list[str]:
        """Units that the manifest says are there and of the source no more."""
        return list((self.manifest or {}).get("left_out", []))

    @property
    def maker(self) -> str:
        """The command that makes the directory's shards."""
        return str((self.settings or {}).get("made_by", "simplear tokenize"))

    @property
    def remedy(self) -> str:
        """What to do about any problem found."""
        return (
            f"`simplear data repair {self.directory}` sets damaged shards aside and writes the manifest anew; then run "
            f"the same `{self.maker}` again, which makes those shards and no others."
        )


def examine(directory: Path, *, workers: int = 1, progress: bool = False) -> Findings:
    """Look at every byte of a directory of token shards.

    Args:
        directory: with or without a manifest.
        workers: processes; 1 is this one.
        progress: show a bar, or lines where there is no terminal.

    Raises:
        FileNotFoundError: no directory.
        ValueError: settings or a manifest of another version, which this code cannot judge.
    """
    if not directory.is_dir():
        raise MissingFileError(f"no token shards at {directory}: name a directory that `simplear tokenize` wrote.")
    found = Findings(directory)
    _read_settings_and_manifest(found)
    stated = {Path(entry["file"]).stem: entry for entry in (found.manifest or {}).get("shards", [])}
    for file in sorted(directory.iterdir()):
        if TEMPORARY_MARK in file.name and file.name.startswith("."):
            found.temporaries.append(file)
    lost = _read_sidecars(found, stated)
    jobs = dict(found.sidecars)
    for name, problem in lost.items():
        if name in stated:
            jobs[name] = stated[name]
        elif (directory / f"{name}.json").exists():  # cut short, and nothing else says what the shard was
            found.damaged[name] = [problem]
        else:
            found.unfinished.append(name)
    codebook = (found.settings or found.manifest or {}).get("codebook_size")
    for name, problems in _check_all(directory, jobs, codebook, workers, progress):
        if name in lost and not problems:
            found.restorable[name] = lost[name]
            found.sidecars[name] = jobs[name]
            found.whole.add(name)
        elif name in lost:
            found.damaged[name] = [lost[name], *problems]
        else:
            problems += _against_the_set(found, name, stated.get(name))
            if problems:
                found.damaged[name] = problems
            else:
                found.whole.add(name)
    _compare_manifest(found, stated)
    found.damaged = dict(sorted(found.damaged.items()))
    return found


def _read_settings_and_manifest(found: Findings) -> None:
    for name in OWN_FILES:
        path = found.directory / name
        try:
            content = read_json(path)
            require_well_formed_manifest(path, content)
        except FileNotFoundError:
            if name == SETTINGS_FILE or not any(found.directory.glob("*.json")):
                found.others.append(Problem(path, "is missing"))
            else:
                found.others.append(Problem(path, "is missing: not all units are made, or it was lost"))
            continue
        except ValueError as error:
            found.others.append(Problem(path, _reason(error, path)))
            continue
        require_version(path, content)
        if name == MANIFEST_FILE:
            found.manifest = content
        else:
            found.settings = content
    if found.manifest is not None:
        settings = settings_of(found.manifest)
        if found.settings is None:
            found.settings = settings
        elif settings != found.settings:
            differing = sorted(
                key for key in settings.keys() | found.settings.keys() if settings.get(key) != found.settings.get(key)
            )
            path = found.directory / MANIFEST_FILE
            found.others.append(Problem(path, f"has another {differing[0]} than {SETTINGS_FILE}"))


def require_well_formed_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the file, for a manifest whose entries are no sidecars; settings have none."""
    if path.name != MANIFEST_FILE:
        return
    entries = content.get("shards")
    if not isinstance(entries, list) or not all(_is_sidecar(entry) for entry in entries):
        raise UserError(f"{path} has entries that state no shard.")


def _is_sidecar(content: Any) -> bool:
    return isinstance(content, dict) and all(key in content for key in SIDECAR_KEYS)


def _read_sidecars(found: Findings, stated: Mapping[str, Any]) -> dict[str, Problem]:
    """Read all sidecars; returns the units that have none, or none that can be read."""
    lost: dict[str, Problem] = {}
    directory = found.directory
    for file in sorted(directory.glob("*.json")):
        if file.name in OWN_FILES:
            continue
        try:
            content = read_json(file)
            if not _is_sidecar(content) or content["file"] != f"{file.stem}.arrow":
                raise UserError(f"{file} states no shard of its own name.")
            stated_shard(directory, content)
        except (ValueError, AttributeError, TypeError) as error:
            lost[file.stem] = Problem(file, _reason(error, file))
            continue
        found.sidecars[file.stem] = content
    for name in sorted({*stated, *(file.stem for file in directory.glob("*.arrow"))} - found.sidecars.keys()):
        if name not in lost:
            lost[name] = Problem(directory / f"{name}.json", "is missing")
    return lost


def _reason(error: Exception, path: Path) -> str:
    """The message of an error without the file that a `Problem` names already, and without another remedy."""
    return str(error).removeprefix(f"{path} ").partition(": delete it")[0]


def _against_the_set(found: Findings, name: str, entry: Mapping[str, Any] | None) -> list[Problem]:
    """Whether a shard that agrees with its sidecar belongs to this directory."""
    sidecar, file = found.sidecars[name], found.directory / f"{name}.arrow"
    if found.settings is not None and is_foreign(sidecar, found.settings):
        return [Problem(file, "was made for another directory, of other settings")]
    if entry is not None and entry["sha256"] != sidecar["sha256"] and "settings" not in sidecar:
        return [Problem(file, "and its sidecar are another shard than the manifest states")]
    return []


def _compare_manifest(found: Findings, stated: Mapping[str, Any]) -> None:
    if found.manifest is None:
        return
    path = found.directory / MANIFEST_FILE
    for name in sorted(found.whole):
        if name in found.left_out:
            continue
        if name not in stated:
            found.others.append(Problem(path, f"does not state {name}.arrow, which is there with its sidecar"))
        elif name not in found.restorable and stated[name] != found.sidecars[name]:
            found.others.append(Problem(path, f"states {name}.arrow otherwise than its sidecar"))
    rows = sum(entry["rows"] for entry in stated.values())
    if found.manifest.get("rows") != rows:
        found.others.append(Problem(path, f"states {found.manifest.get('rows')} rows, its shards have {rows}"))
    for name in found.manifest.get("missing", []):
        if name not in found.whole and name not in found.damaged:
            found.others.append(Problem(found.directory / f"{name}.arrow", "was set aside and not made anew"))


def _check_all(
    directory: Path, sidecars: Mapping[str, dict[str, Any]], codebook_size: int | None, workers: int, progress: bool
) -> Iterator[tuple[str, list[Problem]]]:
    check = partial(check_shard, directory, codebook_size=codebook_size)
    sizes = {name: int(sidecar["bytes"]) for name, sidecar in sidecars.items()}
    with progress_bar(sum(sizes.values()), f"verify {directory}", "B", shown=progress, unit_scale=True) as bar:
        if workers == 1:
            for name, sidecar in sidecars.items():
                yield name, check(sidecar)
                bar.update(sizes[name])
            return
        # Forked from a server without threads, for this process has some; the server imports once for all workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, context) as pool:
            running = {pool.submit(check, sidecar): name for name, sidecar in sidecars.items()}
            for done in as_completed(running):
                yield running[done], done.result()
                bar.update(sizes[running[done]])


def check_shard(directory: Path, sidecar: Mapping[str, Any], *, codebook_size: int | None) -> list[Problem]:
    """What a shard has otherwise than its sidecar states; reads the file twice.

    Args:
        directory: of the shard.
        sidecar: file, rows, bytes, SHA-256 and grids.
        codebook_size: codes lie below it; None: no row may have codes.
    """
    shard = stated_shard(directory, sidecar)
    path = shard.path
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return [Problem(path, "is missing")]
    problems = []
    if size != shard.size:
        problems.append(Problem(path, f"has {size} bytes instead of {shard.size}: it is cut short or changed"))
    else:
        digest = sha256_of(path)
        if digest != shard.sha256:
            problems.append(Problem(path, f"has SHA-256 {digest[:12]}…, its sidecar says {shard.sha256[:12]}…"))
    try:
        columns = Columns(shard)
    except ValueError as error:
        why = error.why if isinstance(error, Damage) else _reason(error, path)
        return [*problems, Problem(path, why)]
    return problems + _check_rows(columns, shard.rows, shard.grids, codebook_size, path)


def _check_rows(
    columns: Columns, count: int, stated: Mapping[tuple[int, int], int], codebook_size: int | None, path: Path
) -> list[Problem]:
    wrong: dict[str, list[int]] = {}
    grids: Counter[tuple[int, int]] = Counter()
    for number in range(count):
        reason = ""
        try:
            grid, codes, _, captions, metadata = columns.row(number)
            grids[grid] += 1
            reason = _wrong_row(grid, codes, captions, metadata, codebook_size)
        except UnicodeDecodeError:
            reason = "has text that is no UTF-8"
        except Damage as error:
            reason = (
                f"is damaged ({error.why})" if count == 1 else "is damaged (its checksum, or its place in the file)"
            )
        if reason:
            wrong.setdefault(reason, []).append(number)
    problems = [Problem(path, reason, ranges(numbers)) for reason, numbers in wrong.items()]
    if not problems and grids != stated:
        problems.append(Problem(path, f"has rows of the grids {dict(grids)}, its sidecar says {dict(stated)}"))
    return problems


def _wrong_row(
    grid: tuple[int, int], codes: memoryview, captions: Sequence[str], metadata: str, codebook_size: int | None
) -> str:
    """What is wrong with a row whose checksum is right; empty: nothing."""
    if len(codes) != grid[0] * grid[1] or min(grid) < 0:
        return "has another number of codes than its grid"
    if len(codes) and int(np.frombuffer(codes, np.uint16).max()) >= (codebook_size or 0):
        return f"has a code outside the codebook of {codebook_size or 0}"
    if not captions:
        return "has no caption"
    if metadata != "{}":
        try:
            json.loads(metadata)
        except ValueError:
            return "has metadata that is no JSON"
    return ""


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers of rows in words: ``row 5``, ``rows 2-4, 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    listed = ", ".join("-".join(map(str, part)) for part in parts)
    return f"row{'s' * (len(numbers) > 1)} {listed}"


def verify(directory: str, *, visual_tokenizer: str | None = None, workers: int = 1) -> None:
    """Hold every byte of token shards against sidecars, checksums, settings and manifest; list all that is wrong.

    Exits with 1 when anything is, with 0 otherwise. Nothing is changed.

    Args:
        directory: Token shards, finished or not.
        visual_tokenizer: Directory of the visual tokenizer that should have made the codes.
        workers: Processes that read.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: shards of another format version.
    """
    found = examine(Path(directory), workers=workers, progress=True)
    problems = found.problems
    if visual_tokenizer is not None and (wrong := _other_tokenizer(found, visual_tokenizer)):
        problems.append(wrong)
    for problem in problems:
        print(problem)
    rows = sum(found.sidecars[name]["rows"] for name in found.whole)
    print(f"{directory}: {len(found.whole)} whole shards, {rows} rows; {len(problems)} problems")
    for name in found.unfinished:
        print(f"{name}.arrow has no sidecar: `{found.maker}` stopped or is at work; run again, it writes it anew.")
    for file in found.temporaries:
        print(f"{file} is being written, or was left by a process that was killed: `simplear data repair` removes it.")
    if problems:
        print(found.remedy)
        raise SystemExit(1)


def _other_tokenizer(found: Findings, visual_tokenizer: str) -> Problem | None:
    fingerprint = load_visual_tokenizer(visual_tokenizer).fingerprint
    made_by = str((found.settings or {}).get("visual_tokenizer"))
    if fingerprint == made_by:
        return None
    return Problem(
        found.directory / SETTINGS_FILE,
        f"the codes were made by visual tokenizer {made_by[:12]}…, {visual_tokenizer} is {fingerprint[:12]}…: name the "
        "other one, or tokenize again into another directory",
    )
