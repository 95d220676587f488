"""The CLIP stage: its pure functions by hand, what it learns, what it writes, and a run that stops and goes on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from simplear.data import ImageDataModule, ScenesSource
from simplear.language_model import train_text_tokenizer
from simplear.rewards import CLIPReward
from simplear.scenes import HELD_OUT, captions, draw, perturb, sample_scene
from simplear.stages.clip import CLIPModule, degrade, false_caption_loss, falsify
from toys import make_trainer

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("text") / "tokenizer"
    texts = [text for index in range(300) for text in captions(sample_scene(0, index), 0, index)]
    train_text_tokenizer(texts, 450, directory)
    return str(directory)


def module(text_tokenizer: str | None, **changes: Any) -> CLIPModule:
    arguments = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20),
    }
    return CLIPModule(ARCHITECTURE, text_tokenizer, **(arguments | changes))


def data(count: int = 17, batch: int = 4) -> ImageDataModule:
    return ImageDataModule(ScenesSource(count, 16), batch, 16, 16, validation_source=ScenesSource(12, 16), seed=5)


def trainer(directory: Path, **changes: Any) -> Trainer:
    return make_trainer(directory, num_sanity_val_steps=0, **changes)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_of_false_captions_is_the_cross_entropy_among_each_pictures_own() -> None:
    images, texts, false = features(3, 4), features(3, 4, seed=1), features(4, 4, seed=2)
    rows, scale = torch.tensor([0, 0, 2, 2]), torch.tensor(7.0)
    expected = []
    for row, others in ((0, false[:2]), (2, false[2:])):
        logits = scale * torch.cat([texts[row : row + 1], others]) @ images[row]
        expected.append(F.cross_entropy(logits[None], torch.tensor([0])))
    found = false_caption_loss(images, texts, false, rows, scale)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    nothing = false_caption_loss(images, texts, false[:0], rows[:0], scale)
    assert nothing.item() == 0


def test_false_captions_name_no_held_out_pair_and_know_their_picture() -> None:
    texts = [captions(sample_scene(0, index), 0, index)[1] for index in range(60)] + ["a dog on a sofa"]
    false, rows = falsify(texts, 2, np.random.default_rng(0))
    assert rows.bincount(minlength=61).tolist()[-1] == 0 and rows.bincount().max() == 2
    for text, row in zip(false, rows.tolist(), strict=True):
        assert text != texts[row]
        named = re.findall(r"(\w+) (circle|square|triangle|cross)", text)
        assert not {(shape, color) for color, shape in named} & set(HELD_OUT)
        # One word is another, or two have changed places.
        changed = [pair for pair in zip(text.split(), texts[row].split(), strict=True) if pair[0] != pair[1]]
        assert 1 <= len([pair for pair in changed if not {"a", "an"} & set(pair)]) <= 2


def test_pictures_are_blurred_and_made_noisy_each_by_its_own_amount() -> None:
    pixels = torch.zeros(64, 3, 16, 16)
    pixels[:, :, 8, 8] = 0.9
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(degrade(pixels, 0.0, 0.0, generator), pixels)
    blurred = degrade(pixels, 0.0, 0.9, generator)
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), pixels.sum(dim=(2, 3)))
    middle = blurred[:, 0, 8, 8]
    assert middle.unique().numel() > 60 and 0.17 < middle.min() < 0.3 and 0.85 < middle.max() <= 0.9
    deviation = degrade(pixels, 0.1, 0.0, generator)[:, :, :4].std(dim=(1, 2, 3))
    assert deviation.max() < 0.12 and deviation.min() < 0.02 and deviation.mean() == pytest.approx(0.05, abs=0.01)
    again = [degrade(pixels, 0.1, 0.5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)


def test_contrast_is_open_clips_own_loss(text_tokenizer: str, tmp_path: Path) -> None:
    stage = module(text_tokenizer, false_captions=0, noise=0.0, blur=0.0, lr_scheduler=None)
    seen: list[float] = []

    @torch.no_grad()
    def expected(batch: dict[str, Any]) -> float:
        image, text, scale = stage.clip(batch["pixels"], stage.tokenizer(batch["captions"]))
        logits = scale * image @ text.T
        labels = torch.arange(len(logits))
        return float(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    step = stage.training_step

    def checked(batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = step(batch, batch_idx)
        seen.append(loss.item() - expected(batch))
        return loss

    stage.training_step = checked  # type: ignore[method-assign]
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(stage, data())
    assert len(seen) == 3 and max(map(abs, seen)) < 1e-5


def test_it_learns_and_exports(text_tokenizer: str, tmp_path: Path) -> None:
    """It knows backgrounds, within seconds, on tiny pictures; and the directory scores as the model in memory does."""
    seed_everything(0)
    logger = TensorBoardLogger(tmp_path, name="", version="logs")
    source = ScenesSource(600, 16)
    pictures = ImageDataModule(source, 32, 16, 16, validation_source=ScenesSource(64, 16, split="validation"))
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    export = str(tmp_path / "clip")
    stage = module(text_tokenizer, optimizer=optimizer, lr_scheduler=None, export_dir=export)
    runner = trainer(tmp_path, max_steps=100, logger=logger, log_every_n_steps=1, val_check_interval=18)
    runner.fit(stage, pictures)

    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    scalars = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert {"train/loss", "train/contrastive", "validation/contrastive"} <= set(scalars)
    assert scalars["validation/contrastive"] < math.log(32)

    reward, rng = CLIPReward(export), np.random.default_rng(0)
    for split in ("train", "validation"):
        scenes = [sample_scene(0, index, split) for index in range(10**7, 10**7 + 200)]
        both = [(text, perturb(text, "background", rng)) for scene in scenes for text in captions(scene, 0, 0)[1:]]
        kept = [place for place, (_, false) in enumerate(both) if false is not None]
        images = torch.from_numpy(np.stack([draw(scenes[place], 16) for place in kept])).permute(0, 3, 1, 2) / 255
        true, false = ([both[place][which] for place in kept] for which in (0, 1))
        prefers = reward(images, true, [{}] * len(kept)) > reward(images, false, [{}] * len(kept))
        assert len(kept) > 50 and prefers.double().mean() > 0.9, split

    scenes = [sample_scene(0, index) for index in range(8)]
    texts = [captions(scene, 0, index)[0] for index, scene in enumerate(scenes)]
    images = torch.from_numpy(np.stack([draw(scene, 16) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    scores = reward(images, texts, [{}] * 8)
    stage.eval()
    with torch.no_grad():
        image = stage.clip.encode_image(images * 2 - 1)
        text = stage.clip.encode_text(stage.tokenizer(texts))
    torch.testing.assert_close(scores, F.cosine_similarity(image, text), atol=1e-5, rtol=0)
    network = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}")
    assert all(torch.equal(value, stage.clip.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_long_caption_keeps_its_end_token(text_tokenizer: str, tmp_path: Path) -> None:
    """Where the feature is read; the tokenizer alone would cut it off. In the exported directory too."""
    runner = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    stage = module(text_tokenizer, export_dir=str(tmp_path / "clip"))
    runner.fit(stage, data())
    exported = CLIPReward(str(tmp_path / "clip")).clip.tokenizer
    end = stage.architecture["text_cfg"]["eos_id"]
    long, short = "a red circle and " * 20, "a red circle"
    for tokenizer in (stage.tokenizer, exported):
        ids = tokenizer([long, short])
        assert ids.shape == (2, 32) and ids[0, -1] == end and (ids[0, :-1] != end).all()
        assert (ids[1] == end).int().argmax() == 3
    assert torch.equal(stage.tokenizer([long, short]), exported([long, short]))


def test_open_clips_own_tokenizer_serves_too(tmp_path: Path) -> None:
    stage = module(None, export_dir=None)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(stage, data())
    assert stage.clip.token_embedding.weight.shape[0] == 49408


def test_the_temperature_is_bounded(text_tokenizer: str, tmp_path: Path) -> None:
    stage = module(text_tokenizer, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), lr_scheduler=None)
    stage.configure_model()
    torch.nn.init.constant_(stage.clip.logit_scale, 9.0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(stage, data())
    assert stage.clip.logit_scale.item() == pytest.approx(math.log(100))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="text tokenizer absent is not here"):
        trainer(tmp_path, max_steps=1).fit(module("absent"), data())


@pytest.mark.parametrize("stop", [2, 5])
def test_run_stopped_and_resumed_has_the_weights_of_one_never_stopped(
    text_tokenizer: str, tmp_path: Path, stop: int
) -> None:
    """Four global batches an epoch; false captions, noise and blur included."""

    def train(directory: Path, steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        seed_everything(7)
        saver = ModelCheckpoint(directory, filename="step", every_n_train_steps=stop)
        stage = module(text_tokenizer)
        runner = trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        runner.fit(stage, data(), ckpt_path=checkpoint, weights_only=True)
        return stage.clip.state_dict()

    whole = train(tmp_path / "whole", 9)
    train(tmp_path / "first", stop)
    torch.rand(17)
    resumed = train(tmp_path / "second", 9, tmp_path / "first" / "step.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
