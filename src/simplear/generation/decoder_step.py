"""The decoder's forward pass as the fast engines take it: what `transformers` computes, with less in between.

Weights are copied once: queries, keys and values of a layer in one matrix, gate and up projection in another, and all
of them stored (in, out), the layout in which CPUs multiply few rows fastest. Keys and values go into a `RowCache`, in
which rows advance apart, so padding, guidance and drafts need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config

from simplear.generation.engine import prompt_width, read_once, require_multiple
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
        shape = (rows, heads, capacity, head_size(config))
        # A tensor a layer, so that a compiler sees each written in place.
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
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

    def take(self, other: RowCache, order: Tensor) -> None:
        """Begin with the rows ``order`` (R,) of another cache, which may repeat them."""
        for mine, theirs in zip([*self.keys, *self.values], [*other.keys, *other.values], strict=True):
            mine[:, :, : other.capacity] = theirs[order]
        self.lengths = other.lengths[order]


def head_size(config: Qwen2Config) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


Forward = Callable[[Tensor, Tensor, RowCache], Tensor]
"""From ids (R, T), their positions and a cache to logits (R, T, codebook_size)."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
ROOM = 64
"""Tokens by which a compiled step's cache grows from one size to the next."""
SHAPES = 128
"""Of a compiled step at most: numbers of rows, sizes of the cache, windows. Without a limit of its own it is 8."""


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
    """Hidden states and logits over the codebook for tokens behind the rows of a cache.

    Args:
        model: its weights are copied.
    """

    def __init__(self, model: LanguageModel) -> None:
        decoder, config = model.decoder.model, model.decoder.config
        self.versions = _versions(model)
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
        """Logits (R, T, codebook_size). Arguments as for `hidden`."""
        return self.logits(self.hidden(ids, positions, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, codebook_size) of normalised hidden states (…, width)."""
        return hidden @ self.head

    def hidden(self, ids: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """Normalised hidden states (R, T, width).

        Args:
            ids: (R, T) tokens behind the rows.
            positions: of them, from `LanguageModel.positions_at`.
            cache: gets their keys and values.
        """
        rows, new = ids.shape
        places = cache.places(new)
        # Queries of the heads that share keys stand below each other, so that keys are not repeated for them.
        shared = self.heads // self.key_heads
        mask = cache.mask(places).repeat(1, 1, shared, 1)
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
            queries = rotated[:, :, : self.heads].view(rows, new, self.key_heads, shared, self.size)
            attended = F.scaled_dot_product_attention(
                queries.permute(0, 2, 3, 1, 4).reshape(rows, self.key_heads, shared * new, self.size),
                keys,
                values,
                attn_mask=mask,
            )
            attended = attended.view(rows, self.heads, new, self.size).transpose(1, 2).reshape(rows * new, -1)
            hidden = torch.addmm(hidden, attended, layer.attention_out)
            gate, up = (self._normalized(hidden, layer.mlp_norm) @ layer.mlp_in).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, layer.mlp_out)
        return self._normalized(hidden, self.norm).view(rows, new, -1)

    def _normalized(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Qwen2's RMSNorm, which computes in float32 whatever the weights are."""
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, weight.shape, weight, self.epsilon)
        return weight * F.rms_norm(hidden.float(), weight.shape, None, self.epsilon).to(hidden.dtype)


def _stored_in_out(*linears: nn.Linear) -> Tensor:
    """One weight (in, sum of outs) of linear layers that read the same."""
    return torch.cat([linear.weight for linear in linears]).t().contiguous()


def _versions(model: LanguageModel) -> list[tuple[int, int]]:
    """What changes when a weight does, in place or by another tensor."""
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]


class Rows:
    """The conditional and then the unconditional rows of B images, prefilled with their prompts.

    Args:
        first_logits: (R, codebook_size) at the first place that is not read.
        lengths: (R,) tokens of the prompts.
        images: B; R is B or 2 B.
        fixed: all of the cache is attended to, with a mask: steps have one shape, and nothing waits for the device.
    """

    def __init__(
        self,
        model: LanguageModel,
        forward: Forward,
        cache: RowCache,
        first_logits: Tensor,
        lengths: Tensor,
        images: int,
        grid: tuple[int, int],
        fixed: bool,
    ) -> None:
        self.model, self.forward, self.cache, self.grid = model, forward, cache, grid
        self.first_logits, self.lengths, self.images, self.fixed = first_logits, lengths, images, fixed

    def logits(self, canvas: Tensor, done: Tensor, window: int) -> Tensor:
        """Logits (R, W + 1, codebook_size) at place ``done`` (B,), 1 or more, of a canvas of codes (B, N), and at the W
        places behind it, given what stands on the canvas before each.
        """
        places = done[:, None] + torch.arange(-1, window, device=done.device)
        pairs = len(self.lengths) // self.images
        ids = (canvas.gather(1, places) + self.model.layout.image_token_offset).repeat(pairs, 1)
        cache = self.cache
        cache.lengths = self.lengths + (done - 1).repeat(pairs)
        cache.visible = cache.capacity if self.fixed else int(cache.lengths.max()) + window + 1
        positions = self.model.positions_at(cache.places(window + 1), self.lengths, self.grid)
        return self.forward(ids, positions, cache)


