"""Checkpoint directories: what stock transformers makes of them, and those of the release as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from simplear.language_model import (
    CheckpointError,
    CheckpointSettings,
    GenerationDefaults,
    LanguageModel,
    load_checkpoint,
    load_text_tokenizer,
    save_checkpoint,
)
from simplear.sequence import SPECIAL_TOKENS, add_special_tokens, encode_captions
from toys import ARCHITECTURE, CAPTIONS, CODEBOOK, make_batch, model_config

OTHER_SETTINGS: dict[str, Any] = {
    "grid": (2, 3),
    "downsample": 8,
    "max_text_tokens": 40,
    "generation": GenerationDefaults("A picture of ", "blurred", 3.5, 0.9, 20, 0.95),
    "visual_tokenizer": "elsewhere/tokenizer",
    "visual_tokenizer_fingerprint": "0" * 64,
}


def settings_of(model: LanguageModel, **changes: Any) -> CheckpointSettings:
    layout = model.layout
    fields = {"grid": (2, 3), "downsample": 8, "rope": model.rope, **changes}
    return CheckpointSettings(layout.image_token_offset, layout.codebook_size, **fields)


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_computes_the_same_logits(tmp_path: Path, tiny_text_tokenizer: str, tied: bool) -> None:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer, tie_word_embeddings=tied).build()
    save_checkpoint(tmp_path / "model", model, tokenizer, settings_of(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock) is Qwen2ForCausalLM
    batch = make_batch(model, tokenizer)
    expected = stock(input_ids=batch["input_ids"]).logits
    model.eval()
    hidden = model.hidden_states(batch["input_ids"], model.training_positions(batch["input_ids"], (2, 3)), None)
    loaded = load_checkpoint(tmp_path / "model").model
    for logits in (model.decoder.lm_head(hidden), loaded.decoder(input_ids=batch["input_ids"]).logits):
        real = batch["attention_mask"].bool()
        assert torch.equal(logits[real], expected[real])
    stock_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert stock_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path, tiny_model: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = tiny_model
    settings = settings_of(model, **OTHER_SETTINGS)
    save_checkpoint(tmp_path / "model", model, tokenizer, settings)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.settings == settings
    assert loaded.model.rope == model.rope
    assert loaded.model.layout == model.layout
    assert loaded.visual_tokenizer_path == tmp_path / "model" / "elsewhere/tokenizer"
    assert not loaded.model.training
    weights = model.state_dict()
    assert weights.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.model.state_dict().items())
    batch = make_batch(model, tokenizer)
    for one, other in zip(
        model(batch["input_ids"], batch["labels"], (2, 3)),
        loaded.model(batch["input_ids"], batch["labels"], (2, 3)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_captions_get_the_same_ids_from_the_checkpoint_as_in_training(
    tiny_checkpoint: Path, tiny_text_tokenizer: str
) -> None:
    """From this project and from stock transformers, which goes by the model's type."""
    captions = [*CAPTIONS, "größe  42, <|soi|>\n  it's"]
    trained = encode_captions(load_text_tokenizer(tiny_text_tokenizer), captions)
    assert encode_captions(load_checkpoint(tiny_checkpoint).tokenizer, captions) == trained
    assert encode_captions(AutoTokenizer.from_pretrained(tiny_checkpoint), captions) == trained


