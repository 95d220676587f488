"""Damaged, foreign and half-written checkpoints: refused with the file's name, and never the only one left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simplear.language_model import CheckpointError, load_checkpoint, save_checkpoint

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "simplear.json"])
def test_a_truncated_file_is_named(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    for length in (0, len(content) // 2):
        (checkpoint / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError) as raised:
            load_checkpoint(checkpoint)
        assert name in str(raised.value)
        assert str(checkpoint) in str(raised.value)
        assert "again" in str(raised.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.safetensors", r"model\.safetensors"),
        ("tokenizer.json", r"tokenizer\.json"),
        ("config.json", r"no config\.json"),
        ("simplear.json", r"no simplear\.json"),
    ],
)
def test_a_missing_file_is_named(checkpoint: Path, name: str, message: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, r"simplear\.json has format version 2; this release reads 1: upgrade"),
        ({"format_version": None}, r"simplear\.json has format version None"),
        ({"colour": "red"}, r"simplear\.json .* unknown key: .*colour"),
        ({"generation": {"guidance": 2.0}}, r"simplear\.json .* unknown key: .*guidance"),
        ({"rope": "3d"}, r"simplear\.json has rope '3d': it must be one of 1d, 2d"),
        ({"rope": "2d"}, r"simplear\.json says 2d RoPE, but config\.json has model type qwen2"),
        ({"image_token_offset": 300}, r"simplear\.json says that codes begin at id 300, but .* 307 ids"),
        ({"codebook_size": 28}, r"simplear\.json says 307 text ids and 28 codes, but config\.json a vocabulary of 334"),
    ],
)
def test_settings_that_do_not_fit_are_refused(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    rewrite(checkpoint / "simplear.json", lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_a_missing_setting_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint / "simplear.json", lambda content: content.pop("grid"))
    with pytest.raises(CheckpointError, match=r"simplear\.json is incomplete .*grid"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_are_missing_are_not_made_up(checkpoint: Path, damage: str) -> None:
    """transformers alone would start them at random, with a warning."""
    weights = load_file(checkpoint / "model.safetensors")
    whole = weights.pop(WEIGHT)
    if damage == "shape":
        weights[WEIGHT] = whole[:3].clone()
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*1 are missing.*{WEIGHT}"):
        load_checkpoint(checkpoint)


def test_a_path_that_is_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint("./checkpoints/demo")


def write_again(checkpoint: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save weights of one more over a checkpoint; returns the ones before."""
    loaded = load_checkpoint(checkpoint)
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    changed = {name: weight + 1 for name, weight in before.items()}
    save_checkpoint(checkpoint, loaded.model, loaded.tokenizer, loaded.settings, state_dict=changed, **options)
    return before


@pytest.mark.parametrize("step", ["weights", "tokenizer", "settings"])
def test_an_interrupted_save_leaves_the_previous_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    loaded = load_checkpoint(checkpoint)

    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    if step == "weights":
        monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", killed)
    elif step == "tokenizer":
        monkeypatch.setattr(type(loaded.tokenizer), "save_pretrained", killed)
    else:
        monkeypatch.setattr("simplear.language_model.checkpoint.json.dumps", killed)
    with pytest.raises(Killed):
        write_again(checkpoint)
    monkeypatch.undo()
    after = load_checkpoint(checkpoint).model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in loaded.model.state_dict().items())
    # What was left half written does not stand in the way of the next one.
    before = write_again(checkpoint)
    after = load_checkpoint(checkpoint).model.state_dict()
    assert all(torch.equal(weight + 1, after[name]) for name, weight in before.items())
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_replaced_checkpoint_keeps_no_file_of_the_one_before(checkpoint: Path) -> None:
    (checkpoint / "visual_tokenizer").mkdir()
    write_again(checkpoint)
    assert not (checkpoint / "visual_tokenizer").exists()
