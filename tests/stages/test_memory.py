"""Memory by arithmetic is what real modules keep; what a knob changes follows from its definition."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from simplear.language_model import Architecture
from simplear.stages.memory import (
    A100,
    GIB,
    H100,
    SAVED_BYTES,
    Rollouts,
    Run,
    days,
    flops_a_step,
    memory,
    saved_a_token,
)
from simplear.stages.memory import seconds_a_step as seconds

BATCH, LENGTH = 3, 51  # a product that is no side of a weight


def kept(config: Qwen2Config, precision: str) -> float:
    """Bytes a token that a forward pass keeps for the backward pass, weights and their casts left out."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).train()
    if precision == "bf16-true":
        model.bfloat16()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {tuple(weight.shape) for weight in model.parameters()} | {
        tuple(weight.T.shape) for weight in model.parameters() if weight.dim() == 2
    }
    sizes: dict[int, int] = {}
    alive = []  # else another tensor would get a freed one's address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed:
        model.model(
            input_ids=torch.randint(0, 64, (BATCH, LENGTH)),
            position_ids=torch.arange(LENGTH)[None],
            attention_mask={"full_attention": None},
            use_cache=False,
        )
    return sum(sizes.values()) / (BATCH * LENGTH)


@pytest.mark.parametrize("precision", SAVED_BYTES)
@pytest.mark.parametrize("sides", [(96, 200, 4, 2, 32), (192, 400, 6, 3, 16), (64, 304, 8, 1, 24)])
def test_a_layer_keeps_what_arithmetic_says(precision: str, sides: tuple[int, ...]) -> None:
    """To half a percent: of the norms' few numbers a token no account is kept."""
    hidden, mlp, heads, key_values, width = sides

    def config(layers: int) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            head_dim=width,
            vocab_size=64,
        )

    one = kept(config(3), precision) - kept(config(2), precision)
    assert saved_a_token(Architecture.of(config(1)), precision) == pytest.approx(one, rel=5e-3)


@pytest.fixture
def run() -> Run:
    """The paper's 1.5B model at 1024 px on one GPU."""
    shape = Architecture(1536, 8960, 28, 12, 2, 128, 215_672, True)
    return Run(shape, 64_000, 4096, 100, 514, 8, 1000, 256, 1, False, "bf16-mixed", False, 512, False)


def test_static_memory_is_sixteen_bytes_a_parameter(run: Run) -> None:
    parts = memory(run)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * 1_641_612_800
    sharded = memory(replace(run, devices=32, sharded=True))
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == parts[name] / 32
    assert memory(replace(run, devices=32))["optimizer"] == parts["optimizer"], "DDP shards nothing"


def test_the_paper_needs_checkpointing_at_1024_px(run: Run) -> None:
    plain = sum(memory(replace(run, devices=32, sharded=True)).values()) / GIB
    frugal = sum(memory(replace(run, devices=32, sharded=True, activation_checkpointing=True)).values()) / GIB
    assert plain > A100.memory_gib > frugal


def test_what_each_knob_saves(run: Run) -> None:
    def total(**changes: Any) -> float:
        return sum(memory(replace(run, **changes)).values())

    assert total(images=4) < total()
    assert total(chunk_rows=None) > 2 * total(chunk_rows=512) - total(chunk_rows=1)
    assert total(precision="bf16-true") < total() < total(precision="32-true")
    assert total(chunk_rows=None) - total(chunk_rows=None, images=4) > 4 * 4096 * 64_000 * 8, "logits are in float32"


def test_rollouts_hold_the_larger_of_cache_and_activations(run: Run) -> None:
    rollouts = Rollouts(4, None, 1, 2, True)
    small = replace(run, images=1, images_a_step=28, devices=7, activation_checkpointing=True, rollouts=rollouts)
    parts = memory(small)
    assert parts["reference"] == 2 * small.architecture.parameters
    at_once = 28 // 7
    cache = 2 * 28 * 2 * 2 * 128 * (514 + 4096) * at_once
    many = memory(replace(small, images_a_step=28 * 200))
    assert many["KV cache and rollouts"] >= 200 * cache and "activations" not in many


def test_pace(run: Run) -> None:
    one, eight = (seconds(replace(run, devices=devices), A100, 0.4, 0.5) for devices in (1, 8))
    assert one == pytest.approx(8 * eight) == pytest.approx(flops_a_step(run) / (0.4 * 312e12))
    assert seconds(run, H100, 0.4, 0.5) < one
    assert days(run, A100, 0.4, 0.5) == pytest.approx(1000 * one / 86400)
    # Six FLOPs a weight and token is the rule of thumb; attention at 4,196 tokens and a smaller head move it little.
    rule = 6 * run.architecture.parameters * 256 * (4096 + 100)
    assert 0.8 < flops_a_step(run) / rule < 1.6
