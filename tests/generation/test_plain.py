"""The engines that are oracles of the others draw what a loop written for the test draws."""

from __future__ import annotations

import pytest
import torch

from generation.models import language_model
from generation.test_cached import GRID, NEGATIVES, PROMPTS, SEEDS, SETTINGS, plainly
from simplear.generation import make_engine


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("name", ["baseline", "kv-cache"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_codes_equal_those_of_a_plain_loop(rope, name, settings):
    model = language_model(rope)
    codes, stats = make_engine(name, model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    assert torch.equal(codes, plainly(model, settings))
    rows = 1 if settings.guidance_scale == 1 else 2
    assert (stats.engine, stats.images, stats.tokens, stats.steps) == (name, 4, 48, 48 * rows)


def test_the_baseline_reads_everything_again_and_the_cache_one_token(monkeypatch):
    fed = []
    model = language_model()
    hidden_states = type(model).hidden_states

    def counted(self, ids, *rest):
        fed.append(ids.shape[1])
        return hidden_states(self, ids, *rest)

    monkeypatch.setattr(type(model), "hidden_states", counted)
    for name, expected in (("baseline", [11, 12, 13]), ("kv-cache", [11, 1, 1])):
        fed.clear()
        make_engine(name, model).generate(PROMPTS[1:2], NEGATIVES[1:2], (1, 3), SETTINGS[0], SEEDS[1:2])
        assert fed == expected
