"""Lightning's checkpoints, each with its Hugging Face directory, never half written, and never only one.

    dirpath/last.ckpt       to resume from          dirpath/last/       the same weights, to generate and fine-tune
    dirpath/previous.ckpt   the state before it     dirpath/previous/   its weights
    export_dir/             the weights at the end of training

Lightning 2.6 builds a checkpoint in memory, writes it to the system's temporary directory and moves it, which copies
where that is another file system; sharded ones it writes in place. Here they are written once, beside their final
name, and renamed. ``--ckpt_path last`` goes on from the newest state that is whole: the checksums that PyTorch writes
into a file are compared, which takes one reading of it.
"""

from __future__ import annotations

import functools
import logging
import os
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
from simplear.stages.sharding import FSDP2, FSDP2_NAME
from simplear.states import DAMAGED, LIGHTNING_METADATA, SHARDS_METADATA, WEIGHTS, damage
from simplear.visual_tokenizer import copy_visual_tokenizer

logger = logging.getLogger(__name__)

PARTIAL = ".partial.ckpt"
PREVIOUS = "previous"


class StateIO(TorchCheckpointIO):
    """States in one file: written straight to their directory, and refused when they are not what was written.

    Args:
        whole: states that are known to be whole; grows.
    """

    def __init__(self, whole: set[Path]) -> None:
        self.whole = whole

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state, complete or not at all. Raises OSError, naming it, when the disk takes no more."""
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Raises UserError, naming the file, for one that is damaged or cut short, or holds something else."""
        state = Path(path).absolute()
        if state.exists() and state not in self.whole:
            if (reason := damage(state)) is not None:
                raise UserError(DAMAGED.format(path, reason))
            self.whole.add(state)
        if state.is_dir():
            raise UserError(
                f"{path} is a state of sharded training: go on with it under --trainer.strategy {FSDP2_NAME}."
            )
        # Lightning would unpickle anything from an address on the web.
        loaded = super().load_checkpoint(path, *arguments, **{**options, "weights_only": True})
        if not isinstance(loaded, dict) or not {"pytorch-lightning_version", WEIGHTS} <= loaded.keys():
            raise UserError(f"{path} was not written by a training: it has no {WEIGHTS!r} beside Lightning's version.")
        return loaded


def require_state(named: str, places: Iterable[str]) -> None:
    """Raises UserError where ``--ckpt_path`` names what is not a training state: what is there, and which states are.

    Args:
        named: a path, or one of Lightning's words: "last" is always fine, and means none before the first one.
        places: directories to look for states in.
    """
    path = Path(named)
    sharded = any((path / name).exists() for name in (LIGHTNING_METADATA, SHARDS_METADATA))
    if named == "last" or "://" in named or sharded or (path.is_file() and _begins_as_archive(path)):
        return
    if (path / "config.json").exists():
        found = f"{named} is a checkpoint of a model, which a new training starts from (--model.init_args.checkpoint)"
    elif path.exists():
        found = f"{named!r} is a {'directory' if path.is_dir() else 'file'}, but not a training state"
    else:
        found = f"there is no training state {named!r}"
    directories = {path.parent, path, *map(Path, places)} if path.is_dir() else set(map(Path, places))
    states = sorted({str(state) for directory in directories for state in directory.glob("[!.]*.ckpt")})
    which = f"one of {', '.join(states)}, or" if states else "its path, or"
    raise UserError(f"--ckpt_path: {found}. To go on with a training, give {which} last for the newest that is whole.")


def _begins_as_archive(file: Path) -> bool:
    """Whether a file may be a state, perhaps a damaged one: empty, or with the first bytes of a zip archive."""
    with file.open("rb") as opened:
        return opened.read(2) in (b"", b"PK")


class AtomicCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint for any stage, whose files are complete or absent, the last step's among them.

    The state after the last step is saved as ``last.ckpt`` whatever the interval, so that a longer training goes on
    from there. The state that it replaces stays as ``previous.ckpt``; a damaged ``last.ckpt`` costs one interval.

    Args:
        save_last: keep ``last.ckpt``, from which ``--ckpt_path last`` goes on, and the one before.
        save_top_k: how many further states to keep, as ModelCheckpoint does.
        kwargs: the other arguments of ModelCheckpoint.

    Raises:
        ValueError: ``save_last="link"``; a link is replaced in two steps and can be found missing.
    """

    def __init__(self, save_last: bool = True, save_top_k: int = 0, **kwargs: Any) -> None:
        if save_last not in (True, False):
            raise UserError(f"save_last {save_last!r} must be true or false: last.ckpt is a file of its own.")
        super().__init__(save_last=save_last, save_top_k=save_top_k, **kwargs)
        self._whole: set[Path] = set()
        """States that this process has written or checked."""
        self._last_state_step = 0
        """Optimizer step of the last state that was saved as ``last.ckpt``; before the first step none is needed."""
        self._has_trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises OSError, before any training, when states cannot be saved."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StateIO(self._whole)
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.whole = self._whole
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_places()

    def _check_places(self) -> None:
        assert self.dirpath is not None
        require_writable(self.dirpath, "states to resume from", "dirpath of the checkpoint callback")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the directory of the state, also after it was moved, and with another interval.

        Lightning by itself would then write ``last-v1.ckpt`` beside a ``last.ckpt`` that stays what it was.
        """
        assert self.dirpath is not None
        if Path(trainer.ckpt_path or "").absolute().parent.resolve() != Path(self.dirpath).resolve():
            return
        states: dict[str, Any] = checkpoint["callbacks"]
        name = type(self).__qualname__
        alike = [key for key in states if key.startswith(name) and states[key].get("monitor") == self.monitor]
        for key in [key for key in (self.state_key, *alike) if key in states][:1]:
            states[self.state_key] = _moved(states[key], str(self.dirpath))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning asks for ``ckpt_path="last"``: the newest state that is whole, if there are any.

        Raises ValueError when there are some and all are damaged.
        """
        states = {Path(path) for path in super()._find_last_checkpoints(trainer)}
        directories = {state.parent for state in states} | ({Path(self.dirpath)} if self.dirpath else set())
        older = {state for directory in directories for state in directory.glob("[!.]*.ckpt")} - states
        reasons: dict[Path, str] = {}
        for state in [*_newest_first(states), *_newest_first(older)]:
            if (reason := damage(state)) is None:
                self._whole.add(state)
                for damaged, why in reasons.items():
                    _warn("%s is damaged (%s): going on from %s, the newest state that is whole", damaged, why, state)
                return {str(state)}
            reasons[state] = reason
        if reasons:
            found = "; ".join(f"{state.name}: {why}" for state, why in reasons.items())
            raise UserError(
                f"no state in {state.parent} is whole ({found}): fetch one from where it was copied, or remove them to "
                "begin anew."
            )
        return set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._has_trained = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._save_if_ending(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._save_if_ending(trainer)

    def _save_if_ending(self, trainer: Trainer) -> None:
        """Save once it is known that no step follows: later on Lightning counts the epoch as done, wherever it is."""
        loop: Any = trainer.fit_loop
        epochs = trainer.max_epochs
        stopping = trainer.should_stop and loop._can_stop_early
        ended = epochs is not None and 0 <= epochs <= loop.epoch_progress.current.processed
        if stopping or ended or 0 <= trainer.max_steps <= trainer.global_step:
            self.save_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also after the last epoch: by `on_train_end` WeightAveraging has replaced the weights to go on from."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_if_ending(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where there was nothing to train."""
        if not self._has_trained and trainer.is_global_zero:
            limits = ("max_steps", "max_epochs", "limit_train_batches")
            logger.info(
                "nothing to train: optimizer step %d is reached with %s. Raise the limit to train longer.",
                trainer.global_step,
                ", ".join(f"--trainer.{name} {getattr(trainer, name)}" for name in limits),
            )

    def save_end(self, trainer: Trainer) -> None:
        """Save the state of this step as the last one, unless it has been; all ranks together, between steps."""
        # What Lightning notes as saved at this step it does not save again for the validation that follows.
        noted, self._last_global_step_saved = self._last_global_step_saved, self._last_state_step
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = noted

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        final = Path(filepath)
        # One name for all, so that what a killed process leaves behind is overwritten by the next.
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
        trainer.strategy.barrier("AtomicCheckpoint.written")
        is_last = final.name.startswith(self.CHECKPOINT_NAME_LAST)
        if trainer.is_global_zero:
            # What might be damaged never takes the place of a state that is whole.
            self._give_name(partial, final, keep_previous=is_last and final in self._whole)
            self._whole.add(final)
            sync(final.parent)
        trainer.strategy.barrier("AtomicCheckpoint.end")
        self._last_global_step_saved = trainer.global_step
        self._last_state_step = trainer.global_step if is_last else self._last_state_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _write(self, trainer: Trainer, partial: Path) -> None:
        trainer.save_checkpoint(partial, self.save_weights_only)

    def _give_name(self, partial: Path, final: Path, keep_previous: bool) -> None:
        """Name a complete state; the one that had the name becomes the previous one, or goes."""
        if keep_previous and final.exists():
            previous = final.with_name(PREVIOUS + final.name.removeprefix(self.CHECKPOINT_NAME_LAST))
            _remove(previous)
            final.rename(previous)
        else:
            _remove(final)
        partial.rename(final)


