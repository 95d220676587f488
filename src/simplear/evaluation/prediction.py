"""Work on a benchmark's prompts as a Lightning prediction: on any number of processes, and going on after a stop.

Drawing images and judging them are the same kind of work: something is made for each prompt, on the rank's own device,
and appears whole or not at all. What a batch holds depends on the list of prompts alone, and ranks share out those
batches of which something is missing. So a result depends neither on how many processes made it nor on how often they
were killed, not even by the rounding that another batch shape brings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from simplear.data.jobs.units import RanksTogether
from simplear.progress import progress_bar


class PromptTask(Protocol):
    """What is made for each prompt, by its number in the list of prompts."""

    title: str
    """Of the progress bar."""

    def setup(self, device: torch.device) -> None:
        """Load what the work needs; called once in each process that has any to do."""

    def is_finished(self, number: int) -> bool:
        """Whether what is made for this prompt is there, whole."""

    def run(self, numbers: Sequence[int]) -> None:
        """Make it for one batch of prompts; what is there already is left as it is."""


def predict_prompts(trainer: lightning.Trainer, task: PromptTask, count: int, prompts_per_batch: int) -> None:
    """Have `task` done for prompts 0 to ``count - 1``; returns on every rank when all ranks are through.

    Args:
        trainer: of `simplear.data.jobs.units.make_trainer`, without inference mode, for engines keep to no_grad by
            themselves and compile for it; one may be used for several tasks in turn.
        task: what is made.
        count: prompts.
        prompts_per_batch: prompts given to the task at once.
    """
    module = _PromptModule(task, count, prompts_per_batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", "predict returned None.*")
        trainer.predict(module, return_predictions=False)


class _Batches(IterableDataset[list[int]]):
    """Without a length, for Lightning leaves out ranks whose length is 0, and others would wait for them."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _PromptModule(lightning.LightningModule):
    def __init__(self, task: PromptTask, count: int, prompts_per_batch: int) -> None:
        super().__init__()
        self.task, self.count, self.prompts_per_batch = task, count, prompts_per_batch
        self.batches: list[list[int]] = []
        """This rank's share of what is left."""
        self._bar: tqdm | None = None
        self._ranks: RanksTogether | None = None

    def setup(self, stage: str) -> None:
        """Look what is left, and load. Lightning lets no rank go on before all have been here."""
        starts = range(0, self.count, self.prompts_per_batch)
        batches = [list(range(start, min(start + self.prompts_per_batch, self.count))) for start in starts]
        unfinished = [batch for batch in batches if not all(map(self.task.is_finished, batch))]
        self.batches = unfinished[self.trainer.global_rank :: self.trainer.world_size]
        if self.batches:
            self.task.setup(self.trainer.strategy.root_device)

    def predict_dataloader(self) -> DataLoader[list[int]]:
        """This rank's batches."""
        return DataLoader(_Batches(self.batches), batch_size=None)

    def on_predict_start(self) -> None:
        """Open the progress bar, over the first rank's share."""
        self._ranks = RanksTogether()
        self._bar = progress_bar(
            sum(map(len, self.batches)),
            self.task.title,
            " prompts",
            shown=bool(self.batches) and self.trainer.is_global_zero,
        )

    def predict_step(self, batch: list[int]) -> None:
        """One batch of prompts."""
        assert self._bar is not None
        self.task.run(batch)
        self._bar.update(len(batch))

    def on_predict_end(self) -> None:
        """Wait for all ranks: what comes next reads what each of them made."""
        assert self._bar is not None and self._ranks is not None
        self._bar.close()
        self._ranks.wait()
        self._ranks.close()