class PreparedStep:
    """A model's step, kept from one request to the next for as long as the weights are the same.

    Args:
        model: on the device where it is to run, in evaluation mode.
        compiled: under `torch.compile`, with CUDA graphs on a GPU. Each shape of a step compiles when it first occurs.
        prompt_multiple: prompts are padded to a multiple of so many tokens.
    """

    def __init__(self, model: LanguageModel, compiled: bool, prompt_multiple: int = 1) -> None:
        self.model, self.compiled, self.prompt_multiple = model, compiled, require_multiple(prompt_multiple)
        self._step: DecoderStep | None = None
        self._forward: Forward | None = None
        self._cache: RowCache | None = None

    def prepare(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function, compiled if the step is. It gets other settings from request to request; beyond some it runs as
        it is.
        """
        if not self.compiled:
            return function
        return torch.compile(  # type: ignore[call-overload,no-any-return]  # the last two are not in its stub
            function, dynamic=False, recompile_limit=SHAPES, isolate_recompiles=True
        )

    def prefill(
        self,
        prompts: Sequence[Tensor],
        negatives: Sequence[Tensor],
        codes: Tensor,
        grid: tuple[int, int],
        room: int,
    ) -> Rows:
        """Rows that hold prompts and codes. An unconditional prompt that all images share is read once.

        Args:
            prompts: B 1-D tensors.
            negatives: B more, or none.
            codes: (B, K) behind the prompts from the beginning.
            grid: rows and columns of codes.
            room: codes that a row can hold.
        """
        step, forward = self._current()
        images, read, device = len(prompts), codes.shape[1], codes.device
        asked, order = read_once(prompts, negatives, read)
        codes = codes + self.model.layout.image_token_offset
        ids = pad_sequence(
            [torch.cat([text.to(device), codes[row % images]]) for row, text in enumerate(asked)], batch_first=True
        )
        lengths = torch.tensor([len(text) for text in asked], device=device)
        longest = prompt_width(asked, self.prompt_multiple)
        ids = F.pad(ids, (0, longest + read - ids.shape[1]), value=self.model.layout.padding_id)
        first = RowCache(self.model.decoder.config, len(asked), longest + read, step.embedding)
        hidden = step.hidden(ids, self.model.positions_at(first.places(longest + read), lengths, grid), first)
        last = hidden[torch.arange(len(asked), device=device), lengths + read - 1]
        rows = torch.tensor(order, device=device)
        cache = self._room(len(order), longest + room, step.embedding)
        # Padding stands behind a row's length, where later tokens replace it.
        cache.take(first, rows)
        return Rows(self.model, forward, cache, step.logits(last)[rows], lengths[rows], images, grid, self.compiled)

    def _current(self) -> tuple[DecoderStep, Forward]:
        """The step and what to call for it, made anew where the weights have changed."""
        if self._step is None or self._forward is None or self._step.versions != _versions(self.model):
            self._step = self._forward = DecoderStep(self.model)
            if self.compiled:
                self._forward = torch.compile(  # type: ignore[call-overload]  # the last two are not in its stub
                    self._step.__call__,
                    fullgraph=True,
                    dynamic=False,
                    mode="reduce-overhead" if self._step.embedding.is_cuda else None,
                    recompile_limit=SHAPES,
                    isolate_recompiles=True,
                )
        return self._step, self._forward

    def _room(self, rows: int, capacity: int, like: Tensor) -> RowCache:
        """A cache; for the compiled step the one of before if it can be: a CUDA graph writes to fixed addresses."""
        if not self.compiled:
            return RowCache(self.model.decoder.config, rows, capacity, like)
        capacity = -(-capacity // ROOM) * ROOM
        cache = self._cache
        if (
            cache is None
            or (len(cache.lengths), cache.capacity) != (rows, capacity)
            or cache.keys[0].dtype != like.dtype
        ):
            self._cache = cache = RowCache(self.model.decoder.config, rows, capacity, like)
            for tensor in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(tensor)
        return cache
