"""Configurations that cannot work are refused before any step is taken, and the message names the keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simplear.cli import main
from simplear.language_model import CheckpointSettings, LanguageModelConfig, save_checkpoint
from simplear.stages import PretrainModule, SFTModule, VisualTokenizerModule
from toys import ARCHITECTURE, make_shards, write_pretraining, write_sft, write_visual_tokenizer_training

Refused = Callable[[Path, str], str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """The one message in which ``simplear VERB --config FILE …`` ends, without a step or a state."""

    def step(module: object, *batch: object) -> None:
        raise AssertionError("a step was taken")

    for stage in (PretrainModule, SFTModule, VisualTokenizerModule):
        monkeypatch.setattr(stage, "training_step", step)
        monkeypatch.setattr(stage, "validation_step", step)

    def run(config: Path, options: str, verb: str = "fit") -> str:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--config", str(config), *options.split()])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in printed
        assert not list(tmp_path.glob("run/states/*.ckpt")) and not (tmp_path / "run" / "model").exists()
        return printed

    return run


@pytest.fixture
def pretraining(tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str) -> Path:
    return write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards)


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_resolution_that_is_no_multiple_of_the_downsample_factor(
    refused: Refused, tmp_path: Path, tiny_visual_tokenizer: str, side: str
) -> None:
    printed = refused(write_visual_tokenizer_training(tmp_path), f"--data.init_args.{side} 20")
    assert f"--data.{side} 20" in printed and "multiples of the tokenizer's downsample, 8 pixels" in printed
    config = tmp_path / "tokenize.yaml"
    config.write_text(
        "source: {class_path: simplear.data.ScenesSource, init_args: {count: 3, resolution: 16}}\n"
        f"visual_tokenizer: {tiny_visual_tokenizer}\nout: {tmp_path / 'tokens'}\nheight: 16\nwidth: 16\n"
    )
    printed = refused(config, f"--{side} 20", "tokenize")
    assert "20" in printed and "no multiples of the tokenizer's 8: change height and width" in printed
    assert not (tmp_path / "tokens").exists()


def test_a_grid_beyond_the_models_positions(refused: Refused, pretraining: Path) -> None:
    """The toy shards have 2 × 2 codes and captions of up to 40 tokens."""
    positions = "--model.init_args.language_model.architecture.max_position_embeddings"
    printed = refused(pretraining, f"{positions} 45")
    assert "2 × 2 grid with up to 40 caption tokens takes 46 positions, the model has 45" in printed
    assert "--data.max_text_tokens" in printed and positions.removesuffix(".max_position_embeddings") in printed


def test_a_checkpoint_with_another_codebook(
    refused: Refused, tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str
) -> None:
    torch.manual_seed(0)
    model, tokenizer = LanguageModelConfig(tiny_text_tokenizer, 64, architecture=ARCHITECTURE).build()
    settings = CheckpointSettings(model.layout.image_token_offset, 64, (2, 2), 8)
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer, settings)
    config = write_sft(tmp_path, str(tmp_path / "checkpoint"), tiny_visual_tokenizer, tiny_shards)
    assert "codebook of 27 codes, the model one of 64: tokenize with the checkpoint's" in refused(config, "")


def test_a_checkpoint_with_another_codebook_of_that_size(
    refused: Refused, tmp_path: Path, tiny_checkpoint: Path, tiny_visual_tokenizer: str
) -> None:
    shards = make_shards(tmp_path / "shards", tiny_visual_tokenizer, (2, 2), fingerprint="f" * 64)
    config = write_sft(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, shards)
    printed = refused(config, "")
    assert "the token shards: ffffffffffff…" in printed and "--model.init_args.visual_tokenizer" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--trainer.accumulate_grad_batches 3", "over 1 ranks x accumulate_grad_batches 3: take a multiple of 3"),
        ("--trainer.accumulate_grad_batches 8", "over 1 ranks x accumulate_grad_batches 8: take a multiple of 8"),
        ("--data.init_args.global_batch_size 21", "global batch of 21: take a smaller global_batch_size or more data"),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "visual_tokenizer"])
def test_a_global_batch_that_does_not_divide(
    refused: Refused, tmp_path: Path, pretraining: Path, stage: str, options: str, message: str
) -> None:
    config = pretraining if stage == "pretrain" else write_visual_tokenizer_training(tmp_path)
    printed = refused(config, options)
    assert message in printed and "global" in printed


def test_the_keys_that_messages_name_are_keys(pretraining: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_options = ["--data.max_text_tokens", "33", "--model.init_args.language_model.architecture", "{hidden_size: 8}"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(pretraining), *main_options, "--print_config"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "max_text_tokens: 33" in printed and "hidden_size: 8" in printed
