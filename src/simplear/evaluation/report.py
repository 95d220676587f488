"""The report of evaluations: one ``report.json`` that runs are added to, and its readable forms.

    {"runs": {name: {"overall": {"accuracy" or "score", "low", "high", "n"}, category: {…}, …}},
     "settings": {name: {…}}, "diversity": {name: {…}}}

A run's result is the inner dictionary. Whoever adds a run leaves the others as they are, so the stages of a training
can be evaluated at different times and still stand side by side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from simplear.atomic import whole_file
from simplear.errors import UserError
from simplear.evaluation.intervals import mean_proportion, ratio_proportion, stratified_interval, wilson_interval
from simplear.evaluation.published import PUBLISHED
from simplear.text_files import read_object

REPORT_FILE = "report.json"
VERDICTS_FILE = "verdicts.jsonl"
"""An image of a run in each line: ``prompt``, ``tag`` (its category) and ``correct`` or ``score``, among others."""
OVERALL = "overall"
LONGEST_NAME = 200
"""Bytes of a run's name; file systems take 255, and files have a suffix."""
BOUNDED = {"accuracy", "low", "high"}
PUBLISHED_MARK = "†"
"""Beside numbers that were not measured here."""

Result = dict[str, dict[str, float]]
"""``overall`` and each category, each with ``accuracy`` (or ``score``), ``low``, ``high`` and ``n``. Where there
is no interval, as of FID, which is of a whole set, ``low`` and ``high`` are left out."""


def accuracy_result(verdicts: Mapping[str, Sequence[bool]]) -> Result:
    """Accuracy by category; overall is the mean of the categories, as in GenEval, its interval stratified.

    Args:
        verdicts: of each category, whether each image was right; at least one image a category.
    """
    counts = {category: (sum(right), len(right)) for category, right in verdicts.items()}
    mean, low, high = stratified_interval(list(counts.values()))
    result: Result = {OVERALL: {"accuracy": mean, "low": low, "high": high, "n": sum(n for _, n in counts.values())}}
    for category, (right, n) in counts.items():
        low, high = wilson_interval(right, n)
        result[category] = {"accuracy": right / n, "low": low, "high": high, "n": n}
    return result


def clustered_accuracy_result(verdicts: Mapping[str, Mapping[str, Sequence[bool]]]) -> Result:
    """As `accuracy_result`, with intervals that take images of one prompt for alike, as they are.

    Args:
        verdicts: of each category, by prompt, whether each of its images was right.
    """
    shares = {
        category: ratio_proportion([(sum(right), len(right)) for right in prompts.values()])
        for category, prompts in verdicts.items()
    }
    counts = {category: sum(map(len, prompts.values())) for category, prompts in verdicts.items()}
    mean, low, high = mean_proportion(list(shares.values()))
    result: Result = {OVERALL: {"accuracy": mean, "low": low, "high": high, "n": sum(counts.values())}}
    for category, (share, low, high) in shares.items():
        result[category] = {"accuracy": share, "low": low, "high": high, "n": counts[category]}
    return result


def read_report(path: str | Path) -> dict[str, Any]:
    """The report at ``path``; an empty one where there is none. Raises ValueError for another kind of file."""
    path = Path(path)
    if not path.exists():
        return {"runs": {}}
    try:
        report = read_object(path)
        if not isinstance(report.get("runs"), dict):
            raise UserError('it has no "runs".')
        if other := [name for name, run in report["runs"].items() if not _is_result(run)]:
            raise UserError(f"its run {other[0]!r} does not have the numbers of a result.")
    except UserError as error:
        raise UserError(f"{path} is not a report: {error} Move it away, or write to another directory.") from error
    return report


def _is_result(run: Any) -> bool:
    return (
        isinstance(run, dict)
        and OVERALL in run
        and all(
            isinstance(entry, dict) and "n" in entry and ({"score"} <= entry.keys() or entry.keys() >= BOUNDED)
            for entry in run.values()
        )
    )


