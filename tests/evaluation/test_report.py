"""The report: its shape, that runs do not touch each other, and that no reader ever sees half of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simplear.evaluation import accuracy_result, markdown_table, merge_run, read_report
from simplear.evaluation.report import Result


@pytest.fixture
def result() -> Result:
    return accuracy_result({"colors": [True] * 8 + [False] * 2, "counting": [True, False]})


def test_result_has_the_reports_fields(result: Result) -> None:
    assert result.keys() == {"overall", "colors", "counting"}
    assert all(entry.keys() == {"accuracy", "low", "high", "n"} for entry in result.values())
    assert result["colors"]["accuracy"] == 0.8
    assert (result["colors"]["low"], result["colors"]["high"]) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert result["overall"]["accuracy"] == pytest.approx(0.65)
    assert result["overall"]["n"] == 12


def test_runs_are_added_and_replaced_and_others_stay(tmp_path: Path, result: Result) -> None:
    path = tmp_path / "demo" / "report.json"
    merge_run(path, "pretrain", result, {"seed": 0})
    better = accuracy_result({"colors": [True] * 10, "counting": [True, True]})
    merge_run(path, "sft", better)
    report = json.loads(path.read_text())
    assert report == {"runs": {"pretrain": result, "sft": better}, "settings": {"pretrain": {"seed": 0}}}
    assert merge_run(path, "pretrain", better)["runs"] == {"pretrain": better, "sft": better}
    assert read_report(path)["runs"]["pretrain"] == better
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.json", "report.md"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    merge_run(path, "pretrain", result)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        merge_run(path, "sft", result)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert merge_run(path, "sft", result)["runs"].keys() == {"pretrain", "sft"}


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"runs": []}', '{"runs": {"a": {"overall": {"accuracy": 1}}}}', '{"runs": {"a": 3}}']
)
def test_a_file_that_is_no_report_is_named_and_kept(tmp_path: Path, result: Result, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        merge_run(path, "sft", result)
    assert path.read_text() == text


def test_table_has_runs_side_by_side(result: Result) -> None:
    scores: Result = {"overall": {"score": 0.31, "low": 0.3, "high": 0.32, "n": 1065}}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown_table({"runs": {"a": result, "b": scores}}).splitlines()
    ]
    assert rows[0] == ["category", "a", "b"]
    assert rows[2] == ["colors", "80.0% (49.0–94.3)", ""]
    assert rows[-2][0] == "**overall**"
    assert rows[-2][2] == "0.310 (0.300–0.320)"
    assert rows[-1] == ["images", "12", "1,065"]
