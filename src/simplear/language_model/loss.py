"""Next-token losses under the two normalisers of the design.

``by_modality``: image targets are predicted by a softmax over image ids alone, text targets over text ids alone.
``full``: one softmax over all ids, as the paper's release does. Both come back as one number a sample, the mean over
that sample's image (or text) targets, so that averaging over samples does not depend on how a batch was split over
ranks and micro-batches, or padded.

With ``chunk_rows`` the logits of a few rows are held at once, and where a mean over samples is taken the head's
gradients are computed while they are there. `F.linear_cross_entropy` in chunks does the same for one scalar loss, but
for a loss a row it computes all logits a second time in the backward pass: a third more arithmetic.

Losses, log-probabilities and entropies are float32 or wider in every precision: matrix products alone are narrower.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simplear.language_model.adapter import CodeRows
from simplear.language_model.packing import Packing
from simplear.sequence import IGNORE_INDEX, TokenLayout, image_target_mask, text_target_mask

Normalizer = Literal["by_modality", "full"]


def next_token_losses(
    hidden: Tensor,
    head_weight: Tensor | CodeRows,
    labels: Tensor,
    layout: TokenLayout,
    *,
    normalizer: Normalizer = "by_modality",
    with_text: bool = True,
    chunk_rows: int | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of each sample's image and text targets, in nats (Eq. 1 of the paper).

    Args:
        hidden: (B, L, D) final hidden states, or (1, T, D) of packed ones; that of place i predicts
            ``labels[:, i + 1]``.
        head_weight: (vocabulary, D) output embedding; frozen, it gets no gradient and takes no memory for one.
        labels: (B, L) int64, unshifted, ``IGNORE_INDEX`` where nothing is predicted.
        layout: where image ids begin.
        normalizer: see the module's docstring.
        with_text: compute the text loss; else it is returned as zeros and costs nothing.
        chunk_rows: rows of logits held at once; None holds them all. Same values, less memory.
        packing: of the hidden states; None where they are not packed.

    Returns:
        image loss (B,) and text loss (B,), float32 or wider; 0 for a sample without such targets.
    """
    batch, length = labels.shape
    # Labels are shifted, a few bytes a token, and not the states: these are picked from where they stand.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    sections = [(image_target_mask(targets, layout), layout.image_token_offset, layout.vocab_size)]
    if with_text:
        sections.append((text_target_mask(targets, layout), 0, layout.image_token_offset))
    losses = []
    for mask, first, last in sections:
        ids = slice(first, last) if normalizer == "by_modality" else slice(0, layout.vocab_size)
        samples, places = mask.nonzero().unbind(dim=1)
        rows = places + (samples * length if packing is None else packing.starts[samples])
        states = hidden.flatten(0, 1).index_select(0, rows)
        counts = mask.sum(dim=1).clamp(min=1)
        row_weights = counts.to(torch.promote_types(states.dtype, torch.float32)).reciprocal()[samples]
        chosen = targets[samples, places] - ids.start
        per_row = _cross_entropy(states, head_weight, ids, chosen, row_weights, chunk_rows)
        losses.append(per_row.new_zeros(batch).index_add_(0, samples, per_row))
    return losses[0], losses[1] if with_text else torch.zeros_like(losses[0])


