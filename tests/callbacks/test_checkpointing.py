"""Checkpoints and their exports: equal weights, kept and removed together, complete or absent."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from simplear.callbacks import AtomicCheckpoint, HuggingFaceCheckpoint
from simplear.language_model import load_checkpoint
from simplear.visual_tokenizer import load_visual_tokenizer

from .conftest import ToyStage, batches

MakeTrainer = Callable[..., Trainer]


def names(directory: Path) -> tuple[set[str], set[str]]:
    """Stems of the .ckpt files, and names of the directories."""
    paths = list(directory.iterdir())
    return {path.stem for path in paths if path.suffix == ".ckpt"}, {path.name for path in paths if path.is_dir()}


def assert_same_weights(directory: Path, state: Path) -> None:
    """A directory holds the weights of a .ckpt."""
    exported = load_checkpoint(directory).model.state_dict()
    saved = torch.load(state, weights_only=False)["state_dict"]
    assert exported
    for name, weight in exported.items():
        assert torch.equal(weight, saved[f"language_model.{name}"]), name


@pytest.mark.parametrize("tied", [False, True])
def test_every_kept_checkpoint_has_its_export(
    tmp_path: Path, tokenizers: tuple[str, str], make_trainer: MakeTrainer, tied: bool
) -> None:
    torch.manual_seed(0)
    stage = ToyStage(*tokenizers, tie_word_embeddings=tied)
    states = tmp_path / "states"
    callback = HuggingFaceCheckpoint(
        export_dir=str(tmp_path / "model"),
        dirpath=states,
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=2,
        monitor="step",
        mode="max",
    )
    make_trainer(callback, max_steps=7).fit(stage, batches())
    files, directories = names(states)
    assert files == directories == {"step=4", "step=6", "last", "previous"}
    for name in files:
        assert_same_weights(states / name, states / f"{name}.ckpt")
    # The last step is kept although it is no multiple of two.
    assert torch.load(states / "last.ckpt", weights_only=False)["global_step"] == 7
    assert torch.load(states / "previous.ckpt", weights_only=False)["global_step"] == 6
    assert_same_weights(tmp_path / "model", states / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.settings.visual_tokenizer == "visual_tokenizer"
    assert load_visual_tokenizer(str(loaded.visual_tokenizer_path)).fingerprint == (
        loaded.settings.visual_tokenizer_fingerprint
    )


@pytest.mark.parametrize("states", ["sft", "sft/states"])
def test_states_inside_the_export_are_refused(
    tmp_path: Path, stage: ToyStage, make_trainer: MakeTrainer, states: str
) -> None:
    callback = HuggingFaceCheckpoint(export_dir=str(tmp_path / "sft"), dirpath=tmp_path / states)
    with pytest.raises(ValueError, match="lies inside export_dir"):
        make_trainer(callback, max_steps=2).fit(stage, batches(2))
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("moment", ["first", "later"])
def test_killed_while_saving_keeps_the_previous_state(
    tmp_path: Path, stage: ToyStage, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The save dies once half of the file is there; `last.ckpt` is absent or the one before, and training goes on."""
    states = tmp_path / "states"
    die_at = 2 if moment == "first" else 4

    class Killed(BaseException):
        pass

    def half_a_save(trainer: Trainer, path: Path, weights_only: bool | None = None) -> None:
        whole(trainer, path, weights_only)
        if trainer.global_step == die_at:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            raise Killed

    whole = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", half_a_save)
    with pytest.raises(Killed):
        callback = HuggingFaceCheckpoint(dirpath=states, every_n_train_steps=2, save_top_k=0)
        make_trainer(callback, max_steps=8).fit(stage, batches())
    monkeypatch.undo()
    if moment == "first":
        assert not (states / "last.ckpt").exists()
    else:
        assert torch.load(states / "last.ckpt", weights_only=False)["global_step"] == 2
    callback = HuggingFaceCheckpoint(dirpath=states, every_n_train_steps=2, save_top_k=0)
    make_trainer(callback, max_steps=8).fit(stage, batches(), ckpt_path="last")
    assert torch.load(states / "last.ckpt", weights_only=False)["global_step"] == 8
    assert names(states) == ({"last", "previous"}, {"last", "previous"})


