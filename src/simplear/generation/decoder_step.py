"""The decoder's forward pass as the fast engines take it: what `transformers` computes, with less in between.

Weights are copied once: queries, keys and values of a layer in one matrix, gate and up projection in another, and all
of them stored (in, out), the layout in which CPUs multiply few rows fastest. Keys and values go into a `RowCache`, in
which rows advance apart, so padding, guidance and drafts need nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config

from simplear.language_model import LanguageModel


class RowCache:
    """Keys and values of R rows, of up to ``capacity`` tokens each.

    Each row has a length of its own: new keys and values are written behind it and what is beyond it is masked, so that
    rejecting drafts only leaves the length where it was.

    Args:
        config: of the decoder.
        rows: R.
        capacity: tokens a row can hold.
        like: its device and dtype are the cache's.
    """

    def __init__(self, config: Qwen2Config, rows: int, capacity: int, like: Tensor) -> None:
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = (config.num_hidden_layers, rows, heads, capacity, head_size(config))
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        """(R,) tokens that count."""
        self.visible = capacity
        """Tokens from the beginning that are attended to at all; at least the longest row and what is fed."""
        self._rows = torch.arange(rows, device=like.device)[:, None]

    def places(self, new: int) -> Tensor:
        """(R, new) where ``new`` tokens behind each row stand."""
        return self.lengths[:, None] + torch.arange(new, device=self.lengths.device)

    def mask(self, places: Tensor) -> Tensor:
        """(R, 1, T, visible) bool: tokens at places (R, T) see their row up to themselves."""
        return (torch.arange(self.visible, device=places.device) <= places[..., None])[:, None]

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (R, T, heads, size) at places (R, T); the layer's whole, (R, heads, visible, size).

        Lengths stay as they are: whoever feeds tokens says afterwards how many of them count.
        """
        self.keys[layer][self._rows, :, places] = keys
        self.values[layer][self._rows, :, places] = values
        return self.keys[layer][:, :, : self.visible], self.values[layer][:, :, : self.visible]


def head_size(config: Qwen2Config) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    attention_in: Tensor
    attention_bias: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class DecoderStep:
    """Logits over the codebook for tokens behind the rows of a cache.

    Args:
        model: its weights are copied.
    """

    def __init__(self, model: LanguageModel) -> None:
        decoder, config = model.decoder.model, model.decoder.config
        self.heads, self.size, self.epsilon = config.num_attention_heads, head_size(config), config.rms_norm_eps
        self.key_heads = config.num_key_value_heads or self.heads
        self.embedding, self.rotary, self.norm = decoder.embed_tokens.weight, decoder.rotary_emb, decoder.norm.weight
        self.layers = []
        for layer in decoder.layers:
            attention = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            self.layers.append(
                _Layer(
                    layer.input_layernorm.weight,
                    _stored_in_out(*attention),
                    torch.cat([linear.bias for linear in attention]),
                    _stored_in_out(layer.self_attn.o_proj),
                    layer.post_attention_layernorm.weight,
                    _stored_in_out(layer.mlp.gate_proj, layer.mlp.up_proj),
                    _stored_in_out(layer.mlp.down_proj),
                )
            )
        self.head = model.image_head_weight.t().contiguous()

    def __call__(self, ids: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """Logits (R, T, codebook_size).

        Args:
            ids: (R, T) tokens behind the rows.
            positions: of them, from `LanguageModel.positions_at`.
            cache: gets their keys and values.
        """
        rows, new = ids.shape
        places = cache.places(new)
        mask = cache.mask(places)
        hidden = F.embedding(ids, self.embedding)
        cos, sin = (part[:, :, None] for part in self.rotary(hidden, positions))
        hidden = hidden.flatten(0, 1)
        turned = self.heads + self.key_heads
        for number, layer in enumerate(self.layers):
            mixed = torch.addmm(layer.attention_bias, self._normalized(hidden, layer.input_norm), layer.attention_in)
            mixed = mixed.view(rows, new, turned + self.key_heads, self.size)
            first, second = mixed[:, :, :turned].chunk(2, dim=-1)
            rotated = mixed[:, :, :turned] * cos + torch.cat([-second, first], dim=-1) * sin
            keys, values = cache.write(number, places, rotated[:, :, self.heads :], mixed[:, :, turned:])
            attended = F.scaled_dot_product_attention(
                rotated[:, :, : self.heads].transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                enable_gqa=self.heads != self.key_heads,
            )
            hidden = torch.addmm(hidden, attended.transpose(1, 2).reshape(rows * new, -1), layer.attention_out)
            gate, up = (self._normalized(hidden, layer.mlp_norm) @ layer.mlp_in).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, layer.mlp_out)
        return (self._normalized(hidden, self.norm) @ self.head).view(rows, new, -1)

    def _normalized(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Qwen2's RMSNorm, which computes in float32 whatever the weights are."""
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, weight.shape, weight, self.epsilon)
        return weight * F.rms_norm(hidden.float(), weight.shape, None, self.epsilon).to(hidden.dtype)


def _stored_in_out(*linears: nn.Linear) -> Tensor:
    """One weight (in, sum of outs) of linear layers that read the same."""
    return torch.cat([linear.weight for linear in linears]).t().contiguous()


class Rows:
    """The conditional and then the unconditional rows of B images, prefilled up to the last token of their prompts.

    Args:
        model: gives positions and token ids.
        step: its forward pass.
        prompts: R = B or 2 B 1-D tensors.
        grid: rows and columns of codes.
        room: tokens behind the longest prompt.
    """

    def __init__(
        self,
        model: LanguageModel,
        step: DecoderStep,
        prompts: Sequence[Tensor],
        grid: tuple[int, int],
        room: int,
    ) -> None:
        self.model, self.step, self.grid, self.device = model, step, grid, step.embedding.device
        ids = pad_sequence(list(prompts), batch_first=True).to(self.device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.start = ids.gather(1, self.lengths[:, None] - 1)
        self.cache = RowCache(model.decoder.config, len(prompts), ids.shape[1] + room, step.embedding)
        # Padding stands behind a row's length, where later tokens replace it.
        self.feed(ids[:, :-1])

    def drafted(self, canvas: Tensor, done: Tensor, window: int) -> Tensor:
        """Logits (R, W + 1, codebook_size) at the W drafts behind ``done`` (B,) final codes of a canvas (B, N), and
        after them.
        """
        places = done[:, None] + torch.arange(-1, window, device=self.device)
        ids = canvas.gather(1, places.clamp(min=0)) + self.model.layout.image_token_offset
        pairs = len(self.lengths) // len(done)
        ids, done = ids.repeat(pairs, 1), done.repeat(pairs)
        first = torch.where(done[:, None] > 0, ids[:, :1], self.start)
        self.cache.lengths = self.lengths - 1 + done
        return self.feed(torch.cat([first, ids[:, 1:]], dim=1))

    def feed(self, ids: Tensor) -> Tensor:
        """Logits (R, T, codebook_size) of tokens (R, T) behind the rows."""
        self.cache.visible = int(self.cache.lengths.max()) + ids.shape[1]
        positions = self.model.positions_at(self.cache.places(ids.shape[1]), self.lengths, self.grid)
        return self.step(ids, positions, self.cache)
