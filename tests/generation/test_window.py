"""The window that gives the most codes a second, on machines and pictures that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from simplear.generation.window import WINDOWS, WindowChoice


def drawn_with(choice: WindowChoice, images: int, cost, right: float, passes: int, spikes: float = 0.0) -> list[int]:
    """Windows chosen where a pass takes cost(window) seconds and each draft is right with that probability."""
    random, chosen, done = np.random.default_rng(0), [], np.zeros(images, dtype=int)
    for _ in range(passes):
        window = choice.best()
        chosen.append(window)
        wrong = random.random((images, window + 1)) > right
        wrong[:, -1] = True
        seconds, before = cost(window) * (20 if random.random() < spikes else 1), done.min()
        done += wrong.argmax(axis=1) + 1
        choice.observe(window, seconds, int(done.min() - before))
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
    drawn_with(choice, 1, cost, right, 600, spikes)
    chosen = drawn_with(choice, 1, cost, right, 100)
    best = max(rate(window, cost, right) for window in WINDOWS)
    reached = sum(rate(window, cost, right) * cost(window) for window in chosen) / sum(map(cost, chosen))
    assert reached > 0.85 * best


def test_drafts_that_cost_what_they_bring_are_left_out():
    """As in a large batch: a pass of W drafts takes W + 1 times as long, and some drafts are wrong."""
    choice = WindowChoice()
    drawn_with(choice, 32, lambda window: 1.0 + window, 0.6, 50)
    assert choice.best() == 0


@pytest.mark.parametrize("right", [0.3, 0.6])
def test_drafts_that_lose_are_hardly_paid_for(right):
    """From the first pass on, within 4 % of drawing code by code; windows that cannot win are not even timed."""
    choice = WindowChoice()
    cost = lambda window: 1.0 + window  # noqa: E731
    chosen = drawn_with(choice, 8, cost, right, 400, spikes=0.2)
    assert sum(map(cost, chosen)) < 1.04 * 400 and 15 not in chosen


def test_it_follows_when_the_pictures_change():
    choice = WindowChoice()
    cost = lambda window: 2.0 + 0.5 * window  # noqa: E731
    drawn_with(choice, 1, cost, 0.95, 60)
    assert choice.best() in (7, 15)
    assert set(drawn_with(choice, 1, cost, 0.1, 60)[-20:]) <= {0, 1}
    assert 15 in drawn_with(choice, 1, cost, 0.99, 120)[-20:]


def test_an_easy_beginning_does_not_mislead_a_large_batch():
    """All drafts of the first pass are right, as on a plain background, and then few; wide passes are dear."""
    choice = WindowChoice()
    cost = lambda window: 1.0 + 0.6 * window  # noqa: E731
    drawn_with(choice, 32, cost, 1.0, 8)
    seconds = sum(cost(window) for window in drawn_with(choice, 32, cost, 0.3, 100))
    assert seconds < 1.35 * 100 * cost(0)
