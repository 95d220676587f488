"""Sets of token shards: all that is damaged is found and made again, and repairs lose nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simplear.cli import main
from simplear.data import TokenShards
from simplear.data.shards import (
    MANIFEST_FILE,
    SETTINGS_FILE,
    TokenRow,
    claim_directory,
    is_committed,
    merge_manifest,
    settings_digest,
    write_shard,
)
from simplear.data.shards.format import how_to_remake
from simplear.data.shards.verify import find_damage, repair

CODEBOOK = 27


def make_rows(count: int, prefix: str, grid: tuple[int, int] = (2, 2)) -> list[TokenRow]:
    random = np.random.default_rng(len(prefix) + sum(prefix.encode()))
    return [
        TokenRow(f"{prefix}{n}", random.integers(0, CODEBOOK, grid).astype(np.uint16), [f"größe {n}"], {"n": n}, prefix)
        for n in range(count)
    ]


def write_units(directory: Path, names: str, **settings: Any) -> None:
    """What `simplear tokenize` does: units that are committed stay, the others are made, then the manifest."""
    defaults = {"visual_tokenizer": "0" * 64, "codebook_size": CODEBOOK, "downsample": 8, "source": {"seed": 0}}
    made = {**defaults, **settings}
    claim_directory(directory, made)
    for name in names:
        if not is_committed(directory, name):
            write_shard(directory, name, make_rows(6, f"{name}-{made['source']['seed']}-"), {"no caption": 2})
    merge_manifest(directory, names)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_units(tmp_path / "set", "cab")
    return tmp_path / "set"


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of each file, those set aside left out."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir() if file.is_file()}


def keys(directory: Path) -> list[str]:
    opened = TokenShards(directory)
    return opened.read(np.arange(len(opened))).keys


def flip(file: Path, byte: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[byte] ^= 1
    file.write_bytes(damaged)


def swap(directory: Path, *suffixes: str) -> None:
    """Another set's shard in place of this one's."""
    other = directory.parent / "other"
    write_units(other, "cab", source={"seed": 1})
    for suffix in suffixes:
        (directory / f"b{suffix}").write_bytes((other / f"b{suffix}").read_bytes())


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_whole_set_has_no_problem(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(shards)
    for verb in ("verify", "repair"):
        main(["data", verb, str(shards), "--workers", "2"])
    assert f"{shards}: 0 damaged files" in capsys.readouterr().out
    assert content(shards) == before and not (shards / "damaged").exists()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: (d / "b.arrow").write_bytes((d / "b.arrow").read_bytes()[:-9]),
        "b.arrow has .* cut short",
    ),
    "bit in a row": (lambda d: flip(d / "b.arrow", (d / "b.arrow").read_bytes().index(b"b-0-3")), "b.arrow has SHA"),
    "bit in no row": (lambda d: flip(d / "b.arrow", -1), r"b.arrow has SHA-256 .*, its sidecar says"),
    "missing": (lambda d: (d / "b.arrow").unlink(), "b.arrow is missing"),
    "swapped": (lambda d: swap(d, ".arrow"), "b.arrow has SHA-256"),
    "swapped with its sidecar": (lambda d: swap(d, ".arrow", ".json"), "b.arrow was made for another directory"),
    "of another name": (
        lambda d: (d / "b.json").write_bytes((d / "a.json").read_bytes()),
        "b.arrow has the sidecar of another shard",
    ),
    "sidecar cut short": (
        lambda d: (d / "b.json").write_bytes((d / "b.json").read_bytes()[:40]),
        "b.arrow has a damaged sidecar",
    ),
    "sidecar lost": (lambda d: (d / "b.json").unlink(), "b.arrow has lost its sidecar"),
    "manifest cut short": (
        lambda d: (d / MANIFEST_FILE).write_bytes((d / MANIFEST_FILE).read_bytes()[:99]),
        "manifest.json is not a JSON object",
    ),
    "settings damaged": (lambda d: (d / SETTINGS_FILE).write_bytes(b"{"), "settings.json is not a JSON object"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_what_is_damaged_is_found_moved_aside_and_made_again(
    shards: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """Alone, and the set is then the one it was."""
    before = content(shards)
    damage, message = DAMAGES[fault]
    damage(shards)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", str(shards)])
    printed = capsys.readouterr().out
    assert stopped.value.code == 1
    assert any(re.search(message, line) for line in printed.splitlines()), printed
    assert f"`simplear data repair {shards}`" in printed and "`simplear tokenize` again" in printed
    there = content(shards)

    main(["data", "repair", str(shards)])
    assert "1 damaged files moved to" in capsys.readouterr().out
    moved = content(shards / "damaged/1")
    assert moved and {**content(shards), **moved} == {
        n: h for n, h in there.items() if n != MANIFEST_FILE or n in moved
    }
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing.*run the same `simplear tokenize` again"):
        TokenShards(shards)
    write_units(shards, "cab")
    assert content(shards) == before and not find_damage(shards)


def test_all_that_is_damaged_is_listed(shards: Path) -> None:
    flip(shards / "a.arrow", -1)
    (shards / "c.arrow").unlink()
    (shards / "b.json").unlink()
    assert list(find_damage(shards, workers=2)) == ["a.arrow", "b.arrow", "c.arrow"]


def test_a_set_that_an_earlier_version_merged_names_a_remedy_that_there_is() -> None:
    assert how_to_remake({"made_by": "simplear data text"}) == "run the same `simplear data text` again"
    assert how_to_remake({"made_by": "simplear data merge"}).startswith("train on the sets that it was merged from")


def test_another_tokenizer_than_named(
    tiny_shards: str, tiny_visual_tokenizer: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "verify", tiny_shards, "--visual-tokenizer", tiny_visual_tokenizer])
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", str(shards), "--visual-tokenizer", tiny_visual_tokenizer])
    assert stopped.value.code == 2 and "made by visual tokenizer 000000000000…" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["verify", "repair"])
@pytest.mark.parametrize("file", [MANIFEST_FILE, SETTINGS_FILE])
def test_a_newer_version_is_left_alone(shards: Path, capsys: pytest.CaptureFixture[str], file: str, verb: str) -> None:
    edit(shards / file, format_version=99)
    before = content(shards)
    with pytest.raises(SystemExit) as stopped:
        main(["data", verb, str(shards)])
    assert stopped.value.code == 2 and content(shards) == before
    assert f"{file} has format version 99, this code reads 3: update simplear" in capsys.readouterr().err


def test_a_shard_without_sidecar_and_manifest_is_not_damaged(shards: Path) -> None:
    """A tokenization that runs has such ones for a moment."""
    (shards / "b.json").unlink()
    (shards / MANIFEST_FILE).unlink()
    assert not find_damage(shards)
    write_units(shards, "cab")
    assert len(keys(shards)) == 18


def test_settings_and_manifest_that_are_lost_are_written_again(shards: Path) -> None:
    before = content(shards)
    (shards / SETTINGS_FILE).unlink()
    (shards / MANIFEST_FILE).unlink()
    repair(str(shards))
    write_units(shards, "cab")
    assert content(shards) == before


def test_manifests_of_older_versions_that_name_missing_shards_are_read(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads((shards / MANIFEST_FILE).read_text())
    lost = manifest["shards"].pop()
    notes = {"b": {"place": 2, "rows": lost["rows"], "grids": lost["grids"]}}
    edit(shards / MANIFEST_FILE, rows=12, shards=manifest["shards"], missing=["b"], set_aside=notes)
    for file in shards.glob("b.*"):
        file.unlink()
    assert len(keys(shards)) == 12
    assert "lacks 1 damaged shards: run the same `simplear tokenize` again" in caplog.text
    assert not find_damage(shards)
    write_units(shards, "cab")
    assert len(keys(shards)) == 18


def test_a_shard_of_another_set_never_gets_into_a_manifest(shards: Path) -> None:
    """Also where the manifest is gone, which knew better: `simplear tokenize` would take it for committed."""
    swap(shards, ".arrow", ".json")
    (shards / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"b\.arrow was made for another directory, of other settings: run `simplear"):
        merge_manifest(shards, "cab")
    repair(str(shards))
    write_units(shards, "cab")
    assert keys(shards)[-1] == "b-0-5" and not find_damage(shards)


def test_sidecars_of_older_directories_name_no_settings(shards: Path) -> None:
    """They are held against the manifest instead."""
    swap(shards, ".arrow", ".json")
    for name in "cab":
        sidecar = json.loads((shards / f"{name}.json").read_text())
        del sidecar["settings"]
        (shards / f"{name}.json").write_text(json.dumps(sidecar))
    assert find_damage(shards) == {"b.arrow": "and its sidecar are another shard than the manifest states"}


def test_what_is_moved_aside_replaces_nothing(shards: Path) -> None:
    for attempt in range(3):
        flip(shards / "b.arrow", -1)
        repair(str(shards))
        assert len(list(shards.glob("damaged/*/b.arrow"))) == attempt + 1
        write_units(shards, "cab")


def test_two_runs_that_make_one_set_at_once(tmp_path: Path) -> None:
    """They may both make a unit; what is there is whole at any time, and in the end what one run makes."""
    write_units(tmp_path / "one", "cab")
    for turn in range(5):
        directory = tmp_path / f"both{turn}"
        processes = []
        for _ in range(2):
            processes.append(os.fork())
            if processes[-1] == 0:
                write_units(directory, "cab")
                os._exit(0)
        assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
        assert content(directory) == content(tmp_path / "one") and not find_damage(directory)


STEPS = ("replace", "rename", "link", "unlink", "fsync")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run the work in a process that is killed before its call number `step` that changes the disk, or right after.

    Returns whether it lived to its end. Even steps are before a call, odd ones after.
    """
    process = os.fork()
    if process == 0:
        count = 0

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                result = function(*arguments, **options)
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return result

            return call

        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.redirect_stderr(open(os.devnull, "w")):
            work()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


