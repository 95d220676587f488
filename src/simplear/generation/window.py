"""How many drafts a pass of `jacobi` should verify: as many as give the most codes a second, measured while drawing.

What a pass takes depends on machine, model and number of rows, and is seen in each. How many drafts are right depends
on the model and on where in which picture it is: a plain background is guessed, an edge is not. So the chance that a
draft is right if those before it are is followed over the last passes, whatever their window was: with a chance of a,
W drafts make (1 − a^(W + 1)) / (1 − a) codes final. A batch is done when its last image is, so what counts is how far
the image that is behind has come: in a large batch hardly farther than without drafts.

A window is tried where it would win if it cost no more than a narrower one, the narrowest first; so one that cannot win
is not tried, and drafts that lose are hardly paid for. Nothing here knows of models.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise

WINDOWS = (0, 1, 3, 7, 15)
"""To choose from; W drafts and the code before them make W + 1 tokens a row. 0 is drawing code by code."""
TIMES_KEPT = 9
"""Passes whose lower quartile is a window's cost: neighbours on the machine make single passes slow, and the quickest
was lucky.
"""
TIMED_AT_FIRST = 2
"""Passes of a window before its time is believed; without drafts, which risks nothing, all that are kept."""
TIMED_AGAIN = 300
"""Passes after which the time of a window that was not chosen is forgotten."""
ASKED_AGAIN = 50
"""Passes without drafts after which one is made, to see whether it would be right."""
MEMORY = 20
"""Passes after which what was seen of drafts weighs 1/e, also where there were none: what is not known is tried again
where it costs little.
"""
GAIN = 1.1
"""Times the codes a second of no drafts that some must promise: what is measured is not exact."""


class WindowChoice:
    """Learns from the passes over one number of rows and says which window the next one should have."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {window: deque(maxlen=TIMES_KEPT) for window in WINDOWS}
        self._cost: dict[int, float] = {}  # of windows that were timed
        self._last = dict.fromkeys(WINDOWS, 0)
        self._passes = self._last_draft = 0
        self._right = self._wrong = 0.0

    def observe(self, window: int, seconds: float, codes: int) -> None:
        """One pass: its window, what it took, and how many codes it made final in the image that is behind."""
        self._passes += 1
        self._last[window] = self._passes
        times = self._seconds[window]
        times.append(seconds)
        if len(times) >= (TIMED_AT_FIRST if window else TIMES_KEPT):
            self._cost[window] = sorted(times)[len(times) // 4]
        fade = 1 - 1 / MEMORY
        self._right, self._wrong = self._right * fade, self._wrong * fade
        if window:
            self._last_draft = self._passes
            self._right += codes - 1
            self._wrong += codes <= window

    def best(self) -> int:
        """The window for the next pass."""
        for window, last in self._last.items():
            if self._passes - last >= TIMED_AGAIN:
                self._seconds[window].clear()
                self._cost.pop(window, None)
        if 0 not in self._cost:
            return 0
        if self._passes - self._last_draft >= ASKED_AGAIN:
            return min(window for window in WINDOWS if window)
        chance = (self._right + 0.5) / (self._right + self._wrong + 1)
        best, most = 0, GAIN / self._least_cost(0)
        codes = 1.0
        for narrower, window in pairwise(WINDOWS):
            codes += sum(chance**draft for draft in range(narrower + 1, window + 1))
            promised = codes / self._least_cost(window)
            if promised > most:
                best, most = window, promised
        return next(window for window in WINDOWS if window == best or window not in self._cost)

    def _least_cost(self, window: int) -> float:
        """Seconds of a pass, or at least so many where it was not timed: those of the widest narrower one that was.

        A wider one that was faster shows that this one was disturbed.
        """
        narrower = max(each for each in self._cost if each <= window)
        return min(seconds for each, seconds in self._cost.items() if each >= narrower)
