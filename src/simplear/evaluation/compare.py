"""``simplear compare``: differences of two evaluated runs, prompt by prompt.

Two runs on the same prompts are compared in pairs: for each prompt the difference of its mean over images, so that what
makes a prompt hard for both cancels. The interval comes from the spread of these differences over prompts, which is
narrower than that of two separate results, and right if several images of a prompt are alike.
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

MEASURED = ("first", "second", "difference", "low", "high")
SHOULD_AGREE = ("benchmark", "judge", "seed", "samples", "images_per_prompt", "prompts_sha256", "detector", "clip")
"""Settings that two runs of one comparison should share; a note says if they do not."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A run of a report, with its value for each prompt."""

    report: Path
    name: str
    settings: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    """Mean over the images of each prompt, by category: shares of right images, or scores."""
    kind: str
    """"accuracy" or "score"."""


def compare(first: str, second: str, *, out: str | None = None) -> dict[str, Any]:
    """Differences of two evaluated runs, second less first, paired by prompt, with 95 % intervals.

    A run is named as REPORT:RUN, where REPORT is a report.json or its directory; RUN can be left out if the report has
    only one.

    Args:
        first: the run to compare with.
        second: the run to compare.
        out: directory for comparison.json and comparison.md; without it the table is only printed.

    Returns:
        the content of comparison.json.

    Raises:
        ValueError: a run is missing or has no results by prompt, or the two share fewer than two prompts of a category.
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
        for name, text in (("comparison.json", json.dumps(comparison, indent=2) + "\n"), ("comparison.md", table)):
            with whole_file(Path(out) / name) as partial:
                partial.write_text(text, encoding="utf-8")
    print(table)
    return comparison


def read_run(name: str) -> EvaluatedRun:
    """The run that is named as REPORT or REPORT:RUN, see `compare`. Raises ValueError if there is none."""
    colons = [place for place, letter in enumerate(name) if letter == ":"]  # also in paths and names of runs
    place = next((end for end in [len(name), *colons] if Path(name[:end]).exists()), name.rfind(":"))
    path, run = name[:place], name[place + 1 :]
    file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no report at {file}: name a report.json, or its directory, and :RUN.")
    report = read_report(file)
    if not run and len(report["runs"]) == 1:
        run = next(iter(report["runs"]))
    if run not in report["runs"]:
        raise UserError(f"{file} has no run {run!r}: name one as {file}:RUN, of {', '.join(report['runs'])}.")
    settings = report.get("settings", {}).get(run, {})
    if "verdicts" not in settings:
        raise UserError(
            f"run {run!r} of {file} names no file of results by prompt (settings.{run}.verdicts), so nothing can be "
            "paired: it is not an evaluation by prompts, or an older one; evaluate it again."
        )
    return EvaluatedRun(file, run, settings, *_values(file.parent / settings["verdicts"], settings.get("verdict")))


def _values(file: Path, key: str | None) -> tuple[dict[str, dict[str, float]], str]:
    """Means by category and prompt, and their kind, from a file of verdicts."""
    if not file.is_file():
        raise UserError(f"the results by prompt, {file}, are gone: evaluate the run again.")
    images: dict[str, dict[str, list[float]]] = {}
    kind = "score"
    for number, row in read_objects(file):
        value = row.get(key or ("correct" if "correct" in row else "score"))
        if not isinstance(value, (bool, int, float)) or "prompt" not in row:
            raise UserError(f"{file}, line {number}, has no prompt with a verdict: evaluate the run again.")
        kind = "accuracy" if isinstance(value, bool) else "score"
        images.setdefault(row.get("tag", OVERALL), {}).setdefault(row["prompt"], []).append(float(value))
    means = {tag: {prompt: fmean(values) for prompt, values in prompts.items()} for tag, prompts in images.items()}
    return means, kind


def paired_differences(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Second less first on the prompts that both have: ``overall``, the mean of the categories, and each category.

    Args:
        first: value of each prompt, by category.
        second: likewise.

    Returns:
        for each: ``first``, ``second`` (means over the shared prompts), ``difference``, ``low``, ``high`` (its 95 %
        interval, `clustered_interval`) and ``n`` (prompts). If no prompt differs, the interval has no width.

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
    found = {category: _difference([members]) for category, members in pairs.items()}
    return {**found, OVERALL: _difference(list(pairs.values()))}


def _difference(strata: list[list[tuple[float, float]]]) -> dict[str, float]:
    difference, low, high = clustered_interval([[b - a for a, b in members] for members in strata])
    first, second = (fmean(fmean(pair[side] for pair in members) for members in strata) for side in (0, 1))
    numbers = dict(zip(MEASURED, (first, second, difference, low, high), strict=True))
    return {**numbers, "n": sum(map(len, strata))}


def _notes(a: EvaluatedRun, b: EvaluatedRun) -> list[str]:
    """What makes the runs not quite comparable."""
    notes = [
        f"{key} differs: {a.settings.get(key)!r} and {b.settings.get(key)!r}"
        for key in SHOULD_AGREE
        if a.settings.get(key) != b.settings.get(key)
    ]
    first, second = ({(tag, prompt) for tag in run.values for prompt in run.values[tag]} for run in (a, b))
    if first != second:
        notes.append(
            f"{len(first - second)} prompts of the first and {len(second - first)} of the second run have no pair and "
            "are left out"
        )
    return notes


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The differences as Markdown: accuracies in percent and percentage points, scores as they are."""
    names = [comparison[side]["run"] for side in ("first", "second")]
    if names[0] == names[1]:
        names = [f"{comparison[side]['run']} ({comparison[side]['report']})" for side in ("first", "second")]
    scale, digits = (100, 1) if comparison["kind"] == "accuracy" else (1, 3)
    rows = []
    for category, entry in comparison["differences"].items():
        first, second, difference, low, high = (scale * entry[key] for key in MEASURED)
        interval = f"({low:+.{digits}f} to {high:+.{digits}f})"
        cells = [f"{first:.{digits}f}", f"{second:.{digits}f}", f"{difference:+.{digits}f} {interval}", f"{entry['n']}"]
        rows.append([f"**{category}**" if category == OVERALL else category, *cells])
    table = markdown_rows(["category", *names, "difference (95 %)", "prompts"], rows)
    return table + "".join(f"\n{note}\n" for note in comparison["notes"])
