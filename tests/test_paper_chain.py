"""The paper's configurations from pictures to a report: its own files, and one overlay that makes everything tiny."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from simplear.cli import main
from simplear.language_model import load_checkpoint
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import ARCHITECTURE, CAPTIONS
from visual_tokenizer.cosmos_files import write

SIZE = "0.5b"
VARIANTS = ("from-scratch", "rope-2d")
NAME = "0.5b-scratch-rope-2d-tiny"
PIXELS = {"512": 32, "1024": 48}
"""In place of the paper's sides: 2 × 2 and 3 × 3 codes."""


def config(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", f"configs/paper/{name}.yaml")]


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (70, 60), (40 * number % 256, 90, 200 - 20 * number)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, numbers: Iterable[int]) -> None:
    """As img2dataset does."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            members = {
                "json": b'{"url": "a", "sha256": "b"}',
                "png": picture(number),
                "txt": CAPTIONS[number % 4].encode(),
            }
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_journeydb(directory: Path, count: int) -> None:
    (directory / "train" / "imgs").mkdir(parents=True)
    lines = []
    for number in range(count):
        (directory / "train" / "imgs" / f"{number}.png").write_bytes(picture(number))
        row = {"img_path": f"{number}.png", "prompt": CAPTIONS[number % 4], "Task2": {"Caption": "a picture"}}
        lines.append(json.dumps(row) + "\n")
    (directory / "train_anno.jsonl").write_text("".join(lines))


def test_from_pictures_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_text_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(Path(__file__).parents[1] / "configs")
    cosmos = str(write(tmp_path / "cosmos"))
    for corpus, numbers in {"cc3m": range(4), "cc12m": range(4, 8), "cc3m-validation": range(8, 12)}.items():
        write_tar(Path(f"data/raw/{corpus}/00000.tar"), numbers)
    write_journeydb(Path("data/raw/journeydb"), 4)
    tiny = {
        "run": {
            "name+": ["tiny"],
            "architecture": {**ARCHITECTURE, "head_dim": 8},
            "visual_tokenizer": cosmos,
        },
        "data": {"init_args": {"global_batch_size": 2, "num_workers": 0, "max_text_tokens": 40}},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true",
            "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1,
        },
    }  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))

    for size, corpora in (("512", ("cc3m", "cc12m")), ("1024", ("journeydb", "cc12m"))):
        side = str(PIXELS[size])
        small = ["--visual-tokenizer", cosmos, "--height", side, "--width", side, "--filters", "[]"]
        small += ["--num-workers", "0", "--bf16", "false", "--accelerator", "cpu"]
        for each in (*corpora, "validation"):
            main(["tokenize", *config(f"data/{size}", f"data/{each}"), *small])
    Path("data/paper/grpo-prompts.jsonl").write_text("".join(f'{{"prompt": "{each}"}}\n' for each in CAPTIONS[:4]))

    stages = {
        "pretrain": ["--run.pixels", "32", "--model.init_args.language_model.tokenizer", tiny_text_tokenizer],
        "sft": ["--run.pixels", "48"],
        "grpo": ["--model.init_args.reward", "toys.Brightness"],
    }
    for stage, options in stages.items():
        main(["fit", *config(stage, SIZE, *VARIANTS), "--config", "tiny.yaml", *options])
    checkpoints = {stage: load_checkpoint(f"checkpoints/paper/{stage}-{NAME}") for stage in stages}
    assert [each.settings.grid for each in checkpoints.values()] == [(2, 2), (3, 3), (3, 3)]
    for stage, checkpoint in checkpoints.items():
        assert checkpoint.model.rope == "2d"
        carried = load_visual_tokenizer(f"checkpoints/paper/{stage}-{NAME}/visual_tokenizer")
        assert carried.fingerprint == checkpoint.settings.visual_tokenizer_fingerprint
        assert carried.fingerprint == load_visual_tokenizer(cosmos).fingerprint
    weights = [checkpoint.model.decoder.model.embed_tokens.weight for checkpoint in checkpoints.values()]
    moved = [float((after - before).abs().max()) for before, after in pairwise(weights)]
    assert all(0 < step < 1e-3 for step in moved), "each goes on from the one before, by two small steps"
    assert {path.name for path in Path("checkpoints/paper").iterdir()} == {
        "logs", "states", *(f"{stage}-{NAME}" for stage in stages),
    }  # fmt: skip

    trained = f"checkpoints/paper/grpo-{NAME}"
    main(["generate", trained, "--prompt", "one star", "--out", "drawn"])
    (drawn,) = Path("drawn").glob("*.png")
    assert Image.open(drawn).size == (48, 48)
    main(["evaluate", "scenes", trained, "--out", "report", "--prompts-per-category", "1"])
    assert f"grpo-{NAME}" in json.loads(Path("report/report.json").read_text())["runs"]
