"""Several sets of token shards as one directory: ``simplear data merge``.

Shards are linked, not copied, where the file system allows it: a shard is never changed in its place, so two names for
one file are safe, and merging terabytes takes as long as naming them. Sidecars name the new directory's settings, which
hold those of all sets. Each step is one link or one whole file, so a merge that was killed is run again and finishes.

To draw from sets in given shares, or from one more often than from another, nothing needs to be merged: see the
``weights`` of `simplear.data.TokenDataModule`.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simplear.atomic import NO_LINK, remove_abandoned, sync, temporary_name, whole_file
from simplear.data.shards.drops import copy_unit_drops, merge_drops
from simplear.data.shards.format import SETTINGS_FILE, read_json, settings_digest, settings_of
from simplear.data.shards.reader import read_manifest
from simplear.data.shards.repair import sole_keeper
from simplear.data.shards.writer import claim_directory, is_committed, merge_manifest, write_json
from simplear.errors import MissingFileError, UserError
from simplear.hashing import sha256_of
from simplear.progress import progress_bar

SHARED_SETTINGS = ("visual_tokenizer", "codebook_size", "downsample")
"""What sets must have in common, for codes to mean the same in all."""


def merge(directories: list[str], out: str, *, copy: bool = False, verify: bool = True) -> None:
    """Join sets of token shards into one directory; run again after a stop, it goes on where it was.

    Args:
        directories: Sets of token shards of one visual tokenizer, in the order that their rows shall have.
        out: Directory for all their shards.
        copy: Copy shards also where they could be linked.
        verify: Compare each shard with the SHA-256 that its set's manifest states. False compares sizes alone.

    Raises:
        FileNotFoundError: a set, its manifest or a shard is missing.
        ValueError: sets of different visual tokenizers; a shard that is not as its manifest states; one shard in two
            sets; `out` is one of the sets, or holds others.
    """
    sets = [Path(directory) for directory in directories]
    target = Path(out)
    manifests = [read_manifest(directory) for directory in sets]
    _require_different(sets, target)
    for directory, manifest in zip(sets, manifests, strict=True):
        _require_whole(directory, manifest)
        _require_same_codes(sets[0], manifests[0], directory, manifest)
    _require_no_shard_twice(sets, manifests)
    settings = {
        **{key: manifests[0][key] for key in SHARED_SETTINGS},
        "made_by": "simplear data merge",
        "sets": [settings_of(manifest) for manifest in manifests],
    }
    claim_directory(target, settings)
    names = unit_names([[Path(entry["file"]).stem for entry in manifest["shards"]] for manifest in manifests])
    with sole_keeper(target):
        remove_abandoned(target)
        _take_all(sets, manifests, names, target, copy, verify)
        merged = merge_manifest(target, [name for of_set in names for name in of_set])
        merge_drops(target, merged["shards"])
    print(f"{merged['rows']} rows in {len(merged['shards'])} shards of {len(sets)} sets: {target}")


def unit_names(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """Unique names for the units of several sets: one that occurs in several gets the number of its set before it."""
    counts = Counter(name for of_set in names for name in of_set)
    return [
        [name if counts[name] == 1 else f"{number:02d}-{name}" for name in of_set]
        for number, of_set in enumerate(names)
    ]


def _take_all(
    sets: Sequence[Path],
    manifests: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    target: Path,
    copy: bool,
    verify: bool,
) -> None:
    entries = [
        (directory, entry, name)
        for directory, manifest, of_set in zip(sets, manifests, names, strict=True)
        for entry, name in zip(manifest["shards"], of_set, strict=True)
    ]
    digest = settings_digest(read_json(target / SETTINGS_FILE))
    size = sum(entry["bytes"] for _, entry, _ in entries)
    with progress_bar(size, f"merge into {target}", "B", unit_scale=True) as bar:
        for directory, entry, name in entries:
            if not _is_taken(target, name, entry):
                copy_unit_drops(directory, Path(entry["file"]).stem, target, name)
                _take(directory / entry["file"], entry, target / f"{name}.arrow", copy, verify)
                write_json(target / f"{name}.json", {**entry, "file": f"{name}.arrow", "settings": digest})
            bar.update(entry["bytes"])


def _is_taken(target: Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Whether the shard is there; a set may have made one anew since an earlier merge."""
    return is_committed(target, name) and read_json(target / f"{name}.json")["sha256"] == entry["sha256"]


def _take(shard: Path, entry: Mapping[str, Any], target: Path, copy: bool, verify: bool) -> None:
    if verify:
        digest = sha256_of(shard)
        if digest != entry["sha256"]:
            raise UserError(
                f"{shard} has SHA-256 {digest[:12]}…, its manifest says {entry['sha256'][:12]}…: it is damaged or "
                f"another set's. `simplear data repair {shard.parent}` sets it aside; make it anew and merge again."
            )
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    if not copy:
        try:
            os.link(shard, temporary)
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing
            sync(target.parent)
            return
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
    with whole_file(target, temporary):
        shutil.copyfile(shard, temporary)


def _require_different(sets: Sequence[Path], target: Path) -> None:
    if len(sets) < 2:
        raise UserError("simplear data merge takes two sets of token shards or more: name them before --out.")
    resolved = [directory.resolve() for directory in sets]
    for number, directory in enumerate(resolved):
        if directory in resolved[:number]:
            raise UserError(
                f"{sets[number]} is named twice: rows that shall come more often are a matter of training's weights."
            )
    if target.resolve() in resolved:
        raise UserError(f"{target} is one of the sets to merge: name a new directory (--out).")


def _require_whole(directory: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("missing"):
        raise UserError(
            f"{directory} lacks {len(manifest['missing'])} shards that were set aside as damaged, the first is "
            f"{manifest['missing'][0]}: make them anew with the command that made the set, and merge then."
        )
    for entry in manifest["shards"]:
        path = directory / entry["file"]
        if not path.exists():
            raise MissingFileError(f"{path} is missing: `simplear data repair {directory}`, and make it anew.")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {entry['bytes']}: `simplear data repair {directory}`, and make it "
                "anew."
            )


def _require_same_codes(first: Path, expected: Mapping[str, Any], directory: Path, manifest: Mapping[str, Any]) -> None:
    for key in SHARED_SETTINGS:
        if manifest[key] != expected[key]:
            raise UserError(
                f"{directory} has {key} {str(manifest[key])[:12]}, {first} has {str(expected[key])[:12]}: their codes "
                "do not mean the same; tokenize one of them again. (Texts and images stay sets of their own: name both "
                "in training's paths.)"
            )


def _require_no_shard_twice(sets: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, Path] = {}
    for directory, manifest in zip(sets, manifests, strict=True):
        for entry in manifest["shards"]:
            path = directory / entry["file"]
            if entry["rows"] and entry["sha256"] in seen:
                raise UserError(
                    f"{path} and {seen[entry['sha256']]} are the same shard: its rows would be there twice. Take one "
                    "of the sets out; rows that shall come more often are a matter of training's weights."
                )
            seen[entry["sha256"]] = path
