"""Work on a source's units as a Lightning prediction: what tokenizing and recaptioning have in common.

Loader processes make batches of units. A batch never reaches over the end of a unit, and the last one of a unit is
empty and says what was left out. What stops the work in a loader process is carried on as a batch too, so that the
batches before it, which may end a unit, are written, and the message is the project's own.

Each rank takes its share of the units that are not committed yet, a writer gathers a unit's rows and commits it when
its last batch has come, and at the end the first rank merges the manifest. So work can be killed and run again, on any
number of processes.
"""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from simplear.atomic import remove_abandoned
from simplear.data.sample import Dropped, Sample, as_made, warn_of_drops
from simplear.data.shards import MANIFEST_FILE, committed_sidecar, is_committed, merge_manifest, read_json
from simplear.data.sources.base import RESERVED_NAMES, Source, Unit
from simplear.errors import SystemRefusedError, UserError
from simplear.progress import progress_bar

logger = logging.getLogger(__name__)

LONGEST_NAME = 150
"""Bytes of a unit's name: file systems allow 255, and files that are being written have longer ones."""
TO_CONNECT, NO_LIMIT = timedelta(minutes=5), timedelta(days=365)


@dataclass(frozen=True)
class UnitEnd:
    """What is known of a unit when all of it was read."""

    dropped: list[Dropped]
    identity: str | None
    """See `Unit`."""


@dataclass(frozen=True)
class UnitBatch:
    """Some pictures of one unit."""

    unit: str
    samples: Sequence[Sample] = ()
    """Without their pictures."""
    images: Any = None
    """What is to be worked on, one for each sample."""
    indices: Sequence[int] = ()
    """Places of the samples in the unit."""
    end: UnitEnd | None = None
    """In the unit's last batch, which is empty."""
    failure: Exception | None = None
    """What stops the work."""

    def pin_memory(self) -> UnitBatch:
        """With pictures in memory from which a GPU copies beside its work."""
        return replace(self, images=self.images.pin_memory()) if isinstance(self.images, Tensor) else self


class UnitDataset(IterableDataset[UnitBatch]):
    """Batches of units, one unit after another in each loader process."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units

    @abstractmethod
    def batches(self, unit: Unit, dropped: list[Dropped]) -> Iterator[UnitBatch]:
        """Batches of one unit but the last; `dropped` is to hold in the end what was left out."""

    def __iter__(self) -> Iterator[UnitBatch]:
        worker = get_worker_info()
        for unit in self.units if worker is None else self.units[worker.id :: worker.num_workers]:
            dropped: list[Dropped] = []
            try:
                identity = None if unit.identity is None else unit.identity()
                yield from self.batches(unit, dropped)
            except (ValueError, TypeError, OSError) as error:
                yield UnitBatch(unit.name, failure=error)
                return
            yield UnitBatch(unit.name, end=UnitEnd(dropped, identity))
            # Lightning hands a batch on when it has the next: the last would wait until another unit is begun.
            yield UnitBatch(unit.name)


def checked_units(source: Source) -> list[Unit]:
    """The source's units. Raises ValueError for names that cannot be those of files in one directory."""
    units, names = source.units(), set[str]()
    for unit in units:
        wrong = None
        if unit.name in RESERVED_NAMES:
            wrong = "which is the name of one of the directory's own files"
        elif unit.name in names:
            wrong = "as another one has"
        elif not unit.name or "/" in unit.name or "\0" in unit.name or len(unit.name.encode()) > LONGEST_NAME:
            wrong = f"which cannot be a file's: it takes 1 to {LONGEST_NAME} bytes without '/'"
        if wrong:
            raise UserError(f"a unit of {type(source).__name__} has the name {unit.name!r}, {wrong}: rename its file.")
        names.add(unit.name)
    return units


