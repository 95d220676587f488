"""How many drafts a pass of `jacobi` should verify: as many as give the most codes a second, measured while drawing.

Nothing here knows of models. What a pass costs depends on the machine, the model and the number of rows; how many
drafts are right depends on the model and the pictures. Both are seen in every pass, so nothing is set by hand.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

WINDOWS = (15, 7, 3, 1, 0)
"""To choose from; W drafts and the code before them make W + 1 tokens a row. 0 is drawing code by code."""
TIMES_KEPT = 9
"""Passes whose shortest time is a window's cost: neighbours on the machine make single passes slow."""
TRIED_AGAIN = 200
"""Passes after which a window that was not chosen is tried again."""
MEMORY = 200
"""Passes of an image after which what was seen of drafts weighs 1/e."""


class WindowChoice:
    """Learns from passes and says which window the next one should have."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=TIMES_KEPT))
        self._last: dict[tuple[int, int], int] = {}
        self._passes = 0
        self._right: dict[int, float] = defaultdict(float)
        self._asked: dict[int, float] = defaultdict(float)

    def observe(self, rows: int, window: int, seconds: float, final: Sequence[int]) -> None:
        """One pass: its rows, its window, what it took, and how many codes it made final in each image to count.

        To count are those that are behind all others, for they say when a batch is done.
        """
        self._seconds[rows, window].append(seconds)
        self._passes += 1
        self._last[rows, window] = self._passes
        fade = (1 - 1 / MEMORY) ** len(final)
        for draft in range(window):
            self._asked[draft] = self._asked[draft] * fade + len(final)
            self._right[draft] = self._right[draft] * fade + sum(number > draft + 1 for number in final)

    def best(self, rows: int) -> int:
        """The window for the next pass over so many rows; one that was not tried for long comes first, the widest."""
        for window in WINDOWS:
            if self._passes - self._last.get((rows, window), -TRIED_AGAIN) >= TRIED_AGAIN:
                return window
        return max(WINDOWS, key=lambda window: self.codes(window) / min(self._seconds[rows, window]))

    def codes(self, window: int) -> float:
        """Codes that a pass is expected to make final in an image."""
        # Nothing is expected of drafts that were never tried.
        return 1 + sum(self._right[draft] / max(self._asked[draft], 1e-9) for draft in range(window))
