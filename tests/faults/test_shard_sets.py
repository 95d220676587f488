"""Sets of token shards: all that is wrong is found, repairs lose nothing, and merging takes only what is whole."""

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

from simplear.atomic import TEMPORARY_MARK
from simplear.cli import main
from simplear.data import TokenDataModule, TokenShards
from simplear.data.shards import (
    MANIFEST_FILE,
    SETTINGS_FILE,
    Grid,
    TokenRow,
    claim_directory,
    is_committed,
    merge_manifest,
    settings_digest,
    write_shard,
)
from simplear.data.shards.merge import merge, unit_names
from simplear.data.shards.repair import repair, sole_keeper
from simplear.data.shards.verify import examine, ranges

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
    main(["data", "verify", str(shards)])
    assert f"{shards}: 3 whole shards, 18 rows; 0 problems" in capsys.readouterr().out
    assert examine(shards).whole == set("abc")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: (d / "b.arrow").write_bytes((d / "b.arrow").read_bytes()[:-9]),
        "b.arrow: has .* cut short",
    ),
    "bit in a row": (
        lambda d: flip(d / "b.arrow", (d / "b.arrow").read_bytes().index(b"b-0-3")),
        "b.arrow, row 3: is da",
    ),
    "bit in no row": (lambda d: flip(d / "b.arrow", -1), r"b.arrow: has SHA-256 .*, its sidecar says"),
    "missing": (lambda d: (d / "b.arrow").unlink(), "b.arrow: is missing"),
    "swapped": (lambda d: swap(d, ".arrow"), "b.arrow: has SHA-256"),
    "swapped with its sidecar": (lambda d: swap(d, ".arrow", ".json"), "b.arrow: was made for another directory"),
    "of another name": (
        lambda d: (d / "b.json").write_bytes((d / "a.json").read_bytes()),
        "b.json: states no shard of",
    ),
    "no Arrow stream": (lambda d: (d / "b.arrow").write_bytes(b"\1" * (d / "b.arrow").stat().st_size), "no readable"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_shard_is_found_set_aside_and_made_anew(
    shards: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """The unit "b" alone is made again, and the set is then the one it was."""
    before, manifest = content(shards), (shards / MANIFEST_FILE).read_bytes()
    damage, message = DAMAGES[fault]
    damage(shards)
    bad = {file.name: file.read_bytes() for file in shards.glob("b.*")}
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", str(shards)])
    printed = capsys.readouterr().out
    assert stopped.value.code == 1
    assert any(re.search(message, line) for line in printed.splitlines()), printed
    assert f"`simplear data repair {shards}`" in printed and "`simplear tokenize` again" in printed

    main(["data", "repair", str(shards)])
    if fault == "of another name":  # the manifest still says what the shard must be, and the shard is that
        assert content(shards) == before
        return
    assert {file.name: file.read_bytes() for file in (shards / "damaged").iterdir()} == bad
    assert not is_committed(shards, "b") and is_committed(shards, "a") and is_committed(shards, "c")
    assert keys(shards) == [f"{name}-0-{n}" for name in "ca" for n in range(6)]
    assert json.loads((shards / MANIFEST_FILE).read_text())["missing"] == ["b"]
    with pytest.raises(SystemExit):
        main(["data", "verify", str(shards)])
    assert "b.arrow: was set aside and not made anew" in capsys.readouterr().out
    write_units(shards, "cab")
    assert content(shards) == before and (shards / MANIFEST_FILE).read_bytes() == manifest


def write_mixed(directory: Path, seed: int) -> None:
    """Three units of two grids each, the rows of these in turn."""
    claim_directory(
        directory,
        {"visual_tokenizer": "0" * 64, "codebook_size": CODEBOOK, "downsample": 8, "source": {"seed": seed}},
    )
    for name in "cab":
        if not is_committed(directory, name):
            rows = [make_rows(9, f"{name}-{seed}-", grid) for grid in ((2, 2), (1, 3))]
            write_shard(directory, name, [row for pair in zip(*rows, strict=True) for row in pair])
    merge_manifest(directory, "cab")


def trained_on(data: TokenDataModule) -> list[tuple[Grid, list[tuple[str, str, bool]]]]:
    """Grid, and key, caption and dropout of each row, of 30 global batches, several epochs."""
    data.setup("fit")
    assert data.training is not None
    order, read = data.training.order(data.global_batch_size, data.seed, data.shuffle, "rows"), []
    for number in range(30):
        batch = data.training.make_batch(order[number])
        rows = zip(batch["keys"], batch["captions"], batch["dropped"].tolist(), strict=True)
        read.append((tuple(batch["codes"].shape[1:]), list(rows)))
    return read


def test_a_grid_of_which_nothing_is_left_is_no_part_of_the_training(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    claim_directory(tmp_path, {"visual_tokenizer": "0" * 64, "codebook_size": CODEBOOK, "downsample": 8})
    for name, grid in (("a", (2, 2)), ("b", (1, 3))):
        write_shard(tmp_path, name, make_rows(6, name, grid))
    merge_manifest(tmp_path, "ab")
    flip(tmp_path / "b.arrow", -1)
    repair(str(tmp_path))
    data = TokenDataModule(str(tmp_path), 2, tiny_text_tokenizer)
    assert {grid for grid, _ in trained_on(data)} == {(2, 2)} and data.grids == [(2, 2)]


def test_all_that_is_wrong_is_listed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(shards / "a.arrow", (shards / "a.arrow").read_bytes().index(b"a-0-1"))
    flip(shards / "a.arrow", (shards / "a.arrow").read_bytes().index(b"a-0-2"))
    flip(shards / "a.arrow", (shards / "a.arrow").read_bytes().index(b"a-0-5"))
    (shards / "c.arrow").unlink()
    (shards / "b.json").unlink()
    edit(shards / MANIFEST_FILE, rows=17)
    with pytest.raises(SystemExit):
        main(["data", "verify", str(shards)])
    printed = capsys.readouterr().out
    for line in (
        "a.arrow: has SHA-256",
        "a.arrow, rows 1-2, 5: is damaged",
        "b.json: is missing",
        "c.arrow: is missing",
        "manifest.json: states 17 rows, its shards have 18",
    ):
        assert line in printed
    assert "5 problems" in printed and [p.rows for p in examine(shards, workers=2).damaged["a"]] == ["", "rows 1-2, 5"]


def test_rows_in_words() -> None:
    assert ranges([5]) == "row 5" and ranges([0, 1, 2, 9]) == "rows 0-2, 9"


def test_codes_outside_the_codebook(tmp_path: Path) -> None:
    claim_directory(tmp_path, {"visual_tokenizer": "0" * 64, "codebook_size": CODEBOOK, "downsample": 8})
    rows = make_rows(3, "a")
    rows[1].codes[0, 1] = CODEBOOK
    write_shard(tmp_path, "a", rows)
    merge_manifest(tmp_path, "a")
    (problem,) = examine(tmp_path).problems
    assert str(problem) == f"{tmp_path}/a.arrow, row 1: has a code outside the codebook of {CODEBOOK}"


def test_another_tokenizer_than_named(
    tiny_shards: str, tiny_visual_tokenizer: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["data", "verify", tiny_shards, "--visual-tokenizer", tiny_visual_tokenizer])
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", str(shards), "--visual-tokenizer", tiny_visual_tokenizer])
    assert stopped.value.code == 1 and "made by visual tokenizer 000000000000…" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["verify", "repair"])
@pytest.mark.parametrize("file", [MANIFEST_FILE, SETTINGS_FILE])
def test_a_newer_version_is_left_alone(shards: Path, capsys: pytest.CaptureFixture[str], file: str, verb: str) -> None:
    edit(shards / file, format_version=99)
    before = content(shards)
    with pytest.raises(SystemExit) as stopped:
        main(["data", verb, str(shards)])
    assert stopped.value.code == 2 and content(shards) == before
    assert f"{file} has format version 99, this code reads 3: update simplear" in capsys.readouterr().err


@pytest.mark.parametrize(
    "loss",
    [
        lambda d: (d / "b.json").unlink(),
        lambda d: (d / "b.json").write_bytes((d / "b.json").read_bytes()[:40]),
        lambda d: (d / MANIFEST_FILE).write_bytes((d / MANIFEST_FILE).read_bytes()[:99]),
        lambda d: edit(d / MANIFEST_FILE, shards=[{"file": "a.arrow"}]),
        lambda d: (d / SETTINGS_FILE).unlink(),
        lambda d: (d / SETTINGS_FILE).write_bytes(b"{"),
        lambda d: edit(d / MANIFEST_FILE, rows=3),
    ],
)
def test_a_lost_file_comes_back_from_what_is_left(shards: Path, loss: Callable[[Path], object]) -> None:
    before = content(shards)
    loss(shards)
    assert examine(shards).problems and not examine(shards).damaged
    repair(str(shards))
    after = content(shards)
    if sorted(keys(shards)) != keys(shards):
        assert after == before
    else:  # without a manifest units come by name
        assert {name: after[name] for name in after if name != MANIFEST_FILE} == {
            name: before[name] for name in before if name != MANIFEST_FILE
        }
    assert not examine(shards).problems and not (shards / "damaged").exists()


def test_nothing_vouches_for_a_shard_without_sidecar_and_manifest(shards: Path) -> None:
    """It is no damage: a tokenization that runs has such ones for a moment. It makes it anew."""
    (shards / "b.json").unlink()
    (shards / MANIFEST_FILE).unlink()
    found = examine(shards)
    assert found.unfinished == ["b"] and not found.damaged
    before = (shards / "b.arrow").read_bytes()
    repair(str(shards))
    assert (shards / "b.arrow").read_bytes() == before and len(keys(shards)) == 12
    write_units(shards, "cab")
    assert len(keys(shards)) == 18


def test_settings_and_manifest_both_lost(shards: Path) -> None:
    (shards / SETTINGS_FILE).unlink()
    (shards / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"nothing says what its codes were made with: run the same"):
        repair(str(shards))
    write_units(shards, "cab")
    assert not examine(shards).problems


def test_a_shard_of_another_set_never_gets_into_a_manifest(shards: Path) -> None:
    """Also where the manifest is gone, which knew better: `simplear tokenize` would take it for committed."""
    swap(shards, ".arrow", ".json")
    (shards / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"b\.arrow was made for another directory, of other settings: run `simplear"):
        merge_manifest(shards, "cab")
    repair(str(shards))
    write_units(shards, "cab")
    assert keys(shards)[-1] == "b-0-5" and not examine(shards).problems


def test_sidecars_of_older_directories_name_no_settings(shards: Path) -> None:
    """They are held against the manifest instead."""
    swap(shards, ".arrow", ".json")
    for name in "cab":
        sidecar = json.loads((shards / f"{name}.json").read_text())
        del sidecar["settings"]
        (shards / f"{name}.json").write_text(json.dumps(sidecar))
    found = examine(shards)
    assert list(found.damaged) == ["b"] and "than the manifest states" in str(found.damaged["b"][0])


def test_what_is_set_aside_replaces_nothing(shards: Path) -> None:
    for attempt in range(3):
        flip(shards / "b.arrow", -1)
        repair(str(shards))
        assert len(list((shards / "damaged").glob("b*.arrow"))) == attempt + 1
        write_units(shards, "cab")


def test_abandoned_temporaries_go_and_those_in_use_stay(shards: Path) -> None:
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    host = os.uname().nodename
    dead, alive = (shards / f".b.arrow{TEMPORARY_MARK}{host}-{number}" for number in (process, os.getppid()))
    dead.touch(), alive.touch()
    assert examine(shards).temporaries == sorted([dead, alive])
    repair(str(shards))
    assert not dead.exists() and alive.exists()


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
        assert content(directory) == content(tmp_path / "one") and not examine(directory).problems


def test_two_repairs_at_once(shards: Path) -> None:
    with sole_keeper(shards), pytest.raises(ValueError, match=r"another process repairs .* wait until it ends"):
        repair(str(shards))
    repair(str(shards))


class TestMerging:
    @pytest.fixture
    def sets(self, shards: Path) -> list[Path]:
        """The second has a unit of a name of its own."""
        write_units(shards.parent / "second", "bad", source={"seed": 2})
        return [shards, shards.parent / "second"]

    def merge(self, sets: list[Path], **options: Any) -> Path:
        out = sets[0].parent / "merged"
        merge([str(directory) for directory in sets], str(out), **options)
        return out

    def test_rows_of_all_in_their_order(self, sets: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        out = sets[0].parent / "merged"
        main(["data", "merge", *map(str, sets), "--out", str(out)])
        assert keys(out) == [*keys(sets[0]), *keys(sets[1])]
        assert not examine(out).problems and examine(out).maker == "simplear data merge"
        assert (out / "c.arrow").stat().st_ino == (sets[0] / "c.arrow").stat().st_ino
        assert json.loads((out / "01-b.json").read_text())["drops"] == {"no caption": 2}
        merge([str(out), str(self.third(sets))], str(out.parent / "again"))
        assert len(keys(out.parent / "again")) == 42

    def third(self, sets: list[Path]) -> Path:
        write_units(sets[0].parent / "third", "z", source={"seed": 3})
        return sets[0].parent / "third"

    @pytest.mark.parametrize("way", ["asked", "no link"])
    def test_copies_where_there_are_no_links(self, sets: list[Path], monkeypatch: pytest.MonkeyPatch, way: str) -> None:
        def no_link(*_: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        if way == "no link":
            monkeypatch.setattr(os, "link", no_link)
        out = self.merge(sets, copy=way == "asked")
        assert (out / "c.arrow").stat().st_ino != (sets[0] / "c.arrow").stat().st_ino
        assert not examine(out).problems

    def test_names(self) -> None:
        assert unit_names([["a", "b"], ["b", "c"], ["b"]]) == [["a", "00-b"], ["01-b", "c"], ["02-b"]]

    @pytest.mark.parametrize("fault", ["truncated", "bit in no row", "missing", "swapped"])
    def test_a_shard_that_is_not_whole_is_refused(self, sets: list[Path], fault: str) -> None:
        DAMAGES[fault][0](sets[0])
        with pytest.raises((ValueError, FileNotFoundError), match=r"set/b\.arrow .*simplear data repair"):
            self.merge(sets)
        assert not (sets[0].parent / "merged" / MANIFEST_FILE).exists()

    def test_a_swapped_shard_with_its_sidecar_is_refused(self, sets: list[Path]) -> None:
        """The manifest says what the set's own was."""
        swap(sets[0], ".arrow", ".json")
        with pytest.raises(ValueError, match=r"set/b\.arrow has SHA-256"):
            self.merge(sets)

    def test_a_shard_that_both_sets_have_is_refused(self, sets: list[Path]) -> None:
        claim_directory(sets[0].parent / "copy", json.loads((sets[0] / SETTINGS_FILE).read_text()))
        write_units(sets[0].parent / "copy", "a")
        with pytest.raises(ValueError, match=r"are the same shard"):
            self.merge([sets[0], sets[0].parent / "copy"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"visual_tokenizer": "1" * 64}, r"visual_tokenizer 111111111111, .* has 000000000000"),
            ({"codebook_size": 30}, r"codebook_size 30, .* has 27"),
        ],
    )
    def test_another_tokenizer_is_refused(self, shards: Path, settings: dict[str, Any], message: str) -> None:
        write_units(shards.parent / "second", "d", **settings)
        with pytest.raises(ValueError, match=message):
            self.merge([shards, shards.parent / "second"])

    def test_one_set_twice_or_into_itself_is_refused(self, sets: list[Path]) -> None:
        with pytest.raises(ValueError, match="named twice"):
            self.merge([sets[0], sets[0]])
        with pytest.raises(ValueError, match="one of the sets"):
            merge([str(directory) for directory in sets], str(sets[1]))

    def test_a_newer_version_is_refused(self, sets: list[Path]) -> None:
        edit(sets[1] / MANIFEST_FILE, format_version=99)
        with pytest.raises(ValueError, match=r"format version 99, .* update simplear"):
            self.merge(sets)

    def test_a_set_with_missing_shards_is_refused(self, sets: list[Path]) -> None:
        flip(sets[1] / "d.arrow", -1)
        repair(str(sets[1]))
        with pytest.raises(ValueError, match=r"second lacks 1 shards .* the first is d"):
            self.merge(sets)

    def test_a_damaged_shard_of_a_merged_set_is_merged_again(self, sets: list[Path]) -> None:
        out = self.merge(sets, copy=True)
        before = content(out)
        flip(out / "00-b.arrow", -1)
        repair(str(out))
        assert self.merge(sets, copy=True) == out and content(out) == before

    def test_a_shard_that_its_set_made_anew_is_taken_again(self, sets: list[Path]) -> None:
        out = self.merge(sets)
        write_shard(sets[0], "c", make_rows(6, "new"))
        merge_manifest(sets[0], "cab")
        assert keys(self.merge(sets))[:6] == [f"new{n}" for n in range(6)] and not examine(out).problems


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
        assert not is_committed(directory, "b") and is_committed(directory, "a") and is_committed(directory, "c")
        write_units(directory, "cab")
        assert content(directory) == expected and not examine(directory).problems
        assert [file.read_bytes() for file in (directory / "damaged").glob("*.arrow")] == [damaged]
        if lived:
            last = step
            break
    assert last > 12


@pytest.mark.parametrize("copy", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_merge_killed_at_every_step_is_run_again_and_finishes(tmp_path: Path, copy: bool) -> None:
    sets = [tmp_path / "one", tmp_path / "two"]
    write_units(sets[0], "ab", source={"seed": 1})
    write_units(sets[1], "bc", source={"seed": 2})
    before = [content(directory) for directory in sets]
    names = [str(directory) for directory in sets]
    merge(names, str(tmp_path / "whole"), copy=copy)
    expected, last = content(tmp_path / "whole"), 0
    for step in every_step():
        out = tmp_path / f"step{step}"
        lived = killed_at(step, partial(merge, names, str(out), copy=copy))
        merge(names, str(out), copy=copy)
        assert content(out) == expected and [content(directory) for directory in sets] == before
        if lived:
            last = step
            break
    assert last > 20


def test_the_digest_of_settings_is_of_their_content_alone() -> None:
    assert settings_digest({"a": 1, "b": {"c": 2}}) == settings_digest({"b": {"c": 2}, "a": 1})
    assert settings_digest({"a": 1}) != settings_digest({"a": 2})
