"""GenEval: 553 prompts, four images each, in the folders of the official program, and a judge in this process.

The official program (github.com/djghosh13/geneval, ``evaluation/evaluate_images.py``) reads the folders as they are.
Its detector needs mmdetection, which does not install beside a current PyTorch, so there is also ``geneval-hf``: the
same rules and thresholds over networks that do. Its numbers are not the official ones, and it reports under its own
name.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from simplear.atomic import claim_directory, whole_file
from simplear.evaluation.drawing import SETTINGS_FILE, DrawnPrompts, draw_prompts
from simplear.evaluation.geneval_models import DETECTOR, DETECTOR_SIZE, ColorClassifier, InstanceDetector
from simplear.evaluation.geneval_rules import CATEGORIES, Detection, counted, judge, threshold_of
from simplear.evaluation.grid import tiled
from simplear.evaluation.prediction import predict_prompts
from simplear.evaluation.publish import publish
from simplear.evaluation.report import clustered_accuracy_result, name_run
from simplear.pictures import read_rgb
from simplear.rewards import load_clip
from simplear.text_files import FreeText, read_objects

logger = logging.getLogger(__name__)

FOLDER = "geneval"
JUDGE = "geneval-hf"
METADATA_FILE = "metadata.jsonl"
SAMPLES_FOLDER = "samples"
GRID_FILE = "grid.png"


def evaluate_geneval(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    score: bool = True,
    detector: str = DETECTOR,
    detector_size: int = DETECTOR_SIZE,
    clip: str = "ViT-L-14",
    clip_pretrained: str | None = "openai",
    **drawing: Any,
) -> dict[str, Any] | None:
    """Draw GenEval's prompts in the folders of its official program, and judge them as run RUN-geneval-hf.

    Writes into OUT: under ``geneval/RUN/`` the images, ``00000/samples/0000.png`` and so on; ``report.json`` (other
    runs stay) and its table ``report.md``; under ``geneval/`` the picture and the page ``RUN-geneval-hf``; in
    ``geneval/RUN/geneval-hf/`` verdicts and events for TensorBoard. Run again after a stop, it goes on where it was.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of the report.
        run: name of the result; the checkpoint directory's own name if not given.
        score: judge the images here; false draws them alone, for the official program.
        detector: hub id or directory of a Mask2Former trained on COCO's instances.
        detector_size: pixels of the shorter side of what the detector sees.
        clip: for colours: a name of open_clip, ``hf-hub:OWNER/REPOSITORY``, or a directory in its format.
        clip_pretrained: for a name: a tag of open_clip or a file; OpenAI's weights in a file need the name
            "ViT-L-14-quickgelu".
        drawing: see `simplear.evaluation.drawing.draw_prompts`.

    Returns:
        the whole report; None where nothing was judged, or another process writes the report.

    Raises:
        ValueError, FileNotFoundError: detector or CLIP cannot be had, or what `draw_prompts` raises.
    """
    name = name_run(run, checkpoint, out)
    directory = Path(out) / FOLDER / name
    networks = None
    if score:  # before hours of drawing
        networks = (
            InstanceDetector(detector, object_names(), detector_size),
            ColorClassifier(
                load_clip(
                    clip, None if Path(clip).is_dir() or clip.startswith(("hf-hub:", "local-dir:")) else clip_pretrained
                )
            ),
        )
        judge_settings = {
            "detector": detector,
            "detector_size": detector_size,
            "clip": clip,
            "clip_pretrained": clip_pretrained,
        }
        claim_directory(directory / JUDGE / SETTINGS_FILE, judge_settings)
    drawn = draw_prompts(checkpoint, prompts(), directory, GenEvalLayout(), **drawing)
    if networks is None:
        if drawn.trainer.is_global_zero:
            print(f"images: {directory}\njudge them: python evaluation/evaluate_images.py {directory} (see docs)")
        return None
    task = _Judging(drawn, directory / JUDGE, *networks)
    predict_prompts(drawn.trainer, task, len(drawn.rows), prompts_per_batch=1)
    if not drawn.trainer.is_global_zero:
        return None
    rows = [row for number in range(len(drawn.rows)) for _, row in read_objects(task.file(number))]
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        verdicts.setdefault(row["tag"], {}).setdefault(row["prompt"], []).append(row["correct"])
    if len(drawn.rows) < len(prompts()):
        logger.warning("only the first %d of %d prompts: no number of GenEval.", len(drawn.rows), len(prompts()))
    if missing := [category for category in CATEGORIES if category not in verdicts]:
        logger.warning("no prompt of %s: overall is the mean of the others.", ", ".join(missing))
    settings = {"benchmark": FOLDER, "judge": JUDGE, "checkpoint": checkpoint, **judge_settings, **drawn.settings}
    settings["prompts"] = len(drawn.rows)
    result = clustered_accuracy_result(verdicts)
    return publish(directory, f"{name}-{JUDGE}", result, settings, rows, title="GenEval", part=JUDGE)


def prompts() -> list[dict[str, Any]]:
    """The 553 prompts: ``tag`` (the category), ``prompt``, ``include`` and, for counts, ``exclude``."""
    content = (files("simplear.evaluation") / "geneval_data" / "evaluation_metadata.jsonl").read_bytes()
    return [row for _, row in read_objects(content)]


def object_names() -> list[str]:
    """The 80 classes that are looked for."""
    return (files("simplear.evaluation") / "geneval_data" / "object_names.txt").read_text().split("\n")[:-1]


class GenEvalLayout:
    """``00000/metadata.jsonl``, ``00000/grid.png``, ``00000/samples/0000.png`` and so on."""

    is_folder = True

    def name(self, number: int, row: Mapping[str, Any]) -> str:
        """Of a prompt's directory."""
        return f"{number:05d}"

    def write(self, path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        """Fill it."""
        (path / METADATA_FILE).write_text(json.dumps(row))
        (path / SAMPLES_FOLDER).mkdir()
        for sample, image in enumerate(images):
            image.save(sample_file(path, sample))
        tiled(images, math.ceil(math.sqrt(len(images)))).save(path / GRID_FILE)

    def is_whole(self, path: Path, samples: int) -> bool:
        """Whether every sample is there, and the row."""
        return (path / METADATA_FILE).exists() and all(sample_file(path, k).exists() for k in range(samples))


def sample_file(path: Path, sample: int) -> Path:
    """An image in a prompt's directory."""
    return path / SAMPLES_FOLDER / f"{sample:04d}.png"


class _Judging:
    """The task: a file of verdicts for each prompt, a line an image."""

    title = JUDGE

    def __init__(
        self, drawn: DrawnPrompts, directory: Path, detector: InstanceDetector, colors: ColorClassifier
    ) -> None:
        self.drawn, self.directory, self.detector, self.colors = drawn, directory, detector, colors

    def setup(self, device: torch.device) -> None:
        """Bring the networks to the device."""
        self.detector.to(device)
        self.colors.to(device)

    def file(self, number: int) -> Path:
        """Of a prompt's verdicts."""
        return self.directory / f"{number:05d}.jsonl"

    def is_finished(self, number: int) -> bool:
        """Whether they are there."""
        return self.file(number).exists()

    def run(self, numbers: Sequence[int]) -> None:
        """Judge all images of prompts."""
        for number in numbers:
            row, path = self.drawn.rows[number], self.drawn.paths[number]
            names = [sample_file(path, sample) for sample in range(self.drawn.settings["samples"])]
            images = [read_rgb(name) for name in names]
            lines = []
            for name, image, detected in zip(names, images, self.detector(images), strict=True):
                found = counted(detected, threshold_of(row))
                verdict = judge(row, found, self.colors.colors_in(image))
                lines.append(
                    {
                        "file": str(name.relative_to(path.parent)),
                        **row,
                        "correct": verdict.correct,
                        "reason": verdict.reason,
                        "found": {key: [_described(item) for item in items] for key, items in found.items()},
                    }
                )
            with whole_file(self.file(number)) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _described(item: Detection) -> list[float]:
    """Box and confidence."""
    return [round(value, 4) for value in (*item.box, item.score)]
