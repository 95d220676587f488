"""What people read of an evaluated run, written the same way by every evaluation.

``OUT/FOLDER/NAME/`` has the images and a line for each (``verdicts.jsonl``); beside it ``FOLDER/RUN.png`` shows some
images and the page ``FOLDER/RUN.html`` all of them; ``report.json`` has the run, and ``report.md`` its table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from simplear.atomic import whole_file
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.page import open_image, write_page
from simplear.evaluation.report import REPORT_FILE, Result, markdown_table, merge_run

logger = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.jsonl"
MOST_ON_PAGE = 5000
"""Images on the page, which is one file."""
SHOWN = 4
"""Prompts of each category in the picture: the first ones, not chosen ones."""
COLUMNS = 8
"""Images in a row of the picture."""
CAPTION_LENGTH = 120


def publish(
    images: Path,
    run: str,
    result: Result,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    verdict: str = "correct",
    part: str = "",
    rows_file: str = VERDICTS_FILE,
    picture: Image.Image | None = None,
    diversity: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write all that people read; the report comes last, so that a run in it has its images beside it.

    Args:
        images: directory of the images, ``OUT/FOLDER/NAME``.
        run: name in the report.
        result: its numbers.
        settings: what they were made with.
        rows: for each image, in the order of the prompts: ``file`` below `images`, ``prompt``, the verdict, and if
            there are any ``tag`` (category), ``reason`` (what is wrong) and ``box`` (left, top, right, bottom) of the
            image in its file. Without ``file`` there is no page.
        title: heading of the page.
        verdict: key of the rows' verdict, a bool or a score; `simplear compare` pairs runs by it.
        part: directory of the rows below `images`.
        rows_file: name of the rows' file.
        picture: in place of the first prompts of each category.
        diversity: how varied the images are.

    Returns:
        the whole report.
    """
    out, folder, file = images.parent.parent, images.parent.name, images / part / rows_file
    with whole_file(file) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = images.with_name(f"{run}.html")
    shown_in = page.with_suffix(".png")
    with whole_file(shown_in) as partial:
        (picture or first_prompts(images, rows, verdict)).save(partial, "PNG")
    settings = dict(settings)
    if verdict in rows[0]:
        settings |= {"verdicts": str(file.relative_to(out)), "verdict": verdict}
    report = merge_run(out / REPORT_FILE, run, result, settings, diversity)
    if "file" in rows[0]:
        shown_in = page
        write_page(page, title, report, run, images, rows[:MOST_ON_PAGE], verdict)
        if len(rows) > MOST_ON_PAGE:
            logger.warning("the page shows the first %d of %d images.", MOST_ON_PAGE, len(rows))
    print(f"\n{markdown_table(report)}\nreport: {out / REPORT_FILE}\nimages ({folder}): {shown_in}")
    return report


def first_prompts(images: Path, rows: Sequence[Mapping[str, Any]], verdict: str) -> Image.Image:
    """The first prompts of each category; rows as `publish` takes them, with a ``label`` for each image if wanted."""
    categories: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        heading = row.get("tag", "").replace("_", " ")
        categories.setdefault(heading, {}).setdefault(row["prompt"], []).append(row)
    shown = SHOWN if len(categories) > 1 else 2 * SHOWN
    sections = {
        heading: [_cell(images, prompt, group[:SHOWN], verdict) for prompt, group in list(prompts.items())[:shown]]
        for heading, prompts in categories.items()
    }
    widest = max(len(cell.images) for cells in sections.values() for cell in cells)
    return image_grid(sections, columns=COLUMNS // widest)


def _cell(images: Path, prompt: str, rows: Sequence[Mapping[str, Any]], verdict: str) -> Cell:
    text = prompt if len(prompt) <= CAPTION_LENGTH else f"{prompt[:CAPTION_LENGTH]}…"
    pictures = tuple(open_image(images, row) for row in rows)
    labels = tuple(row["label"] for row in rows if "label" in row)
    verdicts = [row[verdict] for row in rows if verdict in row]
    if verdicts and not isinstance(verdicts[0], bool):
        return Cell(f"{text} ({fmean(verdicts):.3f})", pictures, labels=labels)
    return Cell(text, pictures, tuple(verdicts), labels)
