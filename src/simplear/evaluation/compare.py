"""``simplear compare``: what one evaluated run has over another, prompt by prompt.

Two runs on the same prompts are compared in pairs: of each prompt the difference of its mean over images, so that what
makes a prompt hard for both cancels. The interval comes from the spread of these differences over prompts, which is
narrower than that of two separate results, and right where several images of a prompt are alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from simplear.atomic import require_writable, whole_file
from simplear.errors import UserError
from simplear.evaluation.intervals import clustered_interval
from simplear.evaluation.report import OVERALL, REPORT_FILE, markdown_rows, read_report
from simplear.text_files import read_objects

COMPARISON_FILE = "comparison.json"
ALIKE = ("benchmark", "judge", "seed", "samples", "images_per_prompt", "prompts_sha256", "detector", "clip")
"""Settings that two runs of one comparison should share; where they do not, it is said."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A run of a report, with what each prompt reached."""

    report: Path
    name: str
    settings: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    """Mean over the images of each prompt, by category: shares of right images, or scores."""
    kind: str
    """"accuracy" or "score"."""


def compare(first: str, second: str, *, out: str | None = None) -> dict[str, Any]:
    """Differences of two evaluated runs, second less first, paired by prompt, with 95 % intervals.

    A run is named as REPORT:RUN, where REPORT is a report.json or its directory, with any colons; RUN can be left out
    where the report has one only.

    Args:
        first: the run to compare with.
        second: the run to compare.
        out: directory for comparison.json and comparison.md; without it the table is only printed.

    Returns:
        the content of comparison.json.

    Raises:
        ValueError: a run is not there, has no results by prompt, or the two share fewer than two prompts of a category.
    """
    if out is not None:
        require_writable(out, "the comparison", "out")
    a, b = read_run(first), read_run(second)
    if a.kind != b.kind:
        raise UserError(f"{first} has {a.kind} and {second} {b.kind}: compare two of one kind.")
    comparison = {
        "first": {"report": str(a.report), "run": a.name, "settings": dict(a.settings)},
        "second": {"report": str(b.report), "run": b.name, "settings": dict(b.settings)},
        "kind": a.kind,
        "differences": paired_differences(a.values, b.values),
        "notes": _notes(a, b),
    }
    table = comparison_table(comparison)
    if out is not None:
        for name, text in (
            (COMPARISON_FILE, json.dumps(comparison, indent=2) + "\n"),
            (str(Path(COMPARISON_FILE).with_suffix(".md")), table),
        ):
            with whole_file(Path(out) / name) as partial:
                partial.write_text(text, encoding="utf-8")
    print(table)
    return comparison


def read_run(name: str) -> EvaluatedRun:
    """The run that is named as REPORT or REPORT:RUN, see `compare`. Raises ValueError where there is none."""
    colons = [place for place, letter in enumerate(name) if letter == ":"]
    readings = [(name, ""), *((name[:place], name[place + 1 :]) for place in reversed(colons))]
    files = [(Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path), run) for path, run in readings if path]
    found = [(file, run) for file, run in files if file.is_file()]
    if not found:
        raise UserError(f"no report at {readings[-1][0]}: name a report.json, or its directory, and :RUN.")
    reports = [(file, run, read_report(file)) for file, run in found]
    # A colon may be part of the path or of the run's name: what is there decides.
    file, run, report = next((each for each in reports if each[1] in each[2]["runs"]), reports[0])
    present = ", ".join(report["runs"]) or "none"
    if not run and len(report["runs"]) != 1:
        raise UserError(f"{file} has the runs {present}: name one as {file}:RUN.")
    run = run or next(iter(report["runs"]))
    if run not in report["runs"]:
        raise UserError(f"{file} has no run {run!r}, but {present}.")
    settings = report.get("settings", {}).get(run, {})
    if "verdicts" not in settings:
        raise UserError(
            f"run {run!r} of {file} names no file of results by prompt (settings.{run}.verdicts), so nothing can be "
            "paired: it is not an evaluation by prompts, or an older one; evaluate it again."
        )
    return EvaluatedRun(file, run, settings, *_values(file.parent / settings["verdicts"], settings.get("verdict")))


