"""Lightning's checkpoints, each with its Hugging Face directory, and neither ever half written.

    dirpath/last.ckpt   to resume from          dirpath/last/   the same weights, to generate, evaluate and fine-tune
    export_dir/         the weights at the end of training

`last.ckpt` is complete or absent: Lightning 2.6 writes a checkpoint to the system's temporary directory and moves it,
which copies where that is another file system, and it writes sharded ones in place. Here they are written beside their
final name and renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from simplear.language_model import save_checkpoint

PARTIAL = ".partial"


class AtomicCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for any stage, whose files are complete or absent, the last step's among them.

    The state after the last step is saved as ``last.ckpt`` whatever the interval, so that a longer training goes on
    from there.

    Args:
        save_last: keep ``last.ckpt``, from which ``--ckpt_path last`` goes on.
        kwargs: the arguments of ModelCheckpoint.

    Raises:
        ValueError: ``save_last="link"``; a link is replaced in two steps and can be found missing.
    """

    def __init__(self, save_last: bool = True, **kwargs: Any) -> None:
        if save_last not in (True, False):
            raise ValueError(f"save_last {save_last!r} must be true or false: last.ckpt is a file of its own.")
        super().__init__(save_last=save_last, **kwargs)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if 0 <= trainer.max_steps <= trainer.global_step:
            self._save_end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_end(trainer)

    def _save_end(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        final = Path(filepath)
        # One name for all, so that what a killed process leaves behind is overwritten by the next.
        partial = final.with_name(PARTIAL)
        if trainer.is_global_zero and partial.is_dir():
            shutil.rmtree(partial)
        trainer.strategy.barrier("AtomicCheckpoint.begin")
        trainer.save_checkpoint(partial, self.save_weights_only)
        if trainer.is_global_zero:
            _move_into_place(partial, final)
        trainer.strategy.barrier("AtomicCheckpoint.end")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


class HuggingFaceCheckpoint(AtomicCheckpoint):
    """Keeps ``x/``, a checkpoint directory of the language model, beside every ``x.ckpt`` that Lightning keeps.

    The directory is written before its .ckpt and removed after it, so that no .ckpt is without.

    Args:
        export_dir: where the final weights are written at the end of training; None writes them beside ``last.ckpt``
            alone.
        kwargs: the arguments of AtomicCheckpoint and ModelCheckpoint.
    """

    def __init__(self, export_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.export_dir = export_dir
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises TypeError for a module without a language model to export, ValueError for states in ``export_dir``."""
        if not hasattr(pl_module, "checkpoint_settings"):
            raise TypeError(
                f"{type(pl_module).__name__} has no checkpoint_settings(), so there is no language model to export: "
                "use simplear.callbacks.AtomicCheckpoint with it."
            )
        super().setup(trainer, pl_module, stage)
        assert self.dirpath is not None
        states = Path(self.dirpath).absolute()
        if self.export_dir is not None and Path(self.export_dir).absolute() in (states, *states.parents):
            raise ValueError(
                f"dirpath {self.dirpath} lies inside export_dir {self.export_dir}, which is replaced as a whole: "
                "states to resume from would go with it. Put them side by side."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``export_dir``; also when a training that had only this left to do is started again."""
        if self.export_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        missing = trainer.strategy.broadcast(not Path(self.export_dir).exists())
        if missing or self._trained:
            export(pl_module, self.export_dir, trainer.is_global_zero)
            trainer.strategy.barrier("HuggingFaceCheckpoint.export")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        export(trainer.lightning_module, Path(filepath).with_suffix(""), trainer.is_global_zero)
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            shutil.rmtree(Path(filepath).with_suffix(""), ignore_errors=True)


def export(module: Any, directory: str | Path, write: bool) -> None:
    """Write a stage's language model as a checkpoint directory, whole even if it is sharded.

    Leaves the global random generators as they were.

    Args:
        module: has ``language_model``, ``text_tokenizer``, ``checkpoint_settings()`` and ``visual_tokenizer_path``.
        directory: where to; an existing checkpoint is replaced.
        write: whether this rank writes. All ranks must call, for they gather the weights together.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(module.language_model, options=options)
    if not write:
        return
    # Settings name the visual tokenizer's fingerprint, and building one to ask it draws random weights first.
    with isolate_rng():
        save_checkpoint(
            directory,
            module.language_model,
            module.text_tokenizer,
            module.checkpoint_settings(),
            state_dict=weights,
            visual_tokenizer=module.visual_tokenizer_path,
        )


def _move_into_place(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name; the one that had it goes only then."""
    if partial.is_file():
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(final)
        return
    # Sharded state is a directory, which no rename replaces: for a moment there is none of this name.
    replaced = final.with_name(f"{PARTIAL}-replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
