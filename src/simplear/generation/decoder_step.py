"""The decoder's forward pass as the fast engines take it: what `transformers` computes, with less in between.

`DecoderStep` is a copy of the weights in the dtype that is computed in: queries, keys and values of a layer in one
matrix, gate and up projection in another. Its buffers keep their addresses: when training has changed the weights they
are copied into them, and nothing is allocated or compiled again. Keys and values go into a `RowCache`, in which rows
advance apart, so padding, guidance and drafts need nothing else.

Attention is masked, or on GPUs told the length of each row (`Attend`): it then reads no further than that, and splits
long rows among thread blocks, of which a few rows with a few heads would otherwise fill very few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.varlen import varlen_attn

from simplear.language_model import LanguageModel, merged_weight

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor], Tensor]
"""From queries (R, T, heads, size) and a layer's keys and values in the cache, which hold those of the queries already,
to what each query saw, (R · T, heads · size)."""
STORED_IN_OUT = ("cpu",)
"""Devices on which matrices lie in memory as (in, out), the fastest for few rows on CPUs; elsewhere (out, in)."""


class CacheMemory:
    """Memory that caches of any shape are views of, so that the next request allocates nothing.

    Args:
        step: for the decoder's sizes, dtype and device.
    """

    def __init__(self, step: DecoderStep) -> None:
        self.layers, self.dtype, self.device = len(step.layers), step.dtype, step.device
        self.heads, self.size = step.key_heads, step.size
        self.by_token = self.device.type == "cuda"
        """Whether a row's heads lie beside each other for each token, as attention by length reads them."""
        self.flat: list[Tensor] = []

    def cache(self, rows: int, capacity: int) -> RowCache:
        """A cache, which the next one overwrites. Memory grows with the largest; older caches keep what they had."""
        shape = (capacity, 2 * self.heads) if self.by_token else (2 * self.heads, capacity)
        numbers = rows * 2 * self.heads * capacity * self.size
        if not self.flat or self.flat[0].numel() < numbers:
            # A tensor a layer, so that a compiler sees each written in place; zeros, for what is masked must be finite.
            self.flat = [torch.zeros(numbers, dtype=self.dtype, device=self.device) for _ in range(self.layers)]
        layers = (flat[:numbers].view(rows, *shape, self.size) for flat in self.flat)
        return RowCache([layer.transpose(1, 2) if self.by_token else layer for layer in layers])


class RowCache(nn.Module):
    """Keys and values of R rows, of up to ``capacity`` tokens each.

    The caller keeps each row's length: new keys and values are written behind it and what is beyond is masked, so
    rejecting drafts only leaves the length where it was.

    Args:
        layers: of each, (R, heads of keys and then as many of values, capacity, size).
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.register_buffer(f"layer_{number}", layer)
        self.rows, _, self.capacity, _ = layers[0].shape

    @property
    def layers(self) -> list[Tensor]:
        """Of each layer, (R, heads of keys and then as many of values, capacity, size)."""
        return list(self.buffers())

    def take(self, other: RowCache, order: Tensor) -> None:
        """Begin with the rows ``order`` (R,) of another cache, which may repeat them."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[:, :, : other.capacity] = theirs[order]


class CopiedWeights(nn.Module):
    """Copies of weights, each of which keeps its first address."""

    def copy(self, dtype: torch.dtype, **weights: Tensor) -> None:
        """Take weights under these names, converted to a dtype; a new name gets memory laid out as its weight."""
        for name, weight in weights.items():
            if name not in self._buffers:
                self.register_buffer(name, torch.empty_like(weight, dtype=dtype, requires_grad=False))
            getattr(self, name).copy_(weight)


