"""Lightning's checkpoints, each with its Hugging Face directory, complete or absent, and always with one before it.

    dirpath/last.ckpt       to resume from          dirpath/last/       the same weights, to generate and fine-tune
    dirpath/previous.ckpt   the state before it     dirpath/previous/   its weights
    export_dir/             the weights at the end of training

Lightning 2.6 builds a checkpoint in memory, writes it to the system's temporary directory and moves it, which copies it
if that is another file system; sharded ones it writes in place. Here they are written once, beside their final name,
and renamed. ``--ckpt_path last`` resumes from the newest whole state: the checksums that PyTorch writes into a file are
compared, which takes one reading of it.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from simplear.atomic import require_replaceable, require_writable, sync, whole_file, writing
from simplear.errors import UserError
from simplear.language_model import merged_model, save_checkpoint
from simplear.stages.averaging import averaged_weights
from simplear.stages.sharding import FSDP2_NAME
from simplear.states import DAMAGED, LIGHTNING_METADATA, SHARDS_METADATA, WEIGHTS, damage
from simplear.visual_tokenizer import copy_visual_tokenizer

logger = logging.getLogger(__name__)

PARTIAL = ".partial.ckpt"
PREVIOUS = "previous"


class StateIO(TorchCheckpointIO):
    """States in one file: written straight to their directory, and refused if they are damaged."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state, complete or not at all. Raises OSError, naming it, if the disk is full."""
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Raises UserError, naming the file, for one that is damaged or cut short, or holds something else."""
        state = Path(path)
        if state.exists() and (reason := damage(state)) is not None:
            raise UserError(DAMAGED.format(path, reason))
        if state.is_dir():
            raise UserError(f"{path} is a state of sharded training: resume it with --trainer.strategy {FSDP2_NAME}.")
        # By itself Lightning unpickles anything from an address on the web.
        loaded = super().load_checkpoint(path, *arguments, **{**options, "weights_only": True})
        if not isinstance(loaded, dict) or not {"pytorch-lightning_version", WEIGHTS} <= loaded.keys():
            raise UserError(f"{path} was not written by a training: it has no {WEIGHTS!r} beside Lightning's version.")
        return loaded


def require_state(named: str, places: Iterable[str]) -> None:
    """Raises UserError, listing the training states there are, if ``--ckpt_path`` does not name one.

    Args:
        named: a path, or "last", which is always fine: there may be none before the first one.
        places: directories to look for states in.
    """
    path = Path(named)
    if (
        named == "last"
        or "://" in named
        or any((path / name).exists() for name in (LIGHTNING_METADATA, SHARDS_METADATA))
    ):
        return
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) in (b"", b"PK"):  # an archive, or a damaged one, which is said when it is loaded
                return
    found = "is not a training state" if path.exists() else "does not exist"
    if (path / "config.json").exists():
        found = "is a checkpoint of a model, which a new training starts from (--model.init_args.checkpoint)"
    states = {str(state) for place in (path, path.parent, *map(Path, places)) for state in place.glob("[!.]*.ckpt")}
    which = "".join(f"{state}, or " for state in sorted(states))
    raise UserError(f"--ckpt_path: {named} {found}. To resume a training, give {which}last for the newest whole one.")


class AtomicCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for any stage, whose files are complete or absent, the last step's among them.

    The state after the last step is saved as ``last.ckpt`` at any interval, so that a longer training resumes from
    it. The state that it replaces stays as ``previous.ckpt``: a damaged ``last.ckpt`` costs one interval.

    Args:
        save_last: keep ``last.ckpt``, from which ``--ckpt_path last`` resumes, and the one before.
        save_top_k: how many further states to keep, as ModelCheckpoint does.
        kwargs: the other arguments of ModelCheckpoint.
    """

    def __init__(self, save_last: bool = True, save_top_k: int = 0, **kwargs: Any) -> None:
        super().__init__(save_last=save_last, save_top_k=save_top_k, **kwargs)
        # With it Lightning writes last-v1.ckpt beside a last.ckpt of a directory that was moved.
        self._enable_version_counter = False
        self._last_is_whole = False
        """Whether this process has written or checked ``last.ckpt``."""
        self._last_state_step = 0
        """Optimizer step of the last state that was saved as ``last.ckpt``; before the first step none is needed."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises OSError, before any training, if states cannot be saved."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StateIO()
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_writable(str(self.dirpath), "states to resume from", "dirpath of the checkpoint callback")

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning asks for ``ckpt_path="last"``: the newest whole state, if there are any.

        Raises UserError if there are some and all are damaged.
        """

        if self.dirpath is None:
            return super()._find_last_checkpoints(trainer)

        def newest(state: Path) -> tuple[bool, int]:
            return state.name.startswith(self.CHECKPOINT_NAME_LAST), state.stat().st_mtime_ns

        damaged: dict[Path, str] = {}
        for state in sorted(Path(self.dirpath).glob("[!.]*.ckpt"), key=newest, reverse=True):
            if (reason := damage(state)) is None:
                self._last_is_whole = not damaged
                for each, why in damaged.items():
                    message = "%s is damaged (%s): resuming from %s, the newest whole state"
                    rank_zero_only(logger.warning)(message, each, why, state)
                return {str(state)}
            damaged[state] = reason
        if damaged:
            found = "; ".join(f"{state.name}: {why}" for state, why in damaged.items())
            raise UserError(
                f"no state in {self.dirpath} is whole ({found}): fetch one from where it was copied, or remove them to "
                "start over."
            )
        return set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_if_ending(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._save_if_ending(trainer)

    def _save_if_ending(self, trainer: Trainer) -> None:
        """Save as soon as no step follows: later, Lightning counts the epoch as done even if it is not."""
        loop: Any = trainer.fit_loop
        epochs = trainer.max_epochs
        stopping = trainer.should_stop and loop._can_stop_early
        ended = epochs is not None and 0 <= epochs <= loop.epoch_progress.current.processed
        if stopping or ended or 0 <= trainer.max_steps <= trainer.global_step:
            self.save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also save here: by `on_train_end`, WeightAveraging has replaced the weights to resume from."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_if_ending(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_end(trainer)

    def save_end(self, trainer: Trainer) -> None:
        """Save the state of this step as the last one, unless that is done; all ranks together, between steps."""
        # If Lightning noted this save, it would not save again for the validation that follows.
        noted, self._last_global_step_saved = self._last_global_step_saved, self._last_state_step
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = noted

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        final = Path(filepath)
        # Always the same name, so that the next save overwrites what a killed process leaves behind.
        partial = final.with_name(PARTIAL)
        if trainer.is_global_zero:
            _remove_both(partial)
        trainer.strategy.barrier("AtomicCheckpoint.begin")
        try:
            with writing(final):
                self._write(trainer, partial)
                if trainer.is_global_zero:
                    for path in (*partial.glob("*"), partial):  # a sharded state is a directory
                        sync(path)
        except BaseException:
            if trainer.is_global_zero:
                _remove_both(partial)
            raise
        is_last = final.name.startswith(self.CHECKPOINT_NAME_LAST)
        if trainer.is_global_zero:
            # A state that may be damaged never replaces a whole one.
            self._give_name(partial, final, keep_previous=is_last and self._last_is_whole)
            sync(final.parent)
        trainer.strategy.barrier("AtomicCheckpoint.end")
        self._last_global_step_saved = trainer.global_step
        if is_last:
            self._last_state_step, self._last_is_whole = trainer.global_step, True
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _write(self, trainer: Trainer, partial: Path) -> None:
        trainer.save_checkpoint(partial, self.save_weights_only)  # ends with a barrier

    def _give_name(self, partial: Path, final: Path, keep_previous: bool) -> None:
        """Name a complete state; the one that had the name becomes the previous one, or is removed."""
        if keep_previous and final.exists():
            previous = final.with_name(PREVIOUS + final.name.removeprefix(self.CHECKPOINT_NAME_LAST))
            _remove(previous)
            final.rename(previous)
        else:
            _remove(final)
        partial.rename(final)


class HuggingFaceCheckpoint(AtomicCheckpoint):
    """Keeps ``x/``, a checkpoint directory of the language model, beside every ``x.ckpt`` that Lightning keeps.

    The directory gets its name before its .ckpt and is removed after it, so that every .ckpt has one.

    Args:
        export_dir: where the final weights are written at the end of training; None only writes them beside
            ``last.ckpt``.
        kwargs: the arguments of AtomicCheckpoint and ModelCheckpoint.
    """

    def __init__(self, export_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.export_dir = export_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises, before any training, TypeError for a module without a language model to export, ValueError for states
        in ``export_dir``, and OSError if one of the two cannot be written.
        """
        if not hasattr(pl_module, "checkpoint_settings"):
            raise TypeError(
                f"{type(pl_module).__name__} has no checkpoint_settings(), so there is no language model to export: "
                "use simplear.callbacks.AtomicCheckpoint with it."
            )
        states = Path(self.dirpath or trainer.default_root_dir).absolute()
        if self.export_dir is not None and Path(self.export_dir).absolute() in (states, *states.parents):
            raise UserError(
                f"dirpath {self.dirpath} lies inside export_dir {self.export_dir}, which is replaced as a whole: "
                "states to resume from would go with it. Put them side by side."
            )
        super().setup(trainer, pl_module, stage)
        if self.export_dir is not None and stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_replaceable(self.export_dir, "the trained model", "export_dir of the checkpoint callback")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``export_dir``, unless it is newer than the last state; also after a training with no step left."""
        if self.export_dir is None or trainer.fast_dev_run or not trainer.global_step:  # type: ignore[attr-defined]
            return
        exported = Path(self.export_dir)
        state = Path(self._last_checkpoint_saved or f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}.ckpt")
        there = exported.exists() and state.exists() and exported.stat().st_mtime_ns > state.stat().st_mtime_ns
        if trainer.strategy.broadcast(not there):
            with averaged_weights(trainer):
                export(pl_module, self.export_dir, trainer.is_global_zero)
            trainer.strategy.barrier("HuggingFaceCheckpoint.export")

    def _write(self, trainer: Trainer, partial: Path) -> None:
        with averaged_weights(trainer):
            export(trainer.lightning_module, partial.with_suffix(""), trainer.is_global_zero)
        super()._write(trainer, partial)

    def _give_name(self, partial: Path, final: Path, keep_previous: bool) -> None:
        super()._give_name(partial.with_suffix(""), final.with_suffix(""), keep_previous)
        super()._give_name(partial, final, keep_previous)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            _remove(Path(filepath).with_suffix(""))


def export(module: Any, directory: str | Path, write: bool) -> None:
    """Write a stage's language model as a checkpoint directory, unsharded and with its adapter merged.

    Restores the global random generators.

    Args:
        module: has ``language_model``, ``text_tokenizer``, ``checkpoint_settings()`` and ``visual_tokenizer_path``, and
            may have ``adapter``.
        directory: where to; an existing checkpoint is replaced.
        write: whether this rank writes. All ranks must call, because they gather the weights together.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, adapter = module.language_model, getattr(module, "adapter", None)
    weights: Any = get_model_state_dict(model, options=options) if adapter is None else None
    if not write:
        return
    # Settings name the visual tokenizer's fingerprint, and building the tokenizer draws random weights.
    carried = module.visual_tokenizer_path
    with isolate_rng():
        save_checkpoint(
            directory,
            model if adapter is None else merged_model(model),
            module.text_tokenizer,
            module.checkpoint_settings(),
            state_dict=weights,
            visual_tokenizer=None if carried is None else functools.partial(copy_visual_tokenizer, carried),
        )


def _remove_both(state: Path) -> None:
    _remove(state)
    _remove(state.with_suffix(""))  # its checkpoint directory


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
