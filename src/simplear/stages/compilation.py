"""The decoder layers under `torch.compile`, in place: names of parameters, states and exports stay as they are.

Each layer is a graph of its own, and all layers are the same one: it is compiled once, with sizes left open, so that
another length or batch size compiles nothing anew. FSDP2's and DDP's own work stays between the graphs, where gathering
the next layer overlaps with computing this one. A copy of a compiled model runs as it is, without the compiler.
"""

from __future__ import annotations

import torch
from transformers import Qwen2ForCausalLM

from simplear.errors import UserError

INDUCTOR = "inductor"


def require_compiler() -> None:
    """Raises ValueError where PyTorch finds no C++ compiler, long before it would miss it itself.

    CPU kernels are C++; on a GPU it is Triton that builds its launchers.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "compile_layers needs a C++ compiler, and there is none: install one (apt-get install g++), or name one in "
            "the environment (CXX), or train without compile_layers."
        ) from error


def compile_decoder_layers(decoder: Qwen2ForCausalLM, backend: str = INDUCTOR) -> None:
    """Have each layer compiled at its first call; after activation checkpointing is set, before sharding.

    Args:
        backend: of `torch.compile`; the others are for debugging.
    """
    # DDP's own splitting of graphs knows no checkpoints, and a graph of one layer is about a bucket anyway.
    torch._dynamo.config.optimize_ddp = False
    for layer in decoder.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=backend)