def test_a_text_tokenizer_of_another_kind_stays_what_it_is_beside_a_qwen2_model(tmp_path: Path) -> None:
    """AutoTokenizer would split as Qwen2 does, and give other ids than training did."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "text")
    model, tokenizer = model_config(str(tmp_path / "text")).build()
    save_checkpoint(tmp_path / "model", model, tokenizer, settings_of(model))
    trained = encode_captions(tokenizer, CAPTIONS)
    assert encode_captions(load_checkpoint(tmp_path / "model").tokenizer, CAPTIONS) == trained
    assert encode_captions(AutoTokenizer.from_pretrained(tmp_path / "model"), CAPTIONS) != trained


def test_weights_given_in_place_of_the_models_own_are_written(
    tmp_path: Path, tiny_model: tuple[LanguageModel, Any]
) -> None:
    model, tokenizer = tiny_model
    gathered = {name: weight.detach() + 1 for name, weight in model.state_dict().items()}
    save_checkpoint(tmp_path / "model", model, tokenizer, settings_of(model), state_dict=gathered)
    loaded = load_checkpoint(tmp_path / "model").model.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in gathered.items())


def test_the_visual_tokenizer_travels_inside(
    tmp_path: Path, tiny_model: tuple[LanguageModel, Any], tiny_visual_tokenizer: str
) -> None:
    model, tokenizer = tiny_model
    save_checkpoint(tmp_path / "model", model, tokenizer, settings_of(model), visual_tokenizer=tiny_visual_tokenizer)
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    path = load_checkpoint(moved).visual_tokenizer_path
    assert path is not None and path.parent == moved
    names = {file.name for file in Path(tiny_visual_tokenizer).iterdir()}
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        name: (Path(tiny_visual_tokenizer) / name).read_bytes() for name in names
    }


def test_the_precision_of_the_weights_is_kept_unless_another_is_asked_for(
    tmp_path: Path, tiny_model: tuple[LanguageModel, Any]
) -> None:
    model, tokenizer = tiny_model
    save_checkpoint(tmp_path / "model", model.bfloat16(), tokenizer, settings_of(model))
    for dtype, expected in [(None, torch.bfloat16), (torch.float32, torch.float32)]:
        loaded = load_checkpoint(tmp_path / "model", dtype=dtype).model
        assert {weight.dtype for weight in loaded.parameters()} == {expected}


REFUSED = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
for loader in (AutoConfig, AutoModelForCausalLM):
    try:
        loader.from_pretrained(sys.argv[1])
    except ValueError as error:
        print(str(error).splitlines()[0])
assert not any(name.startswith("simplear") for name in sys.modules)
"""