class DecoderStep(CopiedWeights):
    """Hidden states and logits over the codebook for tokens behind the rows of a cache.

    Args:
        model: whole, or sharded by FSDP2, on the device where it is to run.
        dtype: to compute in.
    """

    embedding: Tensor
    head: Tensor
    norm: Tensor

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        decoder, config = model.decoder.model, model.decoder.config
        self.heads, self.epsilon = config.num_attention_heads, config.rms_norm_eps
        self.key_heads = config.num_key_value_heads or self.heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.dtype, self.device = dtype, decoder.embed_tokens.weight.device
        self.layers = nn.ModuleList(CopiedWeights() for _ in decoder.layers)
        self.epsilons = nn.Buffer(torch.full((1, 1), self.epsilon, dtype=torch.float32, device=self.device))
        self.rotary = type(decoder.rotary_emb)(config=config).to(self.device)
        self.by_length = attention_by_length(self.device, dtype)
        self._versions: list[tuple[int, int]] = []

    def load(self, model: LanguageModel) -> None:
        """Copy the weights of a model, unless they have not changed. All ranks of a sharded model call it together.

        A sharded model is gathered layer by layer, so that no more than one of its layers is whole at a time.
        """
        sharded = isinstance(model, FSDPModule)
        versions = [(weight.data_ptr(), weight._version) for weight in model.parameters()] if not sharded else []
        if versions and versions == self._versions:
            return
        decoder = model.decoder.model
        for mine, theirs in zip(cast(Any, self.layers), decoder.layers, strict=True):
            with whole(theirs):
                attention, mlp = theirs.self_attn, theirs.mlp
                inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
                mine.copy(
                    self.dtype,
                    input_norm=theirs.input_layernorm.weight,
                    attention_in=joined(*inputs),
                    attention_bias=torch.cat([linear.bias for linear in inputs]),
                    attention_out=joined(attention.o_proj),
                    mlp_norm=theirs.post_attention_layernorm.weight,
                    mlp_in=joined(mlp.gate_proj, mlp.up_proj),
                    mlp_out=joined(mlp.down_proj),
                )
        with whole(model):
            head = in_out(model.image_head_weight)
            self.copy(self.dtype, embedding=decoder.embed_tokens.weight, norm=decoder.norm.weight, head=head)
        self._versions = versions

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, codebook_size) of normalised hidden states (…, width)."""
        return hidden @ self.head

    def hidden(self, ids: Tensor, positions: Tensor, places: Tensor, cache: RowCache, visible: int) -> Tensor:
        """Normalised hidden states (R, T, width).

        Args:
            ids: (R, T) tokens behind the rows.
            positions: of them, from `LanguageModel.positions_at`.
            places: (R, T) where they stand in their rows, one behind the other; each sees its row up to itself.
            cache: gets their keys and values.
            visible: tokens from the beginning that a mask covers; more than the largest place.
        """
        (rows, new), keys = ids.shape, self.key_heads
        hidden = F.embedding(ids, self.embedding)
        by_length = self.by_length is not None
        attend = self._by_length(places, cache) if by_length else self._masked(places, visible, hidden.dtype)
        cos, sin = self._turns(hidden, positions)
        numbers = torch.arange(rows, device=ids.device)[:, None]
        hidden = hidden.flatten(0, 1)
        for layer, cache_layer in zip(cast(Any, self.layers), cache.layers, strict=True):
            mixed = torch.addmm(layer.attention_bias, self._normalized(hidden, layer.input_norm), layer.attention_in)
            mixed = mixed.view(rows, new, self.heads + 2 * keys, self.size)
            mixed = torch.addcmul(mixed * cos, mixed.roll(self.size // 2, dims=-1), sin)
            cache_layer[numbers, :, places] = mixed[:, :, self.heads :]
            attended = attend(mixed[:, :, : self.heads], cache_layer)
            hidden = torch.addmm(hidden, attended, layer.attention_out)
            inner = self._normalized(hidden, layer.mlp_norm) @ layer.mlp_in
            gate, up = inner.chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, layer.mlp_out)
        return self._normalized(hidden, self.norm).view(rows, new, -1)

    def _masked(self, places: Tensor, visible: int, dtype: torch.dtype) -> Attend:
        """Attention to the first ``visible`` tokens of each row, under a mask of those that a query does not see."""
        (rows, new), keys = places.shape, self.key_heads
        # Queries of the heads that share keys stand below each other, so that keys are not repeated for them.
        shared = self.heads // keys
        hidden_from = torch.arange(visible, device=places.device) > places[..., None]
        mask = torch.zeros(hidden_from.shape, dtype=dtype, device=places.device)
        mask = mask.masked_fill_(hidden_from, float("-inf"))[:, None].repeat(1, 1, shared, 1)

        def attend(queries: Tensor, cache_layer: Tensor) -> Tensor:
            if new > 1:
                queries = queries.view(rows, new, keys, shared, self.size).permute(0, 2, 3, 1, 4)
            visible_part = cache_layer.narrow(2, 0, visible)
            attended = F.scaled_dot_product_attention(
                queries.reshape(rows, keys, shared * new, self.size),
                visible_part.narrow(1, 0, keys),
                visible_part.narrow(1, keys, keys),
                attn_mask=mask,
            )
            if new > 1:
                attended = attended.reshape(rows, self.heads, new, self.size).transpose(1, 2)
            return attended.reshape(rows * new, self.heads * self.size)

        return attend

    def _by_length(self, places: Tensor, cache: RowCache) -> Attend:
        """Attention to each row as far as its last query, whose places follow each other."""
        (rows, new), keys, capacity = places.shape, self.key_heads, cache.capacity
        count = torch.arange(rows + 1, dtype=torch.int32, device=places.device)
        begins, cache_begins, lengths = count * new, count * capacity, places[:, -1].int() + 1
        # One query sees its whole row, and saying so lets the heads that share keys be read together.
        window = (-1, 0) if new > 1 else (-1, -1)

        def attend(queries: Tensor, cache_layer: Tensor) -> Tensor:
            tokens = cache_layer.transpose(1, 2).flatten(0, 1)
            attended = cast(Any, self.by_length)(
                queries.flatten(0, 1),
                tokens.narrow(1, 0, keys),
                tokens.narrow(1, keys, keys),
                begins,
                cache_begins,
                new,
                capacity,
                window_size=window,
                enable_gqa=True,
                seqused_k=lengths,
            )
            return attended.reshape(rows * new, self.heads * self.size)

        return attend

    def _turns(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary positions as x · cos + (x rolled by half a head) · sin, for queries, keys and, unturned, values.

        Each (R, T, heads, size).
        """
        cos, sin = (part[:, :, None] for part in self.rotary(hidden, positions))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        turned, unturned = self.heads + self.key_heads, (*cos.shape[:2], self.key_heads, cos.shape[-1])
        cos = torch.cat([cos.expand(-1, -1, turned, -1), cos.new_ones(unturned)], dim=2)
        return cos, torch.cat([sin.expand(-1, -1, turned, -1), sin.new_zeros(unturned)], dim=2)

    def _normalized(self, hidden: Tensor, weight: Any) -> Tensor:
        """Qwen2's RMSNorm, which computes in float32 whatever the weights are."""
        if hidden.is_cuda:
            return weight * F.rms_norm(hidden.float(), weight.shape, None, self.epsilon).to(hidden.dtype)
        # Half the calls of CPUs' rms_norm.
        wide = hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.epsilons, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()
        return (wide * scale).to(hidden.dtype) * weight


def joined(*linears: nn.Linear) -> Tensor:
    """One matrix of several linear layers, with what an adapter adds to them; see `in_out`."""
    return in_out(torch.cat([merged_weight(linear) for linear in linears]))


def in_out(matrix: Tensor) -> Tensor:
    """A matrix (out, in) as (in, out), laid out as its device multiplies few rows fastest."""
    return matrix.t().contiguous() if matrix.device.type in STORED_IN_OUT else matrix.t()


def attention_by_length(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn` where it can read caches; None where attention must be masked.

    It needs a GPU of Ampere's generation or later, two bytes a number, and a PyTorch later than 2.11.
    """
    if device.type != "cuda":
        return None
    recent = torch.cuda.get_device_capability(device) >= (8, 0) and "seqused_k" in signature(varlen_attn).parameters
    if recent and dtype in (torch.bfloat16, torch.float16):
        return cast(Callable[..., Tensor], varlen_attn)
    logger.info(
        "attention while drawing reads whole caches under a mask, which is slower: reading by length needs an Ampere "
        "GPU or later, bfloat16 or float16 (not %s), and a PyTorch later than 2.11",
        dtype,
    )
    return None


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """A module sharded by FSDP2 has its weights whole inside; any other is left as it is."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