def test_a_finished_training_started_again_writes_a_missing_export(
    tmp_path: Path, stage: ToyStage, make_trainer: MakeTrainer
) -> None:
    model, states = tmp_path / "model", tmp_path / "states"

    def fit(max_steps: int) -> ToyStage:
        callback = HuggingFaceCheckpoint(export_dir=str(model), dirpath=states, save_top_k=0)
        make_trainer(callback, max_steps=max_steps).fit(stage, batches(), ckpt_path="last")
        return stage

    fit(3)
    shutil.rmtree(model)
    fit(3)
    assert_same_weights(model, states / "last.ckpt")
    untouched = (model / "config.json").stat().st_mtime_ns
    fit(3)
    assert (model / "config.json").stat().st_mtime_ns == untouched


def test_an_export_of_a_shorter_training_is_replaced(
    tmp_path: Path, stage: ToyStage, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the longer one was killed with nothing left to do but that."""
    model, states = tmp_path / "model", tmp_path / "states"

    class Killed(BaseException):
        pass

    def killed(self: HuggingFaceCheckpoint, *_: object) -> None:
        raise Killed

    def fit(max_steps: int) -> None:
        callback = HuggingFaceCheckpoint(export_dir=str(model), dirpath=states, save_top_k=0)
        make_trainer(callback, max_steps=max_steps).fit(stage, batches(), ckpt_path="last")

    fit(2)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(HuggingFaceCheckpoint, "on_fit_end", killed)
        fit(4)
    fit(4)
    assert torch.load(states / "last.ckpt", weights_only=False)["global_step"] == 4
    assert_same_weights(model, states / "last.ckpt")
    fit(5)
    assert torch.load(states / "last.ckpt", weights_only=False)["global_step"] == 5
    assert_same_weights(model, states / "last.ckpt")


class Validated(BoringModel):
    """With a metric to monitor, which falls and rises with the steps."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("validation/loss", math.cos(self.global_step))
        return super().validation_step(batch, batch_idx)


BY_STEPS: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None}
BEST: dict[str, Any] = {"monitor": "validation/loss", "save_top_k": 2}


LIMITS: list[dict[str, Any]] = [
    {"max_steps": 6, **BY_STEPS},
    {"max_steps": 6, **BY_STEPS, "accumulate_grad_batches": 2},
    {"max_steps": 6, **BY_STEPS, "val_check_interval": 4},
    {"max_steps": 8},
    {"max_steps": 6},
    {"max_steps": 8, "check_val_every_n_epoch": 2},
    {"max_steps": 6, "limit_val_batches": 0},
    {"max_epochs": 2},
]
KEPT: list[dict[str, Any]] = [
    BEST,
    {**BEST, "every_n_train_steps": 2},
    {**BEST, "every_n_train_steps": 3, "save_top_k": -1},
    {**BEST, "every_n_epochs": 2, "mode": "max", "save_top_k": 1},
    {**BEST, "save_on_train_epoch_end": True},
    {"save_top_k": 1, "every_n_epochs": 1, "save_on_train_epoch_end": False},
    {"save_top_k": -1, "every_n_train_steps": 2},
]
PAIRS = [(LIMITS[row], KEPT[(3 * row + n) % len(KEPT)]) for row in range(len(LIMITS)) for n in range(3)]
"""Each limit with three of the settings, and each of these with three limits or more."""


@pytest.mark.parametrize(("limits", "kept"), PAIRS, ids=str)
def test_lightnings_own_callback_keeps_the_same_states(
    tmp_path: Path, make_trainer: MakeTrainer, limits: dict[str, Any], kept: dict[str, Any]
) -> None:
    """Saving the last step costs no other state; and that state is the last one's, and knows which are kept."""
    found = []
    for class_ in (ModelCheckpoint, AtomicCheckpoint):
        seed_everything(0)
        states = tmp_path / class_.__name__
        callback = class_(dirpath=states, save_last=True, **kept)
        make_trainer(callback, **{"limit_train_batches": 4, "limit_val_batches": 1, **limits}).fit(Validated())
        files = names(states)[0] - {"last", "previous"}
        found.append((files, sorted(Path(path).stem for path in callback.best_k_models)))
    assert found[0] == found[1]
    last = torch.load(states / "last.ckpt", weights_only=False)
    (saved,) = last["callbacks"].values()
    assert last["global_step"] == limits.get("max_steps", 8)
    assert saved["best_k_models"] == callback.best_k_models


