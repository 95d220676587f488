"""Texts without images among the training data: plain language modelling, beside images that notice nothing of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from simplear.data import TokenDataModule
from simplear.data.jobs.texts import write_texts
from simplear.language_model import LanguageModel
from simplear.sequence import encode_captions, text_batch
from simplear.stages import GRPOModule, NextTokenObjective, PretrainModule
from toys import make_trainer, model_config

TEXTS = ["the moon is round", "a red sun", "two stars and one circle", "it rains", "left of the green square", "one"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS * 2))
    write_texts([str(tmp_path / "texts.jsonl")], str(tmp_path / "texts"))
    return str(tmp_path / "texts")


def plain_language_model(model: LanguageModel, rows: int) -> Qwen2ForCausalLM:
    """Transformers' own Qwen2 with the first `rows` of the vocabulary, whatever positions the model's codes have."""
    config = Qwen2Config(**{**model.decoder.config.to_dict(), "vocab_size": rows})
    plain = Qwen2ForCausalLM(config).double()
    weights = copy.deepcopy(model.decoder.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:rows]
    plain.load_state_dict(weights)
    return plain


def plain_losses(plain: Qwen2ForCausalLM, ids: list[list[int]]) -> list[Tensor]:
    """Of each text by itself, without padding."""
    rows = [torch.tensor([row]) for row in ids]
    return [plain(input_ids=row, labels=row).loss for row in rows]


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("normalizer", ["full", "by_modality"])
def test_loss_and_gradients_are_those_of_transformers(
    tiny_model: tuple[LanguageModel, Any], normalizer: Any, chunk_rows: int | None
) -> None:
    """Over all ids, or as a model that has no image ids at all; for both kinds of positions."""
    model, tokenizer = tiny_model
    model = model.double()
    ids = encode_captions(tokenizer, TEXTS[:5])
    rows = model.layout.vocab_size if normalizer == "full" else model.layout.image_token_offset
    plain = plain_language_model(model, rows)
    batch = text_batch(ids, model.layout)
    image, text = model(
        batch["input_ids"], batch["labels"], (0, 0), normalizer=normalizer, with_text=True, chunk_rows=chunk_rows
    )
    expected = plain_losses(plain, ids)
    torch.testing.assert_close(text, torch.stack(expected).double(), rtol=1e-6, atol=1e-6)
    assert not image.any()
    text.mean().backward()
    (sum(expected, torch.zeros(())) / len(expected)).backward()
    weights = dict(plain.named_parameters())
    for name, weight in model.decoder.named_parameters():
        assert weight.grad is not None
        own = weight.grad if name not in ("model.embed_tokens.weight", "lm_head.weight") else weight.grad[:rows]
        # transformers computes its loss in float32.
        torch.testing.assert_close(own, weights[name].grad, rtol=1e-4, atol=1e-6)
        assert weight.grad.sum() == pytest.approx(float(own.sum()))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)


@pytest.fixture
def make(tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> Any:
    def make(**options: Any) -> PretrainModule:
        seed_everything(0, verbose=False)
        config = model_config(tiny_text_tokenizer)
        return PretrainModule(config, **{"visual_tokenizer": tiny_visual_tokenizer, "optimizer": adamw, **options})

    return make


@pytest.fixture
def make_data(tiny_text_tokenizer: str, tiny_shards: str, texts: str) -> Any:
    def make(**options: Any) -> TokenDataModule:
        options = {"paths": [tiny_shards, texts], "weights": [2, 1], **options}
        return TokenDataModule(global_batch_size=4, tokenizer=tiny_text_tokenizer, max_text_tokens=30, **options)

    return make


def fit(module: PretrainModule, data: TokenDataModule, directory: Path, **options: Any) -> Any:
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(directory, **{"max_epochs": -1, **options})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return trainer


def weights(module: PretrainModule) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.language_model.state_dict().items()}


def test_images_and_texts_train_together(
    make: Any, make_data: Any, tiny_shards: str, texts: str, tmp_path: Path
) -> None:
    """Both are learned, each logged by itself; the perplexity is that of all held-out tokens."""
    module = make()
    data = make_data(validation_paths=[tiny_shards, texts])
    trainer = fit(module, data, tmp_path, max_steps=60, val_check_interval=60, check_val_every_n_epoch=None)
    logged = trainer.callback_metrics
    assert logged["train/loss"] == logged["train/image_loss"] and logged["train/text_only_loss"] < 2.0
    assert {"validation/loss", "validation/text_only_loss", "validation/text_perplexity"} <= set(logged)
    assert module.checkpoint_settings().grid == (2, 2)
    ids = encode_captions(data.text_tokenizer, TEXTS * 2)
    plain = plain_language_model(module.language_model.double(), module.language_model.layout.image_token_offset)
    losses = [loss * (len(row) - 1) for loss, row in zip(plain_losses(plain, ids), ids, strict=True) if len(row) > 1]
    nats = torch.stack(losses).sum() / sum(len(row) - 1 for row in ids)
    torch.testing.assert_close(logged["validation/text_perplexity"], nats.exp().float(), rtol=1e-4, atol=1e-4)
    assert logged["validation/text_perplexity"] < 6


def test_the_weight_of_texts(make: Any, make_data: Any, texts: str, tmp_path: Path) -> None:
    """0 leaves weights as they are; an image-only run takes no notice of it."""
    options = {"paths": texts, "weights": None, "codebook_size": 27}
    before, after = [], []
    for weight in (0.0, 1.0):
        module = make(
            objective=NextTokenObjective(text_only_loss_weight=weight), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        module.configure_model()
        before.append(weights(module))
        fit(module, make_data(**options), tmp_path, max_steps=2)
        after.append(weights(module))
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert any(not torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_image_only_runs_are_bit_identical_whatever_the_weight(
    make: Any, make_data: Any, tiny_shards: str, tmp_path: Path
) -> None:
    made = []
    for weight, shares in ((1.0, None), (7.0, [3.0])):
        module = make(objective=NextTokenObjective(text_only_loss_weight=weight))
        fit(module, make_data(paths=[tiny_shards], weights=shares), tmp_path, max_steps=7)
        made.append(weights(module))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize("stop_after", [2, 7])
def test_a_resumed_run_is_bit_identical(make: Any, make_data: Any, tmp_path: Path, stop_after: int) -> None:
    whole = make()
    fit(whole, make_data(), tmp_path, max_steps=10)
    trainer = fit(make(), make_data(), tmp_path, max_steps=stop_after)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    resumed = make()
    fit(resumed, make_data(), tmp_path, max_steps=10, ckpt_path=tmp_path / "state.ckpt")
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_changes_nothing(make: Any, make_data: Any, tmp_path: Path) -> None:
    made = []
    for accumulate in (1, 4):
        module = make()
        fit(module, make_data(), tmp_path, max_steps=4, accumulate_grad_batches=accumulate)
        made.append(weights(module))
    assert all((made[0][name] - made[1][name]).abs().max() < 1e-4 for name in made[0])


def test_texts_are_no_prompts(
    tiny_checkpoint: Path, make_data: Any, tmp_path: Path, tiny_visual_tokenizer: str
) -> None:
    from simplear.rewards import SceneReward

    module = GRPOModule(
        str(tiny_checkpoint), reward=SceneReward(), group_size=2, visual_tokenizer=tiny_visual_tokenizer
    )
    data = make_data(caption_dropout=0.0)
    with pytest.raises(ValueError, match=r"texts without images, which are not prompts"):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
