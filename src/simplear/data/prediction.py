"""Work on a source's units as a Lightning prediction: what tokenizing and recaptioning have in common.

Each rank takes its share of the units that are not committed yet, a writer gathers a unit's rows and commits it when
its last batch has come, and at the end the first rank merges the manifest. So work can be killed and run again, on any
number of processes.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from tqdm import tqdm

from simplear.data.pictures import warn_of_drops
from simplear.data.shards import MANIFEST_FILE, is_committed, merge_manifest, read_json, remove_abandoned
from simplear.data.sources import Source, Unit
from simplear.errors import UserError
from simplear.progress import progress_bar

logger = logging.getLogger(__name__)


def make_trainer(
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> lightning.Trainer:
    """A Trainer that predicts and keeps nothing. Arguments as Lightning's."""
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def predict_units(trainer: lightning.Trainer, module: UnitModule) -> None:
    """Do the work; returns on every rank when the manifest is merged.

    Raises UserError on the first rank if no picture was kept; a line says so if most were dropped.
    """
    with warnings.catch_warnings():
        # Batches know their rows themselves, and processes take few units each.
        warnings.filterwarnings("ignore", "Couldn't infer the batch indices.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.predict(module, return_predictions=False)
    if trainer.is_global_zero:
        _look_at_drops(module.source, module.out)


def _look_at_drops(source: Source, out: Path) -> None:
    manifest = read_json(out / MANIFEST_FILE)
    drops: Counter[str] = Counter()
    for shard in manifest["shards"]:
        drops.update(shard["drops"])
    if drops.total() <= manifest["rows"] > 0:
        return
    hint = source.hint(drops)
    hint = f" Note that {hint}" if hint else ""
    if manifest["rows"]:
        (reason, count), *_ = drops.most_common()
        total = drops.total() + manifest["rows"]
        logger.warning("most pictures were dropped: %d of %d, %d as %r.%s", drops.total(), total, count, reason, hint)
        return
    # Nothing is lost with what was committed, and the same command is to try again.
    for file in [out / MANIFEST_FILE, *((out / shard["file"]).with_suffix(".json") for shard in manifest["shards"])]:
        file.unlink(missing_ok=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in drops.most_common()) or "the source has none"
    raise UserError(
        f"no picture was kept ({reasons}).{hint} Change that and run the same again; with other options, remove {out} "
        "first."
    )


class UnitModule(lightning.LightningModule):
    """Divides the unfinished units over ranks.

    Args:
        source: of the units.
        out: directory where they are committed.
    """

    def __init__(self, source: Source, out: Path) -> None:
        super().__init__()
        self.source, self.out = source, out
        self.units: list[Unit] = []
        """This rank's share."""
        self.committed_before = 0
        """Units that need no work, of all ranks."""

    def take_share(self) -> None:
        """Look which units are left; for `predict_dataloader`, since no rank begins before all have been there."""
        units = self.source.units()
        unfinished = [unit for unit in units if not is_committed(self.out, unit.name)]
        self.committed_before = len(units) - len(unfinished)
        self.units = unfinished[self.trainer.global_rank :: self.trainer.world_size]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """What is needed there moves by itself: captions and metadata need no walk through them."""
        return batch


class UnitWriter(BasePredictionWriter):
    """Shows progress, and at the end merges the manifest. Whoever derives commits units in ``write_on_batch_end``.

    Args:
        out: directory where units are committed.
        title: of the progress bar.
    """

    def __init__(self, out: Path, title: str) -> None:
        super().__init__(write_interval="batch")
        self.out, self.title = out, title
        self.drops: Counter[str] = Counter()
        """Of this rank, by reason."""
        self._progress: tqdm | None = None

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the progress bar: pictures of this rank's units, or units where their sizes are unknown."""
        assert isinstance(pl_module, UnitModule)
        self.by_picture = all(unit.count is not None for unit in pl_module.units)
        total = sum(unit.count or 0 for unit in pl_module.units) if self.by_picture else len(pl_module.units)
        self._progress = progress_bar(
            total,
            self.title if trainer.world_size == 1 else f"{self.title} (1 of {trainer.world_size} processes)",
            " pictures" if self.by_picture else " units",
            shown=bool(total) and trainer.is_global_zero,
        )

    def advance(self, pictures: int, unit_is_done: bool, rate: str | None = None) -> None:
        """Count a batch; a rate is shown where the bar does not count pictures itself."""
        assert self._progress is not None
        if rate is not None and not self.by_picture:
            self._progress.set_postfix_str(rate, refresh=False)
        self._progress.update(pictures if self.by_picture else int(unit_is_done))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all ranks, then merge."""
        assert self._progress is not None and isinstance(pl_module, UnitModule)
        self._progress.close()
        warn_of_drops(self.drops, f" on rank {trainer.global_rank}")
        trainer.strategy.barrier("predicted")
        if trainer.is_global_zero:
            remove_abandoned(self.out)
            self.conclude(pl_module, merge_manifest(self.out, [unit.name for unit in pl_module.source.units()]))
        trainer.strategy.barrier("merged")

    def conclude(self, module: Any, manifest: dict[str, Any]) -> None:
        """Say on the first rank what came of it."""
        raise NotImplementedError