def every_step() -> Iterator[int]:
    yield from range(1000)


def test_a_repair_killed_at_every_step_loses_nothing(tmp_path: Path) -> None:
    """The damaged bytes are there after each kill, and run again it ends as one never killed."""
    whole = tmp_path / "whole"
    write_units(whole, "cab")
    expected, last = content(whole), 0
    for step in every_step():
        directory = tmp_path / f"step{step}"
        write_units(directory, "cab")
        flip(directory / "b.arrow", -1)
        (directory / "a.json").write_bytes(b"{")
        damaged = (directory / "b.arrow").read_bytes()
        lived = killed_at(step, partial(repair, str(directory)))
        assert damaged in [file.read_bytes() for file in directory.rglob("b*.arrow")]
        repair(str(directory))
        assert not is_committed(directory, "b") and not is_committed(directory, "a") and is_committed(directory, "c")
        write_units(directory, "cab")
        assert content(directory) == expected and not find_damage(directory)
        assert damaged in [file.read_bytes() for file in directory.glob("damaged/*/b.arrow")]
        if lived:
            last = step
            break
    assert last > 8


def test_the_digest_of_settings_is_of_their_content_alone() -> None:
    assert settings_digest({"a": 1, "b": {"c": 2}}) == settings_digest({"b": {"c": 2}, "a": 1})
    assert settings_digest({"a": 1}) != settings_digest({"a": 2})
