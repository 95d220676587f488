"""One HTML page of an evaluated run: its numbers, and every image with its verdict, to sort and to search.

The page is a single file that needs nothing else and fetches nothing: images are thumbnails within it, the script is a
few lines of plain JavaScript, and without that all is shown in the order of the prompts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from simplear.atomic import whole_file
from simplear.evaluation.report import OVERALL, PUBLISHED_MARK, published_sources, report_table
from simplear.pictures import read_rgb

THUMBNAIL = 192
"""Pixels of the longer side, of larger images; smaller ones are kept as they are, and shown larger pixel by pixel."""
JPEG_QUALITY = 85


@dataclass(frozen=True)
class PageImage:
    """An image and what was found about it."""

    file: Path | Image.Image
    """Where it is, or the image itself."""
    prompt: str
    category: str = ""
    right: bool | None = None
    """The verdict; None where there is a score alone."""
    score: float | None = None
    """The higher the better."""
    reason: str = ""
    """What is wrong, line by line."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the image in its file; None where the file is the image."""
    label: str = ""
    """Above it in the picture, such as the name of its run."""

    def open(self) -> Image.Image:
        """The image alone, RGB."""
        picture = self.file if isinstance(self.file, Image.Image) else read_rgb(self.file)
        return picture.crop(self.box) if self.box else picture


def write_page(file: str | Path, title: str, report: Mapping[str, Any], run: str, images: Sequence[PageImage]) -> None:
    """Write the page of a run; it appears whole or not at all.

    Args:
        file: the page.
        title: its heading, such as the benchmark's name.
        report: all runs, the one shown among them; the table has all.
        run: the one shown.
        images: in the order of the prompts.

    Raises OSError, naming the file, when the disk takes no more.
    """
    settings = report.get("settings", {}).get(run, {})
    wrong: dict[str, float] = {}
    """Of each prompt: images that are wrong, or scores that are missing to 1."""
    for item in images:
        wrong[item.prompt] = wrong.get(item.prompt, 0.0) + _failure(item)
    with whole_file(file) as partial, partial.open("w", encoding="utf-8") as page:
        page.write(_HEAD.format(title=escape(f"{title}: {run}"), style=_STYLE, size=THUMBNAIL))
        page.write(f"<h1>{escape(title)} <span>{escape(run)}</span></h1>\n{_table(report, run)}")
        rows = "".join(f"<tr><th>{escape(key)}<td>{escape(str(value))}\n" for key, value in settings.items())
        page.write(f"<details><summary>Settings</summary><table>{rows}</table></details>\n")
        page.write(_controls(list(dict.fromkeys(item.category for item in images)), images))
        page.write('<main id="images">\n')
        for number, item in enumerate(tqdm(images, desc="page", unit=" images", disable=None, leave=False)):
            page.write(_figure(number, item, wrong[item.prompt]))
        page.write(f"</main>\n<script>{_SCRIPT}</script>\n")


def _failure(item: PageImage) -> float:
    return float(not item.right) if item.right is not None else 1 - (item.score or 0.0)


def _table(report: Mapping[str, Any], run: str) -> str:
    head, *rows = report_table(report)
    cells = "".join(f'<th scope="col"{_kind(name, run)}>{escape(name)}' for name in [head[0].capitalize(), *head[1:]])
    body = "".join(
        f'<tr{" class=overall" if row[0] == OVERALL else ""}><th scope="row">{escape(row[0].replace("_", " "))}'
        + "".join(f"<td{_kind(name, run)}>{escape(cell)}" for name, cell in zip(head[1:], row[1:], strict=True))
        + "\n"
        for row in rows
    )
    notes = "".join(f"<p class=note>{PUBLISHED_MARK} {escape(source)}</p>\n" for source in published_sources(report))
    return f"<div class=wide><table><thead><tr>{cells}</thead>\n<tbody>{body}</tbody></table></div>\n{notes}"


def _kind(name: str, run: str) -> str:
    return " class=this" if name == run else " class=elsewhere" if name.endswith(PUBLISHED_MARK) else ""


