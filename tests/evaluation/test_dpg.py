"""DPG-Bench end to end: the official layout, a tiny judge of the real classes, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.judges import CONTROL, WORDS, make_judge
from evaluation.test_dpg_rules import row, write
from simplear.cli import main
from simplear.evaluation import dpg
from simplear.evaluation.dpg import dpg_prompts, evaluate_dpg, quarter_boxes, write_quarters
from simplear.evaluation.visual_questions import VisualJudge

FIRST = ("0", "1", "10")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_judge(tmp_path_factory.mktemp("judge") / "tiny"))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Three questions of each of the 1,065 prompts."""
    rows = [
        {**row(item["item_id"], number, parent, category), "question_natural_language": text}
        for item in dpg_prompts()
        for number, parent, category, text in (
            (1, "0", "entity - whole", "is there a dog?"),
            (2, "1", "attribute - color", "is the dog brown brown?"),
            (3, "0", "global", "dog?"),
        )
    ]
    return str(write(tmp_path / "dpg_bench.csv", rows))


@pytest.fixture(scope="module")
def roomy_checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The tiny model with room for DPG-Bench's long prompts."""
    directory = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return directory


def pictures(count: int, side: int = 32) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_prompts_ship_with_the_package() -> None:
    prompts = dpg_prompts()
    assert len({item["item_id"] for item in prompts}) == len(prompts) == 1065
    assert all(item["prompt"] for item in prompts) and tuple(item["item_id"] for item in prompts[:3]) == FIRST
    assert "Apache License" in (Path(dpg.__file__).parent / "dpg_data" / "LICENSE").read_text()


def test_quarters_are_where_the_official_program_cuts(tmp_path: Path) -> None:
    images = pictures(4, 8)
    write_quarters(tmp_path / "quarters", {}, images)
    joined = Image.open(tmp_path / "quarters")
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert quarter_boxes(joined.width) == boxes and joined.format == "PNG"
    for image, box in zip(images, boxes, strict=True):
        assert np.array_equal(np.asarray(joined.crop(box)), np.asarray(image))
    with pytest.raises(ValueError, match="must be square"):
        write_quarters(tmp_path / "wide", {}, [Image.new("RGB", (8, 16))] * 4)


def test_an_answer_does_not_depend_on_its_batch(judge: str) -> None:
    images = pictures(5)
    asked = ["is there a dog?", "brown?", "is there a brown brown brown dog?", "dog?", "?"]
    together = VisualJudge(judge, batch_size=5).margins(images, asked)
    for batch_size in (1, 2):
        assert VisualJudge(judge, batch_size).margins(images, asked).tolist() == pytest.approx(
            together.tolist(), abs=1e-5
        )
    # It looks at the image and at the question.
    other = VisualJudge(judge).margins(images[::-1], asked)
    assert (other[:2] - together[:2]).abs().min() > 1e-4
    assert len({round(margin, 5) for margin in VisualJudge(judge).margins([images[0]] * 5, asked).tolist()}) == 5


def test_yes_is_what_the_model_would_rather_write(judge: str) -> None:
    """Against the whole distribution of the next token, one question at a time."""
    loaded = VisualJudge(judge)
    vocabulary = {word: number for number, word in enumerate([*CONTROL, *WORDS])}
    content = [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "dog? Answer with yes or no."}]
    inputs = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    chances = loaded.network(**inputs).logits[0, -1].softmax(dim=0)
    yes, no = (sum(float(chances[vocabulary[word]]) for word in words) for words in (("yes", "Yes"), ("no", "No")))
    margin = loaded.margins(pictures(1), ["dog?"]).item()
    assert margin == pytest.approx(np.log(yes / no), abs=1e-5)
    assert loaded.answer(pictures(1), ["dog?"]) == [yes > no]


