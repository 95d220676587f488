"""Whole pages from top to bottom, in an empty place, as a new user would: every size made small, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from docs.pages import ROOT, blocks, commands, simplear_arguments
from parity.test_checkpoints import released_directory, released_tokenizer
from simplear.cli import main
from simplear.evaluation import accuracy_result, merge_run
from simplear.generation.png import read_metadata
from simplear.language_model import load_checkpoint
from simplear.sequence import SPECIAL_TOKENS
from simplear.visual_tokenizer import FSQAutoencoder, save_visual_tokenizer
from toys import CODEBOOK

CPU = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_steps": "2", "trainer.devices": "1"}
LITTLE_DATA = {"data.init_args.global_batch_size": "4", "data.init_args.num_workers": "0"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def walk(
    page: str,
    small: Mapping[str, str],
    words: Mapping[str, str] | None = None,
    headings: Sequence[str | None] = (None,),
    only: str | None = None,
) -> list[str]:
    """Run every ``simplear`` command of a page in order; returns their verbs.

    Args:
        page: its name under docs.
        small: overrides of what `fit` gets.
        words: of commands, replaced.
        headings: the sections to run; the whole page if not given.
        only: the verb to run; all if not given.
    """
    verbs = []
    file = ROOT / "docs" / f"{page}.md"
    for command in [command for heading in headings for command in commands(file, heading)]:
        arguments = simplear_arguments(command)
        if arguments is not None and only in (None, arguments[0]):
            arguments = [(words or {}).get(word, word) for word in arguments]
            verbs.append(arguments[0])
            if arguments[0] == "fit":
                arguments += [part for key, value in small.items() for part in (f"--{key}", value)]
            main(arguments)
    return verbs


def pictures(directory: Path, count: int) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        colour = tuple(int(value) for value in torch.randint(0, 256, (3,)))
        Image.new("RGB", (80, 70), colour).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(f"colour number {number}\n")


def test_fine_tuning_on_one_gpu(place: Path, tiny_text_tokenizer: str) -> None:
    """A checkpoint of the released layout, a tokenizer of 16 pixels a code, and two steps on the CPU."""
    torch.manual_seed(0)
    tokenizer = released_tokenizer(tiny_text_tokenizer, SPECIAL_TOKENS)
    released_directory(place / "released" / "SimpleAR-0.5B-SFT", tokenizer, "qwen2", positions=200)
    visual = FSQAutoencoder([3, 3, 3], 16, encoder_channels=8, decoder_channels=8, refine_channels=4)
    assert visual.codebook_size == CODEBOOK
    save_visual_tokenizer(visual, place / "released" / "visual_tokenizer")
    pictures(place / "my-pictures" / "train", 9)
    pictures(place / "my-pictures" / "validation", 4)
    small = {**CPU, **LITTLE_DATA, "data.init_args.max_text_tokens": "150", "trainer.accumulate_grad_batches": "2"}
    small |= {"trainer.val_check_interval": "2", "model.init_args.objective.chunk_rows": "16"}
    words = {"512": "64", "released/SimpleAR-1.5B-SFT": "released/SimpleAR-0.5B-SFT"}
    verbs = walk("training", small, words, ["All weights of the 0.5B model", "LoRA for the 1.5B model"])
    assert verbs == ["generate", "tokenize", "tokenize", "fit", "generate", "export", "fit", "export"]
    before, after = (
        load_checkpoint(path).model.state_dict() for path in ("released/SimpleAR-0.5B-SFT", "simplear-mine")
    )
    assert after.keys() == before.keys()
    assert all(weight.dtype == torch.bfloat16 for weight in after.values())
    assert any(not torch.equal(weight.bfloat16(), after[name]) for name, weight in before.items())
    adapted = load_checkpoint("simplear-mine-lora").model.state_dict()
    moved = [name for name, weight in before.items() if not torch.equal(weight.bfloat16(), adapted[name])]
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    (drawn,) = Path("drawn/after").iterdir()
    made = read_metadata(drawn)
    assert made is not None and made["size"] == [64, 64] and made["guidance_scale"] == 6.0
    assert Image.open("simplear-mine/samples.png").width > 100


def test_publishing(place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = place / "checkpoints" / "demo" / "states" / "sft"
    shutil.copytree(trained / "run" / "states", states)
    merge_run(place / "checkpoints" / "demo" / "report.json", "sft", accuracy_result({"colors": [True, False]}))
    assert walk("export", {}, headings=["Export"]) == ["export"]
    for code in blocks(ROOT / "docs" / "export.md", "python", "Load it"):
        exec(code, {})
    assert Image.open("circle.png").size == (24, 16)
    card = Path("shapes-64px/README.md").read_text()
    assert "50.0%" in card and "license: apache-2.0" in card


@pytest.mark.long
def test_own_pictures(place: Path) -> None:
    """With the photographs that the page takes, each training two steps long."""
    scripts = [words[1:] for words in commands(ROOT / "docs" / "own-pictures.md") if words[0].endswith("python")]
    for words in scripts:
        subprocess.run([sys.executable, *words], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    (place / "corpus").mkdir()
    subprocess.run(
        ["tar", "-cf", place / "corpus" / "0.tar", "--sort=name", "."],
        cwd=place / "data" / "photographs" / "validation",
        check=True,
    )
    small = {"trainer.max_steps": "2", "trainer.val_check_interval": "2"}
    verbs = walk("own-pictures", small)
    assert verbs == ["train-text-tokenizer", "fit", "tokenize", "tokenize", "fit", "generate", "tokenize"]
    assert len(list(Path("drawn").iterdir())) == 4
    rows = [
        json.loads(Path(f"data/{name}/manifest.json").read_text())["rows"]
        for name in ("photographs/tokens-validation", "corpus/tokens")
    ]
    assert rows[0] == rows[1] > 16


@pytest.mark.long
def test_a_reward_of_ones_own_trains(place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place)
    (place / "my_rewards.py").write_text(blocks(ROOT / "docs" / "extend.md", "python", "A reward")[0])
    model, shards = str(trained / "run" / "model"), str(trained / "shards")
    small = {**CPU, "model.init_args.checkpoint": model, "data.init_args.paths": f"[{shards}]"}
    small |= {"model.init_args.group_size": "2", "data.init_args.global_batch_size": "2"}
    small |= {"data.init_args.max_text_tokens": "40", "trainer.callbacks": "null"}
    assert walk("extend", small, only="fit") == ["fit"]
