"""Units of a source in batches, as loader processes make them for a prediction: what tokenizing and recaptioning share.

A batch never reaches over the end of a unit, and the last one of a unit is empty and says what was left out. What stops
the work in a loader process is carried on as a batch too, so that the batches before it, which may end a unit, are
written, and the message is the project's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from simplear.data.shards.drops import Dropped
from simplear.data.sources import Sample, Source, Unit
from simplear.data.sources.base import RESERVED_NAMES
from simplear.errors import UserError

LONGEST_NAME = 150
"""Bytes of a unit's name: file systems allow 255, and files that are being written have longer ones."""


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
