"""Next-token losses under the two normalisers of the design.

``by_modality``: image targets are predicted by a softmax over image ids alone, text targets over text ids alone.
``full``: one softmax over all ids, as the paper's release does. Both come back as one number a sample, the mean over
that sample's image (or text) targets, so that averaging over samples does not depend on how a batch was split over
ranks, micro-batches or padding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from simplear.sequence import IGNORE_INDEX, TokenLayout, image_target_mask, text_target_mask

Normalizer = Literal["by_modality", "full"]


def next_token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    layout: TokenLayout,
    *,
    normalizer: Normalizer = "by_modality",
    with_text: bool = True,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of each sample's image and text targets, in nats (Eq. 1 of the paper).

    Args:
        hidden: (B, L, D) final hidden states; the state at i predicts ``labels[:, i + 1]``.
        head_weight: (vocabulary, D) output embedding.
        labels: (B, L) int64, unshifted, ``IGNORE_INDEX`` where nothing is predicted.
        layout: where image ids begin.
        normalizer: see the module's docstring.
        with_text: compute the text loss; else it is returned as zeros and costs nothing.
        chunk_rows: rows of logits held at once; None holds them all. Same values, less memory.

    Returns:
        image loss (B,) and text loss (B,), float32 or wider; 0 for a sample without such targets.
    """
    states, targets = hidden[:, :-1], labels[:, 1:]
    sections = [(image_target_mask(targets, layout), layout.image_token_offset, layout.vocab_size)]
    if with_text:
        sections.append((text_target_mask(targets, layout), 0, layout.image_token_offset))
    losses = []
    for mask, first, last in sections:
        first, last = (first, last) if normalizer == "by_modality" else (0, layout.vocab_size)
        per_token = token_cross_entropy(states[mask], head_weight[first:last], targets[mask] - first, chunk_rows)
        sums = per_token.new_zeros(len(labels)).index_add_(0, mask.nonzero()[:, 0], per_token)
        losses.append(sums / mask.sum(dim=1).clamp(min=1))
    return losses[0], losses[1] if with_text else torch.zeros_like(losses[0])


def token_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None) -> Tensor:
    """Negative log-likelihood of each token, (N,) in nats, float32 or wider.

    Args:
        states: (N, D).
        weight: (C, D) rows of the head to choose among.
        targets: (N,) int64 in [0, C).
        chunk_rows: rows of logits held at once; None holds them all.
    """
    if chunk_rows is not None and len(states) > chunk_rows:
        if torch.is_autocast_enabled(states.device.type):
            # Autocast does not reach into the chunked operation.
            reduced = torch.get_autocast_dtype(states.device.type)
            states, weight = states.to(reduced), weight.to(reduced)
        options = LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
        loss = F.linear_cross_entropy(
            states, weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
        )
        return loss.to(torch.promote_types(loss.dtype, torch.float32))
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
