"""Trains stages on any number of processes and writes what they saw and became; imported and run by test_ranks.py.

Arguments: directory from `write_inputs`, directory for results, number of processes, and a JSON list of `Training`
fields. All trainings share the processes, since starting them takes longer than training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from simplear.callbacks import FiniteGradients
from simplear.data import TokenDataModule
from simplear.data.jobs.texts import write_texts
from simplear.language_model import Adapter, CheckpointSettings, LanguageModel, save_checkpoint
from simplear.sequence import text_target_mask
from simplear.stages import GRPOModule, MuonWithAdamW, NextTokenObjective, PretrainModule, SFTModule
from toys import (
    CODEBOOK,
    DOWNSAMPLE,
    end_rank,
    make_shards,
    make_text_tokenizer,
    make_trainer,
    make_visual_tokenizer,
    model_config,
)

GLOBAL_BATCH = 8
ACCUMULATION = {1: 1, 2: 2, 4: 1}
"""By number of processes; so a micro-batch has 8, 2 and 2 samples, padded to three different lengths."""
CLIP = 0.05
"""Below every norm of a gradient here."""
SENTENCE = "two blue squares left of a red triangle above one green star and three yellow circles"
RAGGED = ["", *(" ".join((SENTENCE.split() * 2)[n : 4 * n + 1]) for n in range(8))]
"""Captions of 0 to 57 tokens."""


def write_inputs(root: Path) -> Path:
    """Tokenizers, shards of 6 global batches an epoch, texts, and a checkpoint with prompts for GRPO."""
    text = make_text_tokenizer(root / "text_tokenizer")
    visual = make_visual_tokenizer(root / "visual_tokenizer")
    make_shards(root / "shards", visual, (2, 2), rows=6 * GLOBAL_BATCH + 4, captions=RAGGED)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": caption}) + "\n" for caption in RAGGED[1:] * 2))
    write_texts([str(root / "texts.jsonl")], str(root / "texts"))
    seed_everything(0, verbose=False)
    model, tokenizer = model_config(text).build()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(40)  # distributions far from uniform
    settings = CheckpointSettings(model.layout.image_token_offset, CODEBOOK, (2, 2), DOWNSAMPLE)
    save_checkpoint(root / "start", model, tokenizer, settings, visual_tokenizer=visual)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in RAGGED[1:]))
    return root


class Pretraining(PretrainModule):
    """The stage, in float64 or as it is."""

    def __init__(self, *arguments: Any, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model_dtype = dtype

    def load_language_model(self) -> tuple[LanguageModel, Any]:
        model, tokenizer = super().load_language_model()
        return model.to(self.model_dtype), tokenizer


class MeansOverTokens(Pretraining):
    """The wrong variant: each micro-batch's text loss is the mean over its tokens, not over its samples."""

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        image, text = self.language_model(batch["input_ids"], batch["labels"], batch["codes"].shape[1:])
        tokens = text_target_mask(batch["labels"][:, 1:], self.language_model.layout).sum(dim=1)
        return image.mean() + self.objective.text_loss_weight * (text * tokens).sum() / tokens.sum()


class DoubleGRPO(GRPOModule):
    """The stage in float64."""

    def load_language_model(self) -> tuple[LanguageModel, Any]:
        model, tokenizer = super().load_language_model()
        return model.double(), tokenizer


class CoarseBrightness:
    """Of the red channel, in steps that hide the visual tokenizer's rounding, which is float32's."""

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return (images[:, 0].mean(dim=(1, 2)) * 500).round() / 500


def adamw(params: Any) -> torch.optim.Optimizer:
    # eps is far above rounding, so that noise in a gradient that should be 0 stays noise.
    return torch.optim.AdamW(params, lr=1e-2, eps=1e-4, weight_decay=0.01)


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)


def pretraining(
    root: Path,
    kind: type[Pretraining] = Pretraining,
    dtype: torch.dtype = torch.float64,
    optimizer: Any = adamw,
    objective: NextTokenObjective = NextTokenObjective(text_loss_weight=0.5),
    **options: Any,
) -> Pretraining:
    seed_everything(0, verbose=False)
    return kind(
        model_config(str(root / "text_tokenizer")),
        visual_tokenizer=str(root / "visual_tokenizer"),
        optimizer=optimizer,
        lr_scheduler=schedule,
        objective=objective,
        dtype=dtype,
        **options,
    )


def grpo(root: Path) -> GRPOModule:
    return DoubleGRPO(
        str(root / "start"), CoarseBrightness(), group_size=3, optimizer=adamw, gradient_clip_val=CLIP, inner_updates=2
    )


class DoubleSFT(SFTModule):
    """The stage in float64."""

    def load_language_model(self) -> tuple[LanguageModel, Any]:
        model, tokenizer = super().load_language_model()
        return model.double(), tokenizer


def adapted(root: Path) -> SFTModule:
    seed_everything(0, verbose=False)
    adapter = Adapter(r=2, code_rows=True)
    return DoubleSFT(str(root / "start"), optimizer=adamw, lr_scheduler=schedule, adapter=adapter)


