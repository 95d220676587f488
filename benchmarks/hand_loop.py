"""What Lightning takes: the demo's pretraining through `simplear fit`, over a loop written by hand.

Both train the model of configs/demo/pretrain.yaml from the same weights on the same batches with the same optimizer and
the same clipping, and must have the same losses. The first has the configured callbacks and logger; it neither
validates, saves nor draws within the steps that are timed, for that work is asked for and no overhead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from tqdm import tqdm

import runs
from measure import Run, Runs
from simplear.cli import main as simplear
from simplear.data import TokenDataModule, TokenRow, merge_manifest, write_shard
from simplear.data.shards import claim_directory
from simplear.language_model import LanguageModelConfig, train_text_tokenizer
from simplear.scenes import captions, sample_scene
from simplear.stages import MuonWithAdamW, PretrainModule
from simplear.stages.optimizers import parameter_groups
from simplear.visual_tokenizer import FSQAutoencoder, save_visual_tokenizer

WARM_UP = 5
"""Steps before the timed ones."""
EQUAL = 1e-5
"""Of the losses of the first two steps. Later ones part: Muon at the demo's rate makes large steps of rounding."""
GRID = (4, 4)


class StepClock(Callback):
    """Notes the first weights, when each step begins, and the losses, to be found after the verb has returned."""

    weights: ClassVar[dict[str, Tensor]] = {}
    begins: ClassVar[list[float]] = []
    losses: ClassVar[list[Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model has been built."""
        StepClock.weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}

    def on_train_batch_start(self, *arguments: Any) -> None:
        """A step begins."""
        StepClock.begins.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        """A step has ended."""
        StepClock.losses.append(outputs["loss"])


@dataclass(frozen=True)
class Inputs:
    """What both loops read."""

    directory: Path
    overlay: dict[str, Any]
    """On top of the demo's configuration."""


def write_inputs(directory: Path, steps: int, batch_size: int) -> Inputs:
    """Tokenizers, and shards of scenes' captions with random codes, enough for one epoch of so many steps."""
    seed_everything(0, verbose=False)
    config = yaml.safe_load((runs.CONFIGS / "pretrain.yaml").read_text())
    visual = yaml.safe_load((runs.CONFIGS / "visual_tokenizer.yaml").read_text())["model"]["init_args"]["tokenizer"]
    tokenizer = FSQAutoencoder(**visual["init_args"])
    save_visual_tokenizer(tokenizer, directory / "visual_tokenizer")
    scenes = [captions(sample_scene(0, number), 0, number)[0] for number in range(steps * batch_size)]
    train_text_tokenizer(scenes[:1000], 400, directory / "text_tokenizer")
    shards = directory / "shards"
    codebook = config["model"]["init_args"]["language_model"]["codebook_size"]
    settings = {"visual_tokenizer": tokenizer.fingerprint, "codebook_size": codebook, "downsample": 8}
    claim_directory(shards, settings)
    codes = np.random.default_rng(0).integers(0, codebook, (len(scenes), *GRID)).astype(np.uint16)
    rows = [TokenRow(f"{n}", code, [text]) for n, (code, text) in enumerate(zip(codes, scenes, strict=True))]
    write_shard(shards, "unit", rows)
    merge_manifest(shards, ["unit"])
    clock = {"class_path": "hand_loop.StepClock"}
    overlay = {
        "model": {
            "init_args": {
                "visual_tokenizer": str(directory / "visual_tokenizer"),
                "language_model": {"tokenizer": str(directory / "text_tokenizer")},
            }
        },
        "data": {
            "init_args": {"paths": [str(shards)], "validation_paths": None, "global_batch_size": batch_size},
        },
        "trainer": {
            "default_root_dir": str(directory),
            "max_steps": steps,
            "limit_val_batches": 0,
            "callbacks+": [clock],
        },
    }
    return Inputs(directory, overlay)


def through_lightning(inputs: Inputs) -> tuple[float, list[Tensor]]:
    """Seconds of a timed step, and the losses."""
    file = inputs.directory / "overlay.yaml"
    file.write_text(yaml.safe_dump(inputs.overlay))
    StepClock.begins, StepClock.losses = [], []
    simplear(["fit", "--config", str(runs.CONFIGS / "pretrain.yaml"), "--config", str(file)])
    return _seconds_a_step(StepClock.begins), StepClock.losses


def by_hand(inputs: Inputs) -> tuple[float, list[Tensor]]:
    """The same of a plain loop, from the weights that the other began with last."""
    config = yaml.safe_load((runs.CONFIGS / "pretrain.yaml").read_text())
    options = config["model"]["init_args"]
    optimizer_options = options.pop("optimizer")["init_args"]
    directories = inputs.overlay["model"]["init_args"]
    language_model = LanguageModelConfig(**{**options.pop("language_model"), **directories["language_model"]})
    module = PretrainModule(language_model, **{**options, "visual_tokenizer": directories["visual_tokenizer"]})
    module.configure_model()
    module.load_state_dict(StepClock.weights)
    model, objective = module.language_model, module.objective
    optimizer = MuonWithAdamW(parameter_groups(model), **optimizer_options)
    rows = {**config["data"]["init_args"], **inputs.overlay["data"]["init_args"]}
    data = TokenDataModule(**{**rows, "tokenizer": language_model.tokenizer})
    data.setup("fit")
    begins, losses = [], []
    for batch in data.train_dataloader():
        begins.append(time.perf_counter())
        image_loss, _ = model(
            batch["input_ids"],
            batch["labels"],
            GRID,
            normalizer=objective.normalizer,
            with_text=objective.text_loss_weight > 0,
            chunk_rows=objective.chunk_rows,
            packed=module.packed,
        )
        loss = image_loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return _seconds_a_step(begins), losses


def _seconds_a_step(begins: list[float]) -> float:
    return (begins[-1] - begins[WARM_UP]) / (len(begins) - 1 - WARM_UP)


def overhead(directory: Path, steps: int, batch_size: int, rounds: int) -> Runs:
    """Seconds of a step, ``Lightning`` and ``by hand``, in turn.

    Raises AssertionError when the two do not train the same.
    """
    inputs = write_inputs(directory, steps, batch_size)
    ways = {"Lightning": through_lightning, "by hand": by_hand}
    found: Runs = {name: [] for name in ways}
    with tqdm(total=rounds * len(ways), desc="Lightning over a loop by hand", unit="run") as progress:
        for number in range(rounds):
            losses = {}
            for name in list(ways)[:: -1 if number % 2 else 1]:
                seconds, losses[name] = ways[name](inputs)
                found[name].append(Run(seconds))
                progress.update()
            if any(
                abs(float(one - other)) > EQUAL
                for one, other in zip(*(way[:2] for way in losses.values()), strict=True)
            ):
                raise AssertionError(f"the two loops do not do the same work, so their ratio means nothing: {losses}.")
    return found
