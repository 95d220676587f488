"""Damaged token shards: ``simplear data verify`` lists them, ``simplear data repair`` moves them aside.

A shard is held against its sidecar (bytes, SHA-256), and the sidecar against settings and manifest. A repair moves what
is damaged into ``damaged/``, and removes the manifest: the set is then unfinished, and the command that made it makes
exactly the missing shards again. Nothing else is changed and nothing is deleted, so a repair that was killed is run
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from simplear.data.shards.format import (
    MANIFEST_FILE,
    OWN_FILES,
    SETTINGS_FILE,
    how_to_remake,
    is_foreign,
    read_json,
    read_versioned,
)
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of
from simplear.progress import progress_bar
from simplear.visual_tokenizer import load_visual_tokenizer

DAMAGED_DIRECTORY = "damaged"


def verify(directory: str, *, visual_tokenizer: str | None = None, workers: int = 1) -> None:
    """Compare every byte of token shards with its checksum, and list all damaged files.

    Exits with 1 if there are any, with 0 otherwise. Nothing is changed.

    Args:
        directory: Token shards, finished or not.
        visual_tokenizer: Directory of the visual tokenizer that should have made the codes.
        workers: Threads that read.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: shards of another format version.
    """
    path = Path(directory)
    damaged = find_damage(path, workers, progress=True)
    settings = _settings(path)
    again = how_to_remake(settings)
    if visual_tokenizer is not None:
        fingerprint = load_visual_tokenizer(visual_tokenizer).fingerprint
        if fingerprint != (expected := str(settings.get("visual_tokenizer"))):
            raise UserError(
                f"{directory} was made by visual tokenizer {expected[:12]}…, {visual_tokenizer} is "
                f"{fingerprint[:12]}…: name the other one, or tokenize again into another directory."
            )
    for name, why in damaged.items():
        print(f"{path / name} {why}")
    print(f"{directory}: {len(damaged)} damaged files")
    if not (path / MANIFEST_FILE).exists():
        print(f"{MANIFEST_FILE} is missing, so not all shards are written: {again}")
    if damaged:
        print(f"`simplear data repair {directory}` moves them aside; then {again}.")
        raise SystemExit(1)


def repair(directory: str, *, workers: int = 1) -> None:
    """Move damaged token shards into ``damaged/``; the command that made the directory then makes them again.

    Not to be run while that command is at work in the directory.

    Args:
        directory: Token shards, finished or not.
        workers: Threads that read.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: shards of another format version.
    """
    path = Path(directory)
    damaged = find_damage(path, workers, progress=True)
    again = how_to_remake(_settings(path))
    if not damaged:
        print(f"{directory}: nothing is damaged")
        return
    aside = next(folder for number in count(1) if not (folder := path / DAMAGED_DIRECTORY / str(number)).exists())
    aside.mkdir(parents=True)
    for name, why in damaged.items():
        print(f"{path / name} {why}")
        # The sidecar last: as long as it is there, a repair that was killed finds the unit again.
        for file in (path / name, (path / name).with_suffix(".json")):
            if file.exists():
                file.rename(aside / file.name)
    (path / MANIFEST_FILE).unlink(missing_ok=True)
    print(f"{directory}: {len(damaged)} damaged files moved to {aside}; {again}")


def find_damage(directory: Path, workers: int = 1, progress: bool = False) -> dict[str, str]:
    """Names of the damaged files of a directory of token shards, sorted, each with what is wrong with it.

    Shards without a sidecar are not among them: they are not committed, and the next run writes them.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: settings or a manifest of another version, which this code cannot judge.
    """
    if not directory.is_dir():
        raise MissingFileError(f"no token shards at {directory}: name a directory that `simplear tokenize` wrote.")
    damaged: dict[str, str] = {}
    own: dict[str, dict[str, Any]] = {MANIFEST_FILE: {}, SETTINGS_FILE: {}}
    for name in OWN_FILES:
        if not (directory / name).exists():
            continue  # the next run of the command that made the directory writes it
        try:
            read_json(directory / name)
        except UserError:
            damaged[name] = "is not a JSON object"
        else:
            own[name] = read_versioned(directory / name)
    hashes = {entry["file"]: entry["sha256"] for entry in own[MANIFEST_FILE].get("shards", [])}
    sidecars = {f"{file.stem}.arrow": file for file in directory.glob("*.json") if file.name not in OWN_FILES}

    def check(shard: str) -> str:
        if shard not in sidecars:
            return "has lost its sidecar"
        return _damage(directory / shard, sidecars[shard], own[SETTINGS_FILE], hashes.get(shard))

    names = sorted({*sidecars, *hashes})
    with (
        progress_bar(len(names), f"verify {directory}", " shards", shown=progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for name, why in zip(names, pool.map(check, names), strict=True):
            bar.update()
            if why:
                damaged[name] = why
    return dict(sorted(damaged.items()))


def _damage(shard: Path, sidecar_file: Path, settings: Mapping[str, Any], sha256: str | None) -> str:
    """What is wrong with a shard or its sidecar; empty: nothing.

    Args:
        shard: file.
        sidecar_file: its sidecar.
        settings: of the directory; empty where they are lost.
        sha256: of the shard, as the manifest states it.
    """
    try:
        sidecar = read_json(sidecar_file)
        file, size, digest = sidecar["file"], sidecar["bytes"], sidecar["sha256"]
    except (UserError, KeyError):
        return "has a damaged sidecar"
    if file != shard.name:
        return "has the sidecar of another shard"
    if settings and is_foreign(sidecar, settings):
        return "was made for another directory, of other settings"
    if sha256 not in (None, digest):
        return "and its sidecar are another shard than the manifest states"
    if not shard.exists():
        return "is missing"
    if (actual_size := shard.stat().st_size) != size:
        return f"has {actual_size} bytes instead of {size}: it is cut short or changed"
    if (actual_digest := sha256_of(shard)) != digest:
        return f"has SHA-256 {actual_digest[:12]}…, its sidecar says {digest[:12]}…"
    return ""


def _settings(directory: Path) -> dict[str, Any]:
    """The settings of a directory; empty if they are lost or damaged."""
    try:
        return read_json(directory / SETTINGS_FILE)
    except (UserError, FileNotFoundError):
        return {}
