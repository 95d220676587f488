"""Building, growing and running the decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from simplear.errors import UserError
from simplear.language_model import LanguageModel, load_text_tokenizer, train_text_tokenizer
from simplear.sequence import TokenLayout
from toys import ARCHITECTURE, CAPTIONS, CODEBOOK, make_batch, model_config

PADDING_ROWS = 13


def pretrained_directory(directory: Path, rows: int, tied: bool = False) -> str:
    """A plain language model of this many embedding rows, all random."""
    torch.manual_seed(3)
    decoder = Qwen2ForCausalLM(Qwen2Config(**{**ARCHITECTURE, "tie_word_embeddings": tied, "vocab_size": rows}))
    with torch.no_grad():
        for weight in (decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight):
            weight.normal_()
    decoder.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def bare_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text tokenizer without any of the seven special tokens, as a language model has."""
    directory = tmp_path_factory.mktemp("bare")
    tokenizer = train_text_tokenizer(CAPTIONS, 270, directory)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 270]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("extra_special_tokens", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("tied", [False, True])
def test_growth_sets_new_and_padding_rows_to_the_mean_of_the_used_ones(
    tmp_path: Path, bare_tokenizer: str, tied: bool, rope: str
) -> None:
    used = len(load_text_tokenizer(bare_tokenizer))
    assert used == 270
    path = pretrained_directory(tmp_path / "llm", used + PADDING_ROWS, tied)
    original = Qwen2ForCausalLM.from_pretrained(path)
    model, tokenizer = model_config(bare_tokenizer, rope=rope, pretrained=path).build()
    assert model.layout.image_token_offset == len(tokenizer) == used + 7
    assert model.decoder.config.vocab_size == used + 7 + CODEBOOK
    assert model.decoder.config.tie_word_embeddings is tied
    pairs = [(model.decoder.get_input_embeddings(), original.get_input_embeddings())]
    pairs.append((model.decoder.get_output_embeddings(), original.get_output_embeddings()))
    for grown, before in pairs:
        weight, old = grown.weight.detach(), before.weight.detach()
        assert weight.shape == (used + 7 + CODEBOOK, ARCHITECTURE["hidden_size"])
        assert torch.equal(weight[:used], old[:used])
        mean = old[:used].double().mean(dim=0)
        torch.testing.assert_close(weight[used:].double(), mean.expand(7 + CODEBOOK, -1), rtol=1e-5, atol=1e-6)
    same = model.decoder.get_input_embeddings().weight is model.decoder.get_output_embeddings().weight
    assert same is tied


def test_growth_to_fewer_rows_than_the_padded_model_has(tmp_path: Path, bare_tokenizer: str) -> None:
    """Padding rows are no codes: the vocabulary may shrink."""
    path = pretrained_directory(tmp_path / "llm", 400)
    model, _ = model_config(bare_tokenizer, pretrained=path).build()
    assert model.decoder.lm_head.weight.shape[0] == 277 + CODEBOOK < 400


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path, bare_tokenizer: str) -> None:
    path = pretrained_directory(tmp_path / "llm", 269)
    with pytest.raises(ValueError, match="270 ids but the pretrained model 269 rows"):
        model_config(bare_tokenizer, pretrained=path).build()


def test_a_pretrained_model_of_another_architecture_is_refused(tmp_path: Path, bare_tokenizer: str) -> None:
    path = pretrained_directory(tmp_path / "llm", 300)
    with pytest.raises(ValueError, match=r"no Qwen2 of this configuration: 6 are missing or .*model\.layers\.0\.mlp"):
        model_config(bare_tokenizer, pretrained=path, intermediate_size=32).build()


def test_one_key_is_between_random_and_pretrained_weights(tmp_path: Path, bare_tokenizer: str) -> None:
    """The two differ in weights alone: given the same ones they compute the same losses, bit for bit."""
    path = pretrained_directory(tmp_path / "llm", 300)
    config = model_config(bare_tokenizer)
    torch.manual_seed(0)
    scratch, tokenizer = config.build()
    config.pretrained = path
    pretrained, _ = config.build()
    assert scratch.layout == pretrained.layout
    assert {n: w.shape for n, w in scratch.named_parameters()} == {n: w.shape for n, w in pretrained.named_parameters()}
    batch = make_batch(scratch, tokenizer)
    arguments = (batch["input_ids"], batch["labels"], (2, 3))
    assert not torch.equal(scratch(*arguments)[0], pretrained(*arguments)[0])
    scratch.load_state_dict(pretrained.state_dict())
    for one, other in zip(scratch(*arguments), pretrained(*arguments), strict=True):
        assert torch.equal(one, other)


