"""Work on the units of a source on any number of processes: what tokenizing and recaptioning have in common.

Loader processes make batches. A batch never reaches over the end of a unit, and the last one of a unit is empty and
says what was dropped. Each rank takes its share of the units that are not committed yet, and a unit is committed when
its last batch has come. At the end the first rank merges the manifest. So work can be killed and run again, also on
another number of processes.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from simplear.data.sample import NO_PICTURE, Drop, Dropped, Sample, as_made, warn_of_drops
from simplear.data.shards import MANIFEST_FILE, committed_sidecar, is_committed, merge_manifest
from simplear.data.sources.base import RESERVED_NAMES, Source, Unit
from simplear.errors import SystemRefusedError, UserError, first_line
from simplear.progress import progress_bar

logger = logging.getLogger(__name__)

FILE_NAME = re.compile(r"[^/\0]+")
LONGEST_NAME = 150
"""Bytes of a unit's name: file systems allow 255, and temporary names are longer."""
TO_CONNECT, NO_LIMIT = timedelta(minutes=5), timedelta(days=365)

Prepare = Callable[[Sample], Any]
"""A sample to the image that is worked on: an array, or a Pillow image. Raises `Drop`."""


@dataclass(frozen=True)
class UnitBatch:
    """Some pictures of one unit."""

    unit: str
    samples: Sequence[Sample] = ()
    """Without their pictures."""
    images: Any = None
    """One for each sample: a tensor of arrays of one shape, or a list."""
    places: Sequence[int] = ()
    """Of the samples in the unit."""
    dropped: list[Dropped] | None = None
    """In the last batch of a unit, which has no samples: all that were dropped in it."""
    identity: str | None = None
    """In the last batch, see `Unit`."""
    failure: Exception | None = None
    """What stops the work, carried to the main process so that the message is not wrapped."""

    def pin_memory(self) -> UnitBatch:
        """With images in memory from which a GPU copies in the background."""
        return replace(self, images=self.images.pin_memory()) if isinstance(self.images, Tensor) else self


class UnitBatches(IterableDataset[UnitBatch]):
    """Batches of prepared pictures, one unit after another in each loader process."""

    def __init__(self, source: Source, units: Sequence[Unit], prepare: Prepare, batch_size: int) -> None:
        self.source, self.units, self.prepare, self.batch_size = source, units, prepare, batch_size

    def __iter__(self) -> Iterator[UnitBatch]:
        worker = get_worker_info()
        for unit in self.units if worker is None else self.units[worker.id :: worker.num_workers]:
            try:
                yield from self._batches(unit)
            except (ValueError, TypeError, OSError) as error:
                yield UnitBatch(unit.name, failure=error)
                return

    def _batches(self, unit: Unit) -> Iterator[UnitBatch]:
        identity = None if unit.identity is None else unit.identity()
        dropped, keys = list[Dropped](), set[str]()
        # Arrays of several shapes are gathered by shape.
        pending: defaultdict[Any, list[tuple[int, Sample, Any]]] = defaultdict(list)
        for place, sample in enumerate(self.source.read(unit, dropped)):
            try:
                if sample.key in keys:
                    raise Drop("duplicate key")
                keys.add(sample.key)
                image = self.prepare(sample)
            except Drop as reason:
                dropped.append((sample.key, str(reason)))
                continue
            shape = getattr(image, "shape", None)
            pending[shape].append((place, replace(sample, picture=NO_PICTURE), image))
            if len(pending[shape]) == self.batch_size:
                yield _batch(unit, pending.pop(shape))
        for rows in pending.values():
            yield _batch(unit, rows)
        yield UnitBatch(unit.name, dropped=dropped, identity=identity)


def _batch(unit: Unit, rows: list[tuple[int, Sample, Any]]) -> UnitBatch:
    places, samples, images = zip(*rows, strict=True)
    is_array = isinstance(images[0], np.ndarray)
    return UnitBatch(unit.name, samples, torch.from_numpy(np.stack(images)) if is_array else list(images), places)


class UnitJob(ABC):
    """What is made of the pictures of a source."""

    title: str
    """Of the progress bar."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load what `compute` needs; called once on each process that has units to do."""

    @abstractmethod
    def compute(self, batch: UnitBatch) -> list[Any]:
        """For each picture of the batch a row, or a `Drop`."""

    @abstractmethod
    def commit(self, unit: str, rows: list[Any], dropped: list[Dropped], identity: str | None) -> None:
        """Write and commit the rows of a unit, in the order of the source."""


