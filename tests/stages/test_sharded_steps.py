"""Steps of two processes are those of one: gradients clipped over all shards, a fused optimizer, layers that compute
again, and (long) layers that are compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from simplear.data import TokenDataModule
from simplear.stages import NextTokenObjective, PretrainModule
from stages.test_next_token import largest_difference, weights
from toys import make_trainer, model_config, run_ranks

STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.1},
    "fused": {"optimizer": "AdamW", "activation_checkpointing": "selective"},
}
COMPILED: dict[str, dict[str, Any]] = {
    f"{precision} {mode}": {
        "compile_layers": True,
        "activation_checkpointing": mode,
        "precision": precision,
        "optimizer": "AdamW",
    }
    for precision, mode in (("32-true", "none"), ("bf16-mixed", "selective"), ("32-true", "full"))
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Unlike AdamW it shows a gradient that was scaled wrongly."""
    return torch.optim.SGD(parameters, lr=1.0)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, fused=True)


def trained(paths: tuple[str, str, str], directory: Path, settings: dict[str, Any], **options: Any) -> Any:
    text, visual, shards = paths
    seed_everything(0, verbose=False)
    module = PretrainModule(
        model_config(text),
        visual_tokenizer=visual,
        optimizer=fused if settings.get("optimizer") == "AdamW" else sgd,
        objective=NextTokenObjective(text_loss_weight=0.5),
        activation_checkpointing=settings.get("activation_checkpointing", "none"),
        compile_layers=settings.get("compile_layers", False),
    )
    data = TokenDataModule(shards, 4, text, caption_dropout=0.3, max_text_tokens=30)
    options = {"precision": settings.get("precision", "32-true"), **options}
    trainer = make_trainer(directory, max_steps=STEPS, gradient_clip_val=settings.get("clip"), **options)
    trainer.fit(module, datamodule=data)
    return module


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from simplear.stages import FSDP2
from stages import test_sharded_steps as steps
from toys import end_rank

def main(*paths, out, group, name):
    torch.set_num_threads(1)
    for setting, options in getattr(steps, group).items():
        strategy = FSDP2() if name == "fsdp2" else DDPStrategy(process_group_backend="gloo")
        module = steps.trained(paths, Path(out), options, devices=2, strategy=strategy)
        whole = get_model_state_dict(
            module.language_model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if module.trainer.is_global_zero:
            torch.save(whole, Path(out, setting + ".pt"))

*paths, out, group, name = sys.argv[1:]
main(*paths, out=out, group=group, name=name)
end_rank()
"""


@pytest.fixture
def runs(tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str, tmp_path: Path) -> Any:
    """Trains each of a group of settings on two processes; compares with one process."""
    paths = (tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards)

    def start(group: str, strategy: str) -> None:
        script = tmp_path / "two_processes.py"
        script.write_text(TWO_PROCESSES)
        run_ranks([sys.executable, str(script), *paths, str(tmp_path), group, strategy], timeout=1200)

    def one(setting: dict[str, Any]) -> dict[str, Tensor]:
        return weights(trained(paths, tmp_path, {**setting, "compile_layers": False}))

    def two(setting: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(tmp_path / f"{setting}.pt")
        return loaded

    return start, one, two


def test_fsdp2_steps_as_one_process_does(runs: Any) -> None:
    start, one, two = runs
    start("SETTINGS", "fsdp2")
    for name, setting in SETTINGS.items():
        assert largest_difference(one(setting), two(name)) < 1e-5, name
    unclipped = one({})
    assert largest_difference(unclipped, two("clipped")) > 1e-2, "the norm is above what it is clipped at"


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_layers_step_as_the_layers_do(runs: Any, strategy: str) -> None:
    start, one, two = runs
    start("COMPILED", strategy)
    for name, setting in COMPILED.items():
        tolerance = 1e-5 if name.startswith("32") else 5e-3
        assert largest_difference(one(setting), two(name)) < tolerance, name
