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

WINDOWS = (0, 1, 3, 7, 15)
"""To choose from; W drafts and the code before them make W + 1 tokens a row. 0 is drawing code by code."""
TIMES_KEPT = 9
"""Passes whose shortest time is a window's cost: neighbours on the machine make single passes slow."""
TIMED_AT_FIRST = 2
"""Passes of a window before its time is believed."""
TIMED_AGAIN = 1000
"""Passes after which the time of a window that was not chosen is forgotten."""
ASKED_AGAIN = 50
"""Passes without drafts after which one is made, to see whether it would be right."""
MEMORY = 10
"""Passes after which what was seen of drafts weighs 1/e, also where there were none: what is not known is tried again
where it costs little.
"""
GAIN = 1.1
"""Times the codes a second of no drafts that some must promise: what is measured is not exact."""


class WindowChoice:
    """Learns from the passes over one number of rows and says which window the next one should have."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {window: deque(maxlen=TIMES_KEPT) for window in WINDOWS}
        self._last = dict.fromkeys(WINDOWS, 0)
        self._passes = self._last_draft = 0
        self._right = self._wrong = 0.0

    def observe(self, window: int, seconds: float, codes: int) -> None:
        """One pass: its window, what it took, and how many codes it made final in the image that is behind."""
        self._passes += 1
        self._seconds[window].append(seconds)
        self._last[window] = self._passes
        fade = 1 - 1 / MEMORY
        self._right, self._wrong = self._right * fade, self._wrong * fade
        if window:
            self._last_draft = self._passes
            self._right += codes - 1
            self._wrong += codes <= window

    def best(self) -> int:
        """The window for the next pass."""
        for window, seconds in self._seconds.items():
            if self._passes - self._last[window] >= TIMED_AGAIN:
                seconds.clear()
        if not self._timed(0):
            return 0
        if self._passes - self._last_draft >= ASKED_AGAIN:
            return min(window for window in WINDOWS if window)
        most = max(WINDOWS, key=self._codes_a_second)
        if self._codes_a_second(most) <= GAIN * self._codes_a_second(0):
            return 0
        return next(window for window in WINDOWS if window == most or not self._timed(window))

    def codes(self, window: int) -> float:
        """Codes that a pass is expected to make final."""
        chance = (self._right + 0.5) / (self._right + self._wrong + 1)
        return sum(chance**draft for draft in range(window + 1))

    def _codes_a_second(self, window: int) -> float:
        return self.codes(window) / self._cost(window)

    def _cost(self, window: int) -> float:
        """Seconds of a pass, or at least so many where it was not timed: those of the widest narrower one that was.

        A wider one that was faster shows that this one was disturbed.
        """
        timed = [each for each in WINDOWS if self._timed(each)]
        from_here = [each for each in timed if each >= max(narrower for narrower in timed if narrower <= window)]
        return min(min(self._seconds[each]) for each in from_here)

    def _timed(self, window: int) -> bool:
        return len(self._seconds[window]) >= TIMED_AT_FIRST