def name_run(run: str | None, source: str, out: str | Path) -> str:
    """The name of a run in the report of a directory: the one given, or that of the directory or hub id evaluated.

    Raises UserError, before any work, for a name that files cannot have, and where something else is in the report's
    place.
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

    The file is replaced in one step: a reader, or a machine that stops, finds the old report or the new one. Its table
    is written beside it under the same name with ``.md``.

    Args:
        path: the report; created with its directory if missing.
        name: of the run.
        result: of the run.
        settings: what the result was made with, JSON-able.
        diversity: numbers that say how varied the images are.

    Returns:
        the whole report.
    """
    path = Path(path)
    report = read_report(path)
    report["runs"][name] = result
    if settings is not None:
        report.setdefault("settings", {})[name] = dict(settings)
    if diversity is not None:
        report.setdefault("diversity", {})[name] = dict(diversity)
    for file, text in ((path, json.dumps(report, indent=2) + "\n"), (path.with_suffix(".md"), markdown_table(report))):
        with whole_file(file) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def markdown_table(report: Mapping[str, Any]) -> str:
    """All runs side by side with their 95 % intervals, and beside them what was published of the same benchmarks."""
    head, *rows = report_table(report)
    rows = [[f"**{row[0]}**" if row[0] == OVERALL else row[0], *row[1:]] for row in rows]
    table = markdown_rows(head, rows)
    sources = [f"{PUBLISHED_MARK} {source}\n" for source in published_sources(report)]
    return table + "".join(["\n", *sources] if sources else [])


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    """A table in Markdown; the rule aligns its columns behind the first, to the right if not given."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, ["---", *[rule] * (len(head) - 1)], *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of cells, the head first: runs, then published numbers; accuracies in percent, scores as they are."""
    runs: Mapping[str, Result] = report["runs"]
    published = [row for benchmark in _benchmarks(report) for row in PUBLISHED[benchmark].rows.items()]
    results = [*runs.values(), *[row for _, row in published]]
    categories = list(dict.fromkeys(category for result in results for category in result if category != OVERALL))
    rows = [["category", *runs, *[f"{name} {PUBLISHED_MARK}" for name, _ in published]]]
    percent = any("accuracy" in entry for result in runs.values() for entry in result.values())
    for category in [*categories, OVERALL]:
        ours = [_cell(result.get(category)) for result in runs.values()]
        theirs = [row.get(category) for _, row in published]
        shown = ["" if value is None else f"{value:.1%}" if percent else f"{value:.3f}" for value in theirs]
        rows.append([category, *ours, *shown])
    blank = [""] * len(published)
    rows.append(["images", *[f"{result[OVERALL]['n']:,.0f}" for result in runs.values()], *blank])
    varied: Mapping[str, Mapping[str, float]] = report.get("diversity", {})
    for measure in dict.fromkeys(measure for numbers in varied.values() for measure in numbers):
        values = [varied.get(name, {}).get(measure) for name in runs]
        rows.append([measure.replace("_", " "), *["" if value is None else f"{value:.2f}" for value in values], *blank])
    return rows


def _benchmarks(report: Mapping[str, Any]) -> list[str]:
    """Benchmarks of the report's runs of which there are published numbers."""
    named = [report.get("settings", {}).get(run, {}).get("benchmark") for run in report["runs"]]
    return [benchmark for benchmark in PUBLISHED if benchmark in named]


def published_sources(report: Mapping[str, Any]) -> list[str]:
    """Where the published numbers beside the runs come from, a line each."""
    return [PUBLISHED[benchmark].source for benchmark in _benchmarks(report)]


def _cell(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return ""
    if "accuracy" in entry:
        return f"{entry['accuracy']:.1%} ({100 * entry['low']:.1f}–{100 * entry['high']:.1f})"
    interval = f" ({entry['low']:.3f}–{entry['high']:.3f})" if "low" in entry else ""
    return f"{entry['score']:.3f}{interval}"


def write_tensorboard(directory: str | Path, result: Result, image: Image.Image, tag: str = "evaluation") -> None:
    """Scalars of a result and its picture as TensorBoard events in ``directory``, under ``tag/…``."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for category, entry in result.items():
            writer.add_scalar(f"{tag}/{category}", entry.get("accuracy", entry.get("score")), 0)
        writer.add_image(f"{tag}/images", np.asarray(image), 0, dataformats="HWC")
