"""GenEval: 553 prompts, four images each, in the folders of the official program, and a judge in this process.

The official program (github.com/djghosh13/geneval, ``evaluation/evaluate_images.py``) reads the folders as they are.
Its detector needs mmdetection, which does not install beside a current PyTorch, so there is also ``geneval-hf``: the
same rules and thresholds over networks that do. Its numbers are not the official ones, and it reports under its own
name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from simplear.atomic import claim_directory
from simplear.evaluation.drawing import SETTINGS_FILE, draw_prompts, judge_prompts
from simplear.evaluation.geneval_models import DETECTOR, ColorClassifier, InstanceDetector
from simplear.evaluation.geneval_rules import Detection, counted, judge
from simplear.evaluation.publish import publish
from simplear.evaluation.report import clustered_accuracy_result, name_run
from simplear.pictures import read_rgb
from simplear.rewards import load_clip
from simplear.text_files import FreeText, read_objects

FOLDER = "geneval"
JUDGE = "geneval-hf"
CLIP, OPENAI = "ViT-L-14", "openai"


def evaluate_geneval(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    score: bool = True,
    detector: str = DETECTOR,
    clip: str = CLIP,
    clip_pretrained: str | None = None,
    **drawing: Any,
) -> dict[str, Any] | None:
    """Draw GenEval's prompts in the folders of its official program, and judge them as run RUN-geneval-hf.

    Writes into OUT: under ``geneval/RUN/`` the images, ``00000/samples/0000.png`` and so on; ``report.json`` (other
    runs stay) and its table ``report.md``; under ``geneval/`` the picture and the page ``RUN-geneval-hf``; in
    ``geneval/RUN/`` also the verdicts (``verdicts.jsonl``). Run it again after a stop to resume.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of the report.
        run: name of the result; the checkpoint directory's own name if not given.
        score: judge the images here; false only draws them, for the official program.
        detector: hub id or directory of a Mask2Former trained on COCO's instances.
        clip: for colours: a name of open_clip, ``hf-hub:OWNER/REPOSITORY``, or a directory in its format.
        clip_pretrained: for a name: a tag of open_clip or a file; "openai" if neither is given. OpenAI's weights in a
            file need the name "ViT-L-14-quickgelu".
        drawing: see `simplear.evaluation.drawing.draw_prompts`.

    Returns:
        the whole report; None if nothing was judged, or another process writes the report.

    Raises:
        ValueError, FileNotFoundError: detector or CLIP cannot be had, or what `draw_prompts` raises.
    """
    name = name_run(run, checkpoint, out)
    directory = Path(out) / FOLDER / name
    clip_pretrained = clip_pretrained or (OPENAI if clip == CLIP else None)
    judging = {"detector": detector, "clip": clip, "clip_pretrained": clip_pretrained}
    if score:  # raises before hours of drawing
        detect = InstanceDetector(detector, object_names())
        loaded_clip = load_clip(clip, clip_pretrained)
        claim_directory(directory / JUDGE / SETTINGS_FILE, judging)
    rows = prompts()
    names = [f"{number:05d}" for number in range(len(rows))]
    drawn = draw_prompts(checkpoint, rows, directory, names, write_images, **drawing)
    if not score:
        if drawn.trainer.is_global_zero:
            print(f"images: {directory}\njudge them: python evaluation/evaluate_images.py {directory} (see docs)")
        return None

    def load(device: torch.device) -> Callable[[int], list[dict[str, Any]]]:
        detect.network.to(device)
        colors = ColorClassifier(loaded_clip, device)

        def verdicts(number: int) -> list[dict[str, Any]]:
            row, path = drawn.rows[number], drawn.paths[number]
            samples = [sample_file(path, sample) for sample in range(drawn.settings["samples"])]
            images = [read_rgb(sample) for sample in samples]
            return [
                _verdict(row, str(sample.relative_to(directory)), image, detections, colors)
                for sample, image, detections in zip(samples, images, detect(images), strict=True)
            ]

        return verdicts

    verdicts = judge_prompts(drawn, JUDGE, directory / JUDGE, load)
    if verdicts is None:
        return None
    settings = drawn.report_settings(FOLDER, judge=JUDGE, checkpoint=checkpoint, **judging)
    result = clustered_accuracy_result((row["tag"], row["prompt"], row["correct"]) for row in verdicts)
    return publish(directory, f"{name}-{JUDGE}", result, settings, verdicts)


def _verdict(
    row: Mapping[str, Any], file: str, image: Image.Image, detections: Sequence[Detection], colors: ColorClassifier
) -> dict[str, Any]:
    """The verdict on one image, with box and confidence of the objects that count."""
    found = counted(row, detections)
    verdict = judge(row, found, lambda objects, name: colors(image, objects, name))
    boxes = {name: [[round(x, 4) for x in (*item.box, item.score)] for item in items] for name, items in found.items()}
    return {"file": file, **row, "correct": verdict.correct, "reason": verdict.reason, "found": boxes}


def prompts() -> list[dict[str, Any]]:
    """The 553 prompts: ``tag`` (the category), ``prompt``, ``include`` and, for counts, ``exclude``."""
    content = (files("simplear.evaluation") / "geneval_data" / "evaluation_metadata.jsonl").read_bytes()
    return [row for _, row in read_objects(content)]


def object_names() -> list[str]:
    """The 80 classes that are looked for."""
    return (files("simplear.evaluation") / "geneval_data" / "object_names.txt").read_text().split("\n")[:-1]


def write_images(directory: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    """A prompt's ``metadata.jsonl``, ``grid.png``, ``samples/0000.png`` and so on."""
    (directory / "metadata.jsonl").write_text(json.dumps(row))
    (directory / "samples").mkdir()
    for sample, image in enumerate(images):
        image.save(sample_file(directory, sample))
    columns = math.ceil(math.sqrt(len(images)))
    save_image([to_tensor(image) for image in images], directory / "grid.png", nrow=columns, padding=0)


def sample_file(directory: Path, sample: int) -> Path:
    """An image in a prompt's directory."""
    return directory / "samples" / f"{sample:04d}.png"
