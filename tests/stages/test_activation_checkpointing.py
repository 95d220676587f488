"""Computing a layer again gives the gradients of a layer that was kept, and computes what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simplear.language_model import LanguageModel
from simplear.stages.decoder_layers import (
    MODES,
    SAVED_OPERATIONS,
    ActivationCheckpointing,
    checkpoint_activations,
)
from toys import make_batch, model_config


def gradients(model: LanguageModel, batch: dict[str, Any], mode: ActivationCheckpointing) -> dict[str, Tensor]:
    checkpoint_activations(model.decoder, mode)
    model.train().zero_grad()
    image, text = model(batch["input_ids"], batch["labels"], (2, 3))
    (image.mean() + text.mean()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_gradients_are_the_same_bit_for_bit(tiny_text_tokenizer: str, rope: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer, rope=rope).build()
    model.to(dtype)
    batch = make_batch(model, tokenizer)
    plain = gradients(model, batch, "none")
    for mode in MODES:
        again = gradients(model, batch, mode)
        assert again.keys() == plain.keys() and all(torch.equal(again[name], plain[name]) for name in plain), mode


class Counter(TorchDispatchMode):
    """Counts operations by kind, those inside of a checkpoint too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {"kept": 0, "norm": 0}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.counts["kept"] += operation in SAVED_OPERATIONS
        self.counts["norm"] += operation is torch.ops.aten.rsqrt.default
        return operation(*arguments, **(keywords or {}))


def test_what_is_computed_again(tiny_text_tokenizer: str) -> None:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    batch = make_batch(model, tokenizer)
    counts = {}
    for mode in MODES:
        with Counter() as counter:
            gradients(model, batch, mode)
        counts[mode] = counter.counts
    layers = model.decoder.config.num_hidden_layers
    norms = 2 * layers
    # A layer has seven products and an attention; the last product is needed for nothing.
    assert counts["full"]["kept"] - counts["none"]["kept"] == 7 * layers
    assert counts["selective"]["kept"] == counts["none"]["kept"]
    assert counts["full"]["norm"] == counts["selective"]["norm"] == counts["none"]["norm"] + norms
