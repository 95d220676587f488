"""Parameters and FLOPs by arithmetic are those of real decoders: counted weights, and PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from simplear.language_model import Adapter, Architecture, LanguageModelConfig
from simplear.language_model.adapter import TARGETS
from simplear.language_model.arithmetic import TRAINING_PASSES
from simplear.stages import NextTokenObjective, PretrainModule
from toys import ARCHITECTURE, CODEBOOK, make_batch

SIZES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [*SIZES, "tiny", "wide heads"])
def test_parameters_are_those_of_the_model(size: str, tied: bool) -> None:
    fields: dict[str, Any] = {**ARCHITECTURE, "vocab_size": 331, **SIZES.get(size, {})}
    fields |= {"num_key_value_heads": 2 if size in SIZES else 1, "tie_word_embeddings": tied}
    if size == "wide heads":
        fields["head_dim"] = 12
    config = Qwen2Config(**fields)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert Architecture.of(config).parameters == sum(weight.numel() for weight in model.parameters())
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert Architecture.of(config).parameters_a_layer == layer


def counted_flops(module: Any, batch: dict[str, Any]) -> int:
    """Of a training step, without the outer product that makes the rotary angles."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        module.training_step(batch, 0).backward()
    angles = sum(
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("normalizer", ["by_modality", "full"])
@pytest.mark.parametrize("text_loss_weight", [0.0, 1.0])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_flops_of_a_step_are_those_that_pytorch_counts(
    tiny_text_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    normalizer: Any,
    text_loss_weight: float,
    checkpointing: Any,
) -> None:
    objective = NextTokenObjective(normalizer, text_loss_weight)
    config = LanguageModelConfig(tiny_text_tokenizer, CODEBOOK, architecture=ARCHITECTURE)
    module = PretrainModule(config, objective=objective, activation_checkpointing=checkpointing)
    module.configure_model()
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    captions = ["a photo of a red circle"] * 3  # of one length: the counter counts padding too
    batch = make_batch(module.language_model, module.text_tokenizer, (2, 3), captions)
    batch["codes"] = torch.zeros(3, 2, 3)
    work = module.step_work(batch)
    assert (work.images, work.tokens) == (3, batch["input_ids"].numel())
    lengths = batch["attention_mask"].sum(dim=1)
    sums = int(lengths.sum()), int(lengths.square().sum())
    shape = Architecture.of(module.language_model.decoder.config)
    recomputed = shape.recomputed_flops(*sums) if checkpointing == "full" else 0
    counted = counted_flops(module, batch)
    assert int(work.flops) + recomputed == counted


@pytest.mark.parametrize("targets", [list(TARGETS), ["q_proj", "v_proj"]])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_flops_with_an_adapter(
    tiny_text_tokenizer: str, monkeypatch: pytest.MonkeyPatch, checkpointing: Any, targets: list[str]
) -> None:
    """Those of PyTorch's counter, but selective checkpointing repeats the adapter's own, and without any nothing goes
    back through the first products of all unless the embeddings are trained.
    """
    config = LanguageModelConfig(tiny_text_tokenizer, CODEBOOK, architecture=ARCHITECTURE)
    for code_rows in (True, False):
        module = PretrainModule(config, activation_checkpointing=checkpointing)
        module.adapter = adapter = Adapter(3, None, targets, code_rows)  # the step is that of fine-tuning
        module.configure_model()
        monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
        batch = make_batch(module.language_model, module.text_tokenizer, (2, 3), ["a photo of a red circle"] * 3)
        batch["codes"] = torch.zeros(3, 2, 3)
        work, shape = module.step_work(batch), Architecture.of(module.language_model.decoder.config)
        tokens, layers = int(work.tokens), shape.num_hidden_layers
        recomputed = shape.recomputed_flops(tokens, tokens * tokens // 3, adapter) if checkpointing == "full" else 0
        expected = int(work.flops) + recomputed - counted_flops(module, batch)
        if checkpointing == "selective":
            last = layers * 3 * shape.hidden_size if "down_proj" in targets else 0
            expected += 2 * tokens * (shape.adapter_parameters(adapter) - last)
        first = shape.layer_flops(tokens, tokens * tokens // 3) // layers
        assert 0 < expected < first if not code_rows else expected == 0


def test_packing_computes_nothing_but_the_work_and_the_padding_of_attention(
    tiny_text_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LanguageModelConfig(tiny_text_tokenizer, CODEBOOK, architecture=ARCHITECTURE)
    module = PretrainModule(config, packed=True)
    module.configure_model()
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    batch = make_batch(module.language_model, module.text_tokenizer)
    batch["codes"] = torch.zeros(len(batch["labels"]), 2, 3)
    lengths = batch["attention_mask"].sum(dim=1)
    padding = int((lengths.amax() ** 2 - lengths**2).sum())
    in_attention = Architecture.of(module.language_model.decoder.config).layer_flops(0, padding)
    assert counted_flops(module, batch) == int(module.step_work(batch).flops) + TRAINING_PASSES * in_attention


def test_padding_is_no_work(tiny_text_tokenizer: str) -> None:
    module = PretrainModule(LanguageModelConfig(tiny_text_tokenizer, CODEBOOK, architecture=ARCHITECTURE))
    module.configure_model()

    def work(*captions: str) -> Any:
        batch = make_batch(module.language_model, module.text_tokenizer, (2, 3), captions)
        return module.step_work({**batch, "codes": torch.zeros(len(captions), 2, 3)})

    long, short, both = (
        work("a green cross left of a red triangle"),
        work("one star"),
        work("one star", "a green cross left of a red triangle"),
    )
    assert int(both.tokens) == int(long.tokens) + int(short.tokens)
    assert int(both.flops) == int(long.flops) + int(short.flops)
