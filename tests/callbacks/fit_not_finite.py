"""Trains on two CPU processes where one row, of rank 1, is not finite: fit_not_finite.py OUT ddp|fsdp2 stop|skip."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from callbacks.test_finite import Line, rows
from simplear.callbacks import FiniteGradients
from toys import make_trainer


class ShardedLine(Line):
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_end(self, *_: Any) -> None:
        """Shards are not kept."""


if __name__ == "__main__":
    out = Path(sys.argv[1])
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if sys.argv[2] == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    torch.set_num_threads(1)
    callback = FiniteGradients(sys.argv[3])  # type: ignore[arg-type]
    trainer = make_trainer(
        out, devices=2, strategy=strategy, max_steps=5, callbacks=[callback], use_distributed_sampler=False
    )
    own = Subset(rows({9}).dataset, range(int(os.environ.get("LOCAL_RANK", 0)), 24, 2))
    trainer.fit(ShardedLine(), DataLoader(own, batch_size=2))
    (out / f"skipped{trainer.global_rank}").write_text(str(callback.skipped))
