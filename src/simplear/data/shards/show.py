"""A set of token shards to look at: ``simplear data show``, one HTML page and one PNG.

Pictures are decoded from their codes, so what is seen is what training sees. Code use, caption lengths and pictures are
of a sample of rows, spread over the whole set by a permutation; grids, sources and drops are of all, from the manifest.
The page has no script and no file beside it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from simplear.atomic import whole_file
from simplear.data.shards.format import Grid, settings_of
from simplear.data.shards.reader import TokenShards, read_manifest
from simplear.errors import UserError
from simplear.hashing import permutation
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

ROWS_AT_ONCE = 256
DECODED_AT_ONCE = 16
COLUMNS = 6
CAPTION_LINES, CAPTION_LETTERS = 4, 26
"""Of a caption in the PNG; the page has all of it."""
INK, FAINT, BAR = "#20242a", "#80868f", "#3566a8"


@dataclass
class Overview:
    """What page and PNG show."""

    directory: Path
    manifest: Mapping[str, Any]
    grids: Mapping[Grid, int]
    sampled: int = 0
    """Rows that codes and captions were counted in."""
    code_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(codebook_size,)"""
    words: list[int] = field(default_factory=list)
    """Of each caption."""
    captions_a_row: Counter[int] = field(default_factory=Counter)
    pictures: list[tuple[str, list[str], Image.Image | None]] = field(default_factory=list)
    """Key, captions and, where a visual tokenizer was given, picture."""

    @property
    def drops(self) -> dict[str, int]:
        """Left out of the whole set, by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.manifest["shards"]:
            total.update(shard.get("drops", {}))
        return dict(total.most_common())

    @property
    def entropy(self) -> float:
        """Of the codes' frequencies, in bits; 0 without codes."""
        shares = self.code_counts[self.code_counts > 0] / max(self.code_counts.sum(), 1)
        return float(-(shares * np.log2(shares)).sum()) + 0.0

    @property
    def facts(self) -> dict[str, str]:
        """Numbers of the set in words."""
        shards = self.manifest["shards"]
        size = sum(shard["bytes"] for shard in shards)
        rows = self.manifest["rows"]
        facts = {
            "rows": f"{rows:,}",
            "shards": f"{len(shards):,} with {size:,} bytes ({size / max(rows, 1):.0f} a row)",
            "grids": ", ".join(f"{height} × {width}: {count:,}" for (height, width), count in self.grids.items()),
            "left out": f"{sum(self.drops.values()):,}",
            "looked at": f"{self.sampled:,} rows" + (", all" if self.sampled == rows else ", spread over the set"),
        }
        if self.code_counts.any():
            used, codebook = int((self.code_counts > 0).sum()), len(self.code_counts)
            facts["codes"] = (
                f"{int(self.code_counts.sum()):,} looked at; {used:,} of {codebook:,} occur, {codebook - used:,} do "
                f"not; entropy {self.entropy:.2f} of {math.log2(codebook):.2f} bits, perplexity {2**self.entropy:,.0f}"
            )
        if self.words:
            low, middle, high = np.percentile(self.words, [5, 50, 95])
            counts = ", ".join(f"{rows:,} rows with {count}" for count, rows in sorted(self.captions_a_row.items()))
            facts["captions"] = f"{counts}; words: median {middle:.0f}, nine tenths {low:.0f} to {high:.0f}"
        facts["visual tokenizer"] = str(self.manifest["visual_tokenizer"] or "none: texts alone")
        return facts


