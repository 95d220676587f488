"""Guidance at the scales where its result is known."""

from __future__ import annotations

import pytest
import torch

from simplear.generation import guide

CONDITIONAL = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
UNCONDITIONAL = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()


@pytest.mark.parametrize(("scale", "expected"), [(0.0, UNCONDITIONAL), (1.0, CONDITIONAL)])
def test_scale_0_is_unconditional_and_1_conditional(scale, expected):
    torch.testing.assert_close(guide(CONDITIONAL, UNCONDITIONAL, scale), expected)


def test_weights_are_the_product_of_powers():
    """p_cond^2 / p_uncond, by hand: 0.49/0.2, 0.04/0.5, 0.01/0.3."""
    weights = guide(CONDITIONAL, UNCONDITIONAL, 2.0).exp()
    torch.testing.assert_close(weights, torch.tensor([[2.45, 0.08, 1 / 30]], dtype=torch.float64))


def test_more_guidance_moves_mass_to_what_the_prompt_makes_more_likely():
    shares = [guide(CONDITIONAL, UNCONDITIONAL, scale).softmax(dim=-1)[0, 0].item() for scale in (0, 1, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.999