MODULES: dict[str, Callable[[Path], Any]] = {
    "by_modality": pretraining,
    "full": lambda root: pretraining(root, objective=NextTokenObjective("full", 0.5, chunk_rows=16)),
    "lean": lambda root: pretraining(root, packed=True, activation_checkpointing="selective"),
    "texts": pretraining,
    "float32": lambda root: pretraining(root, dtype=torch.float32),
    "means over tokens": lambda root: pretraining(root, MeansOverTokens),
    "muon": lambda root: pretraining(root, optimizer=MuonWithAdamW),
    "adapter": adapted,
    "grpo": grpo,
}


def make_data(root: Path, case: str) -> TokenDataModule:
    tokenizer = str(root / "text_tokenizer")
    if case == "grpo":
        options: dict[str, Any] = {"caption_dropout": 0.0, "max_text_tokens": 60, "codebook_size": CODEBOOK}
        return TokenDataModule(str(root / "prompts.jsonl"), 4, tokenizer, **options)
    paths = [str(root / "shards"), *([str(root / "texts")] if case == "texts" else [])]
    options = {"weights": [2, 1], "validation_paths": paths} if case == "texts" else {}
    return TokenDataModule(paths, GLOBAL_BATCH, tokenizer, caption_dropout=0.3, max_text_tokens=60, **options)


@dataclass(frozen=True)
class Training:
    """What is trained, and how far."""

    case: str
    """A key of `MODULES`."""
    strategy: str = "auto"
    steps: int = 20
    resume: str | None = None
    """State to go on from."""
    save: str | None = None
    """Where to write the state at the end."""


class Witness(Callback):
    """Notes the loss of each of this rank's steps, the norm of its gradient and the keys of its rows."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.keys: list[list[str]] = []
        self.micro_batches = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.micro_batches % trainer.accumulate_grad_batches == 0:
            self.losses.append(0.0)
            self.keys.append([])
        logged = trainer.callback_metrics
        # Lightning has divided the loss by the number of micro-batches; GRPO's training step returns none.
        self.losses[-1] += float(outputs["loss"] if outputs else logged["policy/loss"])
        self.keys[-1] += batch["keys"]
        self.micro_batches += 1
        if self.micro_batches % trainer.accumulate_grad_batches == 0:
            self.norms.append(float(logged["train/gradient_norm" if outputs else "policy/gradient_norm"]))


def train(root: Path, training: Training, processes: int) -> dict[str, Any]:
    """Of all ranks: ``losses``, ``norms`` and sorted ``keys`` by step; the final ``weights`` and ``metrics``."""
    module, witness = MODULES[training.case](root), Witness()
    options: dict[str, Any] = {"max_steps": training.steps, "max_epochs": -1, "callbacks": [witness]}
    if training.case == "grpo":
        options["max_steps"] *= module.inner_updates
    else:
        options["accumulate_grad_batches"] = ACCUMULATION[processes]
        options["gradient_clip_val"] = CLIP
        options["callbacks"] += [FiniteGradients()]
    if training.case == "texts":
        options |= {"val_check_interval": 20 * ACCUMULATION[processes], "check_val_every_n_epoch": None}
    trainer = make_trainer(root, devices=processes, strategy=training.strategy, num_sanity_val_steps=0, **options)
    trainer.fit(module, datamodule=make_data(root, training.case), ckpt_path=training.resume, weights_only=False)
    if training.save:
        trainer.save_checkpoint(training.save)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(module.language_model, options=whole)
    seen: list[Any] = [(witness.losses, witness.keys)]
    if processes > 1:
        seen *= processes
        torch.distributed.all_gather_object(seen, (witness.losses, witness.keys))
    return {
        "losses": torch.tensor([losses for losses, _ in seen], dtype=torch.float64).mean(dim=0),
        "norms": torch.tensor(witness.norms, dtype=torch.float64),
        "keys": [
            sorted(key for keys in step for key in keys) for step in zip(*(keys for _, keys in seen), strict=True)
        ],
        "weights": {name: weight.clone() for name, weight in weights.items()},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def main(arguments: Sequence[str]) -> None:
    root, out, processes = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    torch.set_num_threads(1)
    for number, fields in enumerate(json.loads(arguments[3])):
        result: Any
        try:
            result = train(root, Training(**fields), processes)
        except ValueError as error:
            result = str(error)
        if torch.distributed.get_rank() == 0:
            torch.save(result, out / f"{number}.pt")


def command(root: Path, out: Path, processes: int, trainings: Sequence[Training]) -> list[str]:
    """The line that has processes train all of these, with their results in ``out`` by number."""
    fields = json.dumps([asdict(training) for training in trainings])
    return [sys.executable, str(Path(__file__)), str(root), str(out), str(processes), fields]


if __name__ == "__main__":
    main(sys.argv[1:])
    end_rank()
