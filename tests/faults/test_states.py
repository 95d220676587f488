"""Training states that are damaged or of another model: the newest whole one is taken, or the file is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from simplear import demo
from simplear.callbacks import HuggingFaceCheckpoint
from simplear.cli import main
from simplear.language_model import load_checkpoint
from simplear.states import damage
from toys import write_pretraining, write_sft, write_visual_tokenizer_training


@pytest.fixture
def make_config(
    tiny_text_tokenizer: str, tiny_visual_tokenizer: str, tiny_shards: str, tiny_checkpoint: Path
) -> Callable[[str, Path], Path]:
    """Configuration of a stage that saves a state every other step and writes to ``directory/run``."""

    def make(stage: str, directory: Path) -> Path:
        if stage == "visual_tokenizer":
            return write_visual_tokenizer_training(directory, save_every=2)
        if stage == "sft":
            return write_sft(directory, str(tiny_checkpoint), tiny_visual_tokenizer, tiny_shards, save_every=2)
        return write_pretraining(directory, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards, save_every=2)

    return make


def fit(config: Path, steps: int, root: Path, *options: str) -> None:
    main(
        [
            "fit",
            "--config",
            str(config),
            "--trainer.max_steps",
            f"{steps}",
            "--trainer.default_root_dir",
            str(root),
            *options,
        ]
    )


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "states" / "last.ckpt", weights_only=True)["state_dict"]


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("stage", "harm"), [("visual_tokenizer", cut), ("pretrain", cut), ("pretrain", flip), ("sft", empty)]
)
def test_a_damaged_last_state_gives_way_to_the_one_before(
    make_config: Callable[[str, Path], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    harm: Callable[[Path], None],
) -> None:
    config, whole, broken = make_config(stage, tmp_path), tmp_path / "whole", tmp_path / "broken"
    fit(config, 7, whole)
    fit(config, 5, broken)
    last, previous = broken / "states" / "last.ckpt", broken / "states" / "previous.ckpt"
    assert [torch.load(state)["global_step"] for state in (previous, last)] == [4, 5]
    harm(last)
    fit(config, 7, broken, "--ckpt_path", "last")
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert str(last) in line and f"resuming from {previous}" in line
    one, other = weights(whole), weights(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # The damaged state never took the place of the whole one.
    assert [torch.load(state)["global_step"] for state in (previous, last)] == [6, 7]


@pytest.mark.parametrize("resume", ["last", "previous"])
def test_a_state_saved_over_a_damaged_one_spares_the_one_before(
    make_config: Callable[[str, Path], Path], tmp_path: Path, resume: str
) -> None:
    """With one save after resuming, by word or by path, the state that was resumed from is there with its weights."""
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"
    fit(config, 4, root)
    cut(root / "states" / "last.ckpt")
    fit(config, 4, root, "--ckpt_path", "last" if resume == "last" else str(root / "states" / "previous.ckpt"))
    states = root / "states"
    assert [torch.load(states / f"{name}.ckpt")["global_step"] for name in ("previous", "last")] == [2, 4]
    for name in ("previous", "last"):
        exported = load_checkpoint(states / name).model.state_dict()
        saved = torch.load(states / f"{name}.ckpt")["state_dict"]
        assert all(torch.equal(weight, saved[f"language_model.{key}"]) for key, weight in exported.items())


def test_without_a_whole_state_nothing_is_trained(
    make_config: Callable[[str, Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"
    fit(config, 4, root)
    for name in ("last", "previous"):
        cut(root / "states" / f"{name}.ckpt")
    before = {path: path.stat().st_mtime_ns for path in (root / "states").iterdir()}
    with pytest.raises(SystemExit):
        fit(config, 6, root, "--ckpt_path", "last")
    printed = capsys.readouterr().err
    assert f"no state in {root / 'states'} is whole" in printed and "last.ckpt: " in printed
    assert "start over" in printed and "Traceback" not in printed
    assert {path: path.stat().st_mtime_ns for path in (root / "states").iterdir()} == before


@pytest.mark.parametrize("damaged", ["cut", "flipped"])
def test_a_damaged_state_that_is_named_is_refused(
    make_config: Callable[[str, Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    """Whoever names a file wants that one. PyTorch would load a flipped bit without a word."""
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"
    fit(config, 2, root)
    state = root / "states" / "last.ckpt"
    if damaged == "cut":
        cut(state)
    else:
        flip_a_weight(state)
        torch.load(state)
    with pytest.raises(SystemExit):
        fit(config, 4, root, "--ckpt_path", str(state))
    printed = capsys.readouterr().err
    assert f"{state} is damaged" in printed and "--ckpt_path last" in printed and "Traceback" not in printed


def flip_a_weight(state: Path) -> None:
    content = bytearray(state.read_bytes())
    weight = torch.load(state)["state_dict"]["language_model.decoder.model.norm.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    state.write_bytes(content)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(300.0)}, "global_step": 1}, whole)
    assert damage(whole) is None
    content, cut_short = whole.read_bytes(), tmp_path / "cut.ckpt"
    for length in range(0, len(content), 7):
        cut_short.write_bytes(content[:length])
        assert damage(cut_short) is not None


def test_names_go_before_times_which_copying_changes(make_config: Callable[[str, Path], Path], tmp_path: Path) -> None:
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"
    fit(config, 4, root)
    os.utime(root / "states" / "previous.ckpt")
    fit(config, 5, root, "--ckpt_path", "last")
    assert torch.load(root / "states" / "previous.ckpt")["global_step"] == 4


def test_a_kill_between_the_two_names_leaves_the_one_before(
    make_config: Callable[[str, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment in which last.ckpt has become previous.ckpt and the new one has no name yet."""
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"

    class Killed(BaseException):
        pass

    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".partial.ckpt" and (root / "states" / "previous.ckpt").exists():
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        fit(config, 6, root)
    monkeypatch.undo()
    assert not (root / "states" / "last.ckpt").exists()
    fit(config, 6, root, "--ckpt_path", "last")
    fit(config, 6, tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(root)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("trained", "options", "weight"),
    [
        ("pretrain", ["--model.language_model.architecture.intermediate_size", "48"], "mlp.down_proj.weight: (16, 24)"),
        ("pretrain", ["--model.language_model.codebook_size", "64"], "decoder.lm_head.weight: (334, 16)"),
        ("visual_tokenizer", [], "decoder.lm_head.weight: absent there"),
    ],
)
def test_a_state_of_another_model_is_refused_by_name(
    make_config: Callable[[str, Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: str,
    options: list[str],
    weight: str,
) -> None:
    state = tmp_path / "run" / "states" / "last.ckpt"
    fit(make_config(trained, tmp_path), 2, tmp_path / "run")
    before = state.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        fit(make_config("pretrain", tmp_path), 4, tmp_path / "run", "--ckpt_path", "last", *options)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    assert f"{state} is the state of another model" in printed and weight in printed
    assert "start again" in printed and len(printed) < 1000
    assert state.read_bytes() == before


def test_the_demo_goes_on_from_the_state_before(
    make_config: Callable[[str, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when it was killed between the two names, so that there is no last.ckpt at all."""
    config, root = make_config("pretrain", tmp_path), tmp_path / "run"
    step = demo.Step("x", f"fit --config {config} --ckpt_path last", root / "model", 1)
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STEPS", (step,))
    monkeypatch.setattr(demo, "markdown_table", lambda report: "")
    monkeypatch.setattr(demo, "read_report", lambda file: {})
    fit(config, 6, tmp_path / "whole")
    fit(config, 4, root)
    for damaged in (True, False):
        shutil.rmtree(root / "model")
        (cut if damaged else Path.unlink)(root / "states" / "last.ckpt")
        caplog.clear()
        demo.demo()
        assert ("resuming from" in caplog.text) == damaged
        one, other = weights(tmp_path / "whole"), weights(root)
        assert all(torch.equal(one[name], other[name]) for name in one)


def content(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.glob("*.distcp")}


def test_a_damaged_sharded_state_gives_way_to_the_one_before(
    make_config: Callable[[str, Path], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shard file that is missing or cut, by word and by name; with no whole state left, nothing is trained."""
    config, whole, broken = make_config("pretrain", tmp_path), tmp_path / "whole", tmp_path / "broken"
    sharded = ("--trainer.strategy", "fsdp2")
    fit(config, 7, whole, *sharded)
    fit(config, 5, broken, *sharded)
    last, previous = (broken / "states" / f"{name}.ckpt" for name in ("last", "previous"))
    assert [torch.load(state / "meta.pt")["global_step"] for state in (previous, last)] == [4, 5]
    for harm in (cut, Path.unlink):
        harm(last / "__0_0.distcp")
        with pytest.raises(SystemExit):
            fit(config, 7, broken, *sharded, "--ckpt_path", str(last))
        assert f"{last} is damaged" in capsys.readouterr().err
    fit(config, 7, broken, *sharded, "--ckpt_path", "last")
    (line,) = [record.getMessage() for record in caplog.records if "resuming from" in record.getMessage()]
    assert f"{last} is damaged" in line and "__0_0.distcp" in line and f"resuming from {previous}" in line
    assert content(last) == content(whole / "states" / "last.ckpt") and len(content(last)) == 1
    assert [torch.load(state / "meta.pt")["global_step"] for state in (previous, last)] == [6, 7]

    cut(previous / "__0_0.distcp")
    (last / ".metadata").unlink()
    with pytest.raises(SystemExit):
        fit(config, 9, broken, *sharded, "--ckpt_path", "last")
    printed = capsys.readouterr().err
    assert f"no state in {broken / 'states'} is whole" in printed and "Traceback" not in printed


def test_sharded_states_are_checked_too(tmp_path: Path) -> None:
    """As FSDP2 writes them: a directory of archives, their places in ``.metadata``, progress in ``meta.pt``."""
    from torch.distributed.checkpoint import save

    for name, step in (("previous", 2), ("last", 4)):
        state = tmp_path / f"{name}.ckpt"
        save({"state_dict": {"a": torch.randn(50, 50), "b": torch.randn(3)}}, checkpoint_id=state, no_dist=True)
        torch.save({"global_step": step}, state / "meta.pt")
    callback, trainer = HuggingFaceCheckpoint(dirpath=tmp_path), Trainer(accelerator="cpu", logger=False)
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert callback._find_last_checkpoints(trainer) == {str(last)}
    names = sorted(path.name for path in last.iterdir())
    assert names == [".metadata", "__0_0.distcp", "meta.pt"]
    for name in names:
        content = (last / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        damages = [content[: len(content) // 2], content[:-1], None]
        for damaged in damages if name == ".metadata" else [*damages, bytes(flipped)]:
            if damaged is None:
                (last / name).unlink()
            else:
                (last / name).write_bytes(damaged)
            assert callback._find_last_checkpoints(trainer) == {str(previous)}, (name, len(content))
        (last / name).write_bytes(content)
    assert callback._find_last_checkpoints(trainer) == {str(last)}
