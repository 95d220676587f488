"""What a request says of its image survives the way through vLLM."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from simplear.generation import SamplingSettings
from simplear_vllm.request import ImageRequest

GUIDED = ImageRequest(
    codes=3,
    seed=2**64 - 1,
    image_token_offset=40,
    codebook_size=50,
    sampling=SamplingSettings(guidance_scale=2.0, temperature=0.7, top_k=5, top_p=0.9),
    pair="a",
    role="negative",
    fixed_codes=[-1, 4, 49],
)
PLAIN = ImageRequest(3, 0, 40, 50, SamplingSettings(do_sample=False))


@pytest.mark.parametrize("request_", [GUIDED, PLAIN])
def test_requests_survive_the_way(request_: ImageRequest) -> None:
    extra = json.loads(json.dumps(request_.extra_args()))
    assert ImageRequest.of(SimpleNamespace(extra_args=extra)) == request_


def test_a_request_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match="only draws images"):
        ImageRequest.of(SimpleNamespace(extra_args=None))
