"""`simplear evaluate geneval` end to end with tiny networks: folders, verdicts, report, stops, several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simplear.cli import main
from simplear.evaluation.drawing import PromptModule
from simplear.evaluation.geneval import evaluate_geneval, prompts

LIMIT = 5


def options(tiny_detector: str, tiny_clip: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {
        "detector": tiny_detector,
        "clip": tiny_clip[0],
        "clip_pretrained": tiny_clip[1],
        "limit": LIMIT,
        "accelerator": "cpu",
        **more,
    }


def flags(**given: Any) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def evaluated(
    checkpoint: Path, tiny_detector: str, tiny_clip: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The verb's output for five prompts, the first of which asks for a bench, all that the detector ever sees."""
    out = tmp_path_factory.mktemp("geneval")
    main(["evaluate", "geneval", str(checkpoint), "--out", str(out), *flags(**options(tiny_detector, tiny_clip))])
    return out


def test_folders_are_the_official_programs(evaluated: Path) -> None:
    """As it walks them: numbers, a metadata.jsonl of one JSON object, samples named by digits."""
    images = evaluated / "geneval" / "tiny"
    folders = sorted(path.name for path in images.iterdir() if path.is_dir() and path.name.isdigit())
    assert folders == [f"{number:05d}" for number in range(LIMIT)]
    for folder, row in zip(folders, prompts(), strict=False):
        with (images / folder / "metadata.jsonl").open() as file:
            assert json.load(file) == row
        files = sorted((images / folder / "samples").iterdir())
        assert [file.name for file in files] == [f"{k:04d}.png" for k in range(4)]
        samples = [np.asarray(Image.open(file)) for file in files]
        assert all(sample.shape == (32, 32, 3) for sample in samples)
        rows = [np.concatenate(samples[:2], axis=1), np.concatenate(samples[2:], axis=1)]
        assert (np.asarray(Image.open(images / folder / "grid.png")) == np.concatenate(rows)).all()


def test_the_judge_reports_under_its_own_name(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    assert list(report["runs"]) == ["tiny-geneval-hf"]
    result, settings = report["runs"]["tiny-geneval-hf"], report["settings"]["tiny-geneval-hf"]
    assert set(result) == {"overall", "single_object"}
    benches = sum(row["include"][0]["class"] == "bench" for row in prompts()[:LIMIT])
    assert benches == 1 and result["overall"]["accuracy"] == benches / LIMIT
    assert result["single_object"]["n"] == 4 * LIMIT and set(result["overall"]) == {"accuracy", "low", "high", "n"}
    # Five prompts, whose images agree with each other, tell as much as five images.
    assert result["overall"]["low"] == pytest.approx(0.036, abs=0.001)
    expected = {"judge": "geneval-hf", "benchmark": "geneval", "prompts": LIMIT, "guidance_scale": 1.0}
    assert settings | expected == settings and len(settings["checkpoint_sha256"]) == 64
    verdicts = [json.loads(line) for line in (evaluated / settings["verdicts"]).read_text().splitlines()]
    assert len(verdicts) == 4 * LIMIT and sum(row["correct"] for row in verdicts) == 4
    assert all((evaluated / "geneval" / "tiny" / row["file"]).is_file() for row in verdicts)
    cow = next(row for row in verdicts if row["prompt"] == "a photo of a cow")
    assert cow["reason"] == "0 × cow, not 1" and set(cow["found"]) == {"bench"} and len(cow["found"]["bench"][0]) == 5


def test_people_get_a_picture_and_a_page(evaluated: Path) -> None:
    assert Image.open(evaluated / "geneval" / "tiny-geneval-hf.png").width > 1000
    page = (evaluated / "geneval" / "tiny-geneval-hf.html").read_text()
    assert page.count("<figure ") == 4 * LIMIT and page.count("data:image/png;base64,") == 4 * LIMIT
    assert "0 × cow, not 1" in page


def test_a_second_call_draws_and_judges_nothing(
    evaluated: Path,
    checkpoint: Path,
    tiny_detector: str,
    tiny_clip: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = []
    predict_step = PromptModule.predict_step
    monkeypatch.setattr(
        PromptModule, "predict_step", lambda self, batch: (work.append(batch), predict_step(self, batch))[1]
    )
    before = (evaluated / "report.json").read_bytes()
    evaluate_geneval(str(checkpoint), out=str(evaluated), **options(tiny_detector, tiny_clip))
    assert work == [] and (evaluated / "report.json").read_bytes() == before
    (evaluated / "geneval" / "tiny" / "geneval-hf" / "00002.jsonl").unlink()
    evaluate_geneval(str(checkpoint), out=str(evaluated), **options(tiny_detector, tiny_clip))
    assert work == [[2]] and (evaluated / "report.json").read_bytes() == before


def test_another_judge_on_the_same_images_is_refused(
    evaluated: Path, checkpoint: Path, tiny_detector: str, tiny_clip: tuple[str, str], tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_detector, tmp_path / "other")
    with pytest.raises(ValueError, match=r"was begun with detector = .*, not .*other"):
        evaluate_geneval(
            str(checkpoint), out=str(evaluated), **{**options(tiny_detector, tiny_clip), "detector": str(other)}
        )


def test_images_alone_for_the_official_program(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(out=tmp_path, score="false", limit=2, samples=1, run="drawn", accelerator="cpu")
    main(["evaluate", "geneval", str(checkpoint), *arguments])
    images = tmp_path / "geneval" / "drawn"
    assert sorted(path.name for path in images.iterdir()) == ["00000", "00001", "settings.json"]
    assert not (tmp_path / "report.json").exists()
    assert f"evaluate_images.py {images}" in capsys.readouterr().out


def test_networks_that_cannot_be_had_are_named_before_anything_is_drawn(
    checkpoint: Path, tmp_path: Path, tiny_detector: str, tiny_clip: tuple[str, str]
) -> None:
    given = options(tiny_detector, tiny_clip)
    with pytest.raises(ValueError, match=r"none is not a Mask2Former .*--detector"):
        evaluate_geneval(str(checkpoint), out=str(tmp_path / "out"), **{**given, "detector": str(tmp_path / "none")})
    with pytest.raises((ValueError, FileNotFoundError), match="no-such-clip"):
        evaluate_geneval(str(checkpoint), out=str(tmp_path / "out"), **{**given, "clip": "no-such-clip"})
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_processes_report_what_one_reports(
    evaluated: Path, checkpoint: Path, tiny_detector: str, tiny_clip: tuple[str, str], tmp_path: Path
) -> None:
    """The tiny CLIP's name is known in this process alone, so a directory in open_clip's format stands for it."""
    from rewards.toys import ARCHITECTURE
    from simplear.rewards import load_clip, save_clip

    clip = load_clip(*tiny_clip)
    save_clip(clip.network, ARCHITECTURE, clip.tokenizer, tmp_path / "clip")
    given = {**options(tiny_detector, tiny_clip), "clip": tmp_path / "clip", "devices": 2}
    del given["clip_pretrained"]
    command = [sys.executable, "-m", "simplear.cli", "evaluate", "geneval", str(checkpoint)]
    ran = subprocess.run(
        [*command, *flags(out=tmp_path / "out", **given)], check=True, timeout=300, capture_output=True, text=True
    )
    assert ran.stdout.count("| **overall** |") == 1
    one, two = (json.loads((out / "report.json").read_text())["runs"] for out in (evaluated, tmp_path / "out"))
    assert one == two
