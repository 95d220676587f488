"""The smallest things that work: tokenizers, token shards and language models for tests and the scripts they start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from simplear.data.shards import TokenRow, claim_directory, merge_manifest, write_shard
from simplear.language_model import LanguageModel, LanguageModelConfig, train_text_tokenizer
from simplear.sequence import encode_captions, training_batch
from simplear.stages.sharding import leave_ranks
from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer, save_visual_tokenizer

CAPTIONS = ["a photo of a red circle", "two blue squares", "a green cross left of a red triangle", "one star", ""]
CODEBOOK = 27
DOWNSAMPLE = 8
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
}


def make_text_tokenizer(directory: Path) -> str:
    """A byte-level BPE of some 300 ids."""
    train_text_tokenizer(CAPTIONS * 20, 300, directory)
    return str(directory)


def make_visual_tokenizer(directory: Path, seed: int = 0) -> str:
    """An untrained FSQ autoencoder of 27 codes."""
    torch.manual_seed(seed)
    tokenizer = FSQAutoencoder([3, 3, 3], DOWNSAMPLE, encoder_channels=8, decoder_channels=8, refine_channels=4)
    save_visual_tokenizer(tokenizer, directory)
    return str(directory)


def make_shards(
    directory: Path,
    visual_tokenizer: str,
    grid: tuple[int, int],
    rows: int = 20,
    codebook_size: int = CODEBOOK,
    fingerprint: str | None = None,
    captions: Sequence[str] | None = None,
) -> str:
    """Token shards of random codes; each row has two of `CAPTIONS`, or the next of the captions given."""
    fingerprint = fingerprint or load_visual_tokenizer(visual_tokenizer).fingerprint
    random = np.random.default_rng(0)
    claim_directory(
        directory, {"visual_tokenizer": fingerprint, "codebook_size": codebook_size, "downsample": DOWNSAMPLE}
    )
    made = [
        TokenRow(
            f"row{n}",
            random.integers(0, CODEBOOK, grid).astype(np.uint16),
            CAPTIONS[n % 3 : n % 3 + 2] if captions is None else [captions[n % len(captions)]],
        )
        for n in range(rows)
    ]
    write_shard(directory, "unit", made)
    merge_manifest(directory, ["unit"])
    return str(directory)


def model_config(text_tokenizer: str, rope: Any = "1d", pretrained: str | None = None, **fields: Any) -> Any:
    """Of a language model with some ten thousand weights."""
    architecture = {**ARCHITECTURE, **fields} if pretrained is None else fields
    return LanguageModelConfig(text_tokenizer, CODEBOOK, pretrained=pretrained, architecture=architecture, rope=rope)


def make_batch(
    model: LanguageModel, tokenizer: Any, grid: tuple[int, int] = (2, 3), captions: Sequence[str] = CAPTIONS
) -> dict[str, Tensor]:
    """A right-padded batch of all captions and random codes."""
    codes = torch.randint(0, CODEBOOK, (len(captions), *grid), generator=torch.Generator().manual_seed(1))
    return training_batch(encode_captions(tokenizer, captions), codes, model.layout)


class PictureLogger(DummyLogger):
    """Keeps what it is given by the signature of Lightning's WandbLogger."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, int | None, Any]] = []
        """Key, step and picture."""

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        self.pictures += [(key, step, image) for image in images]


def make_trainer(directory: Path, **options: Any) -> Trainer:
    """A Trainer on one CPU process that prints and keeps nothing but what `options` ask for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": directory,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


def trainer_yaml(directory: Path, callback: str, **callback_options: Any) -> str:
    """The ``trainer`` of a configuration file that runs a few steps under ``directory/run``, with one callback."""
    options = "".join(f"\n        {name}: {value}" for name, value in callback_options.items())
    return f"""
trainer:
  default_root_dir: {directory / "run"}
  accelerator: cpu
  devices: 1
  max_steps: 6
  max_epochs: -1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: "${{trainer.default_root_dir}}/logs"}}
  log_every_n_steps: 1
  enable_model_summary: false
  callbacks:
    - class_path: simplear.callbacks.{callback}
      init_args:
        dirpath: ${{trainer.default_root_dir}}/states{options}
