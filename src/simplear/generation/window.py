"""How many drafts a pass of `jacobi` should verify: as many as give the most codes a second, measured while drawing.

What a pass takes depends on machine, model and number of rows, and is seen in each. How many drafts are right depends
on the model and on where in which picture it is: a plain background is guessed, an edge is not. So the chance that a
draft is right if those before it are is followed over the last passes, whatever their window was: with a chance of a,
W drafts make (1 − a^(W + 1)) / (1 − a) codes final. A batch is done when its last image is, so what counts is how far
the image that is behind has come: in a large batch hardly farther than without drafts. Nothing here knows of models.
"""

from __future__ import annotations

from collections import defaultdict, deque

WINDOWS = (0, 1, 3, 7, 15)
"""To choose from; W drafts and the code before them make W + 1 tokens a row. 0 is drawing code by code."""
TIMES_KEPT = 9
"""Passes whose shortest time is a window's cost: neighbours on the machine make single passes slow."""
TIMED_AT_FIRST = 2
"""Passes of a window before it is chosen or not."""
TIMED_AGAIN = 1000
"""Passes after which a window that was not chosen is timed again."""
ASKED_AGAIN = 50
"""Passes without drafts after which one is made, to see whether it would be right."""
MEMORY = 20
"""Passes after which what was seen of drafts weighs 1/e."""


class WindowChoice:
    """Learns from passes and says which window the next one should have."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=TIMES_KEPT))
        self._last: dict[tuple[int, int], int] = {}
        self._passes = self._last_draft = 0
        self._right = self._wrong = 0.0

    def observe(self, rows: int, window: int, seconds: float, codes: int) -> None:
        """One pass: its rows and window, what it took, and how many codes it made final in the image that is behind."""
        self._passes += 1
        self._seconds[rows, window].append(seconds)
        self._last[rows, window] = self._passes
        fade = 1 - 1 / MEMORY
        self._right, self._wrong = self._right * fade, self._wrong * fade
        if window:
            self._last_draft = self._passes
            self._right += codes - 1
            self._wrong += codes <= window

    def best(self, rows: int) -> int:
        """The window for the next pass over so many rows; one that was hardly timed, or not for long, comes first."""
        for window in WINDOWS:
            new = len(self._seconds[rows, window]) < TIMED_AT_FIRST
            if new or self._passes - self._last[rows, window] >= TIMED_AGAIN:
                return window
        if self._passes - self._last_draft >= ASKED_AGAIN:
            return min(window for window in WINDOWS if window)
        return max(WINDOWS, key=lambda window: self.codes(window) / self._cost(rows, window))

    def _cost(self, rows: int, window: int) -> float:
        """Seconds of a pass; a wider one that was faster shows that this one was disturbed."""
        return min(min(self._seconds[rows, wider]) for wider in WINDOWS if wider >= window)

    def codes(self, window: int) -> float:
        """Codes that a pass is expected to make final."""
        chance = (self._right + 0.5) / (self._right + self._wrong + 1)
        return sum(chance**draft for draft in range(window + 1))