def test_models_that_cannot_judge_are_named(tmp_path: Path, tiny_text_tokenizer: str) -> None:
    mute = make_judge(tmp_path / "mute", words=[word for word in WORDS if word.lower() != "no"])
    with pytest.raises(ValueError, match=r"mute is not a model that chats .* no token for yes or for no"):
        VisualJudge(str(mute))
    silent = make_judge(tmp_path / "silent", template=None)
    with pytest.raises(ValueError, match=r"silent .* no chat template"):
        VisualJudge(str(silent))
    with pytest.raises(ValueError, match=r"takes no images|is not a model that chats"):
        VisualJudge(tiny_text_tokenizer)
    cut = make_judge(tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cut is not a model that chats"):
        VisualJudge(str(cut))
    with pytest.raises(FileNotFoundError, match=r"missing is not here.*--judge"):
        VisualJudge(str(tmp_path / "missing"))


def test_the_benchmark_goes_on_where_it_stopped(
    tmp_path: Path, roomy_checkpoint: Path, judge: str, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(out: str, **options: object) -> dict[str, object]:
        report = evaluate_dpg(
            str(roomy_checkpoint),
            out=str(tmp_path / out),
            questions=questions,
            judge=judge,
            accelerator="cpu",
            **options,
        )
        assert report is not None
        return report

    report = evaluate("whole", limit=3)
    (name,) = report["runs"]
    result = report["runs"][name]
    assert name == "tiny-dpg-vlm" and {"overall", "entity", "attribute", "global"} < set(result)
    assert 0 <= result["overall"]["accuracy"] <= 1 and result["overall"]["n"] == 12
    assert report["settings"][name]["judge_model"] == judge
    directory = tmp_path / "whole" / "dpg" / "tiny"
    assert sorted(file.name for file in (directory / "images").iterdir()) == ["0.png", "1.png", "10.png"]
    assert Image.open(directory / "images" / "0.png").size == (64, 64)
    answers = [json.loads(line) for line in (directory / "dpg-vlm" / "10.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(set(row["answers"]) == {"1", "2", "3"} for row in answers)
    assert (directory.parent / f"{name}.png").is_file()
    verdicts = tmp_path / "whole" / report["settings"][name]["verdicts"]
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    scores = [line["score"] for line in lines]
    assert len(scores) == 12 and all(0 < score < 1 for score in scores)  # the judge says yes and no
    assert result["overall"]["accuracy"] == pytest.approx(np.mean(scores))

    page = (directory.parent / f"{name}.html").read_text()
    (refused, *_) = (text for line in lines for text in line["reason"].splitlines())
    assert page.count("<figure") == 12 and refused in page

    # Stopped in the middle of judging, and started again: the same report, and nothing is asked twice.
    asked: list[int] = []
    answer = VisualJudge.answer

    def counted(self: VisualJudge, images: list[Image.Image], texts: list[str]) -> list[bool]:
        asked.append(len(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, images, texts)

    monkeypatch.setattr(VisualJudge, "answer", counted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluate("stopped", limit=3)
    assert evaluate("stopped", limit=3)["runs"] == report["runs"]
    assert asked == [12] * 4

    def unneeded(*_: object) -> None:
        raise AssertionError("loaded a judge that has nothing to say")

    monkeypatch.setattr(VisualJudge, "__init__", unneeded)
    assert evaluate("stopped", limit=3)["runs"] == report["runs"]
    with pytest.raises(ValueError, match="judge_model = "):
        evaluate_dpg(
            str(roomy_checkpoint),
            out=str(tmp_path / "stopped"),
            questions=questions,
            judge=str(make_judge(tmp_path / "other")),
            limit=3,
            accelerator="cpu",
        )


def test_without_questions_images_are_drawn_for_the_official_program(
    tmp_path: Path, roomy_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "dpg", str(roomy_checkpoint), "--out", str(tmp_path), "--limit", "2"]
    main([*arguments, "--accelerator", "cpu"])
    said = capsys.readouterr().out
    assert f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {tmp_path / 'dpg' / 'tiny' / 'images'} 32" in said
    assert not (tmp_path / "report.json").exists()


def test_mistakes_are_found_before_anything_is_drawn(
    tmp_path: Path, checkpoint: Path, judge: str, questions: str
) -> None:
    lines = Path(questions).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-3]))
    (tmp_path / "more.csv").write_text("".join([*lines, lines[-1].replace("whoops9", "whoops99")]))
    for options, message in (
        ({"questions": str(tmp_path / "fewer.csv")}, "such as 'whoops9'"),
        ({"questions": str(tmp_path / "more.csv")}, "such as 'whoops99'"),
        ({"questions": questions, "judge": str(tmp_path / "missing")}, "missing is not here"),
        ({"judge_batch_size": 0}, "judge_batch_size 0"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate_dpg(str(checkpoint), out=str(tmp_path / "out"), **{"judge": judge, **options})
    assert not (tmp_path / "out").exists()
