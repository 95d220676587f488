"""Rotary positions: Qwen2's with exact frequencies, and 2-D ones, whose image codes know their row and column.

Whatever dtype a model is cast to, frequencies stay float32: in bfloat16 one of the 32 of a head of 64 would turn by
half a radian too much or too little at a distance of 1,024 tokens, and five of them at 4,096.

In 2-D, text at position p turns all frequencies by p, as in Qwen2. A code at (row, column) turns the even-indexed
frequencies by its row and the odd-indexed by its column, so that both axes have fast and slow ones. A text-only
sequence is therefore exactly plain Qwen2. Positions come from `simplear.sequence.positions_2d`.

A 2-D checkpoint has a ``model_type`` of its own: transformers and vLLM then refuse it instead of misreading it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding


class Qwen2Rope2DConfig(Qwen2Config):
    """Qwen2's configuration under another ``model_type``."""

    model_type = "simplear_qwen2_rope_2d"


# So that this process reads such directories without warnings; stock transformers elsewhere still refuses them.
AutoConfig.register(Qwen2Rope2DConfig.model_type, Qwen2Rope2DConfig)


class RotaryEmbedding(Qwen2RotaryEmbedding):
    """Qwen2's rotary embedding, for positions (2, B, L) too; no cast of the model rounds its frequencies."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (B, L, head_dim) in x's dtype. Angles are computed in float32, as Qwen2 does.

        Args:
            x: for its dtype and device.
            position_ids: (B, L), for which the result is Qwen2's own, or rows and columns (2, B, L).
        """
        if position_ids.ndim == 2 and self.rope_type != "default":
            return super().forward(x, position_ids)
        frequencies = self.inv_freq.to(x.device)
        angles = position_ids[..., None].float() * frequencies
        if position_ids.ndim == 3:
            by_column = torch.arange(len(frequencies), device=x.device) % 2 == 1
            angles = torch.where(by_column, angles[1], angles[0])
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.rope_type != "default":
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            device = self.inv_freq.device
            self._buffers |= {"inv_freq": exact.to(device), "original_inv_freq": exact.to(device, copy=True)}
        return self


class Qwen2Rope2DForCausalLM(Qwen2ForCausalLM):
    """Qwen2 whose `RotaryEmbedding` gets rows and columns; weights have Qwen2's names and shapes."""

    config_class = Qwen2Rope2DConfig

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.rotary_emb = RotaryEmbedding(config=config)
