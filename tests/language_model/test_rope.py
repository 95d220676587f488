"""2-D rotary positions: plain Qwen2 on text, an angle for each axis on images."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from simplear.generation.decoder_step import DecoderStep
from simplear.language_model import LanguageModel, LanguageModelConfig
from simplear.language_model.rope import Qwen2Rope2DConfig, RotaryEmbedding
from simplear.sequence import TokenLayout, encode_captions, training_batch
from toys import make_batch, model_config

HEAD_DIM = 12
THETA = 100.0


@pytest.fixture
def models(tiny_text_tokenizer: str) -> tuple[LanguageModel, LanguageModel, Any]:
    """A 1-D and a 2-D model of the same weights, and their text tokenizer."""
    torch.manual_seed(0)
    plain, tokenizer = model_config(tiny_text_tokenizer).build()
    two_dimensional, _ = model_config(tiny_text_tokenizer, rope="2d").build()
    two_dimensional.load_state_dict(plain.state_dict())
    return plain, two_dimensional, tokenizer


def rotary() -> RotaryEmbedding:
    config = Qwen2Rope2DConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    return RotaryEmbedding(config=config)


def rotated(vector: Tensor, row: int, column: int) -> Tensor:
    """The rotation written out with complex numbers: frequency i is of numbers i and i + HEAD_DIM / 2 of the vector."""
    half = HEAD_DIM // 2
    turned = torch.empty_like(vector)
    for i in range(half):
        angle = (row if i % 2 == 0 else column) * THETA ** (-2 * i / HEAD_DIM)
        number = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + half] = number.real, number.imag
    return turned


def test_text_alone_is_plain_qwen2_exactly(models: tuple[LanguageModel, LanguageModel, Any]) -> None:
    """Stock transformers' Qwen2 with the same weights, bit for bit."""
    _, model, tokenizer = models
    config = {key: value for key, value in model.decoder.config.to_dict().items() if key != "model_type"}
    stock = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    stock.load_state_dict(model.decoder.state_dict())
    captions = encode_captions(tokenizer, ["two blue squares", "a green cross left of a red triangle"])
    batch = training_batch(captions, torch.empty(2, 0, 0, dtype=torch.long), model.layout)
    model.eval()
    hidden = model.hidden_states(batch["input_ids"], model.training_positions(batch["input_ids"], (0, 0)), None)
    expected = stock.model(input_ids=batch["input_ids"]).last_hidden_state
    real = batch["attention_mask"].bool()
    assert torch.equal(hidden[real], expected[real])


def test_images_differ_from_plain_qwen2_after_the_first_row(models: tuple[LanguageModel, LanguageModel, Any]) -> None:
    plain, model, tokenizer = models
    batch = make_batch(model, tokenizer, (2, 3), ["two blue squares"])
    hidden = [
        m.eval().hidden_states(batch["input_ids"], m.training_positions(batch["input_ids"], (2, 3)), None)
        for m in (plain, model)
    ]
    difference = (hidden[0] - hidden[1]).abs().amax(dim=2)[0]
    first_code = len(difference) - 6
    assert difference[: first_code + 1].max() == 0
    assert (difference[first_code + 1 :] > 0).all()


def test_angles_are_rotations_by_row_and_column() -> None:
    embedding = rotary()
    query = torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, column in [(0, 0), (5, 0), (0, 5), (7, 3), (40, 41)]:
        cos, sin = embedding(query, torch.tensor([[[row]], [[column]]]))
        turned, _ = apply_rotary_pos_emb(query[None, None, None], query[None, None, None], cos, sin)
        torch.testing.assert_close(turned[0, 0, 0], rotated(query, row, column), rtol=1e-4, atol=1e-4)


def test_logits_depend_on_the_offset_of_rows_and_columns_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    embedding = rotary()

    def logit(query_at: tuple[int, int], key_at: tuple[int, int]) -> float:
        positions = torch.tensor([query_at, key_at]).T[:, None]
        cos, sin = embedding(query, positions)
        turned, _ = apply_rotary_pos_emb(torch.stack([query, key])[None, None], query[None, None, None], cos, sin)
        return float(turned[0, 0, 0] @ turned[0, 0, 1])

    reference = logit((5, 9), (3, 2))
    for shift in [(1, 0), (0, 1), (20, 3)]:
        assert logit((5 + shift[0], 9 + shift[1]), (3 + shift[0], 2 + shift[1])) == pytest.approx(reference, abs=1e-5)
    for other in [(6, 9), (5, 10), (9, 5)]:
        assert abs(logit(other, (3, 2)) - reference) > 1e-3


def test_both_axes_have_fast_and_slow_frequencies() -> None:
    """Each axis turns half of the pairs, and its fastest is within one step of the fastest of all."""
    frequencies = rotary().inv_freq
    probe = torch.ones(1, 1, HEAD_DIM)
    moved = []
    for position in [(1, 0), (0, 1)]:
        _, sin = rotary()(probe, torch.tensor(position).view(2, 1, 1))
        moved.append(sin[0, 0, : HEAD_DIM // 2].abs() > 0)
    assert (moved[0] ^ moved[1]).all()
    assert moved[0].sum() == moved[1].sum() == HEAD_DIM // 4
    assert {int(axis.nonzero()[0]) for axis in moved} == {0, 1}
    assert frequencies[0] > frequencies[1] > 0.4 * frequencies[0]


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("place", ["training", "reference", "fused step"])
def test_frequencies_stay_exact_whatever_a_model_is_cast_to(rope: str, place: str) -> None:
    """At a distance of 4,096, against angles in float64; a cast of the frequencies would lose five of 32."""
    architecture = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    architecture |= {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    layout = TokenLayout(0, 1, 20, 12)
    config = LanguageModelConfig("", 12, architecture=architecture, rope=rope)  # type: ignore[arg-type]
    model = LanguageModel(config.random_decoder(layout.vocab_size), layout)
    rounded = copy.deepcopy(Qwen2RotaryEmbedding(config=model.decoder.config)).to(torch.bfloat16)
    model = copy.deepcopy(model).to(torch.bfloat16) if place == "reference" else model.to(torch.bfloat16)
    embedding: Any = model.decoder.model.rotary_emb
    if place == "fused step":
        embedding = DecoderStep(model, torch.bfloat16).rotary
    exact = 4096 * 1e6 ** (-torch.arange(32, dtype=torch.float64) / 32)
    positions = torch.full((2, 1, 1) if rope == "2d" else (1, 1), 4096)
    cos, sin = (part[0, 0, :32] for part in embedding(torch.zeros(1), positions))
    turned_too_far = torch.atan2(sin.double(), cos.double()) - exact
    assert (torch.remainder(turned_too_far + math.pi, 2 * math.pi) - math.pi).abs().max() < 1e-3
    lost = (4096 * rounded.inv_freq.double() - exact).abs()
    assert (lost > 0.5).sum() >= 5