def _controls(categories: Sequence[str], images: Sequence[PageImage]) -> str:
    options = "".join(f'<option value="{escape(name)}">{escape(name.replace("_", " "))}' for name in categories)
    judged = any(item.right is not None for item in images)
    verdicts = (
        '<label>Verdict <select id="verdict"><option value="">all<option value="wrong">wrong<option value="right">right'
        "</select></label>\n"
    )
    return (
        f'<form id="controls"><label>Category <select id="category"><option value="">all{options}</select></label>\n'
        + (verdicts if judged else "")
        + '<label>Order <select id="order"><option value="number">as in the benchmark'
        '<option value="failure">worst images first<option value="prompt">worst prompts first</select></label>\n'
        '<label>Search <input id="search" type="search" placeholder="prompt or reason"></label>\n'
        f'<output id="count">{len(images):,} images</output></form>\n'
    )


def _figure(number: int, item: PageImage, prompt_failure: float) -> str:
    verdict = "" if item.right is None else "right" if item.right else "wrong"
    mark = {"right": "✓", "wrong": "✗", "": ""}[verdict]
    shown = mark if item.score is None else f"{mark} {item.score:.3f}"
    category = escape(item.category.replace("_", " "))
    reason = f"<p class=reason>{escape(item.reason)}</p>" if item.reason else ""
    return (
        f'<figure data-number="{number}" data-category="{escape(item.category)}" data-verdict="{verdict}" '
        f'data-failure="{_failure(item):.6g}" data-prompt="{prompt_failure:.6g}">{_thumbnail(item)}'
        f'<figcaption><b class="{verdict}" title="{verdict}">{shown}</b> <i>{category}</i>'
        f"<p>{escape(item.prompt)}</p>{reason}</figcaption></figure>\n"
    )


def _thumbnail(item: PageImage) -> str:
    buffer = io.BytesIO()
    picture = item.open()
    small = max(picture.size) <= THUMBNAIL
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = THUMBNAIL / max(picture.size)
    size = f'width="{round(picture.width * scale)}" height="{round(picture.height * scale)}"'
    pixels = " class=pixels" if small else ""
    return (
        f'<img{pixels} {size} alt="{escape(item.prompt)}" src="data:image/{"png" if small else "jpeg"};base64,{data}">'
    )


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>:root {{ --size: {size}px }} {style}</style>
"""
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; color: #202124; background: #fff; margin: 1.5rem; }
h1 { font-size: 1.4rem; } h1 span, .note, figcaption i, summary { color: #6b7177; font-weight: normal; }
table { border-collapse: collapse; margin: .5rem 0; } .wide { overflow-x: auto; }
th, td { text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #e3e5e8;
  font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; font-weight: normal; } details td { text-align: left; }
.overall th, .overall td, th.this { font-weight: bold; } .this { background: #eef4ff; } .elsewhere { color: #6b7177; }
.note { font-size: .85rem; }
form { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; flex-wrap: wrap; gap: 1rem;
  align-items: center; border-bottom: 1px solid #e3e5e8; } form output { margin-left: auto; color: #6b7177; }
select, input { font: inherit; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--size), 1fr)); gap: 1.2rem 1rem;
  margin-top: 1rem; }
figure { margin: 0; width: var(--size); overflow-wrap: anywhere; } figure[hidden] { display: none; }
img { display: block; outline: 1px solid #dadce0; } .pixels { image-rendering: pixelated; }
figcaption { font-size: .85rem; margin-top: .3rem; } figcaption p { margin: .15rem 0; }
figcaption i { font-style: normal; }
.right { color: #18794e; } .wrong { color: #c62a34; } .reason { color: #c62a34; white-space: pre-line; }
"""
_SCRIPT = """
const controls = document.getElementById("controls"), images = document.getElementById("images");
const figures = [...images.children], of = id => (document.getElementById(id) || {value: ""}).value;
function show() {
  const category = of("category"), verdict = of("verdict"), order = of("order"), words = of("search").toLowerCase();
  let count = 0;
  for (const figure of figures) {
    figure.hidden = Boolean(category && figure.dataset.category !== category
      || verdict && figure.dataset.verdict !== verdict || !figure.textContent.toLowerCase().includes(words));
    count += !figure.hidden;
  }
  const by = (a, b, key) => b.dataset[key] - a.dataset[key];
  figures.sort((a, b) => (order === "number" ? 0 : by(a, b, order)) || a.dataset.number - b.dataset.number);
  images.append(...figures);
  document.getElementById("count").textContent = `${count.toLocaleString("en")} images`;
}
controls.addEventListener("input", show);
controls.addEventListener("submit", event => event.preventDefault());
show();  // a browser may have kept the choices of an earlier visit
"""
