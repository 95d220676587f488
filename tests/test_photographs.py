"""Photographs through the whole chain by the demo's commands, with the source swapped: every stage a few steps."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from photographs import CAPTIONS, cut, photographs
from simplear.cli import main
from simplear.data import TokenShards
from simplear.stages.visual_tokenizer import psnr
from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer, to_pixels

CONFIGS = Path(__file__).parents[1] / "configs"
SIDE = 64
SHOWN = 8
"""Pictures in the grid of reconstructions."""
TOKENIZER_STEPS, LANGUAGE_MODEL_STEPS, BATCH = 100, 12, 8
BETTER = 3.0
"""dB by which the trained tokenizer must beat what has learned nothing."""


@dataclass
class Chain:
    """Directories that the chain wrote."""

    data: Path
    checkpoints: Path

    def files(self, split: str) -> list[Path]:
        return sorted((self.data / split).glob("*.png"))

    def pixels(self, split: str) -> torch.Tensor:
        return torch.from_numpy(to_pixels(np.stack([np.asarray(Image.open(file)) for file in self.files(split)])))

    def events(self, stage: str) -> EventAccumulator:
        return EventAccumulator(str(self.checkpoints / "logs" / stage)).Reload()


def fit(stage: str, steps: int, *options: str) -> None:
    files = [part for kind in ("demo", "photographs") for part in ("--config", str(CONFIGS / kind / f"{stage}.yaml"))]
    short = {"trainer.max_steps": steps, "trainer.val_check_interval": steps, "trainer.log_every_n_steps": 1}
    short["data.init_args.global_batch_size"] = BATCH
    main(["fit", *files, *(part for key, value in short.items() for part in (f"--{key}", str(value))), *options])


def psnr_of_all(reconstruction: torch.Tensor, pixels: torch.Tensor) -> float:
    """PSNR over all pictures as if they were one; its mean over pictures would be that of the plainest skies."""
    return psnr(reconstruction[None], pixels[None]).item()


def crops_of(row: np.ndarray) -> torch.Tensor:
    """Pixels (B, 3, SIDE, SIDE) of pictures side by side."""
    return torch.from_numpy(to_pixels(np.stack(np.hsplit(row, row.shape[1] // SIDE))))


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean((2, 3), keepdim=True).expand_as(pixels)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    root = tmp_path_factory.mktemp("photographs")
    chain = Chain(root / "data/photographs", root / "checkpoints/photographs")
    cut(chain.data, SIDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["train-text-tokenizer", "--config", str(CONFIGS / "photographs/text_tokenizer.yaml")])
        fit("visual_tokenizer", TOKENIZER_STEPS)
        for part in ("tokenize", "tokenize-validation"):
            main([part.partition("-")[0], "--config", str(CONFIGS / f"photographs/{part}.yaml")])
        prompts = json.dumps([CAPTIONS["cat"], CAPTIONS["rocket"]])
        fit("pretrain", LANGUAGE_MODEL_STEPS, "--trainer.callbacks.init_args.prompts", prompts)
        drawing = ["--prompt", CAPTIONS["cat"], "--num-images-per-prompt", "2", "--out", "drawn"]
        main(["generate", "checkpoints/photographs/pretrain", *drawing])
        yield chain


def test_crops_are_the_photographs_own_pixels_and_none_is_in_both_parts(chain: Chain) -> None:
    train, validation = ({file.stem for file in chain.files(split)} for split in ("train", "validation"))
    assert not train & validation and len(validation) > SHOWN
    for name, picture in photographs().items():
        columns = picture.shape[1] // SIDE
        whole = (picture.shape[0] // SIDE) * columns
        assert {f"{name}-{number:03d}" for number in range(whole)} <= train | validation
        crop = np.asarray(Image.open(chain.data / "train" / f"{name}-{columns + 1:03d}.png"))
        np.testing.assert_array_equal(crop, picture[SIDE : 2 * SIDE, SIDE : 2 * SIDE])


@pytest.mark.parametrize(("split", "shards"), [("train", "tokens"), ("validation", "tokens-validation")])
def test_every_crop_is_tokenized_with_its_captions(chain: Chain, split: str, shards: str) -> None:
    written = TokenShards(chain.data / shards)
    read = written.read(np.arange(len(written)))
    assert read.keys == [file.name for file in chain.files(split)]
    assert read.captions == [file.with_suffix(".txt").read_text().splitlines() for file in chain.files(split)]
    tokenizer = load_visual_tokenizer(chain.checkpoints / "visual_tokenizer")
    assert written.fingerprint == tokenizer.fingerprint
    agree = tokenizer.encode(chain.pixels(split)).numpy() == read.codes
    # Batches of another size may round otherwise where a value lies on the border between two levels.
    assert agree.mean() > 0.999


def test_codes_decode_to_the_pictures_better_than_what_has_learned_nothing(chain: Chain) -> None:
    """On held-out crops: the mean colour of each picture, an untrained tokenizer, codes of another picture."""
    pixels = chain.pixels("validation")
    tokenizer = load_visual_tokenizer(chain.checkpoints / "visual_tokenizer")
    shards = TokenShards(chain.data / "tokens-validation")
    codes = torch.from_numpy(shards.read(np.arange(len(shards))).codes.astype(np.int64))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    reached = psnr_of_all(decoded, pixels)
    seed_everything(0)
    assert isinstance(tokenizer, FSQAutoencoder)
    untrained = FSQAutoencoder(**tokenizer.init_args)
    nothing_learned = [
        mean_colour(pixels),
        untrained.decode(untrained.encode(pixels)),
        tokenizer.decode(codes.roll(1, 0)),
    ]
    for other in nothing_learned:
        assert reached > psnr_of_all(other, pixels) + BETTER


def test_tensorboard_shows_held_out_crops_over_their_reconstructions(chain: Chain) -> None:
    events = chain.events("visual_tokenizer")
    (image,) = events.Images("validation/reconstructions")
    assert (image.step, image.width, image.height) == (TOKENIZER_STEPS, SHOWN * SIDE, 2 * SIDE)
    grid = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    originals = np.hstack([np.asarray(Image.open(file)) for file in chain.files("validation")[:SHOWN]])
    assert np.abs(grid[:SIDE].astype(int) - originals).max() <= 1
    above, below = (crops_of(part) for part in (grid[:SIDE], grid[SIDE:]))
    assert psnr_of_all(below, above) > psnr_of_all(mean_colour(above), above) + BETTER
    loss = [scalar.value for scalar in events.Scalars("train/loss")]
    assert np.mean(loss[-10:]) < 0.7 * np.mean(loss[:10])


def test_language_model_learns_the_codes_and_its_samples_are_in_tensorboard(chain: Chain) -> None:
    events = chain.events("pretrain")
    loss = [scalar.value for scalar in events.Scalars("train/loss")]
    assert np.mean(loss[-3:]) < np.mean(loss[:3]) - 0.3
    (validation,) = events.Scalars("validation/loss")
    assert validation.value < math.log(1000) - 0.3, "held-out codes are better known than by chance"
    assert [image.step for image in events.Images("samples")] == [LANGUAGE_MODEL_STEPS]


def test_samples_decode(chain: Chain) -> None:
    drawn = sorted((chain.data.parents[1] / "drawn").glob("*.png"))
    pictures = [Image.open(file) for file in drawn]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (SIDE, SIDE))] * 2
    assert json.loads(pictures[0].text["simplear"])["prompt"] == CAPTIONS["cat"]
    first, second = (np.asarray(picture).astype(int) for picture in pictures)
    assert first.std() > 1 and np.abs(first - second).mean() > 1


@pytest.mark.parametrize("stage", ["visual_tokenizer", "pretrain"])
def test_nothing_of_scenes_takes_part(chain: Chain, stage: str) -> None:
    composed = (chain.checkpoints / "logs" / stage / "config.yaml").read_text()
    assert "data/photographs" in composed
    assert "Scene" not in composed and "demo" not in composed


def test_the_overlay_has_the_demos_language_model_with_room_for_its_codes() -> None:
    """An overlay replaces `architecture` as a whole, so the two files must agree."""
    demo, own = (
        yaml.safe_load((CONFIGS / kind / "pretrain.yaml").read_text())["model"]["init_args"]["language_model"]
        for kind in ("demo", "photographs")
    )
    room = own["architecture"]["max_position_embeddings"]
    assert own["architecture"] == {**demo["architecture"], "max_position_embeddings": room}


def test_the_demos_own_command_runs_with_the_source_swapped(chain: Chain, tmp_path: Path) -> None:
    sources = [
        part
        for name, split in (("source", "train"), ("validation_source", "validation"))
        for part in (
            *(f"--data.init_args.{name}", "ImageFolderSource"),
            *(f"--data.init_args.{name}.init_args.path", str(chain.data / split)),
        )
    ]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    config = ["--config", str(CONFIGS / "demo/visual_tokenizer.yaml")]
    main(["fit", *config, *sources, *steps, "--trainer.default_root_dir", str(tmp_path)])
    events = EventAccumulator(str(tmp_path / "logs/visual_tokenizer")).Reload()
    assert [image.step for image in events.Images("validation/reconstructions")] == [2]
    assert load_visual_tokenizer(tmp_path / "visual_tokenizer").downsample == 8
