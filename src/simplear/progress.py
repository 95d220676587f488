"""Bars over long work; where there is no terminal to draw them on, a line every few seconds."""

from __future__ import annotations

import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


def progress_bar(total: int | None, title: str, unit: str, shown: bool = True, unit_scale: bool = False) -> tqdm:
    """A bar to update and close.

    Args:
        total: units of all the work; None where that is unknown.
        title: before it.
        unit: what is counted; a space before it sets a word apart from its number.
        shown: False counts and shows nothing.
        unit_scale: with k, M and G, as for bytes.
    """
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit_scale,
        disable=not shown,
        mininterval=0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES,
    )
