"""Weights that are made or read one at a time are those of the model that is built whole, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from language_model.test_model import pretrained_directory
from simplear.language_model import LanguageModelConfig, load_checkpoint, stored_weights
from toys import ARCHITECTURE, model_config


def assert_same(config: LanguageModelConfig) -> None:
    torch.manual_seed(0)
    whole, _ = config.build()
    after = torch.rand(1)
    torch.manual_seed(0)
    empty, _, stream = config.build_empty()
    assert all(weight.is_meta for weight in empty.parameters())
    found = dict(stream)
    if config.pretrained is None:
        assert torch.equal(torch.rand(1), after), "the generator has gone as far"
    wanted = dict(whole.decoder.named_parameters())
    assert found.keys() == wanted.keys() == dict(empty.decoder.named_parameters()).keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name].to(weight.dtype), weight), name
    assert empty.decoder.config.to_dict() == whole.decoder.config.to_dict()
    for defaults in (whole.decoder.generation_config, empty.decoder.generation_config):
        assert (defaults.temperature == 0.7) == (config.pretrained is not None)


def keep_temperature(directory: str) -> None:
    """Among the defaults of generation, which an export hands on."""
    GenerationConfig(do_sample=True, temperature=0.7).save_pretrained(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_random_weights(tiny_text_tokenizer: str, rope: Any, tied: bool, dtype: torch.dtype) -> None:
    """Under ``bf16-true`` Lightning builds models in bfloat16."""
    torch.set_default_dtype(dtype)
    try:
        assert_same(model_config(tiny_text_tokenizer, rope=rope, tie_word_embeddings=tied))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_pretrained_and_grown(tiny_text_tokenizer: str, tmp_path: Path, tied: bool) -> None:
    path = pretrained_directory(tmp_path / "llm", 400, tied)
    keep_temperature(path)
    assert_same(model_config(tiny_text_tokenizer, pretrained=path))


def test_a_model_stored_without_head_and_prefix(tiny_text_tokenizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**{**ARCHITECTURE, "tie_word_embeddings": True, "vocab_size": 400})
    Qwen2Model(config).save_pretrained(tmp_path)
    keep_temperature(str(tmp_path))
    assert_same(model_config(tiny_text_tokenizer, pretrained=str(tmp_path)))


def test_a_checkpoint_in_several_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = load_checkpoint(tiny_checkpoint).model.decoder
    whole.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = dict(stored_weights(whole, tmp_path))
    assert all(torch.equal(found[name], weight) for name, weight in whole.named_parameters())


def test_files_of_another_model_are_refused_before_the_first_weight(tiny_text_tokenizer: str, tmp_path: Path) -> None:
    path = pretrained_directory(tmp_path / "llm", 400)
    config = model_config(tiny_text_tokenizer, pretrained=path, intermediate_size=32)
    with pytest.raises(ValueError, match=r"no Qwen2 of this configuration: 6 are missing or .*model\.layers\.0\.mlp"):
        config.build_empty()
    with pytest.raises(ValueError, match="ids but the pretrained model 40 rows"):
        model_config(tiny_text_tokenizer, pretrained=pretrained_directory(tmp_path / "few", 40)).build_empty()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        stored_weights(Qwen2ForCausalLM(Qwen2Config(**ARCHITECTURE)), tmp_path)
