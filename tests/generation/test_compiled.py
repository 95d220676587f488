"""The compiled engine draws what a plain loop draws, compiles once a shape, and waits for nothing in between."""

from __future__ import annotations

import pytest
import torch

from generation.models import language_model
from generation.test_cached import GRID, NEGATIVES, PROMPTS, SEEDS, SETTINGS, plainly
from simplear.generation import CachedEngine, CompiledEngine, JacobiEngine


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("traced_not_compiled")
def test_codes_are_those_of_a_plain_loop(rope, settings):
    model = language_model(rope)
    codes, stats = CompiledEngine(model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    assert torch.equal(codes, plainly(model, settings))
    assert (stats.engine, stats.images, stats.tokens, stats.steps) == ("compiled", 4, 48, 12)


def test_codes_are_those_of_a_plain_loop_when_code_is_generated():
    """In float64 against the loop and in float32 against the cached engine; with guidance, ragged, with 2-D RoPE."""
    model = language_model("2d")
    for engine in (CompiledEngine(model), JacobiEngine(model, 2, compiled=True)):
        codes, _ = engine.generate(PROMPTS, NEGATIVES, GRID, SETTINGS[-1], SEEDS)
        assert torch.equal(codes, plainly(model, SETTINGS[-1]))


@pytest.mark.usefixtures("traced_not_compiled")
def test_there_may_be_many_shapes():
    """torch allows 8 of a function, of all engines together, if nothing else is said."""
    model = language_model()
    for engine in (CompiledEngine(model), CompiledEngine(model)):
        for images in range(1, 6):
            asked = (PROMPTS[:1] * images, NEGATIVES[:1] * images, (1, 2), SETTINGS[-1], list(range(images)))
            codes, _ = engine.generate(*asked)
            assert torch.equal(codes, CachedEngine(model).generate(*asked)[0])


@pytest.mark.usefixtures("traced_not_compiled")
def test_nothing_is_read_back_between_codes(monkeypatch):
    """Reading a number from the device waits for all that was asked of it."""
    read = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, name=name: (read.append(name), original(self))[1]
        )
    model = language_model()
    counts = []
    for grid in ((1, 4), (3, 4)):
        engine = CompiledEngine(model)
        engine.generate(PROMPTS, NEGATIVES, grid, SETTINGS[-1], SEEDS)
        read.clear()
        engine.generate(PROMPTS, NEGATIVES, grid, SETTINGS[-1], SEEDS)
        counts.append(len(read))
    assert counts[0] == counts[1]
