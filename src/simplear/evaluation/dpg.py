"""DPG-Bench: 1,065 long prompts, four images each, and questions about what they must show.

Images are written as the official program reads them: one PNG a prompt, named by its ``item_id``, its four images as
quarters. That program asks mPLUG, which needs an older environment. In its place a current vision-language model can be
asked the same questions here; its scores are not the official ones and have the name ``dpg-vlm``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from simplear.atomic import claim_directory
from simplear.errors import UserError
from simplear.evaluation.dpg_rules import PromptAnswers, Question, dpg_result, image_score, read_questions
from simplear.evaluation.drawing import SETTINGS_FILE, draw_prompts, judge_prompts
from simplear.evaluation.publish import publish
from simplear.evaluation.report import name_run
from simplear.evaluation.visual_questions import VisualJudge, judge_processor
from simplear.pictures import read_rgb
from simplear.text_files import FreeText, read_objects

FOLDER = "dpg"
JUDGE = "dpg-vlm"
DEFAULT_JUDGE = "Qwen/Qwen2-VL-7B-Instruct"
SAMPLES = 4
"""Images of a prompt."""


def evaluate_dpg(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    questions: str | None = None,
    judge: str = DEFAULT_JUDGE,
    judge_batch_size: int = 16,
    **drawing: Any,
) -> dict[str, Any] | None:
    """DPG-Bench: draw its 1,065 prompts in the official layout and, given its questions, have a model judge.

    Writes into OUT: under ``dpg/RUN/images/`` a PNG for each prompt, named by its ``item_id``, for the official
    program. With questions also ``dpg/RUN/verdicts.jsonl``, the judge's answers; the picture and the page
    ``dpg/RUN-dpg-vlm``; and run RUN-dpg-vlm in ``report.json`` (other runs stay) and its table ``report.md``. Run it
    again after a stop to resume drawing and judging.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of images and report.
        run: name of the result; the checkpoint directory's own name if not given.
        questions: dpg_bench.csv of the official repository, https://github.com/TencentQQGYLab/ELLA; without it images
            are only drawn.
        judge: directory or hub id of a vision-language model that transformers loads for chats about images.
        judge_batch_size: questions answered at once on each device.
        drawing: see `simplear.evaluation.drawing.draw_prompts`.

    Returns:
        the whole report; None without questions, and on all processes but the first.

    Raises:
        FileNotFoundError: questions or judge are missing.
        ValueError: the question file is damaged or lacks a prompt, a number out of its range, or images that are not
            square.
    """
    if judge_batch_size < 1:
        raise UserError(f"judge_batch_size {judge_batch_size} must be at least 1.")
    name = name_run(run, checkpoint, out)
    directory = Path(out) / FOLDER / name
    prompts = dpg_prompts()
    if questions is not None:  # raises before the first image
        by_item = questions_of(prompts, questions)
        judge_processor(judge)
        checksum = hashlib.sha256(Path(questions).read_bytes()).hexdigest()
        judging = {"judge_model": judge, "questions_sha256": checksum}
        claim_directory(directory / JUDGE / SETTINGS_FILE, judging)
    names = [f"images/{row['item_id']}.png" for row in prompts]
    drawn = draw_prompts(checkpoint, prompts, directory, names, write_quarters, samples=SAMPLES, **drawing)
    if questions is None:
        if drawn.trainer.is_global_zero:
            print(
                f"images: {directory / 'images'}\nIn a clone of https://github.com/TencentQQGYLab/ELLA: "
                f"PIC_NUM={SAMPLES} bash dpg_bench/dist_eval.sh {(directory / 'images').absolute()} "
                f"{drawn.settings['width']}"
            )
        return None

    def load(device: torch.device) -> Callable[[int], list[dict[str, Any]]]:
        model = VisualJudge(judge, judge_batch_size)
        model.network.to(device)

        def verdicts(number: int) -> list[dict[str, Any]]:
            row, path = drawn.rows[number], drawn.paths[number]
            return _verdicts(row, by_item[row["item_id"]], str(path.relative_to(directory)), read_rgb(path), model)

        return verdicts

    rows = judge_prompts(drawn, JUDGE, directory / JUDGE, load)
    if rows is None:
        return None
    answers = [{int(number): answer for number, answer in row["answers"].items()} for row in rows]
    judged = [
        PromptAnswers(by_item[row["item_id"]], answers[place * SAMPLES : (place + 1) * SAMPLES])
        for place, row in enumerate(drawn.rows)
    ]
    settings = drawn.report_settings(FOLDER, judge=JUDGE, checkpoint=checkpoint, **judging)
    run_name, result = f"{name}-{JUDGE}", dpg_result(judged)
    return publish(directory, run_name, result, settings, rows, verdict="score")


def _verdicts(
    row: Mapping[str, Any], questions: Sequence[Question], file: str, picture: Image.Image, model: VisualJudge
) -> list[dict[str, Any]]:
    """A line for each of a prompt's images, whose questions are asked in batches of this prompt alone."""
    boxes = quarter_boxes(picture.width)
    pairs = [(picture.crop(box), question.text) for box in boxes for question in questions]
    found = model.answer(*zip(*pairs, strict=True))
    lines = []
    for place, box in enumerate(boxes):
        part = found[place * len(questions) : (place + 1) * len(questions)]
        answers = {question.number: answer for question, answer in zip(questions, part, strict=True)}
        refused = [question.text for question in questions if not answers[question.number]]
        score = image_score(questions, answers)
        lines.append(
            {"file": file, "box": box, **row, "score": score, "reason": "\n".join(refused), "answers": answers}
        )
    return lines


def dpg_prompts() -> list[dict[str, Any]]:
    """The 1,065 prompts, each with its ``item_id``."""
    content = (files("simplear.evaluation") / "dpg_data" / "prompts.jsonl").read_bytes()
    return [row for _, row in read_objects(content)]


def write_quarters(file: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    """Write a prompt's four images as the quarters of a PNG. Raises ValueError if they are not square."""
    width, height = images[0].size
    if width != height:
        raise UserError(f"images of {height} × {width} pixels: those of DPG-Bench must be square.")
    save_image([to_tensor(image) for image in images], file, format="PNG", nrow=2, padding=0)


def quarter_boxes(width: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the images in a file of `write_quarters` of this width."""
    side = width // 2
    return [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]


def questions_of(prompts: Sequence[Mapping[str, Any]], file: str | Path) -> dict[str, list[Question]]:
    """The questions of each prompt, by ``item_id``.

    Raises ValueError if the file lacks a prompt or has another one. Other errors: see
    `simplear.evaluation.dpg_rules.read_questions`.
    """
    found = read_questions(file)
    if different := found.keys() ^ {row["item_id"] for row in prompts}:
        raise UserError(
            f"{file} must have questions about all {len(prompts)} prompts and no others, but differs in "
            f"{len(different)}, such as {min(different)!r}: it is not DPG-Bench's question file, or another version."
        )
    return found
