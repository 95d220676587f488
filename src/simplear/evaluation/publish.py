"""What people read of an evaluated run, written the same way by every evaluation.

``OUT/FOLDER/NAME/`` has the images and a line for each (``verdicts.jsonl``), with TensorBoard events; beside it
``FOLDER/RUN.png`` is a picture of some images and ``FOLDER/RUN.html`` a page of all; ``report.json`` has the run, and
``report.md`` its table.
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
from simplear.evaluation.page import PageImage, write_page
from simplear.evaluation.report import (
    REPORT_FILE,
    VERDICTS_FILE,
    Result,
    markdown_table,
    merge_run,
    write_tensorboard,
)

logger = logging.getLogger(__name__)

MOST_ON_PAGE = 5000
"""Images on the page, which is one file."""
SHOWN_PER_CATEGORY = 4
"""Prompts of each category in the picture: the first ones, not chosen ones."""
SHOWN = 8
"""Prompts in each part of the picture where there are scores: the first ones, and the worst ones."""
IMAGES_IN_A_ROW = 8
MOST_OF_A_PROMPT = 4
CAPTION_LENGTH = 120


def publish(
    images: Path,
    run: str,
    result: Result,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str | None = None,
    shown: Sequence[PageImage] | None = None,
    diversity: Mapping[str, float] | None = None,
    part: str = "",
    rows_file: str = VERDICTS_FILE,
) -> dict[str, Any]:
    """Write all that people read, the report last, so that a run in the report has its images beside it.

    Args:
        images: directory of the images, ``OUT/FOLDER/NAME``.
        run: name in the report.
        result: its numbers.
        settings: what they were made with; its ``verdict`` names the rows' score, if that is not ``score``.
        rows: of each image, see `VERDICTS_FILE`, in the order of the prompts.
        title: heading of the page; None writes no page, and needs what is ``shown``.
        shown: what the picture shows, if not the images of the rows.
        diversity: numbers that say how varied the images are.
        part: directory of rows and events below ``images``.
        rows_file: the rows' file.

    Returns:
        the whole report.
    """
    out, folder, directory = images.parent.parent, images.parent.name, images / part
    directory.mkdir(parents=True, exist_ok=True)
    with whole_file(directory / rows_file) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    all_images = [] if title is None else [page_image(images, row, settings.get("verdict", "score")) for row in rows]
    page = images.with_name(f"{run}.html")
    picture = first_and_worst(run, shown or all_images)
    with whole_file(page.with_suffix(".png")) as partial:
        picture.save(partial, "PNG")
    for earlier in directory.glob("events.out.tfevents.*"):
        earlier.unlink()
    write_tensorboard(directory, result, picture, tag=folder)
    if {"correct", "score", settings.get("verdict")} & rows[0].keys():  # runs can be compared by prompt
        settings = {**settings, "verdicts": str((directory / rows_file).relative_to(out))}
    report = merge_run(out / REPORT_FILE, run, result, settings, diversity)
    if title is not None:
        write_page(page, title, report, run, all_images[:MOST_ON_PAGE])
        if len(rows) > MOST_ON_PAGE:
            logger.warning("the page shows the first %d of %d images.", MOST_ON_PAGE, len(rows))
    shown_in = page.with_suffix(".png") if title is None else page
    print(f"\n{markdown_table(report)}\nreport: {out / REPORT_FILE}\nimages: {shown_in}")
    return report


def page_image(images: Path, row: Mapping[str, Any], score: str = "score", label: str = "") -> PageImage:
    """The image of a row, below the directory ``images``; ``score`` is the row's key of that name."""
    return PageImage(
        images / row["file"],
        row["prompt"],
        row.get("tag", images.parent.name),
        row.get("correct"),
        row.get(score),
        row.get("reason") or "\n".join(row.get("no", ())),
        row.get("box"),
        label,
    )


def first_and_worst(run: str, images: Sequence[PageImage]) -> Image.Image:
    """The first prompts of each category, or, where there are scores, the first and the worst of all prompts."""
    prompts: dict[tuple[str, str], list[PageImage]] = {}
    for image in images:
        prompts.setdefault((image.category, image.prompt), []).append(image)
    members = list(prompts.values())
    sections: dict[str, list[list[PageImage]]] = {}
    if images[0].right is not None:
        for group in members:
            sections.setdefault(group[0].category.replace("_", " "), []).append(group)
        sections = {category: groups[:SHOWN_PER_CATEGORY] for category, groups in sections.items()}
    else:
        sections[f"{run}: the first prompts"] = members[:SHOWN]
        if images[0].score is not None:
            sections["the worst"] = sorted(members, key=_mean_score)[:SHOWN]
    cells = {heading: [_cell(group[:MOST_OF_A_PROMPT]) for group in groups] for heading, groups in sections.items()}
    widest = max(len(cell.images) for of_section in cells.values() for cell in of_section)
    return image_grid(cells, columns=min(4, IMAGES_IN_A_ROW // widest))


def _mean_score(group: Sequence[PageImage]) -> float:
    return fmean(image.score or 0.0 for image in group)


def _cell(group: Sequence[PageImage]) -> Cell:
    text = group[0].prompt if len(group[0].prompt) <= CAPTION_LENGTH else f"{group[0].prompt[:CAPTION_LENGTH]}…"
    scored = "" if group[0].score is None else f" ({_mean_score(group):.3f})"
    marks = tuple(image.right for image in group) if group[0].right is not None else ()
    labels = tuple(image.label for image in group) if group[0].label else ()
    return Cell(text + scored, tuple(image.open() for image in group), marks, labels)