def test_random_weights_follow_the_seed(tiny_text_tokenizer: str) -> None:
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        made.append(model_config(tiny_text_tokenizer).build()[0].state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["decoder.lm_head.weight"], made[2]["decoder.lm_head.weight"])


def test_a_decoder_of_another_vocabulary_is_refused(tiny_model: tuple[LanguageModel, Any]) -> None:
    model, _ = tiny_model
    layout = model.layout
    other = TokenLayout(layout.text_to_image_id, layout.start_of_image_id, layout.image_token_offset, CODEBOOK + 1)
    with pytest.raises(ValueError, match=rf"has {layout.vocab_size} embedding rows .* = {layout.vocab_size + 1}"):
        LanguageModel(model.decoder, other)


def test_the_image_head_is_the_code_rows_of_the_full_head(tiny_model: tuple[LanguageModel, Any]) -> None:
    model, tokenizer = tiny_model
    batch = make_batch(model, tokenizer)
    hidden = model.hidden_states(batch["input_ids"], model.training_positions(batch["input_ids"], (2, 3)), None)
    logits = model.image_logits(hidden)
    assert logits.shape == (*batch["input_ids"].shape, CODEBOOK)
    torch.testing.assert_close(logits, model.decoder.lm_head(hidden)[..., model.layout.image_token_offset :])


def test_step_by_step_with_a_cache_gives_the_hidden_states_of_the_whole(tiny_model: tuple[LanguageModel, Any]) -> None:
    """Left-padded prompts of two lengths, then one code at a time, in float64."""
    model, tokenizer = tiny_model
    model.double().eval()
    batch = make_batch(model, tokenizer, (2, 3), ["two blue squares", "a green cross left of a red triangle"])
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(dim=1) - 6
    whole = model.hidden_states(ids, model.training_positions(ids, (2, 3)), None)
    width = int(lengths.max())
    places = torch.arange(-width, 6)[None] + lengths[:, None]
    mask = (places >= 0).long()
    padded = torch.where(places >= 0, ids.gather(1, places.clamp(min=0)), 0)
    positions = model.positions_at(places.clamp(min=0), lengths, (2, 3))
    cache = DynamicCache(config=model.decoder.config)
    parts = [slice(0, width)] + [slice(at, at + 1) for at in range(width, width + 6)]
    steps = []
    for part in parts:
        attention = mask[:, : part.stop]
        causal = torch.ones(part.stop, part.stop, dtype=torch.bool).tril()[part] & attention[:, None, None].bool()
        # A padding row attends to itself, so that its softmax is not over nothing.
        causal |= torch.eye(part.stop, dtype=torch.bool)[part]
        steps.append(
            model.decoder.model(
                input_ids=padded[:, part],
                position_ids=positions[..., part],
                attention_mask={"full_attention": causal},
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        )
    joined = torch.cat(steps, dim=1)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(joined[row, width - length :], whole[row, : length + 6], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("place", "config", "message"),
    [
        ("nowhere/at/all", None, r"pretrained .*nowhere/at/all: "),
        ("empty", "", r"pretrained .*empty: .*config\.json"),
        ("broken", "{", r"pretrained .*broken: .*config"),
        (
            "llama",
            '{"model_type": "llama"}',
            r"llama: it is a model of type 'llama', but pretraining starts from Qwen2",
        ),
    ],
)
def test_what_is_not_a_language_model_is_refused(
    tmp_path: Path, tiny_text_tokenizer: str, place: str, config: str | None, message: str
) -> None:
    directory = tmp_path / place
    if config is not None:
        directory.mkdir()
        (directory / "config.json").write_text(config) if config else None
    with pytest.raises(UserError, match=message):
        model_config(tiny_text_tokenizer, pretrained=str(directory)).build()