"""


def write_pretraining(
    directory: Path, text_tokenizer: str, visual_tokenizer: str, shards: str, save_every: int = 1000
) -> Path:
    """A configuration file that pretrains a tiny model under ``directory/run``; returns its path."""
    file = directory / "pretrain.yaml"
    file.write_text(
        f"""
seed_everything: 0
model:
  class_path: simplear.stages.PretrainModule
  init_args:
    visual_tokenizer: {visual_tokenizer}
    language_model:
      tokenizer: {text_tokenizer}
      codebook_size: 27
      architecture: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
                      intermediate_size: 24, max_position_embeddings: 96}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01, weight_decay: 0.01}}}}
data:
  class_path: simplear.data.TokenDataModule
  init_args:
    paths: [{shards}]
    global_batch_size: 4
    tokenizer: ${{model.init_args.language_model.tokenizer}}
    max_text_tokens: 40
"""
        + trainer_yaml(
            directory,
            "HuggingFaceCheckpoint",
            export_dir="${trainer.default_root_dir}/model",
            every_n_train_steps=save_every,
        )
    )
    return file


def write_sft(directory: Path, checkpoint: str, visual_tokenizer: str, shards: str, save_every: int = 1000) -> Path:
    """A configuration file that fine-tunes `checkpoint` under ``directory/run``; returns its path."""
    pretraining = write_pretraining(directory, checkpoint, visual_tokenizer, shards, save_every)
    text = pretraining.read_text()
    begin, end = text.index("    language_model:\n"), text.index("    optimizer:")
    text = text[:begin] + f"    checkpoint: {checkpoint}\n" + text[end:]
    text = text.replace("PretrainModule", "SFTModule").replace("language_model.tokenizer", "checkpoint")
    file = directory / "sft.yaml"
    file.write_text(text)
    return file


class Brightness:
    """A reward: mean of the red channel."""

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images[:, 0].mean(dim=(1, 2))


def write_grpo(directory: Path, checkpoint: str, visual_tokenizer: str, save_every: int = 1000) -> Path:
    """A configuration file that reinforces `checkpoint` under ``directory/run``; returns its path."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{caption}"}}\n' for caption in CAPTIONS[:4] * 3))
    file = directory / "grpo.yaml"
    file.write_text(
        f"""
seed_everything: 0
model:
  class_path: simplear.stages.GRPOModule
  init_args:
    checkpoint: {checkpoint}
    visual_tokenizer: {visual_tokenizer}
    reward: {{class_path: toys.Brightness}}
    group_size: 2
    inner_updates: 2
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01, weight_decay: 0.01}}}}
data:
  class_path: simplear.data.TokenDataModule
  init_args:
    paths: [{prompts}]
    codebook_size: 27
    global_batch_size: 4
    tokenizer: ${{model.init_args.checkpoint}}
    caption_dropout: 0.0
    max_text_tokens: 40
"""
        + trainer_yaml(
            directory,
            "HuggingFaceCheckpoint",
            export_dir="${trainer.default_root_dir}/model",
            every_n_train_steps=save_every,
        )
    )
    return file


def write_visual_tokenizer_training(directory: Path, save_every: int = 1000) -> Path:
    """A configuration file that trains a tiny visual tokenizer under ``directory/run``; returns its path."""
    file = directory / "visual_tokenizer.yaml"
    file.write_text(
        """
seed_everything: 0
model:
  class_path: simplear.stages.VisualTokenizerModule
  init_args:
    tokenizer:
      class_path: simplear.visual_tokenizer.FSQAutoencoder
      init_args: {levels: [3, 3, 3], downsample: 8, encoder_channels: 8, decoder_channels: 8, refine_channels: 4}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.01}}
    export_dir: ${trainer.default_root_dir}/model
data:
  class_path: simplear.data.ImageDataModule
  init_args:
    source: {class_path: simplear.data.ScenesSource, init_args: {count: 18, resolution: 16}}
    global_batch_size: 4
    height: 16
    width: 16
"""
        + trainer_yaml(directory, "AtomicCheckpoint", every_n_train_steps=save_every)
    )
    return file


def run_ranks(command: Sequence[str], timeout: float) -> None:
    """Run a script whose further ranks Lightning starts, with the tests' modules in reach."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


def end_rank() -> NoReturn:
    """End a rank's script at once: under FSDP2 some of gloo's threads outlive the process group, and now and then they
    abort an interpreter that ends in its own time.
    """
    leave_ranks()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
