"""Scene accuracy: generators of known accuracy, the two lines of comparison, and the whole verb on a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simplear.cli import main
from simplear.evaluation import draw_and_judge, evaluate_scenes, scene_result
from simplear.evaluation.drawing import draw_prompts
from simplear.evaluation.quality import write_images
from simplear.evaluation.report import name_run
from simplear.evaluation.scenes import blind_accuracy, image_seed, reconstruction_accuracy, strict_result
from simplear.generation import SimpleARPipeline
from simplear.scenes import CATEGORIES, Scene, captions, draw, evaluation_prompts, metadata, sample_scene

PER_CATEGORY = 10


class Painter:
    """Stands in for a pipeline: paints the scene that a caption describes, or one that it is told to."""

    def __init__(self, scenes: dict[str, Scene]) -> None:
        self.scenes = scenes
        self.calls: list[tuple[list[str], list[int], dict[str, Any]]] = []

    def __call__(self, prompt: Sequence[str], seed: Sequence[int], batch_size: int, **options: Any) -> Any:
        assert len(prompt) == len(seed) <= batch_size
        self.calls.append((list(prompt), list(seed), options))
        return SimpleNamespace(images=[Image.fromarray(draw(self.scenes[text], 64)) for text in prompt])


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return evaluation_prompts(PER_CATEGORY)


@pytest.fixture(scope="module")
def scenes(prompts: list[dict[str, Any]]) -> dict[str, Scene]:
    """The scene that each prompt was written for."""
    found = {}
    for index in range(20 * len(prompts)):
        scene = sample_scene(0, index, "evaluation")
        found.setdefault(captions(scene, 0, index)[0], scene)
    return {prompt["prompt"]: found[prompt["prompt"]] for prompt in prompts}


def test_a_perfect_painter_is_always_right(prompts: list[dict[str, Any]], scenes: dict[str, Scene]) -> None:
    painter: Any = Painter(scenes)
    judged = draw_and_judge(painter, prompts, images_per_prompt=2, batch_size=25, guidance_scale=3.0)
    assert [item.prompt["prompt"] for item in judged] == [row["prompt"] for row in prompts for _ in range(2)]
    result = scene_result(judged)
    assert [entry["accuracy"] for entry in result.values()] == [1.0] * 7
    assert result["colors"]["n"] == 2 * PER_CATEGORY and result["overall"]["n"] == 12 * PER_CATEGORY
    assert [len(texts) for texts, _, _ in painter.calls] == [25, 25, 25, 25, 20]
    assert all(options == {"guidance_scale": 3.0} for _, _, options in painter.calls)
    seeds = [seed for _, part, _ in painter.calls for seed in part]
    assert len(set(seeds)) == len(seeds)
    assert seeds[:2] == [image_seed(0, prompts[0]["prompt"], sample) for sample in (0, 1)]


def test_the_strict_judge_is_asked_about_the_same_images(
    prompts: list[dict[str, Any]], scenes: dict[str, Scene]
) -> None:
    """Where each third drawing has a speckled corner, the ordinary judge sees nothing."""
    judged = draw_and_judge(Painter(scenes), prompts)  # type: ignore[arg-type]
    assert strict_result(judged)["overall"]["accuracy"] == 1
    speckled = [replace(item, image=item.image.copy()) for item in judged]
    for item in speckled[::3]:
        item.image[:9:2, :9:2] = (214, 39, 40)
    assert scene_result(speckled)["overall"]["accuracy"] == 1
    assert strict_result(speckled)["overall"]["accuracy"] == pytest.approx(2 / 3, abs=0.02)


def test_a_painter_of_one_category_is_right_in_that_category_alone(
    prompts: list[dict[str, Any]], scenes: dict[str, Scene]
) -> None:
    empty = Scene("colors", "gray", (), None)
    wrong = {text: scene if scene.category == "counting" else empty for text, scene in scenes.items()}
    painter: Any = Painter(wrong)
    judged = draw_and_judge(painter, prompts)
    result = scene_result(judged)
    assert {name for name, entry in result.items() if entry["accuracy"] == 1} == {"counting"}
    assert result["overall"]["accuracy"] == pytest.approx(1 / 6)
    assert all(item.verdict.correct != bool(item.verdict.reason) for item in judged)


def test_blind_images_are_drawn_without_caption_and_judged_by_each_category(prompts: list[dict[str, Any]]) -> None:
    """A painter of one red circle is right exactly where the first prompts ask for what a red circle is."""
    circle = sample_scene(0, 0, "train")
    painter: Any = Painter({"": circle})
    result = blind_accuracy(painter, prompts, 4, batch_size=3)
    assert [texts for texts, _, _ in painter.calls] == [["", "", ""], [""]]
    assert painter.calls[0][2] == {"guidance_scale": 1.0, "prompt_prefix": "", "negative_prompt": ""}
    assert {name: entry["n"] for name, entry in result.items()} == {"overall": 24, **dict.fromkeys(CATEGORIES, 4)}
    shape = circle.objects[0].shape
    asked = [row["include"][0]["class"] for row in prompts if row["tag"] == "single_object"][:4]
    assert result["single_object"]["accuracy"] == asked.count(shape) / 4
    assert result["counting"]["accuracy"] == result["two_object"]["accuracy"] == 0


class PixelTokenizer:
    """Keeps three bits of each channel of each pixel, which harms no colour beyond recognition."""

    codebook_size, downsample, fingerprint = 512, 1, "pixels"

    def encode(self, pixels: Tensor) -> Tensor:
        bits = ((pixels + 1) * 3.5).round().long()
        return bits[:, 0] * 64 + bits[:, 1] * 8 + bits[:, 2]

    def decode(self, codes: Tensor) -> Tensor:
        return torch.stack([codes // 64, codes // 8 % 8, codes % 8], dim=1) / 3.5 - 1


def test_ceiling_of_a_faithful_tokenizer_and_of_one_that_loses_everything() -> None:
    faithful = reconstruction_accuracy(PixelTokenizer(), 64, count=60, batch_size=32)
    assert faithful["overall"]["accuracy"] > 0.9
    assert faithful["colors"]["n"] == 10

    class Gray(PixelTokenizer):
        def decode(self, codes: Tensor) -> Tensor:
            return torch.zeros(len(codes), 3, *codes.shape[1:])

    assert reconstruction_accuracy(Gray(), 64, count=12)["overall"]["accuracy"] == 0


def test_an_images_seed_is_its_own() -> None:
    seeds = [image_seed(seed, text, sample) for seed in (0, 1) for text in ("", "a", "a b") for sample in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    # Fixed for ever, or reports of different versions do not compare.
    assert image_seed(0, "a red circle", 0) == 2081573918964103509


@pytest.mark.parametrize("shared", [1, 4])
def test_images_of_a_prompt_that_are_alike_narrow_no_interval(
    shared: int, prompts: list[dict[str, Any]], scenes: dict[str, Scene]
) -> None:
    """A painter that is right on half of the prompts, and draws each the same way four times."""
    empty = Scene("colors", "gray", (), None)
    half = {text: scene if number % 2 else empty for number, (text, scene) in enumerate(scenes.items())}
    once, often = (scene_result(draw_and_judge(Painter(half), prompts, count)) for count in (1, shared))  # type: ignore[arg-type]
    assert often["overall"]["n"] == shared * once["overall"]["n"]
    for category, entry in once.items():
        for bound in ("accuracy", "low", "high"):
            assert often[category][bound] == pytest.approx(entry[bound]), category
    judged = draw_and_judge(Painter(half), prompts, shared)  # type: ignore[arg-type]
    assert strict_result(judged)["overall"] == pytest.approx(scene_result(judged)["overall"])


def test_an_image_that_several_categories_judge_is_one_image(prompts: list[dict[str, Any]]) -> None:
    """Where verdicts of different categories on an image agree, the overall tells no more than one of them."""
    single = [prompt for prompt in prompts if prompt["tag"] == "single_object"]
    one_kind = [{**prompt, "tag": name} for name in ("single_object", "counting") for prompt in single]
    circle = sample_scene(0, 0, "train")
    result = blind_accuracy(Painter({"": circle}), one_kind, PER_CATEGORY)  # type: ignore[arg-type]
    assert result["overall"] == pytest.approx({**result["counting"], "n": 2 * PER_CATEGORY}), "as wide as one"


OPTIONS: dict[str, tuple[str, Any]] = {
    "temperature": ("0.8", 0.8),
    "top_k": ("5", 5),
    "top_p": ("0.9", 0.9),
    "guidance_scale": ("2", 2.0),
    "negative_prompt": ("null", "null"),
    "prompt_prefix": ("#1 a photo: ", "#1 a photo: "),
    "do_sample": ("false", False),
    "height": ("16", 16),
    "width": ("24", 24),
    "engine": ("jacobi", "jacobi"),
    "engine_options": ("{window: 2}", {"window": 2}),
}


@pytest.mark.parametrize("benchmark", ["scenes", "quality"])
def test_evaluations_draw_with_the_options_of_generate(
    benchmark: str, checkpoint: Path, tmp_path: Path, tiny_clip: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, taken as generate takes them, handed to the pipeline and stated in the report."""
    calls: list[dict[str, Any]] = []
    draw_images = SimpleARPipeline.__call__
    monkeypatch.setattr(
        SimpleARPipeline, "__call__", lambda self, *a, **k: (calls.append(k), draw_images(self, *a, **k))[1]
    )
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    own = {
        "scenes": ["--prompts_per_category", "1", "--device", "cpu", "--blind_prompts", "1"],
        "quality": [
            *("--prompts_file", str(tmp_path / "prompts.txt"), "--accelerator", "cpu"),
            *("--clip", "CLIPReward", "--clip.model", tiny_clip[0], "--clip.pretrained", tiny_clip[1]),
        ],
    }[benchmark]
    options = [word for name, (text, _) in OPTIONS.items() for word in (f"--{name}", text)]
    visual = str(checkpoint / "visual_tokenizer")
    main(["evaluate", benchmark, str(checkpoint), "--out", str(tmp_path), *own, *options, "--visual_tokenizer", visual])
    report = json.loads((tmp_path / "report.json").read_text())
    run = "tiny" if benchmark == "scenes" else "tiny-quality"
    expected = {name: value for name, (_, value) in OPTIONS.items()}
    assert report["settings"][run] | expected == report["settings"][run]
    assert len(report["settings"][run]["visual_tokenizer"]) == 64
    passed = {name: value for name, value in expected.items() if not name.startswith("engine")}
    assert calls[-1] | passed == calls[-1]
    if benchmark == "scenes":
        blind = {"guidance_scale": 1.0, "prompt_prefix": "", "negative_prompt": ""}
        assert calls[0] | passed | blind == calls[0]
        assert report["settings"]["tiny-blind"] | expected | blind == report["settings"]["tiny-blind"]


