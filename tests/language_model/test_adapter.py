"""An adapter begins as nothing, is the merged model throughout, and leaves what it is not for alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from simplear.generation import SamplingSettings, make_engine
from simplear.language_model import (
    Adapter,
    CheckpointSettings,
    LanguageModel,
    adapter_off,
    add_adapter,
    load_checkpoint,
    merged_model,
    next_token_losses,
    save_checkpoint,
)
from simplear.language_model.adapter import TARGETS, CodeRows
from simplear.sequence import prompt_sequence
from toys import CODEBOOK, make_batch, model_config

GRID = (2, 3)
KINDS = {
    "all matrices": ({}, {"r": 4}),
    "two of them": ({}, {"r": 3, "alpha": 5.0, "target_modules": ["q_proj", "v_proj"]}),
    "rows of codes": ({}, {"r": 4, "code_rows": True}),
    "rows, tied": ({"tie_word_embeddings": True}, {"r": 4, "code_rows": True}),
    "2-D RoPE": ({"rope": "2d"}, {"r": 4, "code_rows": True}),
}
"""Fields of the model and of the adapter."""


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest, tiny_text_tokenizer: str) -> tuple[LanguageModel, LanguageModel, Any]:
    """A plain model, the same with an adapter, and the text tokenizer."""
    fields, adapter = KINDS[request.param]
    torch.manual_seed(0)
    plain, tokenizer = model_config(tiny_text_tokenizer, **fields).build()
    adapted = copy.deepcopy(plain)
    add_adapter(adapted, Adapter(**adapter))
    return plain, adapted, tokenizer


@torch.no_grad()
def trained(model: LanguageModel) -> LanguageModel:
    """As after some steps: whatever has a gradient has moved."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) / 10)
    return model