class HuggingFaceCheckpoint(AtomicCheckpoint):
    """Keeps ``x/``, a checkpoint directory of the language model, beside every ``x.ckpt`` that Lightning keeps.

    The directory gets its name before its .ckpt and is removed after it, so that no .ckpt is without.

    Args:
        export_dir: where the final weights are written at the end of training; None writes them beside ``last.ckpt``
            alone.
        kwargs: the arguments of AtomicCheckpoint and ModelCheckpoint.
    """

    def __init__(self, export_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.export_dir = export_dir

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises, before any training, TypeError for a module without a language model to export, ValueError for states
        in ``export_dir``, and OSError when one of the two cannot be written.
        """
        if not hasattr(pl_module, "checkpoint_settings"):
            raise TypeError(
                f"{type(pl_module).__name__} has no checkpoint_settings(), so there is no language model to export: "
                "use simplear.callbacks.AtomicCheckpoint with it."
            )
        super().setup(trainer, pl_module, stage)

    def _check_places(self) -> None:
        assert self.dirpath is not None
        states = Path(self.dirpath).absolute()
        if self.export_dir is not None and Path(self.export_dir).absolute() in (states, *states.parents):
            raise UserError(
                f"dirpath {self.dirpath} lies inside export_dir {self.export_dir}, which is replaced as a whole: "
                "states to resume from would go with it. Put them side by side."
            )
        super()._check_places()
        if self.export_dir is not None:
            require_replaceable(self.export_dir, "the trained model", "export_dir of the checkpoint callback")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``export_dir``; also when a training that had only this left to do is started again."""
        super().on_fit_end(trainer, pl_module)
        if self.export_dir is None or trainer.fast_dev_run or not trainer.global_step:  # type: ignore[attr-defined]
            return
        if trainer.strategy.broadcast(not self._is_exported()):
            with averaged_weights(trainer):
                export(pl_module, self.export_dir, trainer.is_global_zero)
            trainer.strategy.barrier("HuggingFaceCheckpoint.export")

    def _is_exported(self) -> bool:
        """Whether ``export_dir`` is of the last state: what is older is a shorter training's."""
        assert self.export_dir is not None
        exported = Path(self.export_dir)
        state = Path(self._last_checkpoint_saved or f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}.ckpt")
        if not exported.exists() or not state.exists():
            return False
        return exported.stat().st_mtime_ns > state.stat().st_mtime_ns

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
    """Write a stage's language model as a checkpoint directory, whole even if it is sharded, with its adapter merged.

    Leaves the global random generators as they were.

    Args:
        module: has ``language_model``, ``text_tokenizer``, ``checkpoint_settings()`` and ``visual_tokenizer_path``, and
            may have ``adapter``.
        directory: where to; an existing checkpoint is replaced.
        write: whether this rank writes. All ranks must call, for they gather the weights together.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, adapter = module.language_model, getattr(module, "adapter", None)
    weights: Any = get_model_state_dict(model, options=options) if adapter is None else None
    if not write:
        return
    # Settings name the visual tokenizer's fingerprint, and building one to ask it draws random weights first.
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


def _moved(state: dict[str, Any], directory: str) -> dict[str, Any]:
    """The state of a ModelCheckpoint whose directory has become another."""

    def moved(path: str) -> str:
        return path and os.path.join(directory, os.path.relpath(path, state["dirpath"]))

    paths = {key: moved(value) for key, value in state.items() if key.endswith("_path")}
    best = {moved(path): score for path, score in state["best_k_models"].items()}
    return {**state, **paths, "best_k_models": best, "dirpath": directory}


@rank_zero_only
def _warn(message: str, *arguments: Any) -> None:
    logger.warning(message, *arguments)


def _newest_first(states: Iterable[Path]) -> list[Path]:
    return sorted(states, key=lambda state: (state.stat().st_mtime_ns, state.name), reverse=True)


def _remove_both(state: Path) -> None:
    _remove(state)
    _remove(state.with_suffix(""))  # its checkpoint directory


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
