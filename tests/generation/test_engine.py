"""What holds for every engine: names, and codes that are given instead of drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from generation.models import CODEBOOK, language_model
from generation.near_ties import margins
from generation.test_cached import GRID, NEGATIVES, PROMPTS, SEEDS, SETTINGS, plainly
from simplear.errors import UserError
from simplear.generation import ENGINES, SamplingSettings, make_engine

pytestmark = pytest.mark.usefixtures("traced_not_compiled")

SAMPLED = SETTINGS[-1]
GREEDY = SETTINGS[1]
IN_MEMORY = sorted(ENGINES.keys() - {"vllm"})
"""Engines over a model; vLLM reads a directory, and has tests of its own (vllm_plugin)."""


@pytest.mark.parametrize("name", IN_MEMORY)
def test_each_name_makes_an_engine_over_the_model(name):
    model = language_model()
    engine = make_engine(name, model)
    assert engine.model is model


def test_an_unknown_engine_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"no engine 'cache'.*cached"):
        make_engine("cache", language_model())


def test_options_go_to_the_engine_and_unknown_ones_are_named():
    assert make_engine("jacobi", language_model(), window=3).window == 3
    with pytest.raises(ValueError, match=r"engine options of 'jacobi': .*windows.* Its options are: window, compiled"):
        make_engine("jacobi", language_model(), windows=3)
    with pytest.raises(
        ValueError, match=r"engine options of 'cached': .*max_num_seqs.* Its options are: prompt_multiple"
    ):
        make_engine("cached", language_model(), max_num_seqs=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"window": "wide"}, "window"), ({"window": True}, "window"), ({"window": -1}, "window -1 must be 0 or more")],
)
def test_an_option_of_another_kind_is_named(options, words):
    with pytest.raises(UserError, match=words):
        make_engine("jacobi", language_model(), **options)


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("name", IN_MEMORY)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [(torch.float32, GREEDY), (torch.float32, SAMPLED), (torch.bfloat16, SamplingSettings(guidance_scale=2.0))],
)
def test_rounding_parts_engines_only_at_near_ties(rope, dtype, name, settings):
    """Against `kv-cache`, judged by a float64 model of the same weights; bfloat16 rounds 65,536 times as coarsely as
    float32 does.
    """
    model = language_model(rope, dtype)
    judge = language_model(rope)
    judge.load_state_dict(model.state_dict())
    images, limit = 40, {torch.float32: 1e-4, torch.bfloat16: 1.0}[dtype]
    asked = (PROMPTS * 10, NEGATIVES * 10, GRID, settings, list(range(images)))
    found = margins(
        judge, *asked, make_engine(name, model).generate(*asked)[0], make_engine("kv-cache", model).generate(*asked)[0]
    )
    assert all(margin is None or margin < limit for margin in found)
    assert found.count(None) >= (images - 1 if dtype == torch.float32 else images // 4)


def fixed_codes() -> Tensor:
    """A row and some more that all images have, a hole in one of them, a code in the last row."""
    fixed = torch.full((4, *GRID), -1)
    fixed[:, 0] = torch.arange(4)
    fixed[:, 1, :2] = 7
    fixed[1, 1, 0] = -1
    fixed[2, 2, 3] = 9
    return fixed


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("name", IN_MEMORY)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_given_codes_stay_and_the_rest_is_drawn_behind_them(rope: str, name: str, settings: SamplingSettings) -> None:
    """Against the same continuation of the baseline, and of what a plain loop draws for codes that it drew itself."""
    model, fixed = language_model(rope), fixed_codes()
    codes, _ = make_engine(name, model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS, fixed_codes=fixed)
    assert torch.equal(codes[fixed >= 0], fixed[fixed >= 0])
    baseline, _ = make_engine("baseline", model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS, fixed_codes=fixed)
    assert torch.equal(codes, baseline)
    whole = plainly(model, settings)
    known = torch.where(fixed_codes() >= 0, whole, -1)
    known[2, 2, 3] = -1
    again, _ = make_engine(name, model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS, fixed_codes=known)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_rows_that_were_given_are_shown_too(name: str) -> None:
    seen: list[tuple[int, Tensor]] = []
    codes, _ = make_engine(name, language_model()).generate(
        *(PROMPTS, NEGATIVES, GRID, SAMPLED, SEEDS),
        on_row=lambda row, so_far: seen.append((row, so_far.clone())),
        fixed_codes=fixed_codes(),
    )
    assert [row for row, _ in seen] == [1, 2, 3]
    assert all(torch.equal(so_far, codes.flatten(1)[:, : row * GRID[1]]) for row, so_far in seen)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_all_codes_may_be_given(name: str) -> None:
    fixed = torch.arange(12).view(1, *GRID)
    codes, _ = make_engine(name, language_model()).generate(
        PROMPTS[:1], NEGATIVES[:1], GRID, SAMPLED, [0], fixed_codes=fixed
    )
    assert torch.equal(codes, fixed)


@pytest.mark.parametrize(
    "fixed",
    [
        torch.zeros(1, 3, 5, dtype=torch.long),
        torch.full((1, 3, 4), CODEBOOK),
        torch.full((1, 3, 4), -2),
    ],
)
def test_fixed_codes_of_another_shape_or_codebook_are_refused(fixed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"fixed_codes must be \(1, 3, 4\) codes in \[0, 50\), or -1"):
        make_engine("cached", language_model()).generate(
            PROMPTS[:1], NEGATIVES[:1], GRID, SAMPLED, [0], fixed_codes=fixed
        )
