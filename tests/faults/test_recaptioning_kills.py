"""Recaptioning that is killed again and again ends in the same bytes as one that never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.vision_language import write_vision_language_model
from simplear.atomic import TEMPORARY_MARK
from simplear.data.shards import MANIFEST_FILE

from .processes import finish
from .test_kills import kill_at, kill_often


def assert_captions_alike(directory: Path, pictures: int, kill: Callable[[list[str], Path, Path], None]) -> None:
    """What `kill` (of a command, with a log and its directory) begins and kills ends in the same captions."""
    model, log = write_vision_language_model(directory / "model"), directory / "log"
    command = ["recaption", "--source", "ScenesSource", "--source.count", str(pictures), "--source.resolution", "32"]
    command += ["--source.rows_per_unit", "2", "--captioner", "TransformersCaptioner", "--captioner.model", model]
    command += ["--long-tokens", "6", "--short-tokens", "4", "--batch-size", "2", "--accelerator", "cpu"]
    whole, out = directory / "whole", directory / "killed"
    finish([*command, "--out", str(whole)], log)
    command += ["--out", str(out)]
    kill(command, log, out)
    finish(command, log)
    manifests = [json.loads((made / MANIFEST_FILE).read_text()) for made in (whole, out)]
    assert manifests[0] == manifests[1] and manifests[0]["rows"] == pictures
    for unit in manifests[0]["shards"]:
        assert (whole / unit["file"]).read_bytes() == (out / unit["file"]).read_bytes()
    assert not list(out.glob(f".*{TEMPORARY_MARK}*"))


def test_captions_killed_a_few_times_are_the_same(tmp_path: Path) -> None:
    assert_captions_alike(tmp_path, 20, lambda command, log, out: kill_at(command, log, [7, 4]))


@pytest.mark.long
def test_captions_killed_at_many_points_are_the_same(tmp_path: Path) -> None:

    def kill(command: list[str], log: Path, out: Path) -> None:
        left = kill_often(command, log, 32, 0.25, lambda: {path.name for path in out.glob("*")})
        assert len(left) >= 20, "the work is too short to be killed often"
        assert any(TEMPORARY_MARK in name for names in left for name in names), "no kill fell into a write"

    assert_captions_alike(tmp_path, 240, kill)
