"""A job that is pre-empted saves its state at the next step boundary, and its exit code says "resume me".

Lightning by itself exits with 0 on SIGTERM and saves nothing; under SLURM it saves in the signal's handler, in the
middle of a step, into a file that from then on takes precedence over ``--ckpt_path``. So this callback installs other
handlers for the whole training: they set a flag, and at the next step boundary all ranks agree, save ``last.ckpt``, and
exit. A step of GRPO is a rollout with its updates. Under SLURM the requeue signal also requeues the job, as Lightning
would; SIGTERM does not, because `scancel` sends it too.

Ctrl-C does the same during training, and a second one stops at once. `simplear fit` adds this callback whenever there
is an `AtomicCheckpoint` with ``save_last``.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from simplear.callbacks.checkpointing import AtomicCheckpoint
from simplear.command_line import STOPPED
from simplear.errors import UserError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RESUME_ME = 75
"""EX_TEMPFAIL of sysexits.h: the same command with ``--ckpt_path last`` resumes."""
STANDARD_ERROR = 2
AFTER_THIS_STEP = b"\nCtrl-C: stopping after this step, with its state saved; once more stops at once\n"


class Preempted(SystemExit):
    """Ends the process with `RESUME_ME`, or after Ctrl-C with `STOPPED`."""


class Preemption(Callback):
    """Stops training at a step boundary when a signal asks for it, with the state saved, and exits with `RESUME_ME`.

    Needs an `AtomicCheckpoint` (or `HuggingFaceCheckpoint`) with ``save_last`` beside it. It reacts to SIGTERM, SIGUSR1
    and, under SLURM, Lightning's requeue signal; one rank that gets it is enough. A training that has done its last
    step ends as always, its export included, with 0.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that this process got, if any."""
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError if nothing would be saved."""
        if stage != "fit":
            return
        if not any(checkpoint.save_last for checkpoint in _checkpoints(trainer)):
            raise UserError(
                "Preemption has no state to leave behind: put simplear.callbacks.HuggingFaceCheckpoint, or "
                "AtomicCheckpoint, with save_last: true beside it."
            )
        # Last, after callbacks that save at this step anyway. A new list: this hook iterates over the old one.
        trainer.callbacks = [*(other for other in trainer.callbacks if other is not self), self]  # type: ignore[attr-defined]
        # Lightning would now set its own, whose broadcast would meet other collectives of the other ranks.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        requeue = _requeue_signal(trainer)
        for number in (*SIGNALS, *([requeue] if requeue else [])):
            self._handlers.setdefault(number, signal.signal(number, self._note))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on Ctrl-C waits for a step, unless it is ignored; before, there is nothing to save."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_interrupt)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._note(number, frame)
        self._restore(signal.SIGINT)
        # Not print, which it may have interrupted.
        rank_zero_only(os.write)(STANDARD_ERROR, AFTER_THIS_STEP)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The requeue signal takes precedence over SIGTERM, which often follows it.
        if self.received is None or self.received == signal.SIGTERM:
            self.received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        stop: Any = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if not stop or 0 <= trainer.max_steps <= trainer.global_step:
            return
        for checkpoint in _checkpoints(trainer):
            checkpoint.save_end(trainer)
        requeue = _requeue_signal(trainer)
        # Ranks on other machines may get the signal a little later, so one rank's is enough.
        asked: Any = trainer.strategy.reduce_boolean_decision(
            requeue is not None and self.received == requeue, all=False
        )
        if asked and trainer.is_global_zero:
            requeue_job()
        self._exit(trainer)

    def _exit(self, trainer: Trainer) -> NoReturn:
        code = STOPPED if self.received == signal.SIGINT else RESUME_ME
        if trainer.is_global_zero:
            name = self.received.name if self.received else "a signal on another rank"
            meaning = "" if code == STOPPED else f"; exit code {code} says resume me"
            logger.warning(
                "%s: the state of step %d is saved%s: --ckpt_path last resumes from it",
                name,
                trainer.global_step,
                meaning,
            )
        # Lightning takes another exit code of a process that it started for a crash, and kills the first process, whose
        # exit code counts.
        started = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        raise Preempted(0 if started and trainer.local_rank > 0 else code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ctrl-C stops at once again."""
        self._restore(signal.SIGINT)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back to the handlers that they had."""
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        self._restore(*self._handlers)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._handlers:
                signal.signal(number, self._handlers.pop(number))


def requeue_job() -> None:
    """Ask SLURM to start this job again. If it refuses, only log an error: the state is saved."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.error("job %s could not be requeued (%s): submit it again", job, getattr(error, "stderr", "") or error)


def _checkpoints(trainer: Trainer) -> list[AtomicCheckpoint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, AtomicCheckpoint)]  # type: ignore[attr-defined]


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """SLURM's signal on which Lightning would requeue the job."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None
