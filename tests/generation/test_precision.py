"""Every engine in every precision that a Trainer has: the codes are the model's, up to what its rounding can part."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from generation.models import language_model
from generation.near_ties import margins
from generation.test_cached import GRID, NEGATIVES, PROMPTS
from simplear.generation import SamplingSettings, make_engine

ENGINES = {
    "baseline": {},
    "kv-cache": {},
    "cached": {},
    "fused": {},
    "compiled": {},
    "jacobi": {"window": 3},
    "jacobi, compiled": {"window": 3, "compiled": True},
}
PRECISIONS = {"32-true": 1e-4, "bf16-mixed": 1.0, "bf16-true": 1.0}
"""How far a code may be from winning, by a float64 model of the same weights, where an engine parts from that model."""
IMAGES = 12


@pytest.mark.usefixtures("traced_not_compiled")
@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ENGINES)
def test_codes_part_from_the_exact_ones_at_near_ties_alone(name: str, precision: str, rope: str) -> None:
    model = language_model(rope, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    exact = language_model(rope)
    exact.load_state_dict(model.state_dict())
    asked = (PROMPTS * 3, NEGATIVES * 3, GRID, SamplingSettings(guidance_scale=2.0), list(range(IMAGES)))
    engine = make_engine(name.partition(",")[0], model, **ENGINES[name])
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        codes, _ = engine.generate(*asked)
    found = margins(exact, *asked, codes, make_engine("cached", exact).generate(*asked)[0])
    assert all(margin is None or margin < PRECISIONS[precision] for margin in found)
    assert found.count(None) >= (IMAGES - 1 if precision == "32-true" else IMAGES // 4)
