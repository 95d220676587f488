"""The decoder's forward pass as the fast engines take it: what `transformers` computes, with less in between.

`DecoderStep` is a copy of the weights in the dtype that is computed in: queries, keys and values of a layer in one
matrix, gate and up projection in another. Its buffers keep their addresses: when training has changed the weights they
are copied into them, and nothing is allocated or compiled again. Keys and values go into a `RowCache`, in which rows
advance apart, so padding, guidance and drafts need nothing else.

Attention is masked, or on GPUs told the length of each row (`Attend`): it then reads no further than that, and splits
long rows among thread blocks, of which a few rows with a few heads would otherwise fill very few.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2Config

from simplear.language_model import LanguageModel, merged_weight

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor], Tensor]
"""From queries (R, T, heads, size) and a layer's keys and values in the cache, which hold those of the queries already,
to what each query saw, (R · T, heads · size)."""
STORED_IN_OUT = ("cpu",)
"""Devices on which matrices are stored (in, out), by which CPUs multiply few rows fastest; elsewhere (out, in)."""


def head_size(config: Qwen2Config) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class CacheMemory:
    """What caches of any shape are views of, so that the next request allocates nothing.

    Args:
        config: of the decoder.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(self, config: Qwen2Config, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.dtype, self.device = config.num_hidden_layers, dtype, device
        self.by_token = device.type == "cuda"
        """Whether a row's heads lie beside each other for each token, as attention by length reads them."""
        self.heads, self.size = config.num_key_value_heads or config.num_attention_heads, head_size(config)
        self.allocations = 0
        """Times that memory was taken, for it to be seen that it is not taken again."""
        self._flat: list[Tensor] = []

    def cache(self, rows: int, capacity: int) -> RowCache:
        """A cache, which the next one overwrites. Memory grows with the largest; older caches keep what they had."""
        lying = (capacity, 2 * self.heads) if self.by_token else (2 * self.heads, capacity)
        numbers = rows * 2 * self.heads * capacity * self.size
        if not self._flat or self._flat[0].numel() < numbers:
            # A tensor a layer, so that a compiler sees each written in place; zeros, for what is masked must be finite.
            self._flat = [torch.zeros(numbers, dtype=self.dtype, device=self.device) for _ in range(self.layers)]
            self.allocations += 1
        layers = (flat[:numbers].view(rows, *lying, self.size) for flat in self._flat)
        return RowCache([layer.transpose(1, 2) if self.by_token else layer for layer in layers])


class RowCache(nn.Module):
    """Keys and values of R rows, of up to ``capacity`` tokens each.

    Rows have lengths of their own, which whoever feeds tokens keeps: new keys and values are written behind a row's
    length and what is beyond is masked, so that rejecting drafts only leaves the length where it was.

    Args:
        layers: of each, (R, heads of keys and then as many of values, capacity, size).
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.register_buffer(f"layer_{number}", layer, persistent=False)
        self.rows, _, self.capacity, _ = layers[0].shape

    @property
    def layers(self) -> list[Tensor]:
        """Of each layer, (R, heads of keys and then as many of values, capacity, size)."""
        return list(self.buffers())

    def take(self, other: RowCache, order: Tensor) -> None:
        """Begin with the rows ``order`` (R,) of another cache, which may repeat them."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[:, :, : other.capacity] = theirs[order]


class FusedLayer(nn.Module):
    """Weights of one decoder layer.

    Args:
        layer: transformers' Qwen2DecoderLayer, for the shapes.
        stored_in_out: store matrices (in, out), else (out, in).
        options: dtype and device.
    """

    input_norm: Tensor
    attention_in: Tensor
    attention_bias: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    mlp_in: Tensor
    mlp_out: Tensor

    def __init__(self, layer: Any, stored_in_out: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.stored_in_out = stored_in_out
        attention, mlp = layer.self_attn, layer.mlp
        self.inputs = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        width, inner = mlp.gate_proj.in_features, mlp.gate_proj.out_features
        matrices = {
            "attention_in": (width, sum(self.inputs)),
            "attention_out": (self.inputs[0], width),
            "mlp_in": (width, 2 * inner),
            "mlp_out": (inner, width),
        }
        for name, shape in matrices.items():
            matrix = torch.empty(shape if stored_in_out else shape[::-1], **options)
            self.register_buffer(name, matrix, persistent=False)
        for name, size in (("input_norm", width), ("attention_bias", sum(self.inputs)), ("mlp_norm", width)):
            self.register_buffer(name, torch.empty(size, **options), persistent=False)

    def load(self, layer: Any) -> None:
        """Copy the layer's weights into the buffers, with what an adapter adds to them."""
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm.copy_(layer.input_layernorm.weight)
        self.mlp_norm.copy_(layer.post_attention_layernorm.weight)
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        for part, linear in zip(self.attention_bias.split(self.inputs), inputs, strict=True):
            part.copy_(linear.bias)
        self._load_matrix(self.attention_in, *inputs)
        self._load_matrix(self.attention_out, attention.o_proj)
        self._load_matrix(self.mlp_in, mlp.gate_proj, mlp.up_proj)
        self._load_matrix(self.mlp_out, mlp.down_proj)

    def _load_matrix(self, buffer: Tensor, *linears: nn.Linear) -> None:
        parts = in_out(buffer, self.stored_in_out).split([linear.out_features for linear in linears], dim=1)
        for part, linear in zip(parts, linears, strict=True):
            part.copy_(merged_weight(linear).t())


def in_out(matrix: Tensor, stored_in_out: bool) -> Tensor:
    """The matrix as (in, out), which is how it is multiplied with."""
    return matrix if stored_in_out else matrix.t()


class DecoderStep(nn.Module):
    """Hidden states and logits over the codebook for tokens behind the rows of a cache.

    Args:
        model: whole, or sharded by FSDP2, on the device where it is to run.
        dtype: to compute in.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        decoder, config = model.decoder.model, model.decoder.config
        self.heads, self.size, self.epsilon = config.num_attention_heads, head_size(config), config.rms_norm_eps
        self.key_heads = config.num_key_value_heads or self.heads
        weight = decoder.embed_tokens.weight
        self.stored_in_out = weight.device.type in STORED_IN_OUT
        options: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        self.layers = nn.ModuleList(FusedLayer(layer, self.stored_in_out, options) for layer in decoder.layers)
        width, codes = config.hidden_size, model.layout.codebook_size
        head = (width, codes) if self.stored_in_out else (codes, width)
        self.register_buffer("embedding", torch.empty(config.vocab_size, width, **options), persistent=False)
        self.register_buffer("head", torch.empty(head, **options), persistent=False)
        self.register_buffer("norm", torch.empty(width, **options), persistent=False)
        epsilons = torch.full((1, 1), self.epsilon, dtype=torch.float32, device=weight.device)
        self.register_buffer("epsilons", epsilons, persistent=False)
        self.rotary = type(decoder.rotary_emb)(config=config).to(weight.device)
        self.by_length = attention_by_length(weight.device, dtype)
        self.loads = 0
        """Times that weights were copied."""
        self._versions: list[tuple[int, int]] = []

    embedding: Tensor
    head: Tensor
    norm: Tensor
    epsilons: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in."""
        return self.norm.dtype

    def load(self, model: LanguageModel) -> None:
        """Copy the weights of a model, unless they are those of the last time. All ranks of a sharded one together.

        A sharded model is gathered layer by layer, so that no more than one of its layers is whole at a time.
        """
        sharded = isinstance(model, FSDPModule)
        versions = [(weight.data_ptr(), weight._version) for weight in model.parameters()] if not sharded else []
        if versions and versions == self._versions:
            return
        decoder = model.decoder.model
        for mine, theirs in zip(cast(Any, self.layers), decoder.layers, strict=True):
            with whole(theirs):
                mine.load(theirs)
        with whole(model):
            self.embedding.copy_(decoder.embed_tokens.weight)
            self.norm.copy_(decoder.norm.weight)
            in_out(self.head, self.stored_in_out).copy_(model.image_head_weight.t())
        self._versions = versions
        self.loads += 1

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, codebook_size) of normalised hidden states (…, width)."""
        return hidden @ in_out(self.head, self.stored_in_out)

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
        attend = (
            self._masked(places, visible, hidden.dtype) if self.by_length is None else self._by_length(places, cache)
        )
        cos, sin = self._turns(hidden, positions)
        numbers = torch.arange(rows, device=ids.device)[:, None]
        hidden = hidden.flatten(0, 1)
        for layer, cache_layer in zip(cast(Any, self.layers), cache.layers, strict=True):
            attention_in = in_out(layer.attention_in, self.stored_in_out)
            mixed = torch.addmm(layer.attention_bias, self._normalized(hidden, layer.input_norm), attention_in)
            mixed = mixed.view(rows, new, self.heads + 2 * keys, self.size)
            mixed = torch.addcmul(mixed * cos, mixed.roll(self.size // 2, dims=-1), sin)
            cache_layer[numbers, :, places] = mixed[:, :, self.heads :]
            attended = attend(mixed[:, :, : self.heads], cache_layer)
            hidden = torch.addmm(hidden, attended, in_out(layer.attention_out, self.stored_in_out))
            inner = self._normalized(hidden, layer.mlp_norm) @ in_out(layer.mlp_in, self.stored_in_out)
            gate, up = inner.chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, in_out(layer.mlp_out, self.stored_in_out))
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
            seen = cache_layer.narrow(2, 0, visible)
            attended = F.scaled_dot_product_attention(
                queries.reshape(rows, keys, shared * new, self.size),
                seen.narrow(1, 0, keys),
                seen.narrow(1, keys, keys),
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
        parts = ((cos, torch.ones), (sin, torch.zeros))
        cos, sin = (
            torch.cat([part.expand(-1, -1, turned, -1), fill(unturned, dtype=part.dtype, device=part.device)], dim=2)
            for part, fill in parts
        )
        return cos, sin

    def _normalized(self, hidden: Tensor, weight: Any) -> Tensor:
        """Qwen2's RMSNorm, which computes in float32 whatever the weights are."""
        if hidden.is_cuda:
            return weight * F.rms_norm(hidden.float(), weight.shape, None, self.epsilon).to(hidden.dtype)
        # Half the calls of CPUs' rms_norm.
        wide = hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.epsilons, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()
        return (wide * scale).to(hidden.dtype) * weight


def attention_by_length(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn` where it can read caches; None where attention must be masked.

    It needs a GPU of Ampere's generation or later, and two bytes a number.
    """
    if device.type != "cuda":
        return None
    lacking = ""
    if dtype not in (torch.bfloat16, torch.float16):
        lacking = f"{dtype} was asked for"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        lacking = f"{torch.cuda.get_device_name(device)} is older than flash attention"
    if lacking:
        logger.info("attention while drawing reads whole caches under a mask, which is slower: %s", lacking)
        return None
    if {"seqused_k", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return cast(Callable[..., Tensor], varlen_attn)
    return _varlen_attn_before_caches


def _varlen_attn_before_caches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *lengths: Any,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
) -> Tensor:
    """The operation under `varlen_attn` in releases (torch 2.11) whose function does not pass on what it can do."""
    left, right = window_size
    options: dict[str, Any] = {"window_size_left": left, "window_size_right": right, "seqused_k": seqused_k}
    return torch.ops.aten._flash_attention_forward(query, key, value, *lengths, 0.0, right == 0, False, **options)[0]


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
