"""The benchmark scripts run at tiny sizes and write what their README promises; no ratio of times is tested."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import measure
import tables

BENCHMARKS = Path(measure.__file__).parent
CLAIM_KEYS = {"what", "ratio", "low", "high", "bar", "met", "note"}


def run(name: str, out: Path) -> dict[str, Any]:
    runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"](["--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["benchmark"] == name and result["settings"]["quick"]
    assert result["environment"].keys() == {"processor", "cores", "threads", "load_average", "python", "torch"}
    assert all(row.keys() == CLAIM_KEYS and row["low"] <= row["ratio"] <= row["high"] for row in result["claims"])
    return result


def test_data(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    result = run("data", tmp_path / "data.json")
    assert result["claims"][0]["bar"] == ">= 20"
    details = result["details"]
    assert details["pairs_a_second"].keys() == {"shards", "files", "datasets, row by row", "datasets, by batch"}
    sizes = details["bytes_a_sample"]
    # 16 codes of two bytes and some text; a file takes at least a block on disk, and there are two a sample.
    assert 32 < sizes["shards"] < 320 < sizes["files_allocated"]
    assert details["startup_seconds"].keys() == {
        "open, small",
        "first batch, small",
        "open, large",
        "first batch, large",
    }
    assert set(tmp_path.iterdir()) - before == {tmp_path / "data.json"}


def test_training(tmp_path: Path) -> None:
    result = run("training", tmp_path / "training.json")
    bars = {row["what"]: row for row in result["claims"] if row["bar"]}
    assert {row["bar"] for row in bars.values()} == {"<= 0.5", "<= 0.9", "<= 0.35", "<= 1e-05"}
    details = result["details"]
    for kind in ("by_modality", "full"):
        assert bars[f"{kind}: loss, relative difference from plain"]["met"]
        assert details[f"{kind}_gradient_difference"] < 1e-4
    losses = details["losses"]
    assert losses["full, plain"] > losses["by_modality, plain"] > 1
    assert details["seconds"].keys() == details["peak_gib"].keys() == losses.keys() | {"embedding", "layers"}


def test_peak_memory_counts_what_was_freed_again() -> None:
    """64 MiB that live within the variant alone; what is resident before does not count."""
    kept = torch.ones(2**24)
    runs = measure.alternate({"much": lambda: torch.ones(2**24).sum(), "none": kept.sum}, 2, "test", memory=True)
    # The kernel counts resident pages of each thread by themselves and adds them up in batches.
    assert all(0.98 * 2**26 <= (run.peak_bytes or 0) < 1.25 * 2**26 for run in runs["much"])
    assert all(abs(run.peak_bytes or 0) < 2**23 for run in runs["none"])


def test_ratios_are_taken_within_a_round() -> None:
    """A neighbour that slows the second round down does not show in the ratio."""
    runs = {"fast": [measure.Run(1.0), measure.Run(10.0)], "slow": [measure.Run(4.0), measure.Run(40.0)]}
    row = measure.claim("slow over fast", measure.ratios(runs, "slow", "fast"), (">=", 4))
    assert (row["ratio"], row["low"], row["high"], row["met"]) == (4, 4, 4, True)
    assert not measure.claim("slow over fast", [3.9, 3.9, 5], (">=", 4))["met"]


def test_short_variants_repeat_until_they_take_as_long_as_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    calls = {"slow": 0, "fast": 0}

    def take(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    variants = {"slow": lambda: take("slow", 8.0), "fast": lambda: take("fast", 2.0)}
    runs = measure.alternate(variants, 3, "test", balance=True)
    assert calls == {"slow": 1 + 3, "fast": 1 + 3 * 4}
    assert [run.seconds for run in runs["fast"]] == [2.0, 2.0, 2.0]


def test_tables_fill_their_places_alone(tmp_path: Path) -> None:
    claims = [measure.claim("a over b", [0.2, 0.3, 0.7], ("<=", 0.25)), measure.claim("c over d", [2.0])]
    result = {"claims": claims, "environment": {"processor": "P", "threads": 2, "torch": "3"}}
    (tmp_path / "one.json").write_text(json.dumps(result))
    text = "before\n<!-- benchmarks/one -->\nold\n<!-- end -->\nbetween\n<!-- benchmarks/two -->\n<!-- end -->\nafter"
    filled = tables.filled(text, tmp_path)
    assert filled.startswith("before\n<!-- benchmarks/one -->\n| ratio")
    assert "| a over b | 0.3 (0.2–0.7) | <= 0.25, missed |\n| c over d | 2 |  |" in filled and "old" not in filled
    assert filled.endswith("between\n<!-- benchmarks/two -->\nNot measured yet: `make bench`.\n<!-- end -->\nafter")
    assert tables.filled(filled, tmp_path) == filled


def test_the_readme_shows_the_committed_results() -> None:
    text = tables.README.read_text()
    assert {"data", "training"} <= {place[1] for place in tables.MARKED.findall(text)}
    assert tables.filled(text) == text, "python benchmarks/tables.py brings README.md up to date"
