"""Pretraining and fine-tuning under a real Trainer: stopped and resumed; on several processes: test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simplear.data import TokenDataModule
from simplear.language_model import GenerationDefaults, load_checkpoint, save_checkpoint, train_text_tokenizer
from simplear.stages import (
    MuonWithAdamW,
    NextTokenModule,
    NextTokenObjective,
    PretrainModule,
    SFTModule,
    decoder_layers,
)
from simplear.stages.decoder_layers import MODES
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import CODEBOOK, DOWNSAMPLE, make_shards, make_trainer, make_visual_tokenizer, model_config

STEPS = 8
BATCHES_PER_EPOCH = 5
"""20 rows in global batches of 4."""


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)


def fused_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, fused=True)


OPTIMIZERS: dict[str, Any] = {"AdamW": adamw, "fused AdamW": fused_adamw, "MuonWithAdamW": MuonWithAdamW}


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


def fit(module: NextTokenModule, data: TokenDataModule, directory: Path, **options: Any) -> Trainer:
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(directory, **{"max_epochs": -1, **options})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return trainer


@pytest.fixture
def pretrain(tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> Any:
    """Makes the pretraining stage; the same random weights each time."""

    def make(**options: Any) -> PretrainModule:
        seed_everything(0, verbose=False)
        config = model_config(tiny_text_tokenizer, rope=options.pop("rope", "1d"))
        return PretrainModule(config, **{"visual_tokenizer": tiny_visual_tokenizer, "optimizer": adamw, **options})

    return make


@pytest.fixture
def make_data(tiny_text_tokenizer: str, tiny_shards: str) -> Any:
    def make(**options: Any) -> TokenDataModule:
        defaults = {"paths": tiny_shards, "caption_dropout": 0.3, "max_text_tokens": 30}
        return TokenDataModule(global_batch_size=4, tokenizer=tiny_text_tokenizer, **{**defaults, **options})

    return make


def export(module: NextTokenModule, directory: Path) -> str:
    save_checkpoint(
        directory,
        module.language_model,
        module.text_tokenizer,
        module.checkpoint_settings(),
        visual_tokenizer=module.visual_tokenizer_path,
    )
    return str(directory)


def weights(module: NextTokenModule) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.language_model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((weight - other[name]).abs().max()) for name, weight in one.items())


@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_pretraining_then_fine_tuning_at_a_larger_grid(
    pretrain: Any, make_data: Any, tiny_large_shards: str, tiny_shards: str, tmp_path: Path, rope: Any
) -> None:
    generation = GenerationDefaults(prompt_prefix="A drawing of ", guidance_scale=2.5)
    objective = NextTokenObjective(text_loss_weight=0.5, chunk_rows=8)
    module = pretrain(rope=rope, generation=generation, objective=objective)
    data = make_data(validation_paths=tiny_shards)
    trainer = fit(module, data, tmp_path, max_steps=30, check_val_every_n_epoch=3)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/image_loss", "train/text_loss", "validation/loss"} <= set(logged)
    torch.testing.assert_close(logged["train/loss"], logged["train/image_loss"] + 0.5 * logged["train/text_loss"])
    assert logged["train/text_loss"] < 3.0 < torch.tensor(300.0).log()
    first = load_checkpoint(export(module, tmp_path / "pretrain"))
    assert first.settings.grid == (2, 2)
    assert (first.settings.downsample, first.settings.max_text_tokens, first.settings.rope) == (8, 30, rope)
    tuned = SFTModule(str(tmp_path / "pretrain"), optimizer=adamw)
    fit(tuned, make_data(paths=tiny_large_shards), tmp_path, max_steps=3)
    second = load_checkpoint(export(tuned, tmp_path / "sft"))
    assert second.settings.grid == (3, 4)
    assert second.settings.generation == first.settings.generation == generation
    assert second.settings.visual_tokenizer_fingerprint == first.settings.visual_tokenizer_fingerprint
    assert second.visual_tokenizer_path is not None and second.visual_tokenizer_path.parent == tmp_path / "sft"
    assert second.model.layout == first.model.layout
    assert second.model.rope == rope
    assert largest_difference(first.model.state_dict(), second.model.state_dict()) > 1e-3


@pytest.mark.parametrize(
    ("stage", "optimizer", "accumulate", "stop_after"),
    [
        ("pretrain", "AdamW", 1, 3),
        ("pretrain", "fused AdamW", 2, BATCHES_PER_EPOCH),
        ("pretrain", "MuonWithAdamW", 1, 6),
        ("pretrain", "MuonWithAdamW", 2, 3),
        ("sft", "AdamW", 2, 6),
        ("sft", "fused AdamW", 1, 3),
        ("sft", "MuonWithAdamW", 2, BATCHES_PER_EPOCH),
    ],
)
def test_a_resumed_run_is_bit_identical(
    pretrain: Any,
    make_data: Any,
    tiny_large_shards: str,
    tmp_path: Path,
    stage: str,
    optimizer: str,
    accumulate: int,
    stop_after: int,
) -> None:
    """Stopped before, at and after the end of an epoch, with a schedule, clipping, dropout and ragged captions."""
    start = pretrain()
    start.configure_model()
    start.grid = (2, 2)
    checkpoint = export_untrained(start, tmp_path / "start")

    def make() -> tuple[NextTokenModule, TokenDataModule]:
        options = {"optimizer": OPTIMIZERS[optimizer], "lr_scheduler": schedule}
        if stage == "pretrain":
            return pretrain(**options), make_data()
        return SFTModule(checkpoint, **options), make_data(paths=tiny_large_shards)

    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    whole, data = make()
    trainer = fit(whole, data, tmp_path, max_steps=STEPS, **options)
    assert trainer.global_step == STEPS
    stopped, data = make()
    trainer = fit(stopped, data, tmp_path, max_steps=stop_after, **options)
    assert trainer.global_step == stop_after
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    torch.manual_seed(99)
    resumed, data = make()
    trainer = fit(resumed, data, tmp_path, max_steps=STEPS, ckpt_path=tmp_path / "state.ckpt", **options)
    assert trainer.global_step == STEPS
    assert data.global_batches_consumed == STEPS
    assert_equal(weights(whole), weights(resumed))
    assert largest_difference(weights(stopped), weights(resumed)) > 0


def export_untrained(module: NextTokenModule, directory: Path) -> str:
    """As `export`, of a module that no Trainer knows."""
    module.trainer = make_trainer(directory.parent)
    return export(module, directory)


def test_resuming_without_the_optimizer_is_not_the_same(pretrain: Any, make_data: Any, tmp_path: Path) -> None:
    """The mutation that the tests above must be able to see."""
    whole = pretrain(optimizer=MuonWithAdamW)
    fit(whole, make_data(), tmp_path, max_steps=4)
    stopped = pretrain(optimizer=MuonWithAdamW)
    trainer = fit(stopped, make_data(), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    state = torch.load(tmp_path / "state.ckpt", weights_only=False)
    state["optimizer_states"][0]["state"] = {}
    torch.save(state, tmp_path / "state.ckpt")
    resumed = pretrain(optimizer=MuonWithAdamW)
    fit(resumed, make_data(), tmp_path, max_steps=4, ckpt_path=tmp_path / "state.ckpt")
    assert largest_difference(weights(whole), weights(resumed)) > 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_gives_the_weights_of_the_whole_batch(
    pretrain: Any, make_data: Any, tmp_path: Path, optimizer: str
) -> None:
    made = []
    for accumulate in (1, 2, 4):
        module = pretrain(optimizer=OPTIMIZERS[optimizer], objective=NextTokenObjective(text_loss_weight=1.0))
        trainer = fit(module, make_data(), tmp_path, max_steps=3, accumulate_grad_batches=accumulate)
        assert trainer.global_step == 3
        made.append(weights(module))
    # Muon and AdamW make large steps of small gradients, so rounding shows; a wrong mean would differ by a step, 1e-2.
    assert largest_difference(made[0], made[1]) < 1e-4
    assert largest_difference(made[0], made[2]) < 1e-4


def test_packing_changes_nothing(pretrain: Any, make_data: Any, tiny_shards: str, tmp_path: Path) -> None:
    """In training and validation; eps is far above rounding, so that noise in a gradient stays noise."""
    made, losses = [], []
    for packed in (False, True):
        module = pretrain(
            objective=NextTokenObjective(text_loss_weight=0.5, chunk_rows=8),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-4),
            packed=packed,
        )
        rows: list[int] = []
        module.configure_model()
        mlp = module.language_model.decoder.model.layers[0].mlp
        mlp.register_forward_hook(lambda _, args, out, rows=rows: rows.append(out.shape[:-1].numel()))
        data = make_data(validation_paths=tiny_shards)
        trainer = fit(module, data, tmp_path, max_steps=20, precision="64-true", check_val_every_n_epoch=2)
        made.append(weights(module))
        losses.append([float(trainer.callback_metrics[name]) for name in ("train/loss", "validation/loss")])
        assert len(rows) >= 20 + 2 * BATCHES_PER_EPOCH
        assert (len(set(rows)) > 5) == packed, "a packed batch has as many rows as tokens"
    assert largest_difference(made[0], made[1]) < 1e-9
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_state_of_an_unfused_optimizer_goes_on_fused(pretrain: Any, make_data: Any, tmp_path: Path) -> None:
    whole = pretrain()
    fit(whole, make_data(), tmp_path, max_steps=4)
    fit(pretrain(), make_data(), tmp_path, max_steps=2).save_checkpoint(tmp_path / "state.ckpt")
    resumed = pretrain(optimizer=fused_adamw)
    fit(resumed, make_data(), tmp_path, max_steps=4, ckpt_path=tmp_path / "state.ckpt")
    assert largest_difference(weights(whole), weights(resumed)) < 1e-5


def test_a_fused_optimizer_clips_in_mixed_precision(pretrain: Any, make_data: Any, tmp_path: Path) -> None:
    made = []
    for optimizer in (adamw, fused_adamw):
        module = pretrain(optimizer=optimizer)
        fit(module, make_data(), tmp_path, max_steps=2, precision="bf16-mixed", gradient_clip_val=0.1)
        made.append(weights(module))
    assert largest_difference(*made) < 1e-5


def test_activation_checkpointing_changes_nothing(
    pretrain: Any, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(decoder_layers, "checkpoint", spy := Mock(side_effect=checkpoint))
    for mode in MODES:
        module = pretrain(activation_checkpointing=mode)
        fit(module, make_data(), tmp_path, max_steps=2)
        assert spy.called is (mode != "none")
        spy.reset_mock()
        made.append(weights(module))
    assert_equal(made[0], made[1])
    assert_equal(made[0], made[2])


def test_a_finished_run_started_again_still_knows_its_grid(pretrain: Any, make_data: Any, tmp_path: Path) -> None:
    """Its export may be missing; no batch comes any more."""
    trainer = fit(pretrain(), make_data(), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    module = pretrain()
    fit(module, make_data(), tmp_path, max_steps=2, ckpt_path=tmp_path / "state.ckpt")
    assert module.checkpoint_settings().grid == (2, 2)
    with pytest.raises(RuntimeError, match="no batch with images has been trained on"):
        pretrain().checkpoint_settings()


def test_validation_at_another_grid_does_not_become_the_checkpoints(
    pretrain: Any, make_data: Any, tiny_large_shards: str, tmp_path: Path
) -> None:
    module = pretrain()
    data = make_data(validation_paths=tiny_large_shards)
    trainer = fit(module, data, tmp_path, max_steps=2, val_check_interval=1, num_sanity_val_steps=0)
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.checkpoint_settings().grid == (2, 2)


def refused(module: NextTokenModule, data: TokenDataModule, directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module, data, directory, max_steps=1)
    assert module.trainer.global_step == 0
    with pytest.raises(ValueError, match=message):
        make_trainer(directory).validate(module, datamodule=data, verbose=False)


def test_shards_of_another_codebook_are_refused(
    pretrain: Any, make_data: Any, tiny_visual_tokenizer: str, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", tiny_visual_tokenizer, (2, 2), codebook_size=CODEBOOK + 1)
    data = make_data(paths=shards, validation_paths=shards)
    refused(pretrain(), data, tmp_path, r"codebook of 28 codes, the model one of 27: tokenize with")


def test_shards_of_another_visual_tokenizer_are_refused(
    pretrain: Any, make_data: Any, tiny_shards: str, tmp_path: Path
) -> None:
    other = make_visual_tokenizer(tmp_path / "other", seed=1)
    data = make_data(validation_paths=tiny_shards)
    refused(
        pretrain(visual_tokenizer=other), data, tmp_path, r"token shards: .*other: .*Tokenize again .*visual_tokenizer"
    )


def test_a_grid_beyond_the_positions_is_refused(
    pretrain: Any, make_data: Any, tiny_visual_tokenizer: str, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", tiny_visual_tokenizer, (8, 9))
    data = make_data(paths=shards, validation_paths=shards)
    refused(pretrain(), data, tmp_path, r"8 × 9 grid .* takes 104 positions, the model has 96: lower --data")
    exact = make_data(paths=shards, max_text_tokens=22)
    assert fit(pretrain(), exact, tmp_path, max_steps=1).global_step == 1


def test_another_text_tokenizer_than_the_models_is_refused(
    pretrain: Any, make_data: Any, tiny_shards: str, tmp_path: Path
) -> None:
    train_text_tokenizer(["other words"], 270, tmp_path / "other")
    data = make_data(validation_paths=tiny_shards)
    data.tokenizer_path = str(tmp_path / "other")
    refused(pretrain(), data, tmp_path, r"--data\.tokenizer .*name the same one for both")


def test_fine_tuning_on_another_tokenizers_codes_is_refused(pretrain: Any, make_data: Any, tmp_path: Path) -> None:
    """Also when the shards and the tokenizer that is named belong together: the checkpoint learned other codes."""
    module = pretrain()
    fit(module, make_data(), tmp_path, max_steps=1)
    checkpoint = export(module, tmp_path / "pretrain")
    other = make_visual_tokenizer(tmp_path / "other", seed=1)
    shards = make_shards(tmp_path / "shards", other, (2, 2))
    tuned = SFTModule(checkpoint, optimizer=adamw, visual_tokenizer=other)
    refused(
        tuned, make_data(paths=shards, validation_paths=shards), tmp_path, r"token shards: .*the checkpoint: .*other: "
    )


def test_shards_say_what_an_unnamed_tokenizer_is(
    pretrain: Any, make_data: Any, tiny_visual_tokenizer: str, tmp_path: Path
) -> None:
    module = pretrain(visual_tokenizer=None)
    fit(module, make_data(), tmp_path, max_steps=1)
    settings = module.checkpoint_settings()
    assert settings.downsample == DOWNSAMPLE
    assert settings.visual_tokenizer_fingerprint == load_visual_tokenizer(tiny_visual_tokenizer).fingerprint
    assert settings.visual_tokenizer is None
