"""The window that gives the most codes a second, on machines and pictures that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from simplear.generation.window import TRIED_AGAIN, WINDOWS, WindowChoice


def drawn_with(choice: WindowChoice, rows: int, cost, right: float, passes: int, spikes: float = 0.0) -> list[int]:
    """Windows chosen where a pass takes cost(window) seconds and each draft is right with that probability."""
    random, chosen = np.random.default_rng(0), []
    for _ in range(passes):
        window = choice.best(rows)
        chosen.append(window)
        wrong = random.random((rows // 2, window + 1)) > right
        wrong[:, -1] = True
        seconds = cost(window) * (20 if random.random() < spikes else 1)
        choice.observe(rows, window, seconds, (wrong.argmax(axis=1) + 1).tolist())
    return chosen


def rate(window: int, cost, right: float) -> float:
    return sum(right**draft for draft in range(window + 1)) / cost(window)


@pytest.mark.parametrize("spikes", [0.0, 0.2])
@pytest.mark.parametrize("right", [0.05, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    "cost", [lambda window: 1.0, lambda window: 1.0 + window, lambda window: 2.0 + 0.2 * window], ids=["0", "1", "0.1"]
)
def test_it_comes_to_the_best_window(cost, right, spikes):
    """Nearly the best: where two give much the same, either will do. It holds beside neighbours on the machine too."""
    choice = WindowChoice()
    drawn_with(choice, 8, cost, right, 3 * TRIED_AGAIN, spikes)
    chosen = drawn_with(choice, 8, cost, right, TRIED_AGAIN // 2)
    best = max(rate(window, cost, right) for window in WINDOWS)
    usual = max(set(chosen), key=chosen.count)
    assert rate(usual, cost, right) > 0.9 * best
    assert chosen.count(usual) > 0.6 * len(chosen)


def test_drafts_that_cost_what_they_bring_are_left_out():
    """As in a large batch: a pass of W drafts takes W + 1 times as long, and some drafts are wrong."""
    choice = WindowChoice()
    drawn_with(choice, 64, lambda window: 1.0 + window, 0.6, 50)
    assert choice.best(64) == 0


def test_each_number_of_rows_has_its_own():
    choice = WindowChoice()
    drawn_with(choice, 2, lambda window: 1.0, 0.7, 50)
    drawn_with(choice, 64, lambda window: 1.0 + window, 0.7, 50)
    assert (choice.best(2), choice.best(64)) == (15, 0)


def test_it_follows_when_the_pictures_change():
    choice = WindowChoice()
    cost = lambda window: 2.0 + 0.5 * window  # noqa: E731
    drawn_with(choice, 4, cost, 0.95, 300)
    assert choice.best(4) == 7
    drawn_with(choice, 4, cost, 0.1, 300)
    assert choice.best(4) in (0, 1)
