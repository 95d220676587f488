"""Packing: the tokens of a right-padded batch as one row without padding.

Norms, linear layers and MLPs see each token by itself, so they run on that row as they are. Attention alone must keep
the samples apart: queries, keys and values are laid out as the padded batch again, where one causal kernel serves all
samples, and what it gives is taken back to the row. So attention has its padding as before, and nothing else does.

The attention function stands beside transformers' own under a name of its own. It gets the layout by keyword with each
forward pass, through checkpointed layers too; without it, it is transformers' ``sdpa``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "simplear_sdpa"
"""Name of `packed_attention` in a configuration; it is written into no checkpoint."""


@dataclass(frozen=True)
class Packing:
    """Where the T tokens of a row came from in the padded batch (B, L).

    Args:
        places: (T,) int64, ascending: their places in the flattened batch.
        starts: (B,) int64: where each sample begins in the row.
        padded: (B, L).
    """

    places: Tensor
    starts: Tensor
    padded: tuple[int, int]

    @classmethod
    def of(cls, lengths: Tensor, length: int) -> Packing:
        """Of samples that have ``lengths`` (B,) tokens, padded on the right to ``length``."""
        real = torch.arange(length, device=lengths.device) < lengths[:, None]
        return cls(real.flatten().nonzero()[:, 0], lengths.cumsum(0) - lengths, (len(lengths), length))

    def pack(self, padded: Tensor) -> Tensor:
        """The tokens (T, …) of what the batch holds for each place, (B, L, …)."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """The opposite: (B, L, …) of (T, …), zeros in the padding."""
        batch, length = self.padded
        zeros = packed.new_zeros(batch * length, *packed.shape[1:])
        return zeros.index_put((self.places,), packed).unflatten(0, self.padded)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sample of a packed row (1, heads, T, head_dim) to itself alone.

    Args:
        packing: None: not packed, and transformers' ``sdpa``.
        options: what transformers hands to its attention functions.

    Returns:
        (1, T, heads, head_dim), and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (packing.unpack(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value))
    attended, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return packing.pack(attended)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
