"""What a request says of its image survives the way through vLLM, and what no image can have is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from simplear.generation import SamplingSettings
from simplear_vllm.request import REQUIRED, ImageRequest

GUIDED = ImageRequest(
    codes=3,
    seed=2**64 - 1,
    image_token_offset=40,
    codebook_size=50,
    sampling=SamplingSettings(guidance_scale=2.0, temperature=0.7, top_k=5, top_p=0.9),
    pair="a",
    role="negative",
    fixed_codes=(-1, 4, 49),
)
PLAIN = ImageRequest(3, 0, 40, 50, SamplingSettings(do_sample=False))


def params(request: ImageRequest, **changes) -> SimpleNamespace:
    """vLLM's sampling parameters, after a way through JSON."""
    extra = json.loads(json.dumps(request.extra_args()))
    return SimpleNamespace(**{**REQUIRED, "max_tokens": request.codes, "extra_args": extra, **changes})


@pytest.mark.parametrize("request_", [GUIDED, PLAIN])
def test_requests_survive_the_way(request_):
    assert ImageRequest.of(params(request_)) == request_
    assert all(name.startswith("simplear_") for name in request_.extra_args())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_args": None}, "only draws images"),
        ({"extra_args": {"other": 1}}, "only draws images"),
        ({"temperature": 1.0}, r"temperature=1\.0"),
        ({"n": 2}, "n=2"),
        ({"ignore_eos": False}, "ignore_eos=False"),
        ({"stop_token_ids": [4]}, "stop_token_ids"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 2}, "2 codes .* 3 of them fixed_codes"),
    ],
)
def test_parameters_that_no_image_can_have_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ImageRequest.of(params(GUIDED, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"simplear_pair": None}, "an image with guidance is two requests"),
        ({"simplear_role": "third"}, "role 'third'"),
        ({"simplear_seed": -1}, "seed -1"),
        ({"simplear_seed": "one"}, "simplear_… of the request"),
        ({"simplear_fixed_codes": [1, 2, 50]}, "fixed_codes"),
        ({"simplear_top_p": 2.0}, r"top_p 2\.0"),
        ({"simplear_colour": "red"}, "colour"),
    ],
)
def test_arguments_out_of_range_are_named(changes, words):
    extra = {name: value for name, value in {**GUIDED.extra_args(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        ImageRequest.of(params(GUIDED, extra_args=extra))


def test_an_argument_that_is_missing_is_named():
    extra = {name: value for name, value in PLAIN.extra_args().items() if name != "simplear_codebook_size"}
    with pytest.raises(ValueError, match="codebook_size"):
        ImageRequest.of(params(PLAIN, extra_args=extra))
