"""Scene accuracy: draw held-out captions, read the images back with the exact detector, and judge them.

A small GenEval: the same six categories and the same overall, the mean of the categories, with a detector that does
not err. Two baselines frame the number: the same checkpoint drawing from the empty caption, judged by the same prompts
(what a model that ignores its caption reaches), and drawings that only pass through the visual tokenizer (an upper
bound for any language model on top of it).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from simplear.atomic import require_writable
from simplear.errors import UserError
from simplear.evaluation.intervals import clustered_proportion
from simplear.evaluation.publish import VERDICTS_FILE, publish
from simplear.evaluation.report import (
    OVERALL,
    REPORT_FILE,
    Result,
    accuracy_entry,
    accuracy_result,
    clustered_accuracy_result,
    merge_run,
    name_run,
)
from simplear.generation import DrawingOptions, SimpleARPipeline
from simplear.scenes import (
    Verdict,
    background_name,
    detect,
    draw,
    evaluation_prompts,
    metadata,
    sample_scene,
    strict_verdict,
    verdict,
)
from simplear.text_files import FreeText
from simplear.visual_tokenizer import VisualTokenizer, to_pixels

FOLDER = "scenes"
BLIND: dict[str, Any] = {"guidance_scale": 1.0, "prompt_prefix": "", "negative_prompt": ""}
"""Options for images from the empty caption."""
LARGEST_PIXEL = 255.0


@dataclass(frozen=True)
class JudgedImage:
    """An image, its prompt, and whether it shows that."""

    prompt: dict[str, Any]
    """As `simplear.scenes.evaluation_prompts` gives it."""
    image: NDArray[np.uint8]
    """(H, W, 3)."""
    verdict: Verdict

    @cached_property
    def strict(self) -> Verdict:
        """See `simplear.scenes.strict_verdict`."""
        return strict_verdict(self.prompt, self.image)


def evaluate_scenes(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    prompts_per_category: int = 100,
    images_per_prompt: int = 1,
    seed: int = 0,
    blind_prompts: int = 0,
    tokenizer_ceiling: bool = False,
    strict: bool = False,
    batch_size: int = 100,
    device: str | None = None,
    **drawing: Any,
) -> dict[str, Any]:
    """Scene accuracy of a checkpoint, in six categories, on captions whose shapes and colours it never saw together.

    Writes into OUT: ``report.json`` (other runs stay) and its table ``report.md``; under ``scenes/`` the picture
    ``RUN.png`` and the page ``RUN.html`` with every image; in ``scenes/RUN/`` the images and their verdicts
    (``verdicts.jsonl``).

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of the report.
        run: name of the result in the report; the checkpoint directory's own name if not given.
        prompts_per_category: prompts of each of the six categories.
        images_per_prompt: images drawn for each prompt.
        seed: of prompts and images; an image's own seed follows from this, its prompt and its number among the
            prompt's images, so it does not depend on how many others are drawn.
        blind_prompts: also draw this many images from the empty caption and judge them by as many prompts of each
            category, as run RUN-blind; 0 leaves it out.
        strict: also judge the images by `simplear.scenes.strict_verdict`, as run RUN-strict: for models that were
            trained on the ordinary judge.
        tokenizer_ceiling: also judge drawings that went through the visual tokenizer alone, as run "tokenizer".
        batch_size: images drawn at a time.
        device: where to draw; by default a GPU if there is one.
        drawing: what is drawn with, see `simplear.generation.DrawingOptions`; images from the empty caption have
            guidance, prefix and negative prompt of their own.

    Returns:
        the whole report.

    Raises:
        ValueError: a number is out of its range.
    """
    if prompts_per_category < 1 or images_per_prompt < 1 or not 0 <= blind_prompts <= prompts_per_category:
        raise UserError(
            f"prompts_per_category {prompts_per_category} and images_per_prompt {images_per_prompt} must be at least "
            f"1, and blind_prompts {blind_prompts} must lie in [0, {prompts_per_category}]."
        )
    options = DrawingOptions(batch_size=batch_size, **drawing)
    prompts = evaluation_prompts(prompts_per_category, seed)
    name = name_run(run, checkpoint, out)
    pipeline = options.pipeline(checkpoint, device)
    captions = [prompt["prompt"] for prompt in prompts]
    pipeline.check_prompts(captions, options.prompt_prefix, options.height, options.width)
    require_writable(out, "the report", "--out")
    report_file = Path(out) / REPORT_FILE
    tokenizer = pipeline.visual_tokenizer
    settings = {"checkpoint": checkpoint, "seed": seed, **options.stated(pipeline.settings)}
    settings["visual_tokenizer"] = tokenizer.fingerprint
    if tokenizer_ceiling:
        resolution = pipeline.settings.grid[0] * pipeline.settings.downsample
        ceiling = reconstruction_accuracy(tokenizer, resolution, len(prompts), seed, pipeline.device)
        merge_run(report_file, "tokenizer", ceiling, {"checkpoint": checkpoint, "seed": seed, "resolution": resolution})
    if blind_prompts:
        blind = blind_accuracy(pipeline, prompts, blind_prompts, seed, **options.arguments())
        merge_run(report_file, f"{name}-blind", blind, {**settings, **BLIND, "images": blind_prompts})
    judged = draw_and_judge(pipeline, prompts, images_per_prompt, seed, **options.arguments())
    images = Path(out) / FOLDER / name
    rows = _write_images(images, judged, strict)
    settings |= {"prompts_per_category": prompts_per_category, "images_per_prompt": images_per_prompt}
    if strict:
        of_verdicts = {"verdicts": f"{FOLDER}/{name}/{VERDICTS_FILE}", "verdict": "strict"}
        merge_run(report_file, f"{name}-strict", strict_result(judged), {**settings, **of_verdicts})
    varied = diversity([item.image for item in judged], [item.prompt["prompt"] for item in judged])
    result = scene_result(judged)
    return publish(images, name, result, settings, rows, diversity=varied)


def draw_and_judge(
    pipeline: SimpleARPipeline,
    prompts: Sequence[dict[str, Any]],
    images_per_prompt: int = 1,
    seed: int = 0,
    **options: Any,
) -> list[JudgedImage]:
    """Draw each prompt and judge the images, in the order of the prompts.

    Arguments as for `evaluate_scenes`; ``options`` are those of the pipeline's call.
    """
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    captions = [prompt["prompt"] for prompt in repeated]
    seeds = [image_seed(seed, prompt["prompt"], sample) for prompt in prompts for sample in range(images_per_prompt)]
    images = _draw(pipeline, captions, seeds, **options)
    return [_judged(prompt, image) for prompt, image in zip(repeated, images, strict=True)]


def scene_result(judged: Sequence[JudgedImage]) -> Result:
    """Accuracy overall and by category, with 95 % intervals that take the prompt as the unit."""
    return clustered_accuracy_result(
        (item.prompt["tag"], item.prompt["prompt"], item.verdict.correct) for item in judged
    )


def strict_result(judged: Sequence[JudgedImage]) -> Result:
    """As `scene_result`, by `simplear.scenes.strict_verdict`, a judge that gives no rewards."""
    return clustered_accuracy_result(
        (item.prompt["tag"], item.prompt["prompt"], item.strict.correct) for item in judged
    )


def blind_accuracy(
    pipeline: SimpleARPipeline,
    prompts: Sequence[dict[str, Any]],
    count: int,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Accuracy of images drawn from the empty caption, without prefix and guidance, judged by prompts all the same.

    Image k is judged by the k-th prompt of each category. So the images of one category are independent and those of
    different ones the same: for the overall's interval an image is the unit, with a verdict of each category.
    """
    seeds = [image_seed(seed, "", sample) for sample in range(count)]
    images = _draw(pipeline, [""] * count, seeds, **{**options, **BLIND})
    by_category: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt["tag"], []).append(prompt)
    correct = {
        category: [
            _judged(prompt, image).verdict.correct for prompt, image in zip(members[:count], images, strict=True)
        ]
        for category, members in by_category.items()
    }
    shared = clustered_proportion([(sum(right), len(right)) for right in zip(*correct.values(), strict=True)])
    return {**accuracy_result(correct), OVERALL: accuracy_entry(*shared, count * len(correct))}


