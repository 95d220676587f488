"""Compiled layers compute what the layers do, one graph serves all of them, and nothing else notices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from simplear.generation import SamplingSettings, make_engine
from simplear.language_model import LanguageModel
from simplear.stages.decoder_layers import (
    MODES,
    ActivationCheckpointing,
    checkpoint_activations,
    compile_decoder_layers,
)
from simplear.stages.sharding import shard_language_model
from toys import CAPTIONS, make_batch, model_config


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Graphs are kept by code, not by model."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_and_gradients(model: LanguageModel, tokenizer: Any, grid: tuple[int, int], captions: Any) -> list[Any]:
    batch = make_batch(model, tokenizer, grid, captions)
    model.train().zero_grad()
    image, text = model(batch["input_ids"], batch["labels"], grid)
    (image.mean() + text.mean()).backward()
    gradients = [weight.grad for weight in model.parameters()]
    whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return [image.detach(), text.detach(), *whole]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_graph_for_all_layers_and_lengths(
    tiny_text_tokenizer: str, mode: ActivationCheckpointing, sharded: bool, tmp_path: Path
) -> None:
    """Traced, but run by PyTorch as it is: the same operations, hence the same bits."""
    torch.manual_seed(0)
    # A length that is a width of the model too would count as one with it.
    model, tokenizer = model_config(tiny_text_tokenizer, num_hidden_layers=3, hidden_size=40).build()
    checkpoint_activations(model.decoder, mode)
    compiled = copy.deepcopy(model)
    compile_decoder_layers(compiled.decoder, backend="eager")
    assert list(compiled.state_dict()) == list(model.state_dict())
    if sharded:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        shard_language_model(compiled, init_device_mesh("cpu", (1,)))
    captions = CAPTIONS[:2]
    for grid in ((2, 3), (3, 3), (4, 4), (2, 2)):
        wanted = losses_and_gradients(model, tokenizer, grid, captions)
        found = losses_and_gradients(compiled, tokenizer, grid, captions)
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    losses_and_gradients(compiled, tokenizer, (2, 2), CAPTIONS)
    assert counters["stats"]["unique_graphs"] == 1, "another batch size"


def test_drawing_and_copies_run_uncompiled(tiny_text_tokenizer: str) -> None:
    """Drawing feeds a cache, in which every layer and length is another graph."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    prompts = [torch.tensor(tokenizer("<|t2i|>a red circle<|soi|>").input_ids)] * 2

    def drawn(drawer: LanguageModel) -> Any:
        engine = make_engine("cached", drawer.eval())
        return engine.generate(prompts, prompts, (2, 2), SamplingSettings(guidance_scale=2.0), [1, 2])[0]

    wanted = drawn(model)
    compile_decoder_layers(model.decoder, backend="eager")
    assert torch.equal(drawn(model), wanted)
    losses_and_gradients(copy.deepcopy(model), tokenizer, (2, 2), CAPTIONS)
    assert not counters["stats"]