@torch.no_grad()
def logits(model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return model.decoder.lm_head(model.hidden_states(ids, model.training_positions(ids, GRID), None))


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_can_be_switched_off(models: Any) -> None:
    plain, adapted, tokenizer = models
    batch = make_batch(plain, tokenizer, GRID)
    before = logits(plain, batch)
    assert torch.equal(logits(adapted, batch), before)
    trained(adapted)
    assert float((logits(adapted, batch) - before).abs().max()) > 1e-3
    with adapter_off(adapted):
        assert torch.equal(logits(adapted, batch), before)
        assert torch.equal(adapted.image_head_weight, plain.image_head_weight)
    assert not torch.equal(logits(adapted, batch), before)
    assert sum(weight.requires_grad for weight in adapted.parameters()) > 0, "trainable again"


def test_the_merged_model_has_the_adapters_logits_in_stock_transformers_too(models: Any, tmp_path: Path) -> None:
    plain, adapted, tokenizer = models
    batch = make_batch(plain, tokenizer, GRID)
    expected = logits(trained(adapted), batch)
    merged = merged_model(adapted)
    assert merged.state_dict().keys() == plain.state_dict().keys() and type(merged.decoder) is type(plain.decoder)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    settings = CheckpointSettings(plain.layout.image_token_offset, CODEBOOK, GRID, 8, rope=plain.rope)
    save_checkpoint(tmp_path / "merged", merged, tokenizer, settings)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "merged").model, batch), expected, rtol=0, atol=1e-5)
    if plain.rope == "1d":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            found = stock(batch["input_ids"]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_merged_model_beside_bfloat16_loses_nothing_of_what_was_added(models: Any) -> None:
    plain, _, _ = models
    for code_rows in (False, True):
        adapted = copy.deepcopy(plain)
        add_adapter(adapted, Adapter(r=4, code_rows=code_rows), torch.bfloat16)
        dtypes = {weight.requires_grad: weight.dtype for weight in adapted.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if name.endswith(("lora_B.default.weight", ".rows")):
                    weight.add_(1e-5)  # less than bfloat16's next number for most weights
        merged, before = merged_model(adapted).state_dict(), plain.state_dict()
        assert {weight.dtype for weight in merged.values()} == {torch.float32}
        name = "decoder.model.layers.0.self_attn.q_proj"
        small = adapted.get_submodule(name).lora_A.default.weight.sum(dim=0)  # type: ignore[union-attr, operator]
        expected = before[f"{name}.weight"].bfloat16().float() + 2e-5 * small
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-7)
        rows, first = merged["decoder.lm_head.weight"], plain.layout.image_token_offset
        moved = before["decoder.lm_head.weight"] + 1e-5 if code_rows else before["decoder.lm_head.weight"].bfloat16()
        torch.testing.assert_close(rows[first:], moved[first:].float(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["by_modality", "full"])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_gradients_are_those_of_the_whole_models_weights(models: Any, chunk_rows: int | None, normalizer: Any) -> None:
    """By the chain rule: of what is added B·A, of rows as they are; and none of any other weight."""
    _, adapted, tokenizer = models
    merged = merged_model(trained(adapted))
    batch = make_batch(adapted, tokenizer, GRID)
    for model in (adapted, merged):
        image, text = model(batch["input_ids"], batch["labels"], GRID, normalizer=normalizer, chunk_rows=chunk_rows)
        (image.mean() + text.mean()).backward()
    whole = {name: weight.grad for name, weight in merged.named_parameters()}
    checked = 0
    for name, layer in adapted.named_modules():
        if isinstance(layer, CodeRows):
            tied = merged.decoder.config.tie_word_embeddings
            expected = whole["decoder.model.embed_tokens.weight" if tied else f"{name}.weight"]
            torch.testing.assert_close(layer.rows.grad, expected[layer.first_code :], rtol=1e-4, atol=1e-6)
        elif hasattr(layer, "lora_A"):
            down, up, scale = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.scaling["default"]
            torch.testing.assert_close(up.grad, scale * whole[f"{name}.weight"] @ down.T, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(down.grad, scale * up.T @ whole[f"{name}.weight"], rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == 2 * len(adapted.decoder.model.layers[0].self_attn.q_proj.lora_A) * len(_targets(adapted))
    assert all(weight.grad is None for weight in adapted.parameters() if not weight.requires_grad)


def _targets(model: LanguageModel) -> list[str]:
    layer = model.decoder.model.layers[0]
    return [name for name in TARGETS if any(n.endswith(f"{name}.lora_A") for n, _ in layer.named_modules())]


def test_a_frozen_head_takes_no_memory_for_a_gradient() -> None:
    """In chunks the gradient of a head would be as large as the head, in float32."""
    from stages.test_memory import Alive
    from test_sequence import LAYOUT

    labels = torch.tensor([[90, 1, 91, *range(100, 108)]])
    states = torch.randn(1, labels.shape[1], 3, requires_grad=True)
    peaks = {}
    for trains in (False, True):
        head = torch.randn(LAYOUT.vocab_size, 3, requires_grad=trains)
        with Alive(but=[states, head]) as alive:
            next_token_losses(states, head, labels, LAYOUT, with_text=False, chunk_rows=2)[0].mean().backward()
        peaks[trains] = alive.peak
        assert (head.grad is not None) == trains
    assert peaks[True] - peaks[False] >= head.untyped_storage().nbytes()


def test_engines_draw_with_the_merged_weights_as_they_are_at_present(models: Any) -> None:
    """A fused copy is taken again when the adapter has moved, and not when it has not."""
    plain, adapted, tokenizer = models
    plain.double(), adapted.double()
    prompts = [prompt_sequence(ids, plain.layout) for ids in tokenizer(["a red circle", "one"])["input_ids"]]

    def draw(model: LanguageModel, engine: Any) -> Tensor:
        return engine.generate(prompts, prompts, GRID, SamplingSettings(temperature=0.1), [5, 6])[0].clone()

    fused, addresses = make_engine("fused", adapted), set()
    first = draw(adapted, fused)
    assert torch.equal(first, draw(plain, make_engine("cached", plain)))
    for _ in range(2):
        trained(adapted)
        merged = merged_model(adapted)
        codes = draw(adapted, fused)
        assert torch.equal(codes, draw(merged, make_engine("cached", merged)))
        assert torch.equal(codes, draw(adapted, make_engine("cached", adapted)))
        assert not torch.equal(codes, first)
        addresses.add(fused.step.head.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"alpha": 0.0}, r"alpha=0\.0.* alpha above 0"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"'lm_head'\].*code_rows"),
        ({"target_modules": []}, "q_proj, k_proj"),
    ],
)
def test_what_is_no_adapter_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Adapter(**fields)
