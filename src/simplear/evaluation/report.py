"""The report of an evaluation: ``report.json``, which other programs read, and its table ``report.md``.

    {"runs": {name: {"overall": {"accuracy" or "score", "low", "high", "n"}, category: {…}, …}},
     "settings": {name: {…}}, "diversity": {name: {…}}}

A run's result is the inner dictionary. Adding a run leaves the others as they are, so the stages of a training can be
evaluated at different times and still stand side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simplear.atomic import whole_file
from simplear.errors import UserError
from simplear.evaluation.intervals import clustered_proportion, stratified_interval
from simplear.text_files import read_object

REPORT_FILE = "report.json"
OVERALL = "overall"
LONGEST_NAME = 200
"""Bytes of a run's name; file systems take 255, and files have a suffix."""

Result = dict[str, dict[str, float]]
"""``overall`` and each category, each with ``accuracy`` (or ``score``), ``low``, ``high`` and ``n``. Without ``low``
and ``high`` if there is no interval, as for FID, which is of a whole set."""


def accuracy_result(verdicts: Mapping[str, Sequence[bool]]) -> Result:
    """As `clustered_accuracy_result`, for independent images.

    Args:
        verdicts: for each category, whether each image was right; at least one image a category.
    """
    rows = [(category, str(number), ok) for category, right in verdicts.items() for number, ok in enumerate(right)]
    return clustered_accuracy_result(rows)


def clustered_accuracy_result(verdicts: Iterable[tuple[str, str, bool]]) -> Result:
    """Accuracy by category; overall is the mean of the categories, as in GenEval.

    Intervals are at 95 %, with the prompt as the unit, see `simplear.evaluation.intervals`.

    Args:
        verdicts: category, prompt and whether it was right, of each image.
    """
    clusters: dict[str, dict[str, list[bool]]] = {}
    for category, prompt, right in verdicts:
        clusters.setdefault(category, {}).setdefault(prompt, []).append(right)
    result: Result = {}
    for category, prompts in clusters.items():
        totals = [(sum(right), len(right)) for right in prompts.values()]
        result[category] = accuracy_entry(*clustered_proportion(totals), sum(size for _, size in totals))
    strata = [(entry["accuracy"], entry["low"], entry["high"]) for entry in result.values()]
    n = sum(int(entry["n"]) for entry in result.values())
    return {OVERALL: accuracy_entry(*stratified_interval(strata), n), **result}


def accuracy_entry(accuracy: float, low: float, high: float, n: int) -> dict[str, float]:
    """One line of a result."""
    return {"accuracy": accuracy, "low": low, "high": high, "n": n}


def read_report(path: str | Path) -> dict[str, Any]:
    """The report at ``path``; an empty one if there is no such file. Raises ValueError for another kind of file."""
    path = Path(path)
    if not path.exists():
        return {"runs": {}}
    try:
        report = read_object(path)
        report_table(report)
    except (UserError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a report ({error}): move it away, or write to another directory.") from error
    return report


def name_run(run: str | None, source: str, out: str | Path) -> str:
    """The name of a run in a directory's report: the one given, or that of the evaluated directory or hub id.

    Raises UserError, before any work, for a name that files cannot have, and if `out` has another kind of file in the
    report's place.
    """
    name = run or Path(os.path.abspath(source)).name  # not resolved: a link has the name that was chosen for it
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"{name!r} cannot be the name of a run, for files are named by it: give another (--run).")
    read_report(Path(out) / REPORT_FILE)
    return name


def merge_run(
    path: str | Path,
    name: str,
    result: Result,
    settings: Mapping[str, Any] | None = None,
    diversity: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Add a run to the report, or replace the one of that name; all others stay.

    The file is replaced in one step, so readers find the old report or the new one. Its table is written beside it
    under the same name with ``.md``.

    Args:
        path: the report; created with its directory if missing.
        name: of the run.
        result: of the run.
        settings: what the result was made with, JSON values.
        diversity: how varied the images are.

    Returns:
        the whole report.
    """
    path = Path(path)
    report = read_report(path)
    report["runs"][name] = result
    for key, value in (("settings", settings), ("diversity", diversity)):
        if value is not None:
            report.setdefault(key, {})[name] = dict(value)
    for file, text in ((path, json.dumps(report, indent=2) + "\n"), (path.with_suffix(".md"), markdown_table(report))):
        with whole_file(file) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def markdown_table(report: Mapping[str, Any]) -> str:
    """All runs side by side, with 95 % intervals."""
    head, *rows = report_table(report)
    return markdown_rows(head, [[f"**{row[0]}**" if row[0] == OVERALL else row[0], *row[1:]] for row in rows])


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    """A table in Markdown; the rule aligns the columns after the first, by default to the right."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, ["---", *[rule] * (len(head) - 1)], *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of cells, the head first; accuracies in percent, scores as they are."""
    runs: Mapping[str, Result] = report["runs"]
    varied: Mapping[str, Mapping[str, float]] = report.get("diversity", {})
    categories = dict.fromkeys(category for result in runs.values() for category in result if category != OVERALL)
    rows = [["category", *runs]]
    rows += [[name, *[_cell(result.get(name)) for result in runs.values()]] for name in [*categories, OVERALL]]
    rows.append(["images", *[f"{result[OVERALL]['n']:,.0f}" for result in runs.values()]])
    for measure in dict.fromkeys(measure for numbers in varied.values() for measure in numbers):
        values = [varied.get(name, {}).get(measure) for name in runs]
        rows.append([measure.replace("_", " "), *["" if value is None else f"{value:.2f}" for value in values]])
    return rows


def _cell(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return ""
    if "accuracy" in entry:
        return f"{entry['accuracy']:.1%} ({100 * entry['low']:.1f}–{100 * entry['high']:.1f})"
    interval = f" ({entry['low']:.3f}–{entry['high']:.3f})" if "low" in entry else ""
    return f"{entry['score']:.3f}{interval}"
