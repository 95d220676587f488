"""Disks that are full, and places that cannot be written: what was there stays, and the message names the place."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from simplear.atomic import writing
from simplear.callbacks import AtomicCheckpoint, HuggingFaceCheckpoint
from simplear.cli import main
from simplear.data import TokenDataModule, TokenShards
from simplear.data.shards import MANIFEST_FILE, TokenRow, claim_directory, is_committed, merge_manifest, write_shard
from simplear.language_model import load_checkpoint, save_checkpoint
from simplear.stages import PretrainModule
from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer, save_visual_tokenizer
from toys import model_config, write_pretraining

from .conftest import ROOM, FullDisk, mounted


def files(directory: Path) -> dict[str, bytes]:
    """Everything there but what fills the disk."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != "filler")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def refusal(place: Path) -> str:
    return rf"{re.escape(str(place))} could not be written \((No space left|File too large).*free space .* run the same"


def test_shards(disk: tuple[Path, FullDisk]) -> None:
    directory, full = disk
    settings = {"visual_tokenizer": "0" * 64, "codebook_size": 9, "downsample": 8}
    rows = [TokenRow("k", np.zeros((64, ROOM // 64), np.uint16), ["x"])]  # two bytes a code: twice the room
    claim_directory(directory, settings)
    write_shard(directory, "small", [TokenRow("k", np.zeros((2, 2), np.uint16), ["x"])])
    before = files(directory)
    with full():
        for _ in range(2):
            with pytest.raises(OSError, match=refusal(directory / "large.arrow")):
                write_shard(directory, "large", rows)
        assert files(directory) == before
        assert is_committed(directory, "small") and not is_committed(directory, "large")
    write_shard(directory, "large", rows)
    merge_manifest(directory, ["small", "large"])
    TokenShards(directory).verify()


def test_a_manifest_keeps_the_one_before(disk: tuple[Path, FullDisk]) -> None:
    directory, full = disk
    claim_directory(directory, {"visual_tokenizer": "0" * 64, "codebook_size": 9, "downsample": 8})
    names = [f"unit-with-a-long-name-{n:050d}" for n in range(2 * ROOM // 200)]
    for name in names:
        write_shard(directory, name, [])
    merge_manifest(directory, names[:1])
    before = files(directory)
    with full(), pytest.raises(OSError, match=refusal(directory / MANIFEST_FILE)):
        merge_manifest(directory, names)
    assert files(directory) == before


def test_checkpoint_directories(disk: tuple[Path, FullDisk], tiny_checkpoint: Path) -> None:
    directory, full = disk
    loaded = load_checkpoint(tiny_checkpoint)
    place = directory / "model"
    save_checkpoint(place, loaded.model, loaded.tokenizer, loaded.settings)
    before = files(directory)
    with full():
        with pytest.raises(OSError, match=refusal(place)):
            save_checkpoint(place, loaded.model, loaded.tokenizer, loaded.settings)
        assert files(directory) == before
    load_checkpoint(place)


def test_visual_tokenizers(disk: tuple[Path, FullDisk]) -> None:
    directory, full = disk
    tokenizer = FSQAutoencoder([3, 3, 3], 8, encoder_channels=16, decoder_channels=16, refine_channels=4)
    place = directory / "tokenizer"
    save_visual_tokenizer(tokenizer, place)
    nn.init.zeros_(tokenizer.decoder[0].weight)
    before = files(directory)
    with full():
        with pytest.raises(OSError, match=refusal(place)):
            save_visual_tokenizer(tokenizer, place)
        assert files(directory) == before
    assert load_visual_tokenizer(place).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("kind", "strategy"), [(AtomicCheckpoint, "auto"), (HuggingFaceCheckpoint, "auto"), (AtomicCheckpoint, "fsdp2")]
)
def test_states(
    disk: tuple[Path, FullDisk],
    tmp_path: Path,
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    tiny_shards: str,
    kind: type[AtomicCheckpoint],
    strategy: str,
) -> None:
    """A training whose disk fills up stops there, and goes on from the last whole state once there is room."""
    directory, full = disk

    def fit(steps: int) -> None:
        torch.manual_seed(0)
        module = PretrainModule(model_config(tiny_text_tokenizer), visual_tokenizer=tiny_visual_tokenizer)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[kind(dirpath=directory / "states", every_n_train_steps=2)],
        )
        data = TokenDataModule(tiny_shards, 4, tiny_text_tokenizer, max_text_tokens=30)
        trainer.fit(module, datamodule=data, ckpt_path="last")

    fit(4)
    before = files(directory)
    largest = "states/last.ckpt/__0_0.distcp" if strategy == "fsdp2" else "states/last.ckpt"
    assert len(before[largest]) > ROOM
    with full():
        with pytest.raises(OSError, match=refusal(directory / "states" / "last.ckpt")):
            fit(6)
        assert files(directory) == before
    fit(6)
    said = "states/last.ckpt/meta.pt" if strategy == "fsdp2" else "states/last.ckpt"
    assert torch.load(directory / said)["global_step"] == 6


def test_what_libraries_wrap_is_seen_through_and_other_errors_are_left_alone() -> None:
    """torch.distributed.checkpoint gathers the errors of ranks into one that only quotes them."""
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    with pytest.raises(OSError, match=r"here could not be written .No space left"), writing("here"):
        raise CheckpointException("save", {1: _wrap_exception(OSError(28, "No space left on device"))})
    for error in (ValueError("28"), FileNotFoundError(2, "no such file", "x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, writing("here"):
            raise error
        assert raised.value is error


@pytest.fixture
def fit(tmp_path: Path, tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str) -> list[str]:
    """A pretraining under ``tmp_path/run``."""
    config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, save_every=2)
    return ["fit", "--config", str(config)]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], steps: list[int]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and steps == []
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each training step."""
    taken: list[int] = []
    step = PretrainModule.training_step
    monkeypatch.setattr(PretrainModule, "training_step", lambda *batch: taken.append(1) or step(*batch))
    return taken


@pytest.mark.parametrize("place", ["states", "model", "."])
def test_a_file_in_the_place_of_a_directory_is_found_before_training(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int], place: str
) -> None:
    in_the_way = tmp_path / "run" / place
    in_the_way.parent.mkdir(exist_ok=True)
    in_the_way.write_text("mine")
    assert str(in_the_way) in refused(fit, capsys, steps)
    assert in_the_way.read_text() == "mine"


@pytest.mark.parametrize("key", ["dirpath", "export_dir"])
def test_a_place_where_nothing_can_be_made_is_found_before_training(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int], key: str
) -> None:
    overlay = tmp_path / "overlay.yaml"
    place = {"dirpath": tmp_path / "run" / "states", "export_dir": tmp_path / "run" / "model", key: "/proc/simplear/x"}
    overlay.write_text(
        "trainer: {callbacks: [{class_path: simplear.callbacks.HuggingFaceCheckpoint, init_args: "
        f"{{dirpath: {place['dirpath']}, export_dir: {place['export_dir']}}}}}]}}"
    )
    printed = refused([*fit, "--config", str(overlay)], capsys, steps)
    assert "cannot be saved in /proc/simplear" in printed and key in printed


def test_a_read_only_disk_is_found_before_training(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    with mounted(directory):
        (directory / "logs").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        logs = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
        printed = refused([*fit, *logs], capsys, steps)
        assert f"states to resume from cannot be saved in {directory}/states (Read-only file system)" in printed
        assert f"Read-only file system: '{directory}" in refused(fit, capsys, steps)


def test_a_visual_tokenizer_that_cannot_be_exported_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").write_text("mine")
    arguments = ["fit", "--model", "VisualTokenizerModule", "--model.tokenizer", "FSQAutoencoder"]
    arguments += ["--model.tokenizer.levels", "[3,3,3]", "--model.tokenizer.downsample", "8"]
    arguments += ["--model.export_dir", str(tmp_path / "tokenizer"), "--data", "ImageDataModule"]
    arguments += ["--data.source", "ScenesSource", "--data.source.count", "4", "--data.source.resolution", "16"]
    arguments += ["--data.global_batch_size", "2", "--data.height", "16", "--data.width", "16"]
    arguments += ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false", "--trainer.max_steps", "1"]
    arguments += ["--trainer.accelerator", "cpu"]
    with pytest.raises(SystemExit):
        main(arguments)
    printed = capsys.readouterr().err
    assert "tokenizer, which is a file: move it, or name another (--model.init_args.export_dir)" in printed
    assert (tmp_path / "tokenizer").read_text() == "mine"
