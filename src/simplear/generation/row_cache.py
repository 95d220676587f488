"""A KV cache of fixed size whose rows advance independently of each other.

`transformers`' caches crop and grow all rows alike. Here each row has a length of its own: new keys and values are
written behind it and what is beyond it is masked, so that rejecting drafts only leaves the length where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2Config


class RowCache:
    """Keys and values of R rows, of up to ``capacity`` tokens each.

    Args:
        config: of the decoder.
        rows: R.
        capacity: tokens a row can hold.
        device: where.
        dtype: of keys and values.
    """

    def __init__(self, config: Qwen2Config, rows: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = (config.num_hidden_layers, rows, heads, capacity, size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        """(R,) tokens that count."""
        self.visible = capacity
        """Tokens from the beginning that are attended to at all; at least the longest row and what is fed."""
        self._rows = torch.arange(rows, device=device)[:, None]

    def mask(self, new: int) -> Tensor:
        """(R, 1, new, visible) bool: each of ``new`` tokens behind a row sees the row and the new ones up to itself."""
        device = self.lengths.device
        last = self.lengths[:, None] + torch.arange(new, device=device)
        return (torch.arange(self.visible, device=device) <= last[..., None])[:, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, heads, T, size) behind each row, and return the layer's, (R, heads, visible, size).

        Lengths stay as they are: whoever feeds tokens says afterwards how many of them count.
        """
        places = self.lengths[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[layer][self._rows, :, places] = keys.transpose(1, 2)
        self.values[layer][self._rows, :, places] = values.transpose(1, 2)
        return self.keys[layer][:, :, : self.visible], self.values[layer][:, :, : self.visible]