def _values(file: Path, key: str | None) -> tuple[dict[str, dict[str, float]], str]:
    """Means by category and prompt, and their kind, from a file of verdicts (see `VERDICTS_FILE`)."""
    if not file.is_file():
        raise UserError(f"the results by prompt, {file}, are gone: evaluate the run again.")
    images: dict[str, dict[str, list[float]]] = {}
    kinds = set()
    for number, row in read_objects(file):
        name = key or ("correct" if "correct" in row else "score")
        if not isinstance(row.get(name), (bool, int, float)) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{file}, line {number}: no prompt with a {name!r}.")
        kinds.add("accuracy" if isinstance(row[name], bool) else "score")
        images.setdefault(row.get("tag", OVERALL), {}).setdefault(row["prompt"], []).append(float(row[name]))
    if len(kinds) != 1:
        raise UserError(f"{file} holds {'verdicts and scores' if kinds else 'nothing'}: evaluate the run again.")
    means = {tag: {prompt: fmean(values) for prompt, values in prompts.items()} for tag, prompts in images.items()}
    return means, kinds.pop()


def paired_differences(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Second less first on the prompts that both have: ``overall``, the mean of the categories, and each category.

    Args:
        first: value of each prompt, by category.
        second: likewise.

    Returns:
        of each: ``first``, ``second`` (means over the shared prompts), ``difference``, ``low``, ``high`` (its 95 %
        interval, `clustered_interval`) and ``n`` (prompts). Where no prompt differs, the interval has no width.

    Raises:
        ValueError: fewer than two prompts of a category are shared.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for category in dict.fromkeys([*first, *second]):
        mine, other = first.get(category, {}), second.get(category, {})
        pairs[category] = [(value, other[prompt]) for prompt, value in mine.items() if prompt in other]
        if len(pairs[category]) < 2:
            raise UserError(
                f"the runs share {len(pairs[category])} prompts of {category} (of {len(mine)} and {len(other)}): at "
                "least two are needed. Evaluate both on the same prompts, with the same seed where it draws them."
            )
    found = {OVERALL: _difference(list(pairs.values()))}
    return found | {category: _difference([members]) for category, members in pairs.items() if category != OVERALL}


def _difference(strata: list[list[tuple[float, float]]]) -> dict[str, float]:
    difference, low, high = clustered_interval([[b - a for a, b in members] for members in strata])
    first, second = (fmean(fmean(pair[side] for pair in members) for members in strata) for side in (0, 1))
    n = sum(map(len, strata))
    return {"first": first, "second": second, "difference": difference, "low": low, "high": high, "n": n}


def _notes(a: EvaluatedRun, b: EvaluatedRun) -> list[str]:
    """What keeps the comparison from being one of like with like."""
    notes = [
        f"{key} differs: {a.settings.get(key)!r} and {b.settings.get(key)!r}"
        for key in ALIKE
        if a.settings.get(key) != b.settings.get(key)
    ]
    alone = [
        sum(prompt not in other.get(category, {}) for category, prompts in mine.items() for prompt in prompts)
        for mine, other in ((a.values, b.values), (b.values, a.values))
    ]
    if any(alone):
        notes.append(f"{alone[0]} prompts of the first and {alone[1]} of the second run have no pair and are left out")
    return notes


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The differences as Markdown: accuracies in percent and percentage points, scores as they are."""
    names = [comparison[side]["run"] for side in ("first", "second")]
    if names[0] == names[1]:
        names = [f"{comparison[side]['run']} ({comparison[side]['report']})" for side in ("first", "second")]
    scale, digits = (100, 1) if comparison["kind"] == "accuracy" else (1, 3)
    rows = []
    differences = comparison["differences"]
    for category in [*(name for name in differences if name != OVERALL), OVERALL]:
        entry = {key: scale * value for key, value in differences[category].items()}
        interval = f"{entry['low']:+.{digits}f} to {entry['high']:+.{digits}f}"
        rows.append(
            [
                f"**{category}**" if category == OVERALL else category,
                f"{entry['first']:.{digits}f}",
                f"{entry['second']:.{digits}f}",
                f"{entry['difference']:+.{digits}f} ({interval})",
                str(differences[category]["n"]),
            ]
        )
    table = markdown_rows(["category", *names, "difference (95 %)", "prompts"], rows)
    return table + "".join(f"\n{note}\n" for note in comparison["notes"])