def reconstruction_accuracy(
    visual_tokenizer: VisualTokenizer,
    resolution: int,
    count: int = 600,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 100,
) -> Result:
    """Accuracy of drawings that were encoded and decoded: the ceiling of any model on this visual tokenizer.

    Args:
        visual_tokenizer: encodes and decodes.
        resolution: pixels of a side.
        count: scenes of the split of the evaluation's prompts, a sixth of them of each category.
        seed: another seed draws other scenes.
        device: where the tokenizer is.
        batch_size: drawings at a time.
    """
    scenes = [sample_scene(seed, index, "evaluation") for index in range(count)]
    verdicts: dict[str, list[bool]] = {}
    for start in tqdm(range(0, count, batch_size), desc="reconstructing", disable=None, leave=False):
        members = scenes[start : start + batch_size]
        pixels = torch.from_numpy(to_pixels(np.stack([draw(scene, resolution) for scene in members])))
        decoded = visual_tokenizer.decode(visual_tokenizer.encode(pixels.to(device)))
        images = ((decoded.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for prompt, image in zip(map(metadata, members), images, strict=True):
            verdicts.setdefault(prompt["tag"], []).append(_judged(prompt, image).verdict.correct)
    return accuracy_result(verdicts)


def image_seed(seed: int, prompt: str, sample: int) -> int:
    """Seed of one image, in [0, 2**62): the same whichever other prompts are drawn with it."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _draw(
    pipeline: SimpleARPipeline, captions: list[str], seeds: list[int], batch_size: int = 100, **options: Any
) -> list[NDArray[np.uint8]]:
    images: list[NDArray[np.uint8]] = []
    for start in tqdm(range(0, len(captions), batch_size), desc="drawing", unit="batch", disable=None, leave=False):
        part = slice(start, start + batch_size)
        pictures: Any = pipeline(captions[part], seed=seeds[part], batch_size=batch_size, **options).images
        images += [np.asarray(picture) for picture in pictures]
    return images


def _judged(prompt: dict[str, Any], image: NDArray[np.uint8]) -> JudgedImage:
    return JudgedImage(prompt, image, verdict(prompt, detect(image)))


def _write_images(directory: Path, judged: Sequence[JudgedImage], strict: bool) -> list[dict[str, Any]]:
    """Write the images, and return the lines that say what each shows."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows = []
    for number, item in enumerate(judged):
        file = f"{number:05d}.png"
        Image.fromarray(item.image).save(directory / file)
        rows.append({"file": file, **item.prompt, "correct": item.verdict.correct, "reason": item.verdict.reason})
        if strict:
            rows[-1] |= {"strict": item.strict.correct, "strict_reason": item.strict.reason}
    return rows


def diversity(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> dict[str, float]:
    """Variety of the images: reinforcement learning can lose it without any loss of accuracy.

    Args:
        images: (H, W, 3) uint8 each; those of one prompt have one size.
        prompts: of each image.

    Returns:
        ``background_entropy``: bits, 0 if all backgrounds are alike, log2(3) if the three are equally frequent;
        ``color_entropy``: bits, of the colours of all detected objects, 0 to 3; and, if a prompt has several images,
        ``sample_distance``: root mean square difference of two images of one prompt on [0, 1], averaged over all pairs
        of a prompt, then over prompts.
    """
    groups: dict[str, list[NDArray[np.float64]]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        groups.setdefault(prompt, []).append(image / LARGEST_PIXEL)
    found = {
        "background_entropy": _entropy(map(background_name, images)),
        "color_entropy": _entropy(item.color for image in images for item in detect(image)),
    }
    distances = [
        float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(members, 2)]))
        for members in groups.values()
        if len(members) > 1
    ]
    return {**found, "sample_distance": float(np.mean(distances))} if distances else found


def _entropy(names: Iterable[str]) -> float:
    """Of the frequencies of names, in bits; 0 for none."""
    counts = Counter(names)
    return sum(-count / counts.total() * math.log2(count / counts.total()) for count in counts.values())
