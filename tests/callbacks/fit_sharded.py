"""Trains the toy stage under FSDP2 on CPUs and draws during it; run by the test of sharded exports.

Arguments: directories of the text and the visual tokenizer, output directory, number of processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as collectives

from callbacks.conftest import CAPTIONS, ToyStage, batches
from simplear.callbacks import HuggingFaceCheckpoint, SampleImages
from simplear.generation import SimpleARPipeline
from simplear.stages.sharding import shard_language_model
from toys import end_rank


class ShardedStage(ToyStage):
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_language_model(self.language_model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.language_model.parameters(), lr=0.1)  # AdamW would enlarge mere rounding

    def on_train_start(self) -> None:
        torch.manual_seed(1)  # of the random factor in the loss


class Counting(SampleImages):
    """Notes how often weights are gathered for a sheet."""

    gathers: list[int]

    def draw(self, trainer: Trainer, pipeline: SimpleARPipeline) -> None:
        gather, self.gathers = collectives.foreach_all_gather, [*getattr(self, "gathers", []), 0]

        def counted(*gathered: Any, **options: Any) -> Any:
            self.gathers[-1] += 1
            return gather(*gathered, **options)

        collectives.foreach_all_gather = counted
        super().draw(trainer, pipeline)
        collectives.foreach_all_gather = gather


def main() -> None:
    text, visual, out, devices = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stage = ShardedStage(text, visual)
    strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if devices > 1 else "auto"
    samples = Counting(CAPTIONS, every_n_steps=2, guidance_scale=2.0)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=4,
        use_distributed_sampler=False,  # all ranks see the batches that the single process sees
        logger=TensorBoardLogger(out, name="", version="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[
            samples,
            HuggingFaceCheckpoint(
                export_dir=str(out / "model"), dirpath=out / "states", every_n_train_steps=2, save_top_k=0
            ),
        ],
    )
    trainer.fit(stage, batches())
    if devices > 1:
        assert samples.gathers == [len(stage.language_model.decoder.model.layers) + 1] * 2, samples.gathers


if __name__ == "__main__":
    main()
    end_rank()