def test_stock_transformers_refuses_2d_checkpoints(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    model, tokenizer = model_config(tiny_text_tokenizer, rope="2d").build()
    save_checkpoint(tmp_path / "model", model, tokenizer, settings_of(model))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("simplear_qwen2_rope_2d" in line for line in lines)


def released_tokenizer(tiny_text_tokenizer: str, tokens: tuple[str, ...]) -> Any:
    """Qwen2's own tokenizer, of the tiny one's vocabulary, with these of the seven tokens."""
    model = json.loads((Path(tiny_text_tokenizer) / "tokenizer.json").read_text())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    # As the release did, not marked as special: then a caption could type them.
    tokenizer.add_tokens(list(tokens), special_tokens=False)
    return tokenizer


def released_directory(
    directory: Path, tokenizer: Any, model_type: str | None, positions: int = 96
) -> Qwen2ForCausalLM:
    """A checkpoint as the paper's authors publish theirs: no simplear.json, an architecture that nobody registers."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **{**ARCHITECTURE, "vocab_size": len(tokenizer) + CODEBOOK, "max_position_embeddings": positions}
    )
    decoder = Qwen2ForCausalLM(config).eval()
    decoder.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    content["architectures"] = ["SimpARForCausalLM"]
    content.pop("model_type")
    if model_type is not None:
        content["model_type"] = model_type
    (directory / "config.json").write_text(json.dumps(content))
    return decoder


@pytest.mark.parametrize("model_type", ["simpar", "qwen2"])
@pytest.mark.parametrize("tokens", [("<|t2i|>", "<|soi|>"), SPECIAL_TOKENS, ("<|soi|>", "<|sov|>", "<|t2i|>")])
def test_a_released_directory_loads_as_it_is(
    tmp_path: Path, tiny_text_tokenizer: str, tokens: tuple[str, ...], model_type: str
) -> None:
    tokenizer = released_tokenizer(tiny_text_tokenizer, tokens)
    decoder = released_directory(tmp_path / "released", tokenizer, model_type)
    before = {file.name: file.read_bytes() for file in (tmp_path / "released").iterdir()}
    loaded = load_checkpoint(tmp_path / "released")
    assert {file.name: file.read_bytes() for file in (tmp_path / "released").iterdir()} == before
    assert len(loaded.tokenizer) == len(tokenizer) == loaded.model.layout.image_token_offset
    assert loaded.model.layout.start_of_image_id == tokenizer.convert_tokens_to_ids("<|soi|>")
    assert loaded.model.layout.text_to_image_id == tokenizer.convert_tokens_to_ids("<|t2i|>")
    assert loaded.model.rope == "1d"
    assert loaded.visual_tokenizer_path is None
    settings = loaded.settings
    assert (settings.image_token_offset, settings.codebook_size) == (len(tokenizer), CODEBOOK)
    assert (settings.grid, settings.downsample, settings.max_text_tokens) == ((64, 64), 16, 512)
    generation = settings.generation
    assert generation.prompt_prefix == "A highly realistic image of "
    assert generation.negative_prompt.startswith("An image of aerial view, overexposed, ")
    assert generation.negative_prompt.endswith("bad eyes, bad limbs, distortion")
    assert (generation.guidance_scale, generation.top_k) == (6.0, CODEBOOK)
    caption = "a red circle <|soi|> <|t2i|>"
    (ids,) = encode_captions(loaded.tokenizer, [caption])
    assert loaded.tokenizer.decode(ids) == caption
    assert ids[:3] == tokenizer("a red circle")["input_ids"][:3]
    batch = make_batch(loaded.model, loaded.tokenizer)
    assert torch.equal(
        loaded.model.decoder(input_ids=batch["input_ids"]).logits, decoder(input_ids=batch["input_ids"]).logits
    )


def test_a_released_directory_without_a_tokenizer_file_is_converted(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    """vocab.json and merges.txt, from before tokenizer.json was customary."""
    tokenizer = released_tokenizer(tiny_text_tokenizer, ())
    released_directory(tmp_path, tokenizer, "simpar")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    added = {"<|t2i|>": len(tokenizer), "<|soi|>": len(tokenizer) + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    loaded = load_checkpoint(tmp_path)
    assert loaded.model.layout.start_of_image_id == added["<|soi|>"]
    assert loaded.settings.codebook_size == CODEBOOK - 2


def test_a_released_directory_can_be_saved_in_our_layout(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    """Fine-tuning starts from it and writes simplear.json; ids, weights and defaults stay."""
    released_directory(tmp_path / "released", released_tokenizer(tiny_text_tokenizer, ("<|t2i|>", "<|soi|>")), "simpar")
    released = load_checkpoint(tmp_path / "released")
    save_checkpoint(tmp_path / "ours", released.model, released.tokenizer, released.settings)
    ours = load_checkpoint(tmp_path / "ours")
    assert ours.settings == released.settings
    assert ours.model.layout == released.model.layout
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is Qwen2ForCausalLM
    captions = ["two blue squares", "it's 42 <|soi|>"]
    assert encode_captions(ours.tokenizer, captions) == encode_captions(released.tokenizer, captions)


def test_a_plain_language_model_is_no_checkpoint(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_text_tokenizer)
    add_special_tokens(tokenizer)
    Qwen2ForCausalLM(Qwen2Config(**{**ARCHITECTURE, "vocab_size": 400})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no simplear\.json .* start for pretraining"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_weights_a_checkpoint_says_the_same_of_itself(tiny_checkpoint, dtype):
    whole, bare = (load_checkpoint(tiny_checkpoint, dtype=dtype, with_weights=weights) for weights in (True, False))
    assert {parameter.device.type for parameter in bare.model.parameters()} == {"meta"}
    assert (bare.model.layout, bare.settings, bare.model.max_positions, bare.model.rope) == (
        whole.model.layout,
        whole.settings,
        whole.model.max_positions,
        whole.model.rope,
    )
    kinds = [[(name, p.shape, p.dtype) for name, p in found.model.named_parameters()] for found in (whole, bare)]
    assert kinds[0] == kinds[1]
