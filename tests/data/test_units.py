"""Units are committed when they are read to their end, and ranks wait for each other for as long as it takes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.utils.data import get_worker_info

from simplear.data import Captioner, Sample, ScenesSource, TokenShards, Unit, recaption, tokenize
from simplear.data.jobs.units import RanksTogether
from simplear.data.sample import Dropped
from simplear.data.shards import is_committed

from .conftest import MeanTokenizer
from .test_recaption import MeanCaptioner

SHORT = timedelta(seconds=1)
PATIENCE = 60.0
"""Seconds after which something counts as never coming."""


class Watching(ScenesSource):
    """Begins a unit when those before it are committed, and in a second loader process when all of the first are."""

    def __init__(self, out: Path) -> None:
        super().__init__(18, 16, rows_per_unit=3)
        self.out = out

    def read(self, unit: Unit, dropped: list[Dropped]) -> Iterator[Sample]:
        worker, names = get_worker_info(), [unit.name for unit in self.units()]
        number = names.index(unit.name)
        before = names[:number] if worker is None else [*names[worker.id : number : 2], *names[::2][: 9 * worker.id]]
        end = time.monotonic() + (PATIENCE if worker else 0)
        while missing := [name for name in before if not is_committed(self.out, name)]:
            if time.monotonic() > end:
                raise ValueError(f"{unit.name} began and {missing} were not committed")
            time.sleep(0.01)
        yield from super().read(unit, dropped)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("work", ["tokenize", "recaption"])
def test_a_unit_is_committed_when_its_last_batch_has_come(tmp_path: Path, work: str, workers: int) -> None:
    """Not when the next unit, or a slower loader process, gives one."""
    options = {"batch_size": 2, "num_workers": workers, "accelerator": "cpu", "out": str(tmp_path)}
    if work == "tokenize":
        tokenize(source=Watching(tmp_path), visual_tokenizer=MeanTokenizer(), **options)
        assert len(TokenShards(tmp_path)) == 18
    else:
        captioner: Captioner = MeanCaptioner()
        recaption(source=Watching(tmp_path), captioner=captioner, **options)
        assert (tmp_path / "manifest.json").exists()


def rank(number: int, last: int, dies: bool, directory: Path) -> None:
    """Ends with 0, or with 4 if it was told that another one has ended."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(directory / "store"), 3)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=3)
    distributed.distributed_c10d._set_pg_timeout(SHORT, distributed.group.WORLD)
    distributed.distributed_c10d._get_default_timeout = lambda backend: SHORT
    ranks = RanksTogether()
    if number == last:
        time.sleep(2.5 * SHORT.total_seconds())
        if dies:
            os._exit(3)
    try:
        ranks.wait()
    except OSError as error:
        os._exit(4 if "another process of this job has ended before its work was done" in str(error) else 5)
    ranks.close()
    os._exit(0)


@pytest.mark.parametrize(("last", "dies"), [(0, False), (2, False), (2, True)])
def test_ranks_wait_longer_than_their_group_would_and_end_with_one_that_dies(
    tmp_path: Path, last: int, dies: bool
) -> None:
    """Whichever is the last, for the first has another part in the wait."""
    # Not forked from here: a lock that one of PyTorch's threads holds meanwhile would stay locked in the child.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simplear.data.jobs.units"])
    processes = [context.Process(target=rank, args=(number, last, dies, tmp_path), daemon=True) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * PATIENCE)
    codes = [process.exitcode for process in processes]
    assert codes == [(3 if number == last else 4) if dies else 0 for number in range(3)]


def test_one_process_waits_for_nobody() -> None:
    ranks = RanksTogether()
    ranks.wait()
    ranks.close()


LATE = """
import sys, time
from datetime import timedelta
sys.path.insert(0, sys.argv[2])
from torch import distributed
from data.conftest import MeanTokenizer
from simplear.data import ScenesSource, tokenize

class Late(ScenesSource):
    def read(self, unit, dropped):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), distributed.group.WORLD)
        if unit.name.endswith("5"):  # of the second rank
            time.sleep(8)
        yield from super().read(unit, dropped)

if __name__ == "__main__":
    source = Late(10, 16, rows_per_unit=5)
    tokenize(
        source=source, visual_tokenizer=MeanTokenizer(), out=sys.argv[1], accelerator="cpu", devices=2,
        strategy="ddp",
    )
"""


@pytest.mark.long
def test_a_rank_may_take_longer_than_the_strategy_waits(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    tests = Path(__file__).parent.parent
    subprocess.run([sys.executable, script, tmp_path / "out", tests], check=True, timeout=300)
    assert len(TokenShards(tmp_path / "out")) == 10
