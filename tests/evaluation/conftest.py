"""A tiny checkpoint that draws scenes' captions and others, and tiny networks that judge what it drew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evaluation.toys import save_detector
from rewards.toys import random_weights, register
from simplear.language_model import CheckpointSettings, LanguageModelConfig, save_checkpoint, train_text_tokenizer
from simplear.scenes import evaluation_prompts
from simplear.visual_tokenizer import FSQAutoencoder, save_visual_tokenizer
from toys import ARCHITECTURE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights: 4 × 4 codes of 8 pixels."""
    directory = tmp_path_factory.mktemp("checkpoint")
    texts = [row["prompt"] for row in evaluation_prompts(5)]
    train_text_tokenizer(texts, 400, directory / "text")
    torch.manual_seed(0)
    visual = FSQAutoencoder([3, 3, 3], 8, encoder_channels=8, decoder_channels=8, refine_channels=4)
    save_visual_tokenizer(visual, directory / "visual")
    model, tokenizer = LanguageModelConfig(str(directory / "text"), 27, architecture=ARCHITECTURE).build()
    settings = CheckpointSettings(
        model.layout.image_token_offset, 27, (4, 4), 8, visual_tokenizer_fingerprint=visual.fingerprint
    )
    save_checkpoint(directory / "tiny", model, tokenizer, settings, visual_tokenizer=directory / "visual")
    return directory / "tiny"


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a tiny CLIP of open_clip's kind and a file of random weights for it."""
    directory = tmp_path_factory.mktemp("clip")
    name = register(directory)
    torch.save(random_weights(), directory / "weights.pt")
    return name, str(directory / "weights.pt")


@pytest.fixture(scope="session", autouse=True)
def small_pictures_for_detectors() -> Iterator[None]:
    """In place of 800 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simplear.evaluation.geneval_models.DETECTOR_SIZE", {"shortest_edge": 64, "longest_edge": 107})
        yield


@pytest.fixture(scope="session")
def tiny_detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny Mask2Former of random weights that calls everything that it sees a bench."""
    directory = tmp_path_factory.mktemp("detector")
    save_detector(directory, certain_of="bench")
    return str(directory)
