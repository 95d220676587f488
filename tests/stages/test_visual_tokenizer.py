"""The training stage: its pure functions against hand-made numbers, and a run that stops and goes on."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from simplear.data import ImageDataModule, ScenesSource
from simplear.stages.visual_tokenizer import (
    VisualTokenizerModule,
    codebook_use,
    psnr,
    reconstruction_grid,
    reconstruction_loss,
)
from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer
from toys import PictureLogger, make_trainer


def tokenizer() -> FSQAutoencoder:
    torch.manual_seed(0)
    return FSQAutoencoder([5, 5, 3], 4, encoder_channels=16, decoder_channels=16, decoder_blocks=1, refine_channels=8)


def squares(count: int = 24) -> list[dict]:
    """Pictures of one bright square each on a dark ground."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index in range(count):
        pixels = torch.full((3, 16, 16), -0.8)
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        pixels[:, top : top + 8, left : left + 8] = torch.rand(3, 1, 1, generator=generator)
        samples.append({"pixels": pixels, "captions": "a square", "keys": str(index)})
    return samples


def loader() -> DataLoader:
    return DataLoader(squares(), batch_size=4)


def module(**changes) -> VisualTokenizerModule:
    arguments = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20),
        "contrast_weight": 2.0,
    }
    return VisualTokenizerModule(tokenizer(), **(arguments | changes))


def test_loss_without_weights_is_the_mean_absolute_error():
    pixels, reconstruction = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    reconstruction[0, 0, 0, 0] = 0.6
    assert reconstruction_loss(reconstruction, pixels).item() == pytest.approx(0.6 / 12)


def test_contrast_weight_counts_for_what_stands_out_and_for_two_pixels_around_it():
    pixels = torch.full((1, 3, 16, 16), -1.0)
    pixels[0, 0, 8, 8] = 0.0
    pixels[0, 0, 3, 3] = -0.95  # below the threshold

    def loss_of_error_at(row: int, column: int) -> float:
        reconstruction = pixels.clone()
        reconstruction[0, :, row, column] += 0.3
        return reconstruction_loss(reconstruction, pixels, 6.0).item() * 256 / 0.3

    assert loss_of_error_at(8, 8) == pytest.approx(7, rel=1e-4)
    assert loss_of_error_at(10, 6) == pytest.approx(7, rel=1e-4)
    assert loss_of_error_at(11, 8) == pytest.approx(1, rel=1e-4)
    assert loss_of_error_at(3, 3) == pytest.approx(1, rel=1e-4)


def test_psnr_is_measured_on_zero_to_one():
    pixels = torch.zeros(2, 3, 4, 4)
    off = torch.stack([pixels[0] + 0.2, pixels[1] + 0.02])  # 0.1 and 0.01 on [0, 1]
    torch.testing.assert_close(psnr(off, pixels), torch.tensor([20.0, 40.0]))
    assert psnr(pixels, pixels).tolist() == [math.inf, math.inf]


def test_codebook_use_of_known_counts():
    used, perplexity = codebook_use(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert used.item() == 0.5
    assert perplexity.item() == pytest.approx(4.0)
    assert codebook_use(torch.tensor([0, 9, 0]))[1].item() == pytest.approx(1.0)


def test_grid_shows_originals_over_reconstructions():
    pixels = torch.stack([torch.full((3, 2, 2), -1.0), torch.full((3, 2, 2), 1.0)])
    grid = reconstruction_grid(torch.full((2, 3, 2, 2), 7.0), pixels)
    assert grid.shape == (3, 4, 4)
    assert grid[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("callbacks", [[], [EMAWeightAveraging(decay=0.5)]], ids=["", "averaged"])
def test_training_lowers_the_loss_logs_what_it_says_and_exports(tmp_path, callbacks):
    logger = TensorBoardLogger(tmp_path, name="", version="logs")
    stage = module(lr_scheduler=None, export_dir=str(tmp_path / "tokenizer"))
    pictures = PictureLogger()
    runner = make_trainer(tmp_path, max_epochs=12, logger=[logger, pictures], log_every_n_steps=1, callbacks=callbacks)
    before = make_trainer(tmp_path).validate(stage, loader(), verbose=False)[0]
    runner.fit(stage, loader(), loader())
    after = runner.callback_metrics
    assert after["validation/loss"] < 0.6 * before["validation/loss"]
    assert after["validation/psnr"] > before["validation/psnr"] + 3

    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert {"train/loss", "validation/psnr", "validation/codebook_used", "validation/code_perplexity"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["validation/reconstructions"]
    key, step, picture = pictures.pictures[-1]
    assert key == "validation/reconstructions" and step == runner.global_step and picture.dtype == "uint8"
    shown = Image.open(io.BytesIO(events.Images("validation/reconstructions")[-1].encoded_image_string))
    assert (np.asarray(shown) == picture).all()

    exported = load_visual_tokenizer(tmp_path / "tokenizer")
    assert exported.fingerprint == stage.tokenizer.fingerprint
    codes = exported.encode(torch.stack([sample["pixels"] for sample in squares()]))
    assert after["validation/codebook_used"].item() == pytest.approx(len(codes.unique()) / 75)
    counts = codes.flatten().bincount(minlength=75).double()
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log()).sum()
    assert after["validation/code_perplexity"].item() == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_run_stopped_and_resumed_has_the_weights_of_one_never_stopped(tmp_path):
    def train(directory, steps, checkpoint=None):
        seed_everything(7)
        saver = ModelCheckpoint(directory, filename="step", every_n_train_steps=6)
        stage = module()
        runner = make_trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        runner.fit(stage, loader(), ckpt_path=checkpoint, weights_only=True)
        return stage.tokenizer.state_dict()

    whole = train(tmp_path / "whole", 12)  # two epochs of six batches
    train(tmp_path / "first", 6)
    torch.rand(17)  # nothing may depend on the global generator
    resumed = train(tmp_path / "second", 12, tmp_path / "first" / "step.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_run_over_a_data_module_goes_on_within_an_epoch(tmp_path, stop):
    """Four global batches an epoch, in shuffled order: stopped within one, at its end and after it."""

    def train(directory, steps, checkpoint=None):
        seed_everything(7)
        data = ImageDataModule(ScenesSource(17, 16), 4, 16, 16, seed=5)
        saver = ModelCheckpoint(directory, filename="step", every_n_train_steps=stop)
        stage = module()
        runner = make_trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        runner.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
        return stage.tokenizer.state_dict()

    whole = train(tmp_path / "whole", 9)
    train(tmp_path / "first", stop)
    resumed = train(tmp_path / "second", 9, tmp_path / "first" / "step.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoint_holds_plain_values_alone(tmp_path):
    runner = make_trainer(tmp_path, max_steps=1)
    runner.fit(module(), loader())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    assert set(checkpoint["state_dict"]) == {f"tokenizer.{name}" for name in tokenizer().state_dict()}
