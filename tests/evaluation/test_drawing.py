"""Drawing a benchmark: the same images however the work is cut up, stopped and gone on with; never half a prompt."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simplear.evaluation.drawing import DrawnPrompts, draw_prompts
from simplear.evaluation.scenes import image_seed
from simplear.generation import SimpleARPipeline
from simplear.language_model import checkpoint_hash

ROWS = [
    {"prompt": f"a photo of {count} {color} circles", "item": count} for count in (1, 2, 3) for color in ("red", "")
]
SAMPLES = 2


def write_folder(path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    """A directory a prompt: the images and the row."""
    (path / "row.json").write_text(json.dumps(row))
    for sample, image in enumerate(images):
        image.save(path / f"{sample}.png")


def write_strip(path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    """One file a prompt: its images side by side."""
    Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1)).save(path, "PNG")


def drawn(
    checkpoint: Path, out: Path, write: Any = write_folder, rows: Any = ROWS, suffix: str = "", **options: Any
) -> DrawnPrompts:
    names = [f"{number:03d}{suffix}" for number in range(len(rows))]
    given = {"accelerator": "cpu", **options}
    return draw_prompts(str(checkpoint), rows, out, names, write, samples=SAMPLES, **given)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All prompts drawn in one go."""
    out = tmp_path_factory.mktemp("whole")
    drawn(checkpoint, out, batch_size=4)
    return out


def test_an_image_is_the_pipelines_for_its_own_seed(checkpoint: Path, whole: Path) -> None:
    pipeline = SimpleARPipeline.from_pretrained(checkpoint)
    for number, row in enumerate(ROWS):
        for sample in range(SAMPLES):
            alone: Any = pipeline(row["prompt"], seed=image_seed(0, str(row["prompt"]), sample)).images
            assert (np.asarray(alone[0]) == np.asarray(Image.open(whole / f"{number:03d}" / f"{sample}.png"))).all()
    assert sorted(path.name for path in whole.iterdir()) == [f"{n:03d}" for n in range(6)] + ["settings.json"]
    assert len({content for name, content in files(whole).items() if name.endswith(".png")}) == len(ROWS) * SAMPLES


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batch_size_changes_no_image(checkpoint: Path, whole: Path, tmp_path: Path, batch_size: int) -> None:
    drawn(checkpoint, tmp_path, batch_size=batch_size)
    assert files(tmp_path) == files(whole)


def test_a_limit_draws_the_first_prompts_and_the_rest_can_follow(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(checkpoint, tmp_path, batch_size=4, limit=4)
    assert [path.name for path in first.paths] == ["000", "001", "002", "003"] and list(first.rows) == ROWS[:4]
    assert first.trainer.is_global_zero
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    asked = counting(monkeypatch)
    drawn(checkpoint, tmp_path, batch_size=4)
    assert asked == [[row["prompt"] for row in ROWS[4:] for _ in range(SAMPLES)]]
    assert files(tmp_path) == files(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    drawn(checkpoint, tmp_path, batch_size=4)
    assert len(asked) == 1


def counting(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Prompts of each later call of the pipeline."""
    asked: list[list[str]] = []
    draw = SimpleARPipeline.__call__

    def call(self: SimpleARPipeline, prompt: list[str], **options: Any) -> Any:
        asked.append(prompt)
        return draw(self, prompt, **options)

    monkeypatch.setattr(SimpleARPipeline, "__call__", call)
    return asked


def test_what_a_stop_left_is_completed_and_what_was_whole_is_left_alone(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the fourth prompt is written: nothing of it shows, and its batch is drawn again as it was."""

    def stopping(path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        write_folder(path, row, images[: 1 if row is ROWS[3] else None])
        if row is ROWS[3]:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        drawn(checkpoint, tmp_path, stopping, batch_size=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001", "002", "settings.json"]
    shutil.rmtree(tmp_path / "000")
    left = tmp_path / f".003.tmp-{socket.gethostname()}-{2**22 + 1}"  # by a process that was killed
    left.mkdir()
    (left / "0.png").write_bytes(b"half")
    kept = (tmp_path / "002" / "0.png").stat().st_mtime_ns
    asked = counting(monkeypatch)
    drawn(checkpoint, tmp_path, batch_size=4)
    assert files(tmp_path) == files(whole)
    assert (tmp_path / "002" / "0.png").stat().st_mtime_ns == kept
    assert [len(prompts) for prompts in asked] == [4, 4, 4]


def test_files_in_place_of_folders(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    paths = drawn(checkpoint, tmp_path, write_strip, suffix=".png", batch_size=4).paths
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in paths), "settings.json"])
    strip = np.asarray(Image.open(paths[5]))
    assert (strip[:, 32:] == np.asarray(Image.open(whole / "005" / "1.png"))).all()


def test_settings_say_all_and_others_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    settings = drawn(checkpoint, tmp_path, limit=1, guidance_scale=3.0, negative_prompt="a dog").settings
    assert settings == json.loads((tmp_path / "settings.json").read_text())
    assert settings["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    expected = {"seed": 0, "samples": 2, "guidance_scale": 3.0, "negative_prompt": "a dog", "prompt_prefix": ""}
    expected |= {"temperature": 1.0, "top_k": None, "height": 32, "engine": "fused"}
    assert settings | expected == settings
    before = files(tmp_path)
    for change, named in [
        ({"guidance_scale": 2.0}, "guidance_scale = 3.0, not 2.0"),
        ({"seed": 1}, "seed = 0, not 1"),
        ({"negative_prompt": None}, "negative_prompt = 'a dog', not ''"),
        ({"engine": "jacobi"}, "engine = 'fused', not 'jacobi'"),
        ({"rows": ROWS[::-1]}, "prompts_sha256"),
    ]:
        with pytest.raises(ValueError, match=f"was begun with {named}"):
            drawn(checkpoint, tmp_path, **{"guidance_scale": 3.0, "negative_prompt": "a dog", **change})
    assert files(tmp_path) == before


def test_mistakes_are_named_before_anything_is_drawn(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit 0"):
        drawn(checkpoint, tmp_path, limit=0)
    with pytest.raises(ValueError, match=r"prompt 1 .* room for"):
        drawn(checkpoint, tmp_path, rows=[ROWS[0], {"prompt": "circle " * 100}])
    with pytest.raises(ValueError, match="no checkpoint at"):
        drawn(tmp_path / "none", tmp_path)
    assert not list(tmp_path.rglob("*.png"))


TWO_PROCESSES = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[3])
from evaluation.test_drawing import drawn

if __name__ == "__main__":
    done = drawn(Path(sys.argv[1]), Path(sys.argv[2]), batch_size=4, devices=2)
    # Not by print, whose text and line end are two writes without a buffer (PYTHONUNBUFFERED): ranks would mix theirs.
    sys.stdout.write("whole\\n" if all(path.exists() for path in done.paths) else "half\\n")
"""


@pytest.mark.long
def test_two_processes_draw_what_one_draws(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """And go on from what another number of them left; each returns when all is there."""
    out = tmp_path / "out"
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, script, checkpoint, out, Path(__file__).parent.parent]
    drawn(checkpoint, out, batch_size=4, limit=1)
    ran = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True, env=os.environ)
    assert ran.stdout.split() == ["whole", "whole"]
    assert files(out) == files(whole)
