"""Damaged, foreign and half-written checkpoints: refused with the file's name, and never the only one left."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simplear.language_model import CheckpointError, load_checkpoint, save_checkpoint
from simplear.visual_tokenizer import load_visual_tokenizer

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
        ({"colour": "red"}, r"simplear\.json: .*colour"),
        ({"generation": {"guidance": 2.0}}, r"simplear\.json: .*guidance"),
        ({"rope": "3d"}, r"simplear\.json: .*rope.*'1d', '2d'.* 3d"),
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
    with pytest.raises(CheckpointError, match=r"simplear\.json: .*required: .*grid"):
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


def padded(checkpoint: Path, multiple: int) -> int:
    """Save a checkpoint as transformers does with padded embeddings; returns the rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(model.config.vocab_size, pad_to_multiple_of=multiple)
    model.save_pretrained(checkpoint)
    return model.config.vocab_size


@pytest.mark.parametrize("multiple", [8, 64, 128, 512])
@pytest.mark.parametrize("released", [False, True])
def test_a_padded_vocabulary_is_what_it_was_before(
    checkpoint: Path, multiple: int, released: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_checkpoint(checkpoint)
    used = before.model.layout.vocab_size
    rows = padded(checkpoint, multiple)
    if released:
        monkeypatch.setattr("simplear.language_model.checkpoint.RELEASED_CODEBOOK", before.settings.codebook_size)
        (checkpoint / "simplear.json").unlink()
        rewrite(checkpoint / "config.json", lambda content: content.update(architectures=["SimpARForCausalLM"]))
    with caplog.at_level(logging.INFO):
        after = load_checkpoint(checkpoint)
    assert rows % multiple == 0 and rows > used == after.model.decoder.config.vocab_size
    assert f"{rows - used} padding rows" in caplog.text
    weights = before.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in after.model.state_dict().items())
    assert load_checkpoint(checkpoint, with_weights=False).model.decoder.config.vocab_size == used


def test_rows_that_no_padding_explains_are_of_another_checkpoint(checkpoint: Path) -> None:
    used = load_checkpoint(checkpoint).model.layout.vocab_size
    for rows in (used + 1, used - 1, 2 * used, 640, None, "384"):
        rewrite(checkpoint / "config.json", lambda content, rows=rows: content.update(vocab_size=rows))
        with pytest.raises(CheckpointError, match=f"a vocabulary of {rows}: the files come from different checkpoints"):
            load_checkpoint(checkpoint)


def as_pickle(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def add_a_token(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_pickle, r"no weights .*Pickles .*Convert one .*save_pretrained"),
        (lambda d: rewrite(d / "config.json", lambda c: c.update(quantization_config={"bits": 4})), "is quantized"),
        (lambda d: rewrite(d / "config.json", lambda c: c.update(hidden_size="many")), r"config\.json.*hidden_size"),
        (lambda d: rewrite(d / "config.json", lambda c: c.update(hidden_act="none")), r"config\.json"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json does not hold a JSON object"),
        (lambda d: (d / "simplear.json").write_bytes(b"\xff\xfe{\0}\0"), r"simplear\.json is not UTF-8"),
        (lambda d: rewrite(d / "simplear.json", lambda c: c.update(grid=["x", 2])), r"simplear\.json: .*grid"),
        (
            lambda d: rewrite(d / "simplear.json", lambda c: c.update(codebook_size=-27)),
            r"simplear\.json says 307 text ids and -27 codes|must be above 0",
        ),
        (
            lambda d: rewrite(d / "simplear.json", lambda c: c.update(downsample=0)),
            "downsample, max_text_tokens and grid must be above 0",
        ),
        (lambda d: rewrite(d / "simplear.json", lambda c: c["generation"].update(top_k="x")), "generation.top_k"),
        (add_a_token, r"codes begin at id 307, .* has 308 ids, the last being '<pad>': .*Copy tokenizer\.json"),
    ],
)
def test_what_others_made_of_a_checkpoint_is_named(
    checkpoint: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(checkpoint)
    assert str(checkpoint) in str(raised.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("run/states/last.ckpt", "a training state: name run/states/last, the checkpoint directory .* beside it"),
        ("run/states/sharded.ckpt", "a training state: name run/states/sharded, the checkpoint directory"),
        ("run/model/model.safetensors", r"a file of weights: name the directory that it lies in \(.*/run/model\)"),
        ("run/model/config.json", r"a file: name the directory that it lies in"),
        ("visual_tokenizer", r"a visual tokenizer \(--visual-tokenizer\)"),
        ("text_tokenizer", "not a checkpoint directory but a text tokenizer"),
        ("shards", "not a checkpoint directory but token shards"),
        ("run", "a directory of models: name one of run/model"),
        ("run/states", "a directory of models: name one of run/states/last, run/states/previous"),
        ("empty", "not a checkpoint directory but a directory of something else"),
        ("adapter", "not a checkpoint directory but an adapter .*: merge it"),
        ("nowhere", r"no checkpoint at nowhere: there is no directory /.*/nowhere"),
        ("checkpoints/demo", r"no checkpoint at checkpoints/demo: there is no directory /.*/checkpoints/demo\. Train"),
        ("states/last.ckpt", r"no checkpoint at states/last\.ckpt: there is no directory"),
        ("someone/model", r"no directory /.*/someone/model, and someone/model could not be had from the hub"),
    ],
)
def test_what_was_named_in_place_of_a_checkpoint_is_said(
    path: str, message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it is there, in words that name what to give instead, and without asking the hub about paths."""
    asked: list[str] = []

    def refuse(name: str, **options: Any) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("simplear.language_model.checkpoint.snapshot_download", refuse)
    for name in ("run", "visual_tokenizer", "text_tokenizer", "shards"):
        shutil.copytree(trained / name, tmp_path / name)
    (tmp_path / "run" / "states" / "sharded.ckpt").mkdir()
    (tmp_path / "run" / "states" / "sharded.ckpt" / ".metadata").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    assert asked == (["someone/model"] if path.startswith("someone") else [])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("run/model", r"run/model is a checkpoint \(its visual tokenizer is run/model/visual_tokenizer\)"),
        ("text_tokenizer", r"config\.json is missing, so text_tokenizer is not a visual tokenizer; it is a text"),
        ("checkpoints/demo/visual_tokenizer", r"it is missing \(looked for /.*/checkpoints/demo/visual_tokenizer\)"),
        ("checkpoints/visual", r"it is missing \(looked for /.*/checkpoints/visual\)"),
        ("someone/tokenizer", r"no directory /.*/someone/tokenizer, and someone/tokenizer could not be had from"),
    ],
)
def test_what_was_named_in_place_of_a_visual_tokenizer_is_said(
    path: str, message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "text_tokenizer"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_visual_tokenizer(path)


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