@pytest.mark.parametrize(
    ("place", "given", "run"),
    [
        ("sft", ".", "sft"),
        ("sft/states", "..", "sft"),
        ("sft", "./", "sft"),
        ("", "sft/", "sft"),
        ("", "sft/../sft", "sft"),
        ("", "sft/.", "sft"),
        ("", "link", "link"),
    ],
)
def test_a_run_is_called_as_the_directory_is(
    place: str, given: str, run: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "sft")
    (tmp_path / "sft" / "states").mkdir()
    (tmp_path / "link").symlink_to("sft")
    monkeypatch.chdir(tmp_path / place)
    assert name_run(None, given, tmp_path / "out") == run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "../other"}, "cannot be the name of a run"),
        ({"run": ".."}, "cannot be the name of a run"),
        ({"run": "a\nb"}, "cannot be the name of a run"),
        ({"run": "x" * 300}, "cannot be the name of a run"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not available"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"engine": "fast"}, "no engine 'fast'"),
        ({"engine_options": {"speed": 2}}, "engine options of .*speed"),
        ({"temperature": -1.0}, "temperature"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"height": 12}, "height 12"),
        ({"prompt_prefix": "a circle " * 60}, "prompt 0 .* room for"),
        ({"visual_tokenizer": "nowhere"}, "nowhere is not a visual tokenizer"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_said_before_anything_is_written(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_scenes(str(checkpoint), out=str(tmp_path / "out"), prompts_per_category=1, **options)
    assert not list(tmp_path.rglob("*.json"))
    if options.keys() - {"device", "run"}:
        with pytest.raises(ValueError, match=message):
            draw_prompts(str(checkpoint), [{"prompt": "a circle"}], tmp_path / "d", ["0"], write_images, **options)
    assert not list(tmp_path.rglob("*.json")), "no directory is bound to settings that do not work"


def images_of(directory: Path) -> dict[str, NDArray[np.uint8]]:
    rows = [json.loads(line) for line in (directory / "verdicts.jsonl").read_text().splitlines()]
    return {row["prompt"]: np.asarray(Image.open(directory / row["file"])) for row in rows}


def test_verb_writes_report_images_verdicts_and_events(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--prompts_per_category", "2", "--batch_size", "5"]
    main(["evaluate", "scenes", str(checkpoint), *options])
    extra = ["--run", "sft", "--blind_prompts", "1", "--tokenizer_ceiling", "true"]
    extra += ["--strict", "true"]
    main(["evaluate", "scenes", str(checkpoint), *options, "--guidance_scale", "2", *extra])
    report = json.loads((out / "report.json").read_text())
    assert list(report["runs"]) == ["tiny", "tokenizer", "sft-blind", "sft-strict", "sft"]
    for result in report["runs"].values():
        assert set(result) == {"overall", *CATEGORIES}
        assert all(set(entry) == {"accuracy", "low", "high", "n"} for entry in result.values())
    assert report["settings"]["sft"]["guidance_scale"] == 2.0
    assert report["settings"]["tiny"]["guidance_scale"] == 1.0
    assert set(report["diversity"]) == {"tiny", "sft"}
    assert "| background entropy |" in (out / "report.md").read_text()
    assert "| category | tiny | tokenizer | sft-blind | sft-strict | sft |" in capsys.readouterr().out
    assert (out / "report.md").read_text().startswith("| category | tiny")
    for run in ("tiny", "sft"):
        images = images_of(out / "scenes" / run)
        assert set(images) == {row["prompt"] for row in evaluation_prompts(2)}
        assert all(image.shape == (32, 32, 3) for image in images.values())
    verdicts = [json.loads(line) for line in (out / "scenes" / "sft" / "verdicts.jsonl").read_text().splitlines()]
    strict = report["runs"]["sft-strict"]["overall"]
    assert sum(row["strict"] for row in verdicts) == round(strict["accuracy"] * strict["n"])
    assert all(row["strict"] != bool(row["strict_reason"]) for row in verdicts)
    assert Image.open(out / "scenes" / "sft.png").width > 300


def test_images_do_not_depend_on_how_many_are_drawn(checkpoint: Path, tmp_path: Path) -> None:
    for count, out in ((1, "few"), (2, "many"), (2, "again")):
        evaluate_scenes(str(checkpoint), out=str(tmp_path / out), run="r", prompts_per_category=count, batch_size=4)
    few, many, again = (images_of(tmp_path / out / "scenes" / "r") for out in ("few", "many", "again"))
    assert len(many) == 2 * len(few) == 12
    assert all((image == many[text]).all() for text, image in few.items())
    assert all((image == again[text]).all() for text, image in many.items())
    assert (tmp_path / "many" / "report.json").read_bytes() == (tmp_path / "again" / "report.json").read_bytes()


def test_mistakes_are_named_before_anything_is_drawn(checkpoint: Path, tmp_path: Path) -> None:
    out = str(tmp_path)
    with pytest.raises(ValueError, match="images_per_prompt 0"):
        evaluate_scenes(str(checkpoint), out=out, images_per_prompt=0)
    with pytest.raises(ValueError, match=r"blind_prompts 2 must lie in \[0, 1\]"):
        evaluate_scenes(str(checkpoint), out=out, prompts_per_category=1, blind_prompts=2)
    assert not list(tmp_path.iterdir())


def test_metadata_of_scenes_is_what_is_judged(scenes: dict[str, Scene], prompts: list[dict[str, Any]]) -> None:
    """The painter's scenes are the prompts' own, so that its perfect score means something."""
    for prompt in prompts:
        described = metadata(scenes[prompt["prompt"]])
        assert {key: described[key] for key in ("tag", "include", "relation")} == {
            key: prompt[key] for key in ("tag", "include", "relation")
        }
