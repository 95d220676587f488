"""FID, CLIPScore and HPS of drawn pictures, each against the network asked directly, and what is refused early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.test_reconstruction import MeanColors
from rewards.toys import NAME, random_weights, register
from simplear.cli import main
from simplear.data.prepare.crops import resize_and_crop
from simplear.evaluation.quality import evaluate_quality, measure_name
from simplear.rewards import CLIPReward, HPSv2Reward

CAPTIONS = ("a red circle", "a blue square")
COUNT = 10


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("clip")
    register(directory)
    torch.save(random_weights(), directory / "tiny.pt")
    return str(directory / "tiny.pt")


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Ten pictures of 40 × 48 pixels with one of two captions."""
    random = np.random.default_rng(0)
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(COUNT):
        small = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{CAPTIONS[number % 2]}\nanother caption\n")
    return folder


def evaluate(checkpoint: Path, out: Path, **options: object) -> dict[str, dict[str, float]]:
    report = evaluate_quality(str(checkpoint), out=str(out), accelerator="cpu", **options)
    assert report is not None
    return report["runs"]["tiny-quality"]


def test_each_measure_is_what_its_network_says(
    tmp_path: Path, checkpoint: Path, references: Path, clip_weights: str
) -> None:
    networks = CLIPReward(NAME, clip_weights), HPSv2Reward(clip_weights, NAME)
    result = evaluate(
        checkpoint,
        tmp_path / "out",
        references=str(references),
        extractor=MeanColors(),
        clip=networks[0],
        hps=networks[1],
        samples=2,
        measure_batch_size=7,
    )
    assert list(result) == ["overall", "fid-mean-colors", f"clip-score-{NAME}-tiny", "hps-tiny"]
    assert result["overall"] == result["fid-mean-colors"] and "low" not in result["overall"]
    directory = tmp_path / "out" / "quality" / "tiny"
    lines = [json.loads(line) for line in (directory / "verdicts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [CAPTIONS[number % 2] for number in range(COUNT) for _ in range(2)]
    images = [Image.open(directory / line["file"]) for line in lines]
    # Equal captions are drawn differently.
    assert len({image.tobytes() for image in images}) == 2 * COUNT

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    prompts = [line["prompt"] for line in lines]
    for network in networks:
        cosines = 100 * network(pixels, prompts, [{}] * len(prompts))
        expected = cosines if isinstance(network, HPSv2Reward) else cosines.clamp(min=0)
        name = measure_name(network)
        assert [line[name] for line in lines] == pytest.approx(expected.tolist(), abs=1e-4)
        # References share two captions: with five pictures, two images each, they are two clusters and no more.
        of_captions = expected.view(COUNT // 2, 2, 2).mean(dim=(0, 2))
        entry = result[name]
        assert entry["score"] == pytest.approx(expected.mean().item(), abs=1e-4) and entry["n"] == 2 * COUNT
        spread = 1.96 * float(of_captions.std()) / 2**0.5
        assert (entry["high"] - entry["low"]) / 2 == pytest.approx(spread, rel=1e-3)

    features = MeanColors()
    sides = [resize_and_crop(Image.open(references / f"{number}.png"), 32, 32) for number in range(COUNT)]
    sets = [features(torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2)).double().numpy() for side in (sides, images)]
    means, covariances = zip(*((rows.mean(axis=0), np.cov(rows.T)) for rows in sets), strict=True)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    fid = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert result["fid-mean-colors"]["score"] == pytest.approx(fid, rel=1e-4)


def test_a_second_run_draws_nothing_and_says_the_same(
    tmp_path: Path, checkpoint: Path, references: Path, clip_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> dict[str, dict[str, float]]:
        return evaluate(checkpoint, tmp_path, references=str(references), extractor=MeanColors())

    first = again()
    monkeypatch.setattr("simplear.generation.SimpleARPipeline.__call__", lambda *_, **__: pytest.fail("it draws"))
    assert again() == first
    # Other measures of the same images.
    clip = CLIPReward(NAME, clip_weights)
    (tmp_path / "prompts.txt").write_text("".join(f"{CAPTIONS[n % 2]}\n" for n in range(COUNT)))
    measured = evaluate(checkpoint, tmp_path, prompts_file=str(tmp_path / "prompts.txt"), clip=clip)
    assert list(measured) == ["overall", f"clip-score-{NAME}-tiny"]


def test_the_command_line(
    tmp_path: Path, checkpoint: Path, clip_weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in CAPTIONS))
    arguments = ["evaluate", "quality", str(checkpoint), "--out", str(tmp_path / "out"), "--accelerator", "cpu"]
    arguments += ["--prompts-file", str(prompts), "--clip", "CLIPReward", "--clip.model", NAME]
    main(
        [
            *arguments,
            "--clip.pretrained",
            clip_weights,
            "--hps",
            "HPSv2Reward",
            "--hps.model",
            NAME,
            "--hps.pretrained",
            clip_weights,
        ]
    )
    assert "| hps-tiny |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["tiny-quality"]["clip"] == f"{NAME} {clip_weights}"


def no_caption(folder: Path) -> None:
    (folder / "3.txt").unlink()


def broken(folder: Path) -> None:
    (folder / "3.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(no_caption, r"3\.png has no caption"), (broken, r"3\.png: not a picture")],
)
def test_a_reference_that_cannot_be_used_is_named(
    tmp_path: Path, checkpoint: Path, references: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(references)
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, tmp_path / "out", references=str(references), extractor=MeanColors())
    assert not (tmp_path / "out" / "report.json").exists()


def test_mistakes_are_found_before_anything_is_drawn(tmp_path: Path, checkpoint: Path, references: Path) -> None:
    (tmp_path / "one.txt").write_text("a circle\n")
    for options, message in (
        ({}, "nothing to measure"),
        ({"hps": HPSv2Reward(str(tmp_path / "missing.pt"))}, "nothing to draw"),
        ({"references": str(tmp_path / "missing")}, "missing is not a folder"),
        ({"references": str(references), "hps": HPSv2Reward(str(tmp_path / "missing.pt"))}, r"missing\.pt"),
        ({"references": str(references), "prompts_file": str(tmp_path / "one.txt")}, "1 prompts: a mean"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate(checkpoint, tmp_path / "out", **{"extractor": MeanColors(), **options})
    assert not (tmp_path / "out").exists()


def test_names_of_measures() -> None:
    assert measure_name(HPSv2Reward()) == "hps-v2.1"
    assert measure_name(HPSv2Reward("weights/HPS_v2_compressed.pt")) == "hps-HPS_v2_compressed"
    assert measure_name(CLIPReward("ViT-L-14", "openai")) == "clip-score-ViT-L-14-openai"
    assert measure_name(CLIPReward("checkpoints/demo/clip")) == "clip-score-clip"


@pytest.mark.long
def test_two_processes_say_what_one_says(tmp_path: Path, checkpoint: Path, references: Path) -> None:
    """Both draw, one measures, and the other is not waited for."""
    for devices in ("1", "2"):
        command = [sys.executable, "-m", "simplear.cli", "evaluate", "quality", str(checkpoint)]
        command += ["--out", str(tmp_path / devices), "--references", str(references), "--batch-size", "2"]
        command += ["--extractor", "evaluation.test_reconstruction.MeanColors", "--accelerator", "cpu"]
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [*command, "--devices", devices], check=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
        )
    one, two = (json.loads((tmp_path / devices / "report.json").read_text()) for devices in ("1", "2"))
    assert one["runs"] == two["runs"]
