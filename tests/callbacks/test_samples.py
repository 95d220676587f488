"""Drawing during training: when it happens, what arrives in TensorBoard, and that training does not notice."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplear.callbacks import DrawingCallback, HuggingFaceCheckpoint, SampleImages
from simplear.evaluation import Cell, image_grid
from simplear.generation import SimpleARPipeline
from toys import PictureLogger

from .conftest import CAPTIONS, ToyStage, batches

MakeTrainer = Callable[..., Trainer]


class Recorder(DrawingCallback):
    """Notes when it is asked to draw and in which state; spoils what a careless drawing would."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.steps: list[int] = []
        self.training = False

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        self.steps.append(trainer.global_step)
        self.training |= any(part.training for part in trainer.lightning_module.modules())
        torch.rand(5)
        np.random.rand(5)


@pytest.mark.parametrize(
    ("every", "max_steps", "accumulate", "drawn"),
    [(2, 5, 1, [2, 4, 5]), (2, 4, 1, [2, 4]), (3, 4, 2, [3, 4]), (9, 2, 1, [2])],
)
def test_draws_every_n_optimizer_steps_and_at_the_end_once(
    stage: ToyStage, make_trainer: MakeTrainer, every: int, max_steps: int, accumulate: int, drawn: list[int]
) -> None:
    recorder = Recorder(every)
    make_trainer(recorder, max_steps=max_steps, accumulate_grad_batches=accumulate).fit(stage, batches())
    assert recorder.steps == drawn
    assert not recorder.training


def test_resumed_training_does_not_draw_again(stage: ToyStage, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=4)
    trainer.fit(stage, batches())
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    recorder = Recorder(2)
    make_trainer(recorder, max_steps=7).fit(stage, batches(), ckpt_path=tmp_path / "state.ckpt")
    assert recorder.steps == [6, 7]


def test_training_does_not_notice(tokenizers: tuple[str, str], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Losses (which hold random numbers), weights and modes are those of a training without callbacks."""

    def train(*callbacks: Any) -> ToyStage:
        torch.manual_seed(0)
        stage = ToyStage(*tokenizers)
        logger = TensorBoardLogger(tmp_path, name="log")
        make_trainer(*callbacks, max_steps=5, logger=logger).fit(stage, batches())
        return stage

    plain = train()
    drawing = train(
        SampleImages(CAPTIONS, every_n_steps=2, guidance_scale=3.0),
        Recorder(3),
        HuggingFaceCheckpoint(dirpath=tmp_path / "states", every_n_train_steps=2),
    )
    assert drawing.losses == plain.losses
    for (name, weight), other in zip(plain.named_parameters(), drawing.parameters(), strict=True):
        assert torch.equal(weight, other), name
        assert other.requires_grad
    assert [part.training for part in drawing.modules()] == [part.training for part in plain.modules()]
    assert drawing.language_model.training and not drawing.frozen.training


def test_loggers_get_the_labelled_images_of_the_final_weights(
    stage: ToyStage, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """TensorBoard and what has W&B's `log_image`; one that takes no pictures is passed over."""
    pictures = PictureLogger()
    logger = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="", version="log"), pictures]
    callback = SampleImages(CAPTIONS, every_n_steps=2, guidance_scale=2.0, seed=5)
    make_trainer(callback, max_steps=3, logger=logger).fit(stage, batches())
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"images": 0}).Reload()
    shown = events.Images("samples")
    assert [event.step for event in shown] == [2, 3]
    settings = stage.checkpoint_settings()
    pipeline = SimpleARPipeline(stage.language_model.eval(), stage.text_tokenizer, settings, settings.visual_tokenizer)
    images = pipeline(CAPTIONS, guidance_scale=2.0, seed=5).images
    assert isinstance(images, list)
    expected = image_grid({"": [Cell(text, (image,)) for text, image in zip(CAPTIONS, images, strict=True)]})
    found = Image.open(io.BytesIO(shown[-1].encoded_image_string))
    assert (np.asarray(found.convert("RGB")) == np.asarray(expected)).all()
    assert [(key, step) for key, step, _ in pictures.pictures] == [("samples", 2), ("samples", 3)]
    assert (pictures.pictures[-1][2] == np.asarray(expected)).all()


def test_what_is_missing_is_said_before_training(
    tokenizers: tuple[str, str], stage: ToyStage, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    without = ToyStage(tokenizers[0], None)
    callback = SampleImages(CAPTIONS, every_n_steps=1)
    with pytest.raises(ValueError, match=r"SampleImages draws images.*--model\.init_args\.visual_tokenizer"):
        make_trainer(callback, max_steps=1).fit(without, batches())
    assert not without.losses
    with pytest.warns(UserWarning, match="no TensorBoardLogger"):
        make_trainer(callback, max_steps=1, logger=CSVLogger(tmp_path)).fit(stage, batches())
    with pytest.raises(ValueError, match="no prompts"):
        SampleImages([], every_n_steps=1)
    with pytest.raises(ValueError, match="every_n_steps 0"):
        SampleImages(CAPTIONS, every_n_steps=0)