def make_trainer(accelerator: str, devices: int, num_nodes: int, strategy: str, **options: Any) -> lightning.Trainer:
    """A Trainer that predicts and keeps nothing. Arguments as Lightning's."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= dict.fromkeys(shown, False)
    return lightning.Trainer(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, **options
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


class RanksTogether:
    """Lets ranks wait for each other for as long as it takes; a rank that ends with an error ends the wait.

    A barrier of the strategy gives up after half an hour, and one rank's units may take longer than those of the
    others. To be made by all ranks at about the same time. On one process it does nothing.
    """

    def __init__(self) -> None:
        """Raises OSError when the machines cannot reach each other."""
        self._group: Any = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.destroy_process_group(_connected(TO_CONNECT))
            self._group = _connected(NO_LIMIT)

    def wait(self) -> None:
        """Return when all ranks have come here. Raises OSError when one has ended before."""
        if self._group is None:
            return
        try:
            distributed.monitored_barrier(self._group, timeout=NO_LIMIT)
        except RuntimeError as error:
            raise SystemRefusedError(
                "another process of this job has ended before its work was done; its own message says why. What is "
                "finished is kept: run the same again."
            ) from error

    def close(self) -> None:
        """Take the connections down."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)


def _connected(timeout: timedelta) -> Any:
    try:
        # gloo's connections end with a process, so a death is seen at once; NCCL would wait on.
        return distributed.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise SystemRefusedError(
            f"the processes of this job cannot connect to each other ({error}): set GLOO_SOCKET_IFNAME to the name of "
            "the network interface between the machines."
        ) from error


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
        """Look which units are left; for `predict_dataloader`, since no rank begins before all have been there.

        Raises ValueError for a unit of this rank's share that was made from something else than the source has now.
        """
        units = checked_units(self.source)
        committed = [unit for unit in units if is_committed(self.out, unit.name)]
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        for unit in committed[rank::world_size]:
            if unit.identity is not None:
                committed_sidecar(self.out, unit.name, unit.identity())
        names = {unit.name for unit in committed}
        self.committed_before = len(names)
        self.units = [unit for unit in units if unit.name not in names][rank::world_size]

    def loader(self, batches: UnitDataset, num_workers: int) -> DataLoader[UnitBatch]:
        """Batches of this rank's units, in the order in which loader processes have them ready."""
        workers = min(num_workers, len(self.units))
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_made,
            # A batch that ends a unit does not wait for a slower process.
            in_order=not workers,
            pin_memory=self.device.type == "cuda",
        )

    def on_predict_batch_start(self, batch: UnitBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise what stopped a loader process."""
        if batch.failure is not None:
            raise batch.failure

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """What is needed there moves by itself: captions and metadata need no walk through them."""
        return batch


class UnitWriter(BasePredictionWriter):
    """Shows progress, has units committed when their last batch has come, and at the end merges the manifest.

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
        self._ranks: RanksTogether | None = None

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the progress bar: pictures of this rank's units, or units where their sizes are unknown."""
        assert isinstance(pl_module, UnitModule)
        self._ranks = RanksTogether()
        self.by_picture = all(unit.count is not None for unit in pl_module.units)
        total = sum(unit.count or 0 for unit in pl_module.units) if self.by_picture else len(pl_module.units)
        self._progress = progress_bar(
            total,
            self.title if trainer.world_size == 1 else f"{self.title} (1 of {trainer.world_size} processes)",
            " pictures" if self.by_picture else " units",
            shown=bool(total) and trainer.is_global_zero,
        )

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: UnitBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the batch's rows; commit the unit after its last batch."""
        if batch.samples:
            self.keep(batch, prediction)
        if batch.end is not None:
            self.commit(batch.unit, batch.end)
            self.drops += Counter(reason for _, reason in batch.end.dropped)
        self.advance(len(batch.end.dropped) if batch.end else len(batch.samples), batch.end is not None)

    def keep(self, batch: UnitBatch, prediction: Any) -> None:
        """Hold what was made of a batch."""
        raise NotImplementedError

    def commit(self, unit: str, end: UnitEnd) -> None:
        """Write what was made of a unit."""
        raise NotImplementedError

    def advance(self, pictures: int, unit_is_done: bool) -> None:
        """Count a batch."""
        assert self._progress is not None
        self._progress.update(pictures if self.by_picture else int(unit_is_done))

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for all ranks, then merge."""
        assert self._progress is not None and self._ranks is not None and isinstance(pl_module, UnitModule)
        self._progress.close()
        warn_of_drops(self.drops, f" on rank {trainer.global_rank}")
        self._ranks.wait()
        if trainer.is_global_zero:
            remove_abandoned(self.out)
            self.conclude(pl_module, merge_manifest(self.out, [unit.name for unit in pl_module.source.units()]))
        self._ranks.wait()
        self._ranks.close()

    def conclude(self, module: Any, manifest: dict[str, Any]) -> None:
        """Say on the first rank what came of it."""
        raise NotImplementedError
