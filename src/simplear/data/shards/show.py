"""A page about a set of token shards: ``simplear data show``.

Pictures are decoded from their codes, so the page shows what training sees. Code use, caption lengths and pictures are
of a sample of rows, spread over the set by a permutation; grids and drops are of the whole set. The page is one HTML
file without scripts.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image

from simplear.atomic import whole_file
from simplear.data.shards.format import settings_of
from simplear.data.shards.reader import TokenShards, read_manifest
from simplear.errors import UserError
from simplear.hashing import permutation
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer

ROWS_AT_ONCE = 256
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto }
th, td { text-align: left; padding: .2em 1em .2em 0; vertical-align: top } th { white-space: nowrap }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1.2em }
figure { margin: 0; overflow-wrap: anywhere } figure img { width: 100% } pre { overflow-x: auto }
"""


@dataclass
class RowSample:
    """What was counted in a sample of rows, and the rows to show."""

    code_counts: npt.NDArray[np.int64]
    """(codebook_size,)"""
    rows: int = 0
    words: list[int] = field(default_factory=list)
    """Of each caption."""
    examples: list[tuple[str, list[str], Image.Image | None]] = field(default_factory=list)
    """Key, captions and, if a visual tokenizer was given, picture."""


def show(
    directory: str,
    *,
    visual_tokenizer: str | None = None,
    out: str | None = None,
    pictures: int = 24,
    rows: int = 20_000,
    seed: int = 0,
) -> None:
    """Write a page about a set of token shards: pictures, captions, codes, sources, drops.

    Args:
        directory: Finished token shards.
        visual_tokenizer: Directory of the visual tokenizer that made the codes; without it no picture is decoded.
        out: Directory for overview.html; by default that of the shards.
        pictures: Rows that are shown.
        rows: Rows in which codes and captions are counted.
        seed: Of the choice of rows.

    Raises:
        FileNotFoundError: directory, manifest or a shard is missing.
        ValueError: another visual tokenizer than the one that made the codes; damaged shards.
    """
    shards, manifest = TokenShards(directory), read_manifest(Path(directory))
    tokenizer = None if visual_tokenizer is None else load_visual_tokenizer(visual_tokenizer)
    if tokenizer is not None and tokenizer.fingerprint != shards.fingerprint:
        raise UserError(
            f"{directory} was made with the visual tokenizer {str(shards.fingerprint)[:12]}…, the one named is "
            f"{tokenizer.fingerprint[:12]}…: its pictures would be others. Name the one that made the codes."
        )
    sample = sample_rows(shards, tokenizer, pictures, rows, seed)
    facts = facts_of(shards, manifest, sample)
    page = Path(out or directory) / "overview.html"
    with whole_file(page) as partial:
        partial.write_text(page_html(directory, manifest, facts, sample), encoding="utf-8")
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print(page)


@torch.no_grad()
def sample_rows(
    shards: TokenShards, tokenizer: VisualTokenizer | None, pictures: int, rows: int, seed: int = 0
) -> RowSample:
    """Read a sample of rows and decode some of them; each grid has its share. Arguments as those of `show`."""
    sample = RowSample(np.zeros(shards.codebook_size or 0, np.int64))
    for grid, count in shards.grids.items():
        counted, shown = (math.ceil(min(limit / len(shards), 1) * count) for limit in (max(rows, pictures), pictures))
        numbers = shards.bucket(grid).rows(permutation(count, seed)(np.arange(counted)))
        for first in range(0, counted, ROWS_AT_ONCE):
            read = shards.read(numbers[first : first + ROWS_AT_ONCE])
            if read.codes.size:
                sample.code_counts += np.bincount(read.codes.reshape(-1), minlength=len(sample.code_counts))
            sample.words += [len(caption.split()) for captions in read.captions for caption in captions]
            for number in range(min(shown - first, len(read.keys))):
                image = None
                if tokenizer is not None and read.codes.size:
                    codes = torch.from_numpy(read.codes[number : number + 1].astype(np.int64))
                    pixels = ((tokenizer.decode(codes)[0].float() + 1) * 127.5).round().clamp(0, 255)
                    image = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).cpu().numpy())
                sample.examples.append((read.keys[number], read.captions[number], image))
        sample.rows += counted
    return sample


def facts_of(shards: TokenShards, manifest: Mapping[str, Any], sample: RowSample) -> dict[str, str]:
    """Numbers of the set in words."""
    drops = sum((Counter(shard.get("drops", {})) for shard in manifest["shards"]), Counter[str]())
    facts = {
        "rows": f"{len(shards):,} in {len(manifest['shards']):,} shards of {shards.size:,} bytes",
        "grids": ", ".join(f"{height} × {width}: {count:,}" for (height, width), count in shards.grids.items()),
        "dropped": ", ".join(f"{count:,} {reason}" for reason, count in drops.most_common()) or "nothing",
        "counted in": f"{sample.rows:,} rows",
        "visual tokenizer": str(manifest["visual_tokenizer"] or "none: texts alone"),
    }
    if sample.code_counts.any():
        shares = torch.from_numpy(sample.code_counts / sample.code_counts.sum())
        bits = float(torch.special.entr(shares).sum()) / math.log(2)
        facts["codes"] = (
            f"{int((shares > 0).sum()):,} of {len(shares):,} occur; entropy {bits:.2f} of {math.log2(len(shares)):.2f} "
            f"bits, perplexity {2**bits:,.0f}"
        )
    if sample.words:
        low, middle, high = np.percentile(sample.words, [5, 50, 95])
        facts["words of a caption"] = f"median {middle:.0f}, nine tenths {low:.0f} to {high:.0f}"
    return facts


def page_html(directory: str, manifest: Mapping[str, Any], facts: Mapping[str, str], sample: RowSample) -> str:
    """The page, complete in itself."""
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>" for name, fact in facts.items()]
    figures = []
    for key, captions, image in sample.examples:
        picture = "" if image is None else _embedded(partial(image.save, format="PNG"), captions[0])
        texts = "".join(f"<p>{html.escape(caption)}</p>" for caption in captions)
        figures.append(f"<figure>{picture}<figcaption>{texts}<small>{html.escape(key)}</small></figcaption></figure>")
    settings = html.escape(json.dumps(settings_of(manifest), indent=2, ensure_ascii=False))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(directory)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(directory)}</h1>
<table>{"".join(lines)}</table>
<h2>Rows</h2><div class="pictures">{"".join(figures)}</div>
<h2>Codes and captions</h2>{_embedded(_charts(sample).savefig, "code use and caption lengths")}
<h2>Settings</h2><pre>{settings}</pre>
</body></html>
"""


def _charts(sample: RowSample) -> Figure:
    figure = Figure(figsize=(11, 3), layout="constrained")
    codes, captions = figure.subplots(1, 2)
    if sample.code_counts.any():
        codes.semilogy(np.sort(sample.code_counts)[::-1] / sample.code_counts.sum())
    codes.set(xlabel="code, by frequency", ylabel="share of all codes")
    captions.hist(sample.words, bins=40)
    captions.set(xlabel="words of a caption", ylabel="captions")
    return figure


def _embedded(save: Callable[[io.BytesIO], Any], text: str) -> str:
    """An image as a part of the page."""
    png = io.BytesIO()
    save(png)
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" alt="{html.escape(text)}">'
