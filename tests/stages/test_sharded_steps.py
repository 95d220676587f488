"""Steps of two processes are those of one: gradients clipped over all shards, a fused optimizer, layers that compute
again, weights gathered in bfloat16, and (long) layers that are compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.distributed.tensor import DTensor

from simplear.callbacks.checkpointing import export
from simplear.data import TokenDataModule
from simplear.generation import make_engine
from simplear.language_model import load_checkpoint
from simplear.stages import NextTokenObjective, PretrainModule
from stages.test_next_token import largest_difference, weights
from toys import CODEBOOK, make_batch, make_trainer, model_config, run_ranks

STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.1},
    "fused": {"optimizer": "AdamW", "activation_checkpointing": "selective"},
    "mixed": {"precision": "bf16-mixed", "activation_checkpointing": "selective"},
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


class Witness(Callback):
    """Notes the types of what travels between ranks, and of what passes from layer to layer, and the losses of a batch
    that every rank has.
    """

    def __init__(self) -> None:
        self.types: dict[str, set[torch.dtype]] = {"gathered": set(), "reduced": set(), "stream": set()}
        self.losses: Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        batch = make_batch(pl_module.language_model, pl_module.text_tokenizer)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self.losses = torch.cat(pl_module.language_model(batch["input_ids"], batch["labels"], (2, 3)))
        for layer in pl_module.language_model.decoder.model.layers:
            layer.register_forward_pre_hook(lambda _, inputs: self.types["stream"].add(inputs[0].dtype))
        names = {"all_gather_single": "gathered", "reduce_scatter_single": "reduced"}
        for name, what in names.items():
            mock.patch.object(torch.distributed, name, self._noting(getattr(torch.distributed, name), what)).start()

    def _noting(self, collective: Any, what: str) -> Any:
        def noting(*tensors: Tensor, **options: Any) -> Any:
            self.types[what].add(options["input"].dtype if "input" in options else tensors[1].dtype)
            return collective(*tensors, **options)

        return noting

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        mock.patch.stopall()


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
    if not module.compile_layers:
        options["callbacks"] = [Witness()]
    trainer = make_trainer(directory, max_steps=STEPS, gradient_clip_val=settings.get("clip"), **options)
    trainer.fit(module, datamodule=data)
    return module


def facts(module: Any, directory: Path) -> dict[str, Any]:
    """What the witness noted, the types of shards and their gradients, and an export after drawing has gathered all."""
    weight = module.language_model.decoder.lm_head.weight
    shard = weight.full_tensor() if isinstance(weight, DTensor) else weight
    with module.trainer.precision_plugin.forward_context():
        engine: Any = make_engine("fused", module.language_model)
        engine.refresh()
    export(module, directory, module.trainer.is_global_zero)
    witness = witness_of(module)
    return {"types": witness.types, "losses": witness.losses, "head": shard.detach(), "drawn": engine.step.head}


def witness_of(module: Any) -> Witness:
    return next(callback for callback in module.trainer.callbacks if isinstance(callback, Witness))


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
        facts = None if module.compile_layers else steps.facts(module, Path(out, setting))
        if module.trainer.is_global_zero:
            torch.save(whole, Path(out, setting + ".pt"))
            torch.save(facts, Path(out, setting + "-facts.pt"))

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

    def one(setting: dict[str, Any]) -> Any:
        return trained(paths, tmp_path, {**setting, "compile_layers": False})

    def two(name: str) -> Any:
        return torch.load(tmp_path / f"{name}.pt")

    return start, one, two


def test_fsdp2_steps_as_one_process_does(runs: Any, tmp_path: Path) -> None:
    start, one, two = runs
    start("SETTINGS", "fsdp2")
    alone = {name: one(setting) for name, setting in SETTINGS.items()}
    for name in ("clipped", "fused"):
        assert largest_difference(weights(alone[name]), two(name)) < 1e-5, name
    unclipped = weights(one({}))
    assert largest_difference(unclipped, two("clipped")) > 1e-2, "the norm is above what it is clipped at"
    # What is rounded beside autocast, embeddings and norms, does no more than autocast's own rounding.
    assert distance(two("mixed"), unclipped) < 2 * distance(weights(alone["mixed"]), unclipped)
    check_mixed_precision(alone["mixed"], tmp_path)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((weight - other[name]).square().sum() for name, weight in one.items())) ** 0.5


def check_mixed_precision(alone: Any, directory: Path) -> None:
    """Under bf16-mixed half as much is gathered; all that is added up, and exported, is float32."""
    facts = torch.load(directory / "mixed-facts.pt")
    float32, bfloat16 = {torch.float32}, {torch.bfloat16}
    assert facts["types"] == {"gathered": bfloat16, "reduced": float32, "stream": float32}
    wide = torch.load(directory / "fused-facts.pt")["types"]
    assert wide == {"gathered": float32, "reduced": float32, "stream": float32}
    losses, same = facts["losses"], witness_of(alone).losses
    assert same is not None and losses.dtype == torch.float32
    assert 0 < float((losses - same).abs().max()) < 1e-3
    head, exported = facts["head"], load_checkpoint(directory / "mixed").model.decoder.lm_head.weight
    assert torch.equal(exported, head) and not torch.equal(head, head.bfloat16().float())
    assert torch.equal(facts["drawn"], head[-CODEBOOK:].T.bfloat16())


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_layers_step_as_the_layers_do(runs: Any, strategy: str) -> None:
    start, one, two = runs
    start("COMPILED", strategy)
    for name, setting in COMPILED.items():
        if name.startswith("32"):
            assert largest_difference(weights(one(setting)), two(name)) < 1e-5, name
        else:
            exact = weights(one({**setting, "precision": "32-true"}))
            assert distance(two(name), exact) < 2 * distance(weights(one(setting)), exact), name