def _cross_entropy(
    states: Tensor,
    weight: Tensor | CodeRows,
    ids: slice,
    targets: Tensor,
    row_weights: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    """Weighted loss of each row (N,) over the rows ``ids`` of the head, float32 or wider."""
    if isinstance(weight, CodeRows):
        weight, ids = weight[ids], slice(0, ids.stop - ids.start)
    if chunk_rows is None or len(states) <= chunk_rows:
        return token_cross_entropy(states, weight[ids], targets, None) * row_weights
    return _ChunkedCrossEntropy.apply(states, weight, targets, row_weights, ids, chunk_rows, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`_cross_entropy` in chunks of rows, with matrix products in autocast's dtype and sums in float32 or wider.

    With ``early`` the forward pass computes the gradients of the sum of all rows. They are right but for a factor when
    the loss is a mean over samples; for any other combination of rows the backward pass computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        ids: slice,
        chunk_rows: int,
        early: bool,
    ) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.save_for_backward(states, weight, targets, row_weights)
        ctx.settings = ids, chunk_rows, dtype, ctx.needs_input_grad[1]
        # In float16 they would underflow without the factor of loss scaling, which the backward pass alone knows.
        early = early and dtype != torch.float16
        losses, ctx.gradients = _in_chunks(states, weight, targets, row_weights, early, *ctx.settings)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and bool((upstream == upstream[0]).all()):
            gradients = [None if gradient is None else gradient.mul_(upstream[0]) for gradient in gradients]
        else:
            gradients = None  # frees them
            states, weight, targets, row_weights = ctx.saved_tensors
            _, gradients = _in_chunks(states, weight, targets, row_weights * upstream, True, *ctx.settings)
            assert gradients is not None
        return (*gradients, None, None, None, None, None)


def _in_chunks(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    with_gradients: bool,
    ids: slice,
    chunk_rows: int,
    dtype: torch.dtype,
    by_weight: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
    """Weighted loss of each row (N,), and the gradients of their sum by states (N, D) and by the weight (V, D) if it
    is trained.
    """
    wide = torch.promote_types(dtype, torch.float32)
    inputs, matrix = states.to(dtype), weight[ids].to(dtype)
    losses = torch.empty(len(states), dtype=wide, device=states.device)
    buffer = torch.empty(chunk_rows, len(matrix), dtype=dtype, device=states.device)
    grad_states = torch.empty_like(states) if with_gradients else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients and by_weight else None
    with torch.autocast(states.device.type, enabled=False):
        for first in range(0, len(states), chunk_rows):
            rows = slice(first, first + chunk_rows)
            chunk, target, scale = inputs[rows], targets[rows, None], row_weights[rows, None]
            logits = torch.mm(chunk, matrix.T, out=buffer[: len(chunk)]).to(wide)
            logits -= logits.amax(dim=1, keepdim=True)
            at_target = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            losses[rows] = (scale * (total.log() - at_target))[:, 0]
            if grad_states is not None:
                # By the logits: softmax minus one-hot, each row with its weight.
                by_logits = logits.mul_(scale / total).scatter_add_(1, target, -scale).to(dtype)
                grad_states[rows] = by_logits @ matrix
                if grad_weight is None:
                    continue
                if dtype == wide:
                    grad_weight[ids].addmm_(by_logits.T, chunk)
                else:
                    grad_weight[ids] += by_logits.T @ chunk
    if grad_states is None:
        return losses, None
    return losses, (grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))


def token_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None) -> Tensor:
    """Negative log-likelihood of each token, (N,) in nats, float32 or wider.

    Args:
        states: (N, D).
        weight: (C, D) rows of the head to choose among.
        targets: (N,) int64 in [0, C).
        chunk_rows: rows of logits held at once; None holds them all.
    """
    if chunk_rows is not None and len(states) > chunk_rows:
        ones = torch.ones(len(states), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        return _ChunkedCrossEntropy.apply(states, weight, targets, ones, slice(0, len(weight)), chunk_rows, False)
    logits = F.linear(states, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


@torch.no_grad()
def token_entropy(states: Tensor, weight: Tensor, chunk_rows: int | None) -> Tensor:
    """Entropy of each token's distribution, (N,) in nats, float32 or wider. Arguments as `token_cross_entropy`."""
    entropies = []
    for part in states.split(chunk_rows or max(len(states), 1)):
        logits = F.linear(part, weight)
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        entropies.append(-(log_probabilities.exp() * log_probabilities).sum(dim=-1))
    return torch.cat(entropies)
