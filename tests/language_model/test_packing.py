"""Packed sequences have the losses and gradients of padded ones, and no padding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from simplear.language_model import CheckpointSettings, LanguageModel, save_checkpoint
from simplear.language_model.packing import PACKED_ATTENTION, Packing, packed_attention
from simplear.sequence import encode_captions, labelled_lengths, text_batch
from simplear.stages.decoder_layers import checkpoint_activations
from toys import ARCHITECTURE, CAPTIONS, make_batch, model_config

GRID = (2, 3)
SAME = 1e-12
"""Relative, in float64."""
BATCHES: dict[str, Sequence[str]] = {
    "ragged": CAPTIONS,
    "one": CAPTIONS[2:3],
    "of one length": CAPTIONS[:1] * 3,
    "texts": [*CAPTIONS[:4], "a"],
}


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms round to float32, which would make of a last bit a difference of 1e-7."""

    def norm(self: Any, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)


def batch_of(model: LanguageModel, tokenizer: Any, name: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
    if name == "texts":
        return text_batch(encode_captions(tokenizer, BATCHES[name]), model.layout), (0, 0)
    return make_batch(model, tokenizer, GRID, BATCHES[name]), GRID


def results(model: LanguageModel, losses: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The losses (B, …) and all gradients of a sum of them in which each number has a weight of its own."""
    model.zero_grad()
    found = list(losses())
    random = torch.Generator().manual_seed(2)
    total = sum((loss * torch.rand(loss.shape, generator=random).double()).sum() for loss in found)
    assert isinstance(total, Tensor)
    total.backward()
    return [loss.detach() for loss in found] + [weight.grad for weight in model.parameters() if weight.grad is not None]


def difference(model: LanguageModel, losses: Callable[[bool], Sequence[Tensor]]) -> float:
    """Largest relative one between packed and padded, over losses and gradients."""
    padded, packed = (results(model, lambda packed=packed: losses(packed)) for packed in (False, True))
    assert len(padded) == len(packed)
    return max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
        for one, other in zip(padded, packed, strict=True)
    )


def losses_of(model: LanguageModel, batch: dict[str, Tensor], grid: tuple[int, int], **options: Any) -> Any:
    return lambda packed: model(batch["input_ids"], batch["labels"], grid, packed=packed, **options)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("normalizer", ["full", "by_modality"])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_those_of_padded_sequences(
    tiny_model: tuple[LanguageModel, Any], name: str, normalizer: Any, chunk_rows: int | None
) -> None:
    model, tokenizer = tiny_model
    model.double()
    batch, grid = batch_of(model, tokenizer, name)
    assert difference(model, losses_of(model, batch, grid, normalizer=normalizer, chunk_rows=chunk_rows)) < SAME


def test_recomputed_layers_are_packed_too(tiny_model: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = tiny_model
    checkpoint_activations(model.double().train().decoder, "full")
    batch, grid = batch_of(model, tokenizer, "ragged")
    assert difference(model, losses_of(model, batch, grid)) < SAME


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_log_probs_are_those_of_padded_sequences(tiny_model: tuple[LanguageModel, Any], chunk_rows: int | None) -> None:
    model, tokenizer = tiny_model
    model.double()
    ids = make_batch(model, tokenizer, GRID)["input_ids"]

    def found(packed: bool) -> Sequence[Any]:
        return model.image_log_probs(ids, GRID, temperature=0.7, chunk_rows=chunk_rows, packed=packed)

    assert difference(model, found) < SAME
    assert found(True)[1].shape == (len(CAPTIONS), 6)


@pytest.mark.parametrize("name", ["ragged", "texts"])
def test_samples_that_see_each_other_are_noticed(
    tiny_model: tuple[LanguageModel, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The wrong variant: one causal row, in which a sample attends to all that stand before it."""

    def one_row(*args: Any, packing: Packing | None = None, **options: Any) -> Any:
        return packed_attention(*args, **options)

    model, tokenizer = tiny_model
    model.double()
    batch, grid = batch_of(model, tokenizer, name)
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, one_row)
    assert difference(model, losses_of(model, batch, grid)) > 1e-3


@pytest.mark.parametrize("name", BATCHES)
def test_no_padding_reaches_a_layer(tiny_model: tuple[LanguageModel, Any], name: str) -> None:
    model, tokenizer = tiny_model
    batch, grid = batch_of(model, tokenizer, name)
    rows: list[int] = []
    for layer in model.decoder.model.layers:
        for part in (layer.mlp, layer.self_attn.q_proj, layer.self_attn.o_proj, layer.input_layernorm):
            part.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    model(batch["input_ids"], batch["labels"], grid, packed=True)
    if grid == GRID:
        model.image_log_probs(batch["input_ids"], grid, packed=True)
    assert set(rows) == {int(batch["attention_mask"].sum())}
    assert len(rows) == 8 * (1 + (grid == GRID))


def test_lengths_by_labels_leave_out_the_padding_alone(tiny_model: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = tiny_model
    for name in BATCHES:
        batch, _ = batch_of(model, tokenizer, name)
        assert torch.equal(labelled_lengths(batch["labels"]), batch["attention_mask"].sum(dim=1))
    single = text_batch([[5], [6, 7]], model.layout)
    assert labelled_lengths(single["labels"]).tolist() == [1, 2]


def test_packing_and_unpacking() -> None:
    packing = Packing.of(torch.tensor([2, 1, 3]), 3)
    padded = torch.arange(1.0, 10.0).view(3, 3)
    assert packing.pack(padded).tolist() == [1, 2, 4, 7, 8, 9]
    assert packing.unpack(packing.pack(padded)).tolist() == [[1, 2, 0], [4, 0, 0], [7, 8, 9]]
    assert packing.starts.tolist() == [0, 2, 3]


def test_mixed_precision(tiny_model: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = tiny_model
    batch, grid = batch_of(model, tokenizer, "ragged")
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed = (losses_of(model, batch, grid)(packed)[0] for packed in (False, True))
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-3)


def test_lengths_change_without_compiling_again(tiny_text_tokenizer: str) -> None:
    """One graph for all layers, batches and lengths, without a break."""
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    model.double()
    torch._dynamo.reset()
    counter = CompileCounter()
    expected = []
    for compiled in (False, True):
        for layer in model.decoder.model.layers if compiled else []:
            layer.compile(backend=counter, dynamic=True, fullgraph=True)
        for number, captions in enumerate((CAPTIONS, CAPTIONS[1:3], CAPTIONS[:4], CAPTIONS[2:], CAPTIONS[:3])):
            batch = make_batch(model, tokenizer, (2, 2 + number), captions)
            image, _ = model(batch["input_ids"], batch["labels"], (2, 2 + number), packed=True)
            if compiled:
                torch.testing.assert_close(image, expected[number], rtol=SAME, atol=SAME)
            expected.append(image.detach())
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_name_of_the_attention_is_in_no_checkpoint(tiny_model: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny_model
    batch, grid = batch_of(model, tokenizer, "ragged")
    model(batch["input_ids"], batch["labels"], grid, packed=True)
    layout = model.layout
    settings = CheckpointSettings(layout.image_token_offset, layout.codebook_size, GRID, 8, rope=model.rope)
    save_checkpoint(tmp_path / "model", model, tokenizer, settings)
    content = (tmp_path / "model" / "config.json").read_text()
    assert "attn" not in content and PACKED_ATTENTION not in content
    if model.rope == "1d":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert stock.config._attn_implementation == "sdpa"
        assert json.loads(content)["model_type"] == "qwen2"


def test_another_attention_is_refused(tiny_model: tuple[LanguageModel, Any]) -> None:
    _, tokenizer = tiny_model
    layout = tiny_model[0].layout
    config = Qwen2Config(**ARCHITECTURE, vocab_size=layout.vocab_size, attn_implementation="eager")
    model = LanguageModel(Qwen2ForCausalLM(config), layout)
    batch = make_batch(model, tokenizer, GRID)
    model(batch["input_ids"], batch["labels"], GRID)
    with pytest.raises(ValueError, match="attention by sdpa, the model has eager: leave attn_implementation out"):
        model(batch["input_ids"], batch["labels"], GRID, packed=True)