def run_units(
    job: UnitJob, source: Source, out: Path, prepare: Prepare, batch_size: int, num_workers: int, fabric: Fabric
) -> dict[str, Any] | None:
    """Do a job on all units of a source that are not committed in `out` yet, on the processes of `fabric`.

    Returns the manifest on the first rank and None on the others, when all ranks have finished.

    Raises:
        ValueError: a unit that was made from something else than the source has now, or no picture was kept.
        ChildProcessError: a loader process was killed.
    """
    fabric.launch()
    ranks, units = RanksTogether(), checked_units(source)
    unfinished = [unit for unit in units if not is_committed(out, unit.name)]
    ranks.wait()  # before another rank commits a unit, which would change the shares
    for unit in units[fabric.global_rank :: fabric.world_size]:
        committed_sidecar(out, unit.name, None if unit.identity is None else unit.identity())
    share = unfinished[fabric.global_rank :: fabric.world_size]
    try:
        with torch.inference_mode(), fabric.autocast():
            drops = _work(job, UnitBatches(source, share, prepare, batch_size), num_workers, fabric)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a loader process was killed ({first_line(error)}): often memory has run out. Take fewer num_workers or a "
            "smaller batch_size, or leave out huge pictures by PixelLimit, and run the same again to resume."
        ) from error
    warn_of_drops(drops, f" on rank {fabric.global_rank}")
    ranks.wait()
    manifest = merge_manifest(out, [unit.name for unit in units]) if fabric.is_global_zero else None
    ranks.wait()
    ranks.close()
    if manifest is not None:
        _look_at_drops(manifest, source, out)
        if committed := len(units) - len(unfinished):
            # A source is known by its settings: pictures or captions that changed since are not noticed.
            text = "%d of %d units were there already; remove the directory to make them again"
            logger.info(text, committed, len(units))
    return manifest


def _work(job: UnitJob, batches: UnitBatches, num_workers: int, fabric: Fabric) -> Counter[str]:
    """Do a rank's units; returns its drops by reason."""
    units = batches.units
    workers = min(num_workers, len(units))
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=as_made,
        in_order=not workers,  # a batch that ends a unit does not wait for a slower process
        pin_memory=fabric.device.type == "cuda",
    )
    if units:
        job.load(fabric.device)
    drops: Counter[str] = Counter()
    results: defaultdict[str, list[tuple[int, str, Any]]] = defaultdict(list)
    total = sum(unit.count or 0 for unit in units) if all(unit.count is not None for unit in units) else None
    title = job.title if fabric.world_size == 1 else f"{job.title} (1 of {fabric.world_size} processes)"
    with progress_bar(total, title, " pictures", shown=bool(units) and fabric.is_global_zero) as bar:
        for batch in loader:
            if batch.failure is not None:
                raise batch.failure
            if batch.dropped is None:
                keys = [sample.key for sample in batch.samples]
                results[batch.unit] += zip(batch.places, keys, job.compute(batch), strict=True)
                bar.update(len(keys))
                continue
            # Batches of several shapes overlap, so rows come in another order than the source's.
            ordered = sorted(results.pop(batch.unit, []), key=lambda result: result[0])
            rows = [row for *_, row in ordered if not isinstance(row, Drop)]
            dropped = [*batch.dropped, *((key, str(row)) for _, key, row in ordered if isinstance(row, Drop))]
            job.commit(batch.unit, rows, dropped, batch.identity)
            drops.update(reason for _, reason in dropped)
            bar.update(len(batch.dropped))
    return drops


def checked_units(source: Source) -> list[Unit]:
    """The source's units. Raises ValueError for names that cannot be those of files in one directory."""
    units = source.units()
    for name, count in Counter(unit.name for unit in units).items():
        is_file_name = FILE_NAME.fullmatch(name) and len(name.encode()) <= LONGEST_NAME
        if count > 1 or not is_file_name or name in RESERVED_NAMES:
            raise UserError(
                f"a unit of {type(source).__name__} has the name {name!r}, which is taken or not a file name of at "
                f"most {LONGEST_NAME} bytes: rename its file."
            )
    return units


def _look_at_drops(manifest: Mapping[str, Any], source: Source, out: Path) -> None:
    """Say so if most pictures were dropped. Raises UserError if all were."""
    drops = sum((Counter(shard["drops"]) for shard in manifest["shards"]), Counter[str]())
    if drops.total() <= manifest["rows"] > 0:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in drops.most_common()) or "the source has none"
    hint = f" Note that {hint}" if (hint := source.hint(drops)) else ""
    if manifest["rows"]:
        total = drops.total() + manifest["rows"]
        logger.warning("most pictures were dropped: %d of %d (%s).%s", drops.total(), total, reasons, hint)
        return
    # So that the same command tries again; nothing is lost.
    for file in [out / MANIFEST_FILE, *((out / shard["file"]).with_suffix(".json") for shard in manifest["shards"])]:
        file.unlink(missing_ok=True)
    raise UserError(
        f"no picture was kept ({reasons}).{hint} Change that and run the same again; with other options, remove {out} "
        "first."
    )


def make_trainer(accelerator: str, devices: int, num_nodes: int, strategy: str, **options: Any) -> lightning.Trainer:
    """A Trainer that predicts and keeps nothing. Arguments as Lightning's."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= dict.fromkeys(shown, False)
    return lightning.Trainer(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, **options
    )


class RanksTogether:
    """Lets ranks wait for each other for as long as it takes; a rank that ends with an error ends the wait.

    A barrier of the strategy gives up after half an hour, and one rank's units may take longer than those of the
    others. All ranks must create it at about the same time. On one process it does nothing.
    """

    def __init__(self) -> None:
        """Raises OSError when the machines cannot reach each other."""
        self._group: Any = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # Kept until the end: closed at once by one rank, it would break the connecting of a slower one.
            self._first_group = _connected(TO_CONNECT)
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
        """Close the connections."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            distributed.destroy_process_group(self._first_group)


def _connected(timeout: timedelta) -> Any:
    try:
        # gloo's connections end with a process, so a death is noticed at once; NCCL would wait on.
        return distributed.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise SystemRefusedError(
            f"the processes of this job cannot connect to each other ({error}): set GLOO_SOCKET_IFNAME to the name of "
            "the network interface between the machines."
        ) from error