class StopAt(Callback):
    """Asks the Trainer to stop after an optimizer step, as ``max_time`` does, or a validation, as EarlyStopping."""

    def __init__(self, step: int, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == step))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_steps": 3}, {"max_steps": 10}),
        ({"max_steps": 8}, {"max_steps": 10}),
        ({"max_epochs": 1}, {"max_epochs": 3}),
        ({"max_epochs": 3, "max_steps": 6}, {"max_epochs": 3}),
        ({"max_epochs": 3, "stop": StopAt(6, "on_train_batch_end")}, {"max_epochs": 3}),
        ({"max_epochs": 3, "stop": StopAt(6, "on_validation_end")}, {"max_epochs": 3}),
        ({"max_epochs": 3, "stop": StopAt(4, "on_train_epoch_end")}, {"max_epochs": 3}),
    ],
    ids=[
        "max_steps",
        "at an epoch's end",
        "max_epochs",
        "max_steps, then epochs",
        "max_time",
        "early stopping",
        "after an epoch",
    ],
)
def test_a_training_that_ended_early_goes_on_as_if_it_had_not(
    tmp_path: Path, make_trainer: MakeTrainer, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """As many steps in as many epochs, and the same states kept."""
    found = []
    for runs in ([then], [first, then]):
        states = tmp_path / str(len(runs))
        for number, limits in enumerate(runs):
            seed_everything(0)
            options = {"limit_train_batches": 4, "limit_val_batches": 1, **BY_STEPS, **limits}
            callbacks = [options.pop("stop", Callback()), AtomicCheckpoint(dirpath=states, **BEST)]
            make_trainer(*callbacks, **options).fit(Validated(), ckpt_path="last" if number else None)
        last = torch.load(states / "last.ckpt", weights_only=False)
        progress = last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
        found.append((last["global_step"], last["epoch"], progress, sorted(path.name for path in states.glob("e*"))))
    assert found[0] == found[1]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("interval", [2, 3])
def test_last_stays_last_in_a_directory_that_was_moved_and_with_another_interval(
    tmp_path: Path, make_trainer: MakeTrainer, moved: bool, interval: int
) -> None:
    def fit(directory: Path, steps: int, interval: int, **resume: str) -> AtomicCheckpoint:
        callback = AtomicCheckpoint(dirpath=directory, every_n_train_steps=interval, **BEST)
        options = {"val_check_interval": 1, "limit_train_batches": 4, "max_steps": steps}
        make_trainer(callback, **options).fit(Validated(), **resume)
        return callback

    before, after = tmp_path / "before", tmp_path / ("after" if moved else "before")
    fit(before, 4, 2)
    before.rename(after)
    callback = fit(after, 9, interval, ckpt_path="last")
    kept = {Path(path).stem for path in callback.best_k_models}
    assert len(kept) == 2 and {"last", "previous", *kept} <= names(after)[0]
    assert not any("-v" in name for name in names(after)[0])
    assert torch.load(after / "last.ckpt", weights_only=False)["global_step"] == 9


def test_any_module_has_its_last_step_saved(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    callback = AtomicCheckpoint(dirpath=tmp_path / "states", every_n_train_steps=3, save_top_k=0)
    make_trainer(callback, max_steps=4).fit(BoringModel())
    assert names(tmp_path / "states") == ({"last", "previous"}, set())
    steps = [torch.load(tmp_path / "states" / f"{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert steps == [3, 4]


def test_a_module_without_language_model_is_refused_at_once(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    module: LightningModule = BoringModel()
    with pytest.raises(TypeError, match=r"BoringModel has no checkpoint_settings.*AtomicCheckpoint"):
        make_trainer(HuggingFaceCheckpoint(dirpath=tmp_path), max_steps=1).fit(module)


@pytest.mark.long
def test_sharded_state_is_exported_whole(tmp_path: Path, tokenizers: tuple[str, str]) -> None:
    """Two processes of FSDP2 over gloo export the weights that one process computes."""
    script = Path(__file__).with_name("fit_sharded.py")
    for devices in (1, 2):
        run(script, *tokenizers, tmp_path / str(devices), devices)
    whole, sharded = (load_checkpoint(tmp_path / str(n) / "model").model.state_dict() for n in (1, 2))
    for name, weight in whole.items():
        assert torch.allclose(weight, sharded[name], rtol=0, atol=1e-6), name
    assert names(tmp_path / "2" / "states") == (
        {"last", "previous"},
        {"last", "last.ckpt", "previous", "previous.ckpt"},
    )


def run(script: Path, *arguments: object) -> None:
    import subprocess
    import sys

    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, timeout=300)
