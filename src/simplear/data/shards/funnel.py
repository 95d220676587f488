"""A picture of what was left of a corpus after each reason to leave something out."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from simplear.data.shards.reader import write_atomically

FUNNEL_FILE = "drops.png"
WIDTH, HEIGHT_OF_BAR, DOTS_PER_INCH = 8.0, 0.3, 120


def funnel(manifest: Mapping[str, Any], filters: Sequence[Sequence[str]]) -> list[tuple[str, int, int]]:
    """Reason, samples dropped for it, and samples left then, in the order in which the picture shows them.

    What no filter claims (files that are no pictures, missing captions) comes first, the most frequent first; then the
    filters in their order.

    Args:
        manifest: of token shards.
        filters: the reasons of each filter.
    """
    drops: Counter[str] = Counter()
    for shard in manifest["shards"]:
        drops.update(shard["drops"])
    claimed = [reason for reasons in filters for reason in reasons]
    others = sorted(drops.keys() - set(claimed), key=lambda reason: (-drops[reason], reason))
    left, steps = manifest["rows"] + drops.total(), []
    for reason in [*others, *(reason for reason in claimed if drops[reason])]:
        left -= drops[reason]
        steps.append((reason, drops[reason], left))
    return steps


def draw_funnel(directory: Path, manifest: Mapping[str, Any], filters: Sequence[Sequence[str]]) -> Path:
    """Write ``drops.png``: a bar for the samples read, and one for those left after each reason."""
    steps = funnel(manifest, filters)
    total = manifest["rows"] + sum(dropped for _, dropped, _ in steps)
    labels = ["read", *(reason for reason, _, _ in steps)]
    lefts = [total, *(left for _, _, left in steps)]
    figure = Figure(figsize=(WIDTH, 1 + HEIGHT_OF_BAR * len(labels)), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    places = range(len(labels))
    axes.barh(places, lefts, color="tab:blue")
    axes.barh(places, [0, *(dropped for _, dropped, _ in steps)], left=lefts, color="tab:red", alpha=0.5)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"pictures: {manifest['rows']:,} of {total:,} kept")
    for place, left in zip(places, lefts, strict=True):
        dropped = "" if place == 0 else f", {steps[place - 1][1]:,} dropped"
        axes.text(0, place, f" {left:,}{dropped}", va="center", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(directory / FUNNEL_FILE, image.getvalue())
    return directory / FUNNEL_FILE
