"""The decoder layers under `torch.compile`, in place: names of parameters, states and exports stay as they are.

Each layer is a graph, and all layers share one: it is compiled once, with sizes left open, so that another length or
batch size compiles nothing again. FSDP2's and DDP's own work stays between the graphs, where gathering the next layer
overlaps with computing this one. A copy of a compiled model runs uncompiled.
"""

from __future__ import annotations

import torch
from transformers import Qwen2ForCausalLM


def compile_decoder_layers(decoder: Qwen2ForCausalLM, backend: str = "inductor") -> None:
    """Have each layer compiled at its first call; after activation checkpointing is set, before sharding.

    Args:
        backend: of `torch.compile`; the others are for debugging.
    """
    # DDP's own splitting of graphs refuses checkpointed layers, and a graph of one layer is about a bucket anyway.
    torch._dynamo.config.optimize_ddp = False
    for layer in decoder.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=backend)
