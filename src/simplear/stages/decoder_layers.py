"""How decoder layers run in training: what they keep for the backward pass, and under `torch.compile`.

Activation checkpointing says what a layer keeps and what it computes again. ``none`` keeps everything that autograd
saves. ``full`` keeps each layer's input and computes the layer again, a third more arithmetic. ``selective`` also
keeps what is expensive to compute, the outputs of matrix products and of attention, and computes again what is cheap
but large: norms, rotations, the activation and the products of the MLP, and the casts of mixed precision. The MLP's
last product, the layer's output, is not kept either: nothing in the layer needs it. Gradients are the same in all
three, for the same operations run on the same numbers.

Layers are compiled in place: names of parameters, states and exports stay as they are. Each layer is a graph, and all
layers share one: it is compiled once, with sizes left open, so that another length or batch size compiles nothing
again. FSDP2's and DDP's own work stays between the graphs, where gathering the next layer overlaps with computing this
one. A copy of a compiled model runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Qwen2ForCausalLM

ActivationCheckpointing = Literal["none", "selective", "full"]
MODES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)

_aten = torch.ops.aten
SAVED_OPERATIONS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        # What `scaled_dot_product_attention` becomes: on CPUs, and on GPUs one of three by dtype, mask and version.
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Operations whose outputs ``selective`` keeps. Without a fused kernel attention is products (bmm) and a softmax."""


def checkpoint_activations(decoder: Qwen2ForCausalLM, mode: ActivationCheckpointing, rank: int | None = None) -> None:
    """Set what the decoder's layers keep in training, in place; before they are compiled or sharded.

    Args:
        rank: of an adapter, whose products are cheap, and as large as those of the matrices beside them: ``selective``
            computes them again.
    """
    options: dict[str, Any] = {}
    if mode == "selective":
        policy = _policy_of(decoder.config.intermediate_size, decoder.config.hidden_size, rank)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for layer in decoder.model.layers:
        layer.__dict__.pop("forward", None)
        if mode != "none":
            layer.forward = partial(_checkpointed, layer, layer.forward, options)


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], options: Any, *inputs: Any, **keywords: Any) -> Any:
    """A layer's forward pass; within it, so that FSDP2's hooks around it gather the weights once a pass."""
    if not layer.training:
        return forward(*inputs, **keywords)
    return checkpoint(forward, *inputs, use_reentrant=False, **options, **keywords)


def _policy_of(inner: int, outer: int, rank: int | None) -> Callable[..., CheckpointPolicy]:
    """For the operations of a layer's forward pass and of its repetition.

    A closure, since the compiler takes its numbers for constants; a partial's, under FSDP2, for sizes that may change.

    Args:
        inner: the MLP's width.
        outer: the residual stream's.
        rank: of an adapter, if there is one.
    """

    def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if operation not in SAVED_OPERATIONS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        # The repetition stops when it has what the backward pass asks for, which is before the last product; with an
        # adapter behind it.
        shape = arguments[1].shape if operation is _aten.mm.default else ()
        last = rank is None and shape == (inner, outer) and inner != outer
        return CheckpointPolicy.PREFER_RECOMPUTE if last or rank in shape else CheckpointPolicy.MUST_SAVE

    return policy


def compile_decoder_layers(decoder: Qwen2ForCausalLM, backend: str = "inductor") -> None:
    """Have each layer compiled at its first call; after activation checkpointing is set, before sharding.

    Args:
        backend: of `torch.compile`; the others are for debugging.
    """
    # DDP's own splitting of graphs refuses checkpointed layers, and a graph of one layer is about a bucket anyway.
    torch._dynamo.config.optimize_ddp = False
    for layer in decoder.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=backend)
