"""DPG-Bench: 1,065 long prompts, four images each, and questions about what they must show.

Images are written as the official program reads them: one PNG a prompt, named by its ``item_id``, its images as
quarters. That program asks mPLUG, which needs packages of its own. In its place a vision-language model of today can be
asked the same questions here; its scores are not the official ones and go by the name ``dpg-vlm``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplear.atomic import claim_directory, whole_file
from simplear.errors import UserError
from simplear.evaluation.dpg_rules import PromptAnswers, Question, dpg_result, image_score, read_questions
from simplear.evaluation.drawing import SETTINGS_FILE, draw_prompts
from simplear.evaluation.prediction import predict_prompts
from simplear.evaluation.publish import publish
from simplear.evaluation.report import name_run
from simplear.evaluation.visual_questions import VisualJudge, judge_processor
from simplear.pictures import read_rgb
from simplear.text_files import FreeText, parse_json, read_objects

logger = logging.getLogger(__name__)

FOLDER = "dpg"
IMAGES = "images"
JUDGE = "dpg-vlm"
DEFAULT_JUDGE = "Qwen/Qwen2-VL-7B-Instruct"
MOST_SAMPLES = 4
"""Images of a prompt that the official program can cut out of its picture."""
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Column and row of each image, in the official order."""


class QuarterLayout:
    """One PNG a prompt under ``images/``: up to four square images as quarters, the only one as the whole."""

    is_folder = False

    def name(self, number: int, row: Mapping[str, Any]) -> str:
        """See `simplear.evaluation.drawing.Layout`."""
        return f"{IMAGES}/{row['item_id']}.png"

    def write(self, path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        """See `simplear.evaluation.drawing.Layout`. Raises ValueError for images that are not square."""
        join_quarters(images).save(path, "PNG")

    def is_whole(self, path: Path, samples: int) -> bool:
        """See `simplear.evaluation.drawing.Layout`."""
        return path.is_file()


def dpg_prompts() -> list[dict[str, Any]]:
    """The 1,065 prompts, each with its ``item_id``."""
    content = (files("simplear.evaluation") / "dpg_data" / "prompts.jsonl").read_bytes()
    return [row for _, row in read_objects(content)]


def join_quarters(images: Sequence[Image.Image]) -> Image.Image:
    """One to four square images as one picture; what is not filled of four quarters is black.

    Raises ValueError for other numbers, or for images that are not square.
    """
    width, height = images[0].size
    if width != height or not 1 <= len(images) <= MOST_SAMPLES:
        raise UserError(
            f"{len(images)} images of {height} × {width} pixels: DPG-Bench takes one to four, and they must be square."
        )
    if len(images) == 1:
        return images[0]
    joined = Image.new("RGB", (2 * width, 2 * width))
    for image, (column, row) in zip(images, QUARTERS, strict=False):
        joined.paste(image, (column * width, row * width))
    return joined


def quarter_boxes(width: int, samples: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the images in a picture of `join_quarters` of this width."""
    side = width if samples == 1 else width // 2
    places = [(column * side, row * side) for column, row in QUARTERS[:samples]]
    return [(left, top, left + side, top + side) for left, top in places]


def evaluate_dpg(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    questions: str | None = None,
    judge: str = DEFAULT_JUDGE,
    judge_batch_size: int = 16,
    samples: int = MOST_SAMPLES,
    **drawing: Any,
) -> dict[str, Any] | None:
    """DPG-Bench: draw its 1,065 prompts in the official layout and, where its questions are given, have a model judge.

    Writes into OUT: under ``dpg/RUN/images/`` a PNG for each prompt, named by its ``item_id``, for the official
    program. With questions also ``dpg/RUN/dpg-vlm/``, the judge's answers and events for TensorBoard; the picture
    and the page ``dpg/RUN-dpg-vlm``; and run RUN-dpg-vlm in ``report.json`` (other runs stay) and its table
    ``report.md``. Stopped and started again it goes on where it was, drawing and judging.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of images and report.
        run: name of the result; the checkpoint directory's own name if not given.
        questions: dpg_bench.csv of the official repository, https://github.com/TencentQQGYLab/ELLA; without it images
            are only drawn.
        judge: directory or hub id of a vision-language model that transformers loads for chats about images.
        judge_batch_size: questions answered at once on each device.
        samples: images of each prompt, one to four.
        drawing: what is drawn with.

    Returns:
        the whole report; None without questions, and on all processes but the first.

    Raises:
        FileNotFoundError: questions or judge are missing.
        ValueError: the question file is not in order or lacks a prompt, a number out of its range, or images that
            are not square.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise UserError(f"samples {samples} must lie in [1, {MOST_SAMPLES}]: the official program reads quarters.")
    if judge_batch_size < 1:
        raise UserError(f"judge_batch_size {judge_batch_size} must be at least 1.")
    name = name_run(run, checkpoint, out)
    directory = Path(out) / FOLDER / name
    prompts = dpg_prompts()
    asked = None if questions is None else questions_of(prompts, questions)
    judging = {"judge_model": judge, "questions_sha256": _sha256(questions), "samples": samples}
    if asked is not None:  # one that is missing, or another than before, is missed before the first image
        judge_processor(judge)
        claim_directory(directory / JUDGE / SETTINGS_FILE, judging)
    drawn = draw_prompts(checkpoint, prompts, directory, QuarterLayout(), samples=samples, **drawing)
    if asked is None:
        if drawn.trainer.is_global_zero:
            side = read_rgb(drawn.paths[0]).width // (1 if samples == 1 else 2)
            print(
                f"images: {directory / IMAGES}\nIn a clone of https://github.com/TencentQQGYLab/ELLA: "
                f"PIC_NUM={samples} bash dpg_bench/dist_eval.sh {(directory / IMAGES).absolute()} {side}"
            )
        return None
    of_rows = [asked[row["item_id"]] for row in drawn.rows]
    task = Judging(drawn.paths, of_rows, directory / JUDGE, judge, judge_batch_size, samples)
    predict_prompts(drawn.trainer, task, len(drawn.rows), prompts_per_batch=1)
    if not drawn.trainer.is_global_zero:
        return None
    judged = [PromptAnswers(of_row, task.read(number)) for number, of_row in enumerate(of_rows)]
    boxes = quarter_boxes(read_rgb(drawn.paths[0]).width, samples)
    lines = [
        {
            "file": str(path.relative_to(directory)),
            "sample": sample,
            "item_id": row["item_id"],
            "prompt": row["prompt"],
            "box": box,
            "score": image_score(item.questions, answers),
            "no": [question.text for question in item.questions if not answers[question.number]],
        }
        for row, path, item in zip(drawn.rows, drawn.paths, judged, strict=True)
        for sample, (answers, box) in enumerate(zip(item.answers, boxes, strict=True))
    ]
    if len(drawn.rows) < len(prompts):
        logger.warning("only the first %d of %d prompts: no number of DPG-Bench.", len(drawn.rows), len(prompts))
    settings = {"benchmark": FOLDER, "judge": JUDGE, "checkpoint": checkpoint, **drawn.settings, **judging}
    settings["prompts"] = len(drawn.rows)
    return publish(directory, f"{name}-{JUDGE}", dpg_result(judged), settings, lines, title="DPG-Bench", part=JUDGE)


def questions_of(prompts: Sequence[Mapping[str, Any]], file: str | Path) -> dict[str, list[Question]]:
    """The questions of each prompt, by ``item_id``.

    Raises ValueError where the file lacks a prompt or has one more. Other errors: see
    `simplear.evaluation.dpg_rules.read_questions`.
    """
    found = read_questions(file)
    items = [row["item_id"] for row in prompts]
    for difference, what in ((set(items) - set(found), "has no question of"), (set(found) - set(items), "asks of")):
        if difference:
            raise UserError(
                f"{file} {what} item {sorted(difference)[0]!r} and {len(difference) - 1} others. It must have those of "
                f"all {len(items)} prompts and no more: it is not DPG-Bench's question file, or another version."
            )
    return found


class Judging:
    """The task of asking the judge about each prompt's images; its answers are written prompt by prompt.

    Args:
        paths: of the prompts' pictures.
        questions: of each prompt.
        directory: of the answers, one JSON file a prompt.
        judge: see `simplear.evaluation.visual_questions.VisualJudge`.
        batch_size: questions answered at once.
        samples: images in each picture.
    """

    title = "judging"

    def __init__(
        self,
        paths: Sequence[Path],
        questions: Sequence[Sequence[Question]],
        directory: Path,
        judge: str,
        batch_size: int,
        samples: int,
    ) -> None:
        self.paths, self.questions, self.directory = paths, questions, directory
        self.judge_source, self.batch_size, self.samples = judge, batch_size, samples
        self.judge: VisualJudge | None = None

    def setup(self, device: torch.device) -> None:
        """Load the judge."""
        self.judge = VisualJudge(self.judge_source, self.batch_size).to(device)

    def is_finished(self, number: int) -> bool:
        """Whether the prompt's answers are there."""
        return self._file(number).is_file()

    def run(self, numbers: Sequence[int]) -> None:
        """Ask all questions about all images of each prompt, in batches of one prompt alone."""
        assert self.judge is not None
        for number in numbers:
            picture = read_rgb(self.paths[number])
            images = [picture.crop(box) for box in quarter_boxes(picture.width, self.samples)]
            questions = self.questions[number]
            pairs = [(image, question.text) for image in images for question in questions]
            found = self.judge.answer(*zip(*pairs, strict=True))
            parts = [found[start : start + len(questions)] for start in range(0, len(found), len(questions))]
            answers = [
                {str(question.number): answer for question, answer in zip(questions, part, strict=True)}
                for part in parts
            ]
            with whole_file(self._file(number)) as partial:
                partial.write_text(json.dumps(answers) + "\n")

    def read(self, number: int) -> list[dict[int, bool]]:
        """Of each image of a prompt that is finished, the answers by the questions' numbers."""
        answers = parse_json(self._file(number).read_bytes())
        return [{int(question): bool(answer) for question, answer in image.items()} for image in answers]

    def _file(self, number: int) -> Path:
        return self.directory / f"{self.paths[number].stem}.json"


def _sha256(file: str | Path | None) -> str | None:
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
