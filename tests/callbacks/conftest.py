"""A toy stage: a tiny language model learning random codes, with a tiny visual tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from simplear.language_model import CheckpointSettings, LanguageModelConfig, train_text_tokenizer
from simplear.sequence import encode_captions, training_batch
from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer, save_visual_tokenizer
from toys import ARCHITECTURE

CAPTIONS = ["a photo of a red circle", "two blue squares", "a green cross left of a red triangle", "one large square"]
GRID = (4, 4)
CODEBOOK = 27


class ToyStage(LightningModule):
    """What the callbacks ask of a stage, with dropout, so that training itself draws random numbers."""

    def __init__(self, text_tokenizer: str, visual_tokenizer: str | None, **architecture: Any) -> None:
        super().__init__()
        self.visual_tokenizer_path = visual_tokenizer
        config = LanguageModelConfig(text_tokenizer, CODEBOOK, architecture={**ARCHITECTURE, **architecture})
        self.language_model, self.text_tokenizer = config.build()
        self.language_model.train()
        self.frozen = torch.nn.Dropout().eval()
        self.losses: list[float] = []

    def checkpoint_settings(self) -> CheckpointSettings:
        layout = self.language_model.layout
        path = self.visual_tokenizer_path
        return CheckpointSettings(
            layout.image_token_offset,
            CODEBOOK,
            GRID,
            8,
            visual_tokenizer=path,
            visual_tokenizer_fingerprint=None if path is None else load_visual_tokenizer(path).fingerprint,
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = training_batch(encode_captions(self.text_tokenizer, CAPTIONS), batch, self.language_model.layout)
        image_loss, _ = self.language_model(tokens["input_ids"], tokens["labels"], GRID, with_text=False)
        loss = image_loss.mean() * (1 + 0.1 * torch.rand(()))
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.language_model.parameters(), lr=1e-2)


def batches(count: int = 8) -> DataLoader:
    """``count`` batches of codes (4, 4, 4), always the same."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randint(0, CODEBOOK, (4 * count, *GRID), generator=generator), batch_size=4)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a text tokenizer and of a visual tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizers")
    train_text_tokenizer(CAPTIONS * 20, 300, directory / "text")
    torch.manual_seed(0)
    save_visual_tokenizer(
        FSQAutoencoder([3, 3, 3], 8, encoder_channels=8, decoder_channels=8, refine_channels=4), directory / "visual"
    )
    return str(directory / "text"), str(directory / "visual")


@pytest.fixture
def stage(tokenizers: tuple[str, str]) -> ToyStage:
    """The same weights each time."""
    torch.manual_seed(0)
    return ToyStage(*tokenizers)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet trainer on the CPU that writes to ``tmp_path``."""

    def make(*callbacks: Any, **options: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
            "logger": False,
            "max_epochs": -1,
            "log_every_n_steps": 1,
        }
        return Trainer(**{**defaults, **options})

    return make
