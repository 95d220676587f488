"""Lightning's EMA with the project's callbacks: what leaves a training is the average, and training does not notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from simplear.callbacks import DrawingCallback, HuggingFaceCheckpoint
from simplear.cli import main
from simplear.generation import SimpleARPipeline
from simplear.language_model import load_checkpoint
from toys import write_grpo, write_pretraining, write_sft

from .conftest import ToyStage, batches

DECAY = 0.6
EMA = f"--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay {DECAY}"


class Validated(ToyStage):
    """Notes a weight that it validates with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.validated: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        return self.language_model.decoder.lm_head.weight.detach().clone()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.weight)


class Witness(Callback):
    """The weight after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(pl_module.weight)


class Drawn(DrawingCallback):
    """The weight that is drawn with."""

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        self.weight = trainer.lightning_module.weight  # type: ignore[union-attr]


def test_what_is_validated_drawn_saved_and_exported_is_the_average(
    tokenizers: tuple[str, str], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Recomputed by hand from the weights of each step, which are those of a training without an average."""
    weights = {}
    for name, averaging in (("plain", []), ("averaged", [EMAWeightAveraging(decay=DECAY)])):
        torch.manual_seed(0)
        stage, witness, drawn = Validated(*tokenizers), Witness(), Drawn(5)
        saving = HuggingFaceCheckpoint(dirpath=tmp_path / name, every_n_train_steps=2)
        trainer = make_trainer(*averaging, witness, drawn, saving, max_steps=5, val_check_interval=3)
        trainer.fit(stage, batches(), batches(1))
        weights[name] = witness.weights
    for one, other in zip(weights["plain"], weights["averaged"], strict=True):
        assert torch.equal(one, other)
    averages = [weights["plain"][0]]
    for weight in weights["plain"][1:]:
        averages.append(DECAY * averages[-1] + (1 - DECAY) * weight)
    torch.testing.assert_close(stage.validated[-1], averages[2])
    torch.testing.assert_close(drawn.weight, averages[4])
    for name, step in (("previous", 3), ("last", 4)):
        state = torch.load(tmp_path / "averaged" / f"{name}.ckpt", weights_only=True)
        key = "language_model.decoder.lm_head.weight"
        assert torch.equal(state["current_model_state"][key], weights["plain"][step])
        exported = load_checkpoint(tmp_path / "averaged" / name).model.state_dict()
        torch.testing.assert_close(exported["decoder.lm_head.weight"], averages[step])
        assert all(
            torch.equal(weight, state["state_dict"][f"language_model.{key}"]) for key, weight in exported.items()
        )


@pytest.mark.parametrize(
    ("stage", "stop", "end"),
    [
        ("pretrain", "--trainer.max_steps 4", ""),
        ("pretrain", "--trainer.max_steps -1 --trainer.max_epochs 1", "--trainer.max_steps -1 --trainer.max_epochs 2"),
        ("sft", "--trainer.max_steps 4", ""),
        ("grpo", "--trainer.max_steps 4", ""),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_average(
    tmp_path: Path,
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    tiny_shards: str,
    tiny_checkpoint: Path,
    stage: str,
    stop: str,
    end: str,
) -> None:
    """Also started again when it had only its export left to do."""
    config = {
        "pretrain": lambda: write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards),
        "sft": lambda: write_sft(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer, tiny_shards),
        "grpo": lambda: write_grpo(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer),
    }[stage]()
    validation = "" if stage == "grpo" else f"--data.init_args.validation_paths [{tiny_shards}]"
    words = f"--config {config} {EMA} {validation} --trainer.val_check_interval 2"

    def fit(name: str, *options: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        main(["fit", *f"{words} --trainer.default_root_dir {tmp_path / name}".split(), *" ".join(options).split()])
        state = torch.load(tmp_path / name / "states" / "last.ckpt", weights_only=False)
        return state, load_checkpoint(tmp_path / name / "model").model.state_dict()

    whole, exported = fit("whole", end)
    fit("resumed", stop)
    shutil.rmtree(tmp_path / "resumed" / "model")
    fit("resumed", stop, "--ckpt_path last")
    state, again = fit("resumed", end, "--ckpt_path last")
    assert state["global_step"] == whole["global_step"]
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert whole[key].keys() == state[key].keys()
        assert all(torch.equal(whole[key][name], state[key][name]) for name in whole[key]), key
    for name, weight in exported.items():
        assert torch.equal(weight, again[name]) and torch.equal(weight, whole["state_dict"][f"language_model.{name}"])
    assert any(
        not torch.equal(whole["state_dict"][name], whole["current_model_state"][name]) for name in whole["state_dict"]
    )
