"""Paired differences: by hand, against what pairing is for, and the verb on reports of two kinds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from simplear.cli import main
from simplear.evaluation import accuracy_result, compare, evaluate_scenes, merge_run
from simplear.evaluation.compare import paired_differences


def report(directory: Path, run: str, values: dict[str, dict[str, list[Any]]], **settings: Any) -> str:
    """A report with results by prompt, as an evaluation writes it."""
    directory.mkdir(exist_ok=True)
    rows = [
        {"prompt": prompt, "tag": tag, "correct" if isinstance(value, bool) else "score": value}
        for tag, prompts in values.items()
        for prompt, images in prompts.items()
        for value in images
    ]
    (directory / f"{run}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = accuracy_result({"x": [True]})
    merge_run(directory / "report.json", run, result, {"seed": 0, "verdicts": f"{run}.jsonl", **settings})
    return f"{directory / 'report.json'}:{run}"


FIRST = {
    "x": {"a": [True, False], "b": [False, False], "c": [True, True]},
    "y": {"d": [True, True], "e": [False, True]},
}
SECOND = {"x": {"a": [True, True], "b": [False, True], "c": [True, True]}, "y": {"d": [True, False], "e": [True, True]}}


def test_differences_by_hand(tmp_path: Path) -> None:
    """Category x: +0.5, +0.5, 0, so 1/3 with variance 1/12; category y: −0.5, +0.5, so 0 with variance 1/2."""
    found = compare(report(tmp_path, "one", FIRST), report(tmp_path, "two", SECOND))["differences"]
    x, y, overall = found["x"], found["y"], found["overall"]
    assert (x["first"], x["second"], x["n"]) == (0.5, pytest.approx(5 / 6), 3)
    assert x["difference"] == pytest.approx(1 / 3)
    assert x["high"] - x["difference"] == pytest.approx(1.96 * (1 / 12 / 3) ** 0.5, rel=1e-4)
    assert y["difference"] == 0 and y["high"] == pytest.approx(1.96 * (1 / 2 / 2) ** 0.5, rel=1e-4)
    assert overall["difference"] == pytest.approx(1 / 6) and overall["n"] == 5
    assert overall["high"] - overall["difference"] == pytest.approx(1.96 * (1 / 36 + 1 / 4) ** 0.5 / 2, rel=1e-4)


def test_pairing_finds_what_two_separate_results_hide() -> None:
    """Prompts of very different difficulty, and a second run a little better on each: only pairs tell."""
    random = np.random.default_rng(0)
    hard = random.random(200)
    first = {"x": {str(k): float(value) for k, value in enumerate(hard)}}
    second = {"x": {str(k): float(value + 0.02 + 0.05 * random.normal()) for k, value in enumerate(hard)}}
    found = paired_differences(first, second)["overall"]
    assert 0 < found["low"] < 0.02 < found["high"] < 0.03
    unpaired = 1.96 * (2 * np.var(hard) / 200) ** 0.5
    assert unpaired > found["difference"]
    assert paired_differences(second, first)["overall"]["difference"] == pytest.approx(-found["difference"])


def test_prompts_are_paired_by_name_not_by_place(tmp_path: Path) -> None:
    turned = {tag: dict(reversed(prompts.items())) for tag, prompts in reversed(SECOND.items())}
    a, b = report(tmp_path, "one", FIRST), report(tmp_path, "two", SECOND)
    c = report(tmp_path, "three", turned)
    assert compare(a, c)["differences"] == compare(a, b)["differences"]


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = report(tmp_path / "a", "run", FIRST), report(tmp_path / "b", "run", SECOND, seed=1)
    main(["compare", str(tmp_path / "a"), f"{tmp_path / 'b'}:run", "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "| x | 50.0 | 83.3 | +33.3 (+0.7 to +66.0) | 3 |" in table
    assert "| **overall** | 62.5 | 79.2 | +16.7 (-35.0 to +68.3) | 5 |" in table
    assert "seed differs: 0 and 1" in table
    assert (tmp_path / "out" / "comparison.md").read_text() in table
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written == compare(a, b) and written["second"]["settings"]["seed"] == 1


def test_scores_without_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = report(tmp_path, "a", {"overall": {"p": [0.25], "q": [0.5]}})
    b = report(tmp_path, "b", {"overall": {"p": [0.375], "q": [0.625]}})
    found = compare(a, b)["differences"]
    assert set(found) == {"overall"} and found["overall"]["difference"] == 0.125
    assert "| **overall** | 0.375 | 0.500 | +0.125 (+0.125 to +0.125) | 2 |" in capsys.readouterr().out


def test_prompts_without_a_pair_are_counted(tmp_path: Path) -> None:
    more = {**FIRST, "x": {**FIRST["x"], "f": [True], "g": [False]}}
    compared = compare(report(tmp_path, "more", more), report(tmp_path, "two", SECOND))
    assert compared["differences"]["x"]["n"] == 3
    assert compared["notes"] == ["2 prompts of the first and 0 of the second run have no pair and are left out"]


@pytest.mark.parametrize(
    ("directory", "run", "named"),
    [
        ("plain", "sft", "plain:sft"),
        ("plain", "sft", "plain/report.json:sft"),
        ("plain", "sft", "plain"),
        ("2026-10-01T12:30", "sft", "2026-10-01T12:30:sft"),
        ("2026-10-01T12:30", "sft", "2026-10-01T12:30"),
        ("a:b", "c:d", "a:b:c:d"),
        ("plain", "c:d:e", "plain:c:d:e"),
        ("epoch=0-step=2", "x=1", "epoch=0-step=2/report.json:x=1"),
        ("größe 1", "ä", "größe 1/:ä"),
    ],
)
def test_names_may_hold_colons_and_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, run: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    report(Path(directory), run, FIRST)
    report(tmp_path / "other", "two", SECOND)
    main(["compare", named, "other:two", "--out", "out"])
    written = json.loads(Path("out/comparison.json").read_text())
    assert written["first"]["run"] == run and written["differences"]["overall"]["n"] == 5


def test_a_prompt_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    """U+2028 and U+0085 do not end a line of JSON."""
    values = {"x": {"a\u2028b": [True, False], "c\u0085d": [False, False], "e\x0cf": [True, True]}}
    a, b = report(tmp_path, "one", values), report(tmp_path, "two", values)
    for run in ("one", "two"):
        file = tmp_path / f"{run}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert compare(a, b)["differences"]["x"]["n"] == 3


def test_mistakes_are_named(tmp_path: Path) -> None:
    a, b = report(tmp_path, "one", FIRST), report(tmp_path, "two", SECOND)
    for first, second, message in [
        (str(tmp_path), b, "name one as .*:RUN, of one, two, "),
        (f"{tmp_path}:three", b, "has no run 'three': name one as .*, of one, two, "),
        (str(tmp_path / "none.json"), b, "no report at"),
        (a, report(tmp_path, "other", {"x": {"z": [True]}, "y": {}}), "share 0 prompts of x"),
        (a, report(tmp_path, "scored", {"x": {"a": [0.5], "b": [0.5]}}), r"accuracy and .* score"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(first, second)
    merge_run(tmp_path / "report.json", "old", accuracy_result({"x": [True]}), {})
    with pytest.raises(ValueError, match=r"run 'old' .* names no file of results by prompt"):
        compare(a, f"{tmp_path}:old")
    (tmp_path / "two.jsonl").unlink()
    with pytest.raises(ValueError, match="are gone: evaluate the run again"):
        compare(a, b)


def test_scenes_can_be_compared_and_have_a_page(checkpoint: Path, tmp_path: Path) -> None:
    for seed_of_run, scale in (("one", 1.0), ("two", 3.0)):
        evaluate_scenes(
            str(checkpoint),
            out=str(tmp_path),
            run=seed_of_run,
            prompts_per_category=2,
            guidance_scale=scale,
            strict=True,
        )
    found = compare(f"{tmp_path}:one", f"{tmp_path}:two")
    assert len(found["differences"]) == 7 and found["differences"]["overall"]["n"] == 12 and found["notes"] == []
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert found["differences"]["overall"]["first"] == pytest.approx(runs["one"]["overall"]["accuracy"])
    strict = compare(f"{tmp_path}:one-strict", f"{tmp_path}:two-strict")["differences"]
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "one" / "verdicts.jsonl").read_text().splitlines()]
    assert strict["overall"]["first"] == pytest.approx(fmean(row["strict"] for row in rows))
    page = (tmp_path / "scenes" / "two.html").read_text()
    assert page.count("<figure ") == 12
