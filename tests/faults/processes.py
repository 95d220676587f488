"""Commands of the project as processes forked from one that has the libraries loaded, on one rank or on several.

A start costs a second in place of eight, so work can be killed often. The ranks find each other as torchrun's do, and
as with torchrun, whoever kills one of them has to see to the others.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["simplear.cli", "simplear.callbacks", "simplear.stages", "simplear.data", "lightning.pytorch.cli"]
)

SLOW_SYNC = 0.01
"""Seconds of an fsync and of a rename, as of a real disk: on one in memory a kill would hardly ever fall into one."""
GRACE = 30.0
"""Seconds that ranks have to end after one that has ended with an error, before they are killed, as by any launcher."""
PATIENCE = 300.0
"""Seconds after which a process counts as hanging; a rendezvous without the first rank takes half an hour."""


@dataclass
class Run:
    """A command at work: its processes, by rank, and what they print."""

    ranks: list[BaseProcess]
    log: Path

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self, rank: int | None = None) -> list[int]:
        """Kill one rank, and the others a little later, or all of them at once; exit codes by rank."""
        if rank is not None:
            self.ranks[rank].kill()
            self.ranks[rank].join()
            time.sleep(0.2)
        for process in self.ranks:
            process.kill()
        return self.wait()

    def wait(self) -> list[int]:
        """Exit codes by rank."""
        while any(process.is_alive() for process in self.ranks):
            for process in self.ranks:
                process.join(0.02)
            if any(process.exitcode for process in self.ranks):
                end = time.monotonic() + GRACE
                for process in self.ranks:
                    process.join(max(0.0, end - time.monotonic()))
                    process.kill()
        return [process.exitcode or 0 for process in self.ranks]

    def printed(self) -> str:
        return self.log.read_text()[-3000:]


def start(arguments: Sequence[str], log: Path, ranks: int = 1, dies_at: int | None = None) -> Run:
    """Begin one `simplear` command; `log` grows by what it prints.

    Args:
        dies_at: the process kills itself after so many fsyncs and renames, whatever the machine's speed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        shared = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "GROUP_RANK": "0", "MASTER_PORT": port}
        shared |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
        environments = [{**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)]
    made = [PROCESSES.Process(target=_work, args=(list(arguments), log, extra, dies_at)) for extra in environments]
    for process in made:
        process.start()
    return Run(list(made), log)


def finish(arguments: Sequence[str], log: Path, ranks: int = 1) -> None:
    """Have one `simplear` command done, from here to its end."""
    run = start(arguments, log, ranks)
    assert run.wait() == [0] * ranks, run.printed()


def logged_steps(root: Path) -> int:
    """Lines in all tables of curves below a directory, in which others come and go: one a logged step."""
    # Not `rglob`, which a directory that vanishes meanwhile stops.
    tables = (Path(directory, "metrics.csv") for directory, _, files in os.walk(root) if "metrics.csv" in files)
    return sum(len(table.read_text().splitlines()) for table in tables)


def _work(arguments: Sequence[str], log: Path, environment: dict[str, str], dies_at: int | None) -> None:
    os.environ.update(environment)
    from simplear.cli import main

    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    numbers = itertools.count(1)

    def sync_slowly(descriptor: int = 0) -> None:
        time.sleep(SLOW_SYNC)
        if next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = sync_slowly
    rename = Path.rename

    def rename_slowly(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        sync_slowly()
        return renamed

    Path.rename = rename_slowly  # type: ignore[method-assign, assignment]
    main(arguments)
