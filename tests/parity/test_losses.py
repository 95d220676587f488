"""Losses against a plain loop over positions, in float64; and the same however a batch is cut up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simplear.language_model import LanguageModel, Normalizer, next_token_losses
from simplear.language_model.loss import token_cross_entropy
from simplear.sequence import IGNORE_INDEX, TokenLayout, training_batch
from toys import make_batch, model_config

NORMALIZERS: tuple[Normalizer, ...] = ("by_modality", "full")
LAYOUT = TokenLayout(text_to_image_id=8, start_of_image_id=9, image_token_offset=10, codebook_size=6)


def loop_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, layout: TokenLayout, normalizer: Normalizer
) -> list[tuple[float, float]]:
    """(image, text) loss of each sample, one logit after another."""
    losses = []
    for states, targets in zip(hidden.tolist(), labels.tolist(), strict=True):
        terms: dict[bool, list[float]] = {True: [], False: []}
        for state, target in zip(states, targets[1:], strict=False):
            if target == IGNORE_INDEX:
                continue
            is_image = target >= layout.image_token_offset
            first, last = (layout.image_token_offset, layout.vocab_size) if is_image else (0, layout.image_token_offset)
            if normalizer == "full":
                first, last = 0, layout.vocab_size
            logits = {
                row: sum(a * b for a, b in zip(state, weight[row].tolist(), strict=True)) for row in range(first, last)
            }
            terms[is_image].append(math.log(sum(map(math.exp, logits.values()))) - logits[target])
        losses.append(tuple(sum(part) / len(part) if part else 0.0 for part in (terms[True], terms[False])))
    return losses  # type: ignore[return-value]


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels of three ragged samples."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 6, (3, 2, 2), generator=generator)
    labels = training_batch([[1, 2, 3], [], [7]], codes, LAYOUT)["labels"]
    hidden = torch.randn(*labels.shape, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(LAYOUT.vocab_size, 5, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_rows", [None, 1, 5])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_losses_equal_a_plain_loop(normalizer: Normalizer, chunk_rows: int | None) -> None:
    hidden, weight, labels = example()
    image, text = next_token_losses(hidden, weight, labels, LAYOUT, normalizer=normalizer, chunk_rows=chunk_rows)
    assert image.dtype == text.dtype == torch.float64
    expected = torch.tensor(loop_losses(hidden, weight, labels, LAYOUT, normalizer), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([image, text], dim=1), expected, rtol=1e-12, atol=1e-12)


def test_the_two_normalisers_differ_and_padding_rows_count_for_neither() -> None:
    """Ids beyond the layout's vocabulary are in no softmax; the other modality's ids are in the full one alone."""
    hidden, weight, labels = example()
    padded = torch.cat([weight, torch.full((3, 5), 50.0, dtype=torch.float64)])
    values = {}
    for normalizer in NORMALIZERS:
        values[normalizer] = next_token_losses(hidden, weight, labels, LAYOUT, normalizer=normalizer)
        more = next_token_losses(hidden, padded, labels, LAYOUT, normalizer=normalizer)
        torch.testing.assert_close(values[normalizer], more)
    for by_modality, full in zip(values["by_modality"], values["full"], strict=True):
        assert (full > by_modality).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_chunks_change_neither_values_nor_gradients(normalizer: Normalizer) -> None:
    results = []
    for chunk_rows in (None, 3):
        hidden, weight, labels = example()
        image, text = next_token_losses(hidden, weight, labels, LAYOUT, normalizer=normalizer, chunk_rows=chunk_rows)
        (image.mean() + 0.5 * text.mean()).backward()
        results.append((image.detach(), text.detach(), hidden.grad, weight.grad))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(plain, chunked, rtol=1e-12, atol=1e-14)


def test_gradients_equal_finite_differences() -> None:
    hidden, weight, labels = example()
    for normalizer in NORMALIZERS:
        assert torch.autograd.gradcheck(
            lambda h, w, n=normalizer: next_token_losses(h, w, labels, LAYOUT, normalizer=n), (hidden, weight)
        )


def test_without_text_the_image_loss_is_the_same() -> None:
    hidden, weight, labels = example()
    image, text = next_token_losses(hidden, weight, labels, LAYOUT)
    alone, none = next_token_losses(hidden, weight, labels, LAYOUT, with_text=False)
    assert torch.equal(image, alone)
    assert not none.any()
    assert text.all()


def test_text_alone_has_an_image_loss_of_zero() -> None:
    labels = training_batch([[1, 2], [3]], torch.empty(2, 0, 0, dtype=torch.long), LAYOUT)["labels"]
    hidden = torch.randn(2, labels.shape[1], 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(LAYOUT.vocab_size, 5, dtype=torch.float64)
    image, text = next_token_losses(hidden, weight, labels, LAYOUT)
    (image.sum() + text.sum()).backward()
    assert not image.any()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_logits_in_bfloat16_are_summed_in_float32() -> None:
    hidden, weight, labels = example()
    expected, _ = next_token_losses(hidden, weight, labels, LAYOUT)
    for chunk_rows in (None, 3):
        image, _ = next_token_losses(hidden.bfloat16(), weight.bfloat16(), labels, LAYOUT, chunk_rows=chunk_rows)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_log_probs_in_chunks_are_float32_and_equal_those_of_all_rows(precision: str) -> None:
    """With their gradients; of equal inputs a Kullback-Leibler divergence is exactly 0."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(40, 32, generator=generator), torch.randn(64, 32, generator=generator)
    targets, upstream = torch.randint(64, (40,), generator=generator), torch.randn(40, generator=generator)
    if precision == "bfloat16":
        states, weight = states.bfloat16(), weight.bfloat16()
    found = []
    for chunk_rows in (None, 16, 16):
        inputs = states.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            losses = token_cross_entropy(*inputs, targets, chunk_rows)
        assert losses.dtype == torch.float32
        (losses * upstream).sum().backward()
        found.append((losses.detach(), *(part.grad for part in inputs)))
    plain, chunked, again = found
    torch.testing.assert_close(chunked[0], plain[0], rtol=0, atol=1e-5)
    for one, other in zip(chunked[1:], plain[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 if precision != "float32" else 1e-5)
    assert torch.equal(chunked[0], again[0])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_divided(
    tiny_model: tuple[LanguageModel, Any], normalizer: Normalizer
) -> None:
    """Ragged captions: 4 samples at once equal 2 + 2 (ranks, accumulation) and 1 + 1 + 1 + 1, padding and all."""
    model, tokenizer = tiny_model
    model.double()
    whole = make_batch(model, tokenizer, (2, 3), ["two blue squares", "", "a green cross left of a red triangle", "x"])
    results = []
    for parts in (1, 2, 4):
        model.zero_grad()
        total = 0.0
        for rows in torch.arange(4).chunk(parts):
            ids, labels = whole["input_ids"][rows], whole["labels"][rows]
            length = int(whole["attention_mask"][rows].sum(dim=1).max())
            image, text = model(ids[:, :length], labels[:, :length], (2, 3), normalizer=normalizer)
            loss = (image.mean() + text.mean()) / parts
            loss.backward()
            total += float(loss.detach())
        results.append((total, {name: weight.grad.clone() for name, weight in model.named_parameters()}))  # type: ignore[union-attr]
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_what_follows_and_what_pads_a_sequence_does_not_change_its_loss(tiny_text_tokenizer: str) -> None:
    """Causal attention without a mask: more padding, or another id in it, gives the same numbers."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    batch = make_batch(model, tokenizer, (2, 2))
    expected = model(batch["input_ids"], batch["labels"], (2, 2))
    ids = batch["input_ids"].clone()
    ids[batch["attention_mask"] == 0] = 3
    longer = torch.nn.functional.pad(ids, (0, 5), value=7)
    labels = torch.nn.functional.pad(batch["labels"], (0, 5), value=IGNORE_INDEX)
    for got, wanted in zip(model(longer, labels, (2, 2)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