def show(
    directory: str,
    *,
    visual_tokenizer: str | None = None,
    out: str | None = None,
    pictures: int = 24,
    rows: int = 20_000,
    seed: int = 0,
) -> None:
    """Write a page (HTML) and a picture (PNG) of a set of token shards: pictures, captions, codes, sources, drops.

    Args:
        directory: Finished token shards.
        visual_tokenizer: Directory of the visual tokenizer that made the codes; without one no picture is decoded.
        out: Directory for overview.html and overview.png; by default that of the shards.
        pictures: Rows that are shown.
        rows: Rows in which codes and captions are counted; at least those that are shown.
        seed: Of the choice of rows.

    Raises:
        FileNotFoundError: directory, manifest or a shard is missing.
        ValueError: another visual tokenizer than the one that made the codes; damaged shards.
    """
    if pictures < 1:
        raise UserError(f"pictures {pictures}: show one at least.")
    tokenizer = None if visual_tokenizer is None else load_visual_tokenizer(visual_tokenizer)
    overview = look(Path(directory), tokenizer, pictures, max(rows, pictures), seed, progress=True)
    target = Path(out or directory)
    with whole_file(target / "overview.png") as file:
        file.write_bytes(_png(_poster(overview)))
    with whole_file(target / "overview.html") as file:
        file.write_text(page(overview), encoding="utf-8")
    for name, fact in overview.facts.items():
        print(f"{name}: {fact}")
    print(f"{target / 'overview.html'}\n{target / 'overview.png'}")


def look(
    directory: Path,
    tokenizer: VisualTokenizer | None,
    pictures: int,
    rows: int,
    seed: int = 0,
    progress: bool = False,
) -> Overview:
    """Read a sample of rows and decode some of them; arguments as those of `show`."""
    shards, manifest = TokenShards(directory), read_manifest(directory)
    if tokenizer is not None and tokenizer.fingerprint != shards.fingerprint:
        raise UserError(
            f"{directory} was made with the visual tokenizer {str(shards.fingerprint)[:12]}…, the one named is "
            f"{tokenizer.fingerprint[:12]}…: its pictures would be others. Name the one that made the codes."
        )
    overview = Overview(directory, manifest, shards.grids)
    overview.code_counts = np.zeros(manifest["codebook_size"] or 0, np.int64)
    total = len(shards)
    with tqdm(total=min(rows, total), desc="rows", unit="row", disable=not progress) as bar:
        for grid, count in shards.grids.items():
            chosen = min(count, math.ceil(rows * count / total))
            shown = math.ceil(pictures * count / total)
            numbers = shards.bucket(grid).rows(permutation(count, seed)(np.arange(chosen)))
            for first in range(0, chosen, ROWS_AT_ONCE):
                read = shards.read(numbers[first : first + ROWS_AT_ONCE])
                if read.codes.size:
                    overview.code_counts += np.bincount(read.codes.reshape(-1), minlength=len(overview.code_counts))
                for captions in read.captions:
                    overview.captions_a_row[len(captions)] += 1
                    overview.words += [len(caption.split()) for caption in captions]
                if first < shown:
                    part = slice(0, shown - first)
                    images = _decode(read.codes[part], tokenizer)
                    overview.pictures += zip(read.keys[part], read.captions[part], images, strict=True)
                bar.update(len(read.keys))
            overview.sampled += chosen
    overview.pictures = overview.pictures[: max(pictures, len(shards.grids))]
    return overview


