"""Train GRPO on two CPU processes: fit_grpo.py CHECKPOINT PROMPTS OUT ddp|fsdp2.

Writes the weights, how often gradients were reduced, how often weights were gathered in each rollout, and what a first
update under bf16-mixed logs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as collectives
from torch.nn.parallel import DistributedDataParallel

from simplear.data import TokenDataModule
from simplear.stages import GRPOModule
from toys import CODEBOOK, end_rank


class Brightness:
    """Of the red channel; one rank may fail in its second rollout."""

    def __init__(self, failing_rank: int | None) -> None:
        self.failing_rank, self.calls = failing_rank, 0

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.calls += 1
        if self.calls == 2 and torch.distributed.get_rank() == self.failing_rank:
            raise OSError("the reward's server is gone")
        return images[:, 0].mean(dim=(1, 2))


reductions: list[int] = []
gathers: list[int] = []


def reduced(group, bucket):  # DDP compares the classes of annotations, which are text here
    reductions.append(bucket.index())
    return allreduce_hook(group, bucket)


class Counting(GRPOModule):
    def on_train_start(self) -> None:
        super().on_train_start()
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.register_comm_hook(None, reduced)

    def _roll_out(self, *arguments: Any) -> Any:
        gathers.append(0)
        gather = collectives.foreach_all_gather

        def counted(*gathered: Any, **options: Any) -> Any:
            gathers[-1] += 1
            return gather(*gathered, **options)

        collectives.foreach_all_gather = counted
        try:
            return super()._roll_out(*arguments)
        finally:
            collectives.foreach_all_gather = gather


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "prompts", "out", "strategy"):
        parser.add_argument(name)
    parser.add_argument("--fail-on-rank", type=int)
    arguments = parser.parse_args()
    module = train(arguments, steps=3, precision="32-true")
    weights = get_model_state_dict(
        module.language_model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    counts = {"reductions": [*reductions], "gathers": [*gathers]}
    metrics = train(arguments, steps=1, precision="bf16-mixed").trainer.callback_metrics
    if module.trainer.is_global_zero:
        torch.save({"weights": weights, **counts, "mixed": dict(metrics)}, arguments.out)


def train(arguments: argparse.Namespace, steps: int, precision: Any) -> GRPOModule:
    module = Counting(
        arguments.checkpoint,
        Brightness(arguments.fail_on_rank),
        group_size=3,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        rollout_batch_size=6,
        micro_batch_size=3,
        packed=arguments.strategy == "fsdp2",
    )
    data = TokenDataModule(
        paths=arguments.prompts,
        global_batch_size=4,
        tokenizer=arguments.checkpoint,
        codebook_size=CODEBOOK,
        caption_dropout=0.0,
        max_text_tokens=40,
    )
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if arguments.strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        max_steps=steps,
        precision=precision,
    )
    trainer.fit(module, datamodule=data)
    return module


if __name__ == "__main__":
    main()
    end_rank()
