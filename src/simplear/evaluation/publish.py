"""What people read of an evaluated run, written the same way by every evaluation.

``OUT/FOLDER/NAME/`` has the images and a line for each (``verdicts.jsonl``); beside it ``FOLDER/RUN.png`` shows some
images and the page ``FOLDER/RUN.html`` all of them; ``report.json`` has the run, and ``report.md`` its table.

The page is a single file that fetches nothing: images are embedded thumbnails, and without its few lines of JavaScript
all images are shown in the order of the prompts.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from PIL import Image
from tqdm import tqdm

from simplear.atomic import whole_file
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.report import REPORT_FILE, Result, markdown_table, merge_run, report_table
from simplear.pictures import read_rgb

logger = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.jsonl"
MOST_ON_PAGE = 5000
"""Images on the page, which is one file."""
SHOWN = 4
"""Prompts of each category in the picture: the first ones, not chosen ones."""
COLUMNS = 8
"""Images in a row of the picture."""
CAPTION_LENGTH = 120
THUMBNAIL = 192
"""Pixels of the longer side of larger images; smaller ones are embedded as they are, and shown enlarged."""
JPEG_QUALITY = 85


def publish(
    images: Path,
    run: str,
    result: Result,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    verdict: str = "correct",
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
        verdict: key of the rows' verdict, a bool or a score; `simplear compare` pairs runs by it.
        rows_file: name of the rows' file.
        picture: in place of the first prompts of each category.
        diversity: how varied the images are.

    Returns:
        the whole report.
    """
    out, file = images.parent.parent, images / rows_file
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
        write_page(page, report, run, images, rows[:MOST_ON_PAGE], verdict)
        if len(rows) > MOST_ON_PAGE:
            logger.warning("the page shows the first %d of %d images.", MOST_ON_PAGE, len(rows))
    print(f"\n{markdown_table(report)}\nreport: {out / REPORT_FILE}\nimages: {shown_in}")
    return report


def first_prompts(images: Path, rows: Sequence[Mapping[str, Any]], verdict: str) -> Image.Image:
    """The first prompts of each category; rows as `publish` takes them."""
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
    verdicts = [row[verdict] for row in rows if verdict in row]
    if verdicts and not isinstance(verdicts[0], bool):
        return Cell(f"{text} ({fmean(verdicts):.3f})", pictures)
    return Cell(text, pictures, tuple(verdicts))


def write_page(
    file: str | Path,
    report: Mapping[str, Any],
    run: str,
    images: Path,
    rows: Sequence[Mapping[str, Any]],
    verdict: str = "correct",
) -> None:
    """Write the page of a run; it appears whole or not at all.

    Args:
        file: the page.
        report: all runs; the table has all of them.
        run: the one shown.
        images: directory of the images.
        rows: for each image, see `simplear.evaluation.publish.publish`.
        verdict: key of the rows' verdict.

    Raises OSError, naming the file, when the disk takes no more.
    """
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    page = template.stream(
        run=run,
        size=THUMBNAIL,
        table=report_table(report),
        settings=report.get("settings", {}).get(run, {}),
        categories=list(dict.fromkeys(row.get("tag", "") for row in rows)),
        count=len(rows),
        images=_shown(images, rows, verdict),
    )
    with whole_file(file) as partial:
        page.dump(str(partial), encoding="utf-8")


def open_image(images: Path, row: Mapping[str, Any]) -> Image.Image:
    """The image of a row, RGB."""
    picture = read_rgb(images / row["file"])
    return picture.crop(row["box"]) if row.get("box") else picture


def _shown(images: Path, rows: Sequence[Mapping[str, Any]], verdict: str) -> Iterator[dict[str, Any]]:
    """What the page shows of each image; ``failure`` is what images are sorted by, the worst first."""
    for row in tqdm(rows, desc="page", unit=" images", disable=None, leave=False):
        value, thumbnail, data = row.get(verdict), open_image(images, row), io.BytesIO()
        small = max(thumbnail.size) <= THUMBNAIL
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnail.save(data, "PNG" if small else "JPEG", quality=JPEG_QUALITY)
        scale = THUMBNAIL / max(thumbnail.size)
        yield {
            **row,
            "tag": row.get("tag", ""),
            "verdict": {True: "right", False: "wrong"}[value] if isinstance(value, bool) else "",
            "score": "" if value is None or isinstance(value, bool) else f"{value:.3f}",
            "failure": -float(value or 0),
            "kind": "png" if small else "jpeg",
            "data": base64.b64encode(data.getvalue()).decode(),
            "width": round(thumbnail.width * scale),
            "height": round(thumbnail.height * scale),
        }


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ run }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto; }
td { text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #ddd; } td:first-child { text-align: left; }
form { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; flex-wrap: wrap; gap: 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax({{ size }}px, 1fr)); gap: 1.2rem 1rem; }
figure { margin: 0; width: {{ size }}px; overflow-wrap: anywhere; } figure[hidden] { display: none; }
img { display: block; outline: 1px solid #ddd; image-rendering: pixelated; } figcaption p { margin: .15rem 0; }
.right { color: #18794e; } .wrong, .reason { color: #c62a34; } .reason { white-space: pre-line; }
</style>
<h1>{{ run }}</h1>
<table>{% for row in table %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<details><summary>Settings</summary><table>
{% for key, value in settings.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></details>
<form id="controls">
<label>Category <select id="category"><option value="">all</option>
{% for name in categories %}<option>{{ name }}</option>{% endfor %}</select></label>
<label>Verdict <select id="verdict"><option value="">all</option><option>wrong</option><option>right</option></select>
</label>
<label>Order <select id="order"><option value="number">as in the benchmark</option>
<option value="failure">worst images first</option></select></label>
<label>Search <input id="search" type="search" placeholder="prompt or reason"></label>
<output id="count">{{ count }} images</output></form>
<main id="images">
{% for image in images %}<figure data-number="{{ loop.index0 }}" data-category="{{ image.tag }}"
 data-verdict="{{ image.verdict }}" data-failure="{{ image.failure }}"><img alt="{{ image.prompt }}"
 width="{{ image.width }}" height="{{ image.height }}" src="data:image/{{ image.kind }};base64,{{ image.data }}">
<figcaption><b class="{{ image.verdict }}">{{ image.verdict }} {{ image.score }}</b> {{ image.tag }}
<p>{{ image.prompt }}</p><p class="reason">{{ image.reason }}</p></figcaption></figure>
{% endfor %}</main>
<script>
const figures = [...document.querySelectorAll("figure")], chosen = id => document.getElementById(id).value;
function show() {
  const words = chosen("search").toLowerCase(), key = chosen("order");
  const shown = figures.filter(figure => !(figure.hidden =
    chosen("category") && figure.dataset.category !== chosen("category")
    || chosen("verdict") && figure.dataset.verdict !== chosen("verdict")
    || !figure.textContent.toLowerCase().includes(words)));
  figures.sort((a, b) => (key === "failure" && b.dataset.failure - a.dataset.failure)
    || a.dataset.number - b.dataset.number);
  document.getElementById("images").append(...figures);
  document.getElementById("count").textContent = `${shown.length} images`;
}
document.getElementById("controls").addEventListener("input", show);
document.getElementById("controls").addEventListener("submit", event => event.preventDefault());
</script>
"""