@torch.no_grad()
def _decode(codes: npt.NDArray[np.uint16], tokenizer: VisualTokenizer | None) -> list[Image.Image | None]:
    if tokenizer is None or not codes.size:
        return [None] * len(codes)
    images: list[Image.Image | None] = []
    for part in torch.from_numpy(codes.astype(np.int64)).split(DECODED_AT_ONCE):
        pixels = ((tokenizer.decode(part).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images += [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def page(overview: Overview) -> str:
    """The page, complete in itself."""
    escape = html.escape
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(fact)}</td></tr>" for name, fact in overview.facts.items())
    figures = []
    for key, captions, image in overview.pictures:
        shown = (
            "" if image is None else f'<img src="{_embedded(_png_of(image))}" alt="{escape(captions[0], quote=True)}">'
        )
        texts = "".join(f"<p>{escape(caption) or '<i>empty</i>'}</p>" for caption in captions)
        figures.append(f"<figure>{shown}<figcaption>{texts}<small>{escape(key)}</small></figcaption></figure>")
    drops = "".join(f"<tr><td>{escape(reason)}</td><td>{count:,}</td></tr>" for reason, count in overview.drops.items())
    sources = escape(json.dumps(settings_of(overview.manifest), indent=2, ensure_ascii=False))
    charts = Figure(figsize=(11, 3), dpi=110, layout="constrained")
    _draw_charts(overview, list(charts.subplots(1, 2)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(overview.directory.name)}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: {INK}; max-width: 1180px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} th, td {{ text-align: left; padding: .2em 1em .2em 0; vertical-align: top }}
th {{ font-weight: 600; white-space: nowrap }} h2 {{ margin-top: 2em }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1.2em }}
figure {{ margin: 0 }} figure img {{ width: 100%; image-rendering: auto; border: 1px solid #dadce0 }}
figcaption p {{ margin: .3em 0; overflow-wrap: anywhere }} small {{ color: {FAINT}; overflow-wrap: anywhere }}
pre {{ overflow-x: auto; background: #f6f7f8; padding: 1em }} .chart {{ max-width: 100% }}
</style></head><body>
<h1>{escape(str(overview.directory))}</h1>
<table>{facts}</table>
<h2>Rows</h2><div class="pictures">{"".join(figures)}</div>
<h2>Codes and captions</h2><img class="chart" src="{_embedded(_png(charts))}" alt="code use and caption lengths">
<h2>Left out</h2>{f"<table>{drops}</table>" if drops else "<p>nothing</p>"}
<h2>Sources and settings</h2><pre>{sources}</pre>
</body></html>
"""


def _poster(overview: Overview) -> Figure:
    """Pictures with their captions over the charts."""
    columns = min(COLUMNS, len(overview.pictures)) or 1
    lines = math.ceil(len(overview.pictures) / columns)
    with_pictures = any(image is not None for *_, image in overview.pictures)
    height = 2.7 if with_pictures else 1.1
    figure = Figure(figsize=(2 * COLUMNS, lines * height + 3.4), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[lines * height, 3.4])
    top, bottom = parts
    top.suptitle(f"{overview.directory.name}: {overview.facts['rows']} rows, {overview.facts['grids']}", color=INK)
    cells: Sequence[Axes] = top.subplots(lines, columns, squeeze=False).flat
    for number, axes in enumerate(cells):
        axes.axis("off")
        if number >= len(overview.pictures):
            continue
        _, captions, image = overview.pictures[number]
        # A dollar sign would begin a formula.
        wrapped = textwrap.wrap(captions[-1].replace("$", r"\$"), CAPTION_LETTERS)
        text = "\n".join(wrapped[:CAPTION_LINES]) + ("…" if len(wrapped) > CAPTION_LINES else "")
        if image is not None:
            axes.imshow(np.asarray(image), interpolation="nearest")
        axes.text(0.5, -0.04 if image is not None else 1, text, transform=axes.transAxes, ha="center", va="top", size=7)
    _draw_charts(overview, list(bottom.subplots(1, 2)))
    return figure


def _draw_charts(overview: Overview, axes: Sequence[Axes]) -> None:
    codes, captions = axes
    if overview.code_counts.any():
        shares = np.sort(overview.code_counts)[::-1] / overview.code_counts.sum()
        codes.fill_between(np.arange(1, len(shares) + 1), shares, color=BAR, alpha=0.6, linewidth=0)
        codes.axhline(1 / len(shares), color=FAINT, linewidth=0.8, linestyle="--")
        codes.set_yscale("log")
        codes.set(xlabel="code, by frequency (dashed: all alike)", ylabel="share of all codes")
        codes.set_title(f"{overview.entropy:.2f} of {math.log2(len(shares)):.2f} bits", color=INK)
    else:
        codes.set_title("no codes", color=FAINT)
    if overview.words:
        captions.hist(overview.words, bins=min(40, max(overview.words) + 1), color=BAR, alpha=0.6)
        captions.set(xlabel="words of a caption", ylabel="captions")
        captions.set_title(f"{len(overview.words):,} captions", color=INK)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
