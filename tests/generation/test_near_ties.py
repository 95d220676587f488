"""The judge of first differences knows a tie from a mistake."""

from __future__ import annotations

import pytest
import torch

from generation.models import language_model, prompts
from generation.near_ties import GREEDY, SAMPLED, margins, right
from simplear.generation import CachedEngine, SamplingSettings
from simplear.generation.sampling import Noise

GRID, SEEDS = (3, 4), [1, 2, 3]
MOVED = 1e-2
PROMPTS, NEGATIVES = prompts(2, 7, 0), prompts(1, 4, 4, seed=2)


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize(
    "settings", [SamplingSettings(guidance_scale=2.0, top_p=0.9), SamplingSettings(do_sample=False)]
)
def test_a_mistake_is_no_near_tie(rope, settings):
    model = language_model(rope)
    asked = (PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    codes, _ = CachedEngine(model).generate(*asked)
    assert margins(model, *asked, codes, codes) == [None, None, None]
    wrong = codes.clone()
    wrong[1, 1, 2] = (wrong[1, 1, 2] + 25) % model.layout.codebook_size
    found = margins(model, *asked, codes, wrong)
    assert found[0] is None and found[2] is None and found[1] > 10 * (SAMPLED if settings.do_sample else GREEDY)
    assert right(found, settings) == 2


def test_rounding_is_a_near_tie(monkeypatch):
    """Numbers moved by a little part some images, and each time by no more than that."""
    model, settings, seeds = language_model(), SamplingSettings(guidance_scale=2.0), list(range(500))
    asked = (PROMPTS[:1] * 500, NEGATIVES[:1] * 500, GRID, settings, seeds)
    codes, _ = CachedEngine(model).generate(*asked)
    at, moves = Noise.at, torch.Generator().manual_seed(0)

    def moved_a_little(self, places):
        numbers = at(self, places)
        return numbers * (1 + MOVED * (2 * torch.rand(numbers.shape, generator=moves, dtype=numbers.dtype) - 1))

    with monkeypatch.context() as changed:
        changed.setattr(Noise, "at", moved_a_little)
        moved, _ = CachedEngine(model).generate(*asked)
    found = margins(model, *asked, codes, moved)
    parted = torch.tensor([margin for margin in found if margin is not None])
    assert 3 < len(parted) < 100 and parted.max() < 2.1 * MOVED
