"""How good drawn pictures are, by three measures that do not judge their content.

FID tells how far the set of drawn pictures is from a set of real ones, CLIPScore how well each fits its caption, and
HPS v2.1 which ones people would prefer. Each needs a network, and only those that are named are used.

Drawing resumes after a stop and runs on any number of processes; measuring is the first process's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_only
from PIL import Image
from torch import nn

from simplear.data.sample import Drop
from simplear.data.sources.folders import ImageFolderSource
from simplear.errors import UserError
from simplear.evaluation.drawing import draw_prompts
from simplear.evaluation.fid import FrechetDistance, picture_batches
from simplear.evaluation.intervals import clustered_interval
from simplear.evaluation.publish import publish
from simplear.evaluation.report import OVERALL, Result, name_run
from simplear.rewards import CLIPReward, HPSv2Reward, score
from simplear.text_files import FreeText, read_prompts

FOLDER = "quality"
HPS_V2_1_FILE = "HPS_v2.1"
"""How the file of the weights of version 2.1 begins."""
PERCENT = 100


def evaluate_quality(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    prompts_file: str | None = None,
    references: str | None = None,
    extractor: nn.Module | None = None,
    clip: CLIPReward | None = None,
    hps: HPSv2Reward | None = None,
    samples: int = 1,
    measure_batch_size: int = 32,
    **drawing: Any,
) -> dict[str, Any] | None:
    """FID, CLIPScore and HPS v2.1 of a checkpoint's pictures; only what is named is measured.

    Draws the captions of a file, or the first caption of each reference picture. Writes into OUT: under
    ``quality/RUN/`` the images and the scores of each (``verdicts.jsonl``); the picture and the page
    ``quality/RUN-quality``; and run RUN-quality in ``report.json`` (other runs stay) and its table ``report.md``.
    Run it again after a stop to resume drawing.

    Args:
        checkpoint: directory or hub id of the checkpoint.
        out: directory of images and report.
        run: name of the result; the checkpoint directory's own name if not given.
        prompts_file: .txt with a caption a line, .jsonl or .json with objects that have a "prompt"; the references'
            captions if not given.
        references: folder of real pictures, with a .txt of captions beside each or a ``metadata.jsonl``; resized and
            cropped to the size of the drawn ones. Without it there is no FID.
        extractor: the network of FID, by class path: `simplear.evaluation.fid.InceptionFeatures` if not given, whose
            weights are ``--extractor InceptionFeatures --extractor.weights FILE``.
        clip: the network of CLIPScore: ``--clip CLIPReward --clip.model ViT-L-14 --clip.pretrained openai``, or a
            file, a directory, a hub repository. Left out if not given.
        hps: ``--hps HPSv2Reward`` with ``--hps.pretrained FILE``, or the weights of the hub. Left out if not given.
        samples: images of each prompt.
        measure_batch_size: images measured at once.
        drawing: see `simplear.evaluation.drawing.draw_prompts`.

    Returns:
        the whole report; None on all processes but the first.

    Raises:
        FileNotFoundError: no prompts, references, or weights.
        ValueError: nothing to measure or to draw, a reference without a caption, or one that cannot be read.
    """
    networks = {key: network for key, network in (("clip", clip), ("hps", hps)) if network is not None}
    if references is None and not networks:
        raise UserError("nothing to measure: name references (FID), clip (CLIPScore) or hps.")
    name = name_run(run, checkpoint, out)
    source = None if references is None else ImageFolderSource(references)
    captions = _captions(source) if prompts_file is None else [text for text, _ in read_prompts(prompts_file)]
    if (different := len({*captions[: drawing.get("limit")]})) < 2:
        raise UserError(f"{different} prompts: a mean and its interval need two or more different ones.")
    if getattr(rank_zero_only, "rank", 0) == 0:  # raises for missing weights before anything is drawn
        distance = None if references is None else FrechetDistance(extractor)
        for network in networks.values():
            network.to("cpu")
    directory = Path(out) / FOLDER / name
    rows = [{"prompt": caption} for caption in captions]
    names = [f"images/{number:05d}" for number in range(len(rows))]
    drawn = draw_prompts(checkpoint, rows, directory, names, write_images, samples=samples, **drawing)
    if not drawn.trainer.is_global_zero:
        return None

    device = drawn.trainer.strategy.root_device
    files = [path / f"{sample}.png" for path in drawn.paths for sample in range(samples)]
    if distance is not None and source is not None:
        distance.metric.to(device)
        real = [source.entry(index)[0] for index in range(len(source))]
        size = drawn.settings["height"], drawn.settings["width"]
        for is_real, pictures in ((True, real), (False, files)):
            for images in picture_batches(pictures, measure_batch_size, size, "features"):
                distance.update(images, is_real)
    prompts = [str(row["prompt"]) for row in drawn.rows for _ in range(samples)]
    scores = {
        measure_name(network): _scores(network, files, prompts, measure_batch_size, device)
        for network in networks.values()
    }
    settings: dict[str, Any] = {"checkpoint": checkpoint, "prompts_file": prompts_file, "references": references}
    settings |= {key: f"{network.model} {network.pretrained}" for key, network in networks.items()}
    lines = [
        {"file": str(file.relative_to(directory)), "prompt": prompt, **{key: scores[key][place] for key in scores}}
        for place, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    return publish(
        directory,
        f"{name}-{FOLDER}",
        quality_result(scores, prompts, distance),
        drawn.report_settings(FOLDER, **settings),
        lines,
        verdict=next(iter(scores), ""),
    )


def write_images(directory: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
    """A prompt's images as ``0.png``, ``1.png`` and so on."""
    for sample, image in enumerate(images):
        image.save(directory / f"{sample}.png")


def measure_name(network: CLIPReward) -> str:
    """Name of a measure in the report: "clip-score-" and the model; "hps-v2.1", or for other weights their file."""
    if isinstance(network, HPSv2Reward):
        stem = Path(network.pretrained or network.model).stem
        return "hps-v2.1" if stem.startswith(HPS_V2_1_FILE) else f"hps-{stem}"
    parts = (network.model, network.pretrained)
    return "-".join(["clip-score", *(Path(part).stem for part in parts if part)])


def quality_result(
    scores: Mapping[str, Sequence[float]], prompts: Sequence[str], distance: FrechetDistance | None = None
) -> Result:
    """FID, and the mean of each measure with its 95 % interval, the prompt as the unit; the first is the overall.

    Means are over the images of each distinct prompt, then over prompts.

    Args:
        scores: by measure, of each image.
        prompts: of each image.
        distance: of all the images, if wanted.
    """
    result: Result = {}
    if distance is not None:
        result[f"fid-{distance.name}"] = {"score": distance.compute(), "n": len(prompts)}
    for name, values in scores.items():
        of_prompts: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            of_prompts.setdefault(prompt, []).append(value)
        means = [fmean(images) for images in of_prompts.values()]
        mean, low, high = clustered_interval([means])
        result[name] = {"score": mean, "low": low, "high": high, "n": len(prompts)}
    return {OVERALL: next(iter(result.values())), **result}


def _captions(source: ImageFolderSource | None) -> list[str]:
    """The first caption of each reference."""
    if source is None:
        raise UserError("nothing to draw: name a file of prompts, or references with captions.")
    found = []
    for index in range(len(source)):
        try:
            file, captions, _ = source.entry(index)
        except Drop as reason:
            raise UserError(f"picture {index} of {source.path}: {reason}.") from reason
        if not captions:
            raise UserError(f"{file} has no caption: write a .txt beside it, or name a file of prompts.")
        found.append(captions[0])
    return found


def _scores(
    network: CLIPReward, files: Sequence[Path], prompts: Sequence[str], batch_size: int, device: torch.device
) -> list[float]:
    """A hundred times each image's cosine; CLIPScore is 0 if that is negative (Hessel et al. 2021)."""
    found: list[float] = []
    for pictures in picture_batches(files, batch_size, title=measure_name(network)):
        texts = prompts[len(found) : len(found) + len(pictures)]
        cosines, _ = score(network, pictures.to(device).float() / 255, texts, [{}] * len(texts))
        found += (PERCENT * (cosines if isinstance(network, HPSv2Reward) else cosines.clamp(min=0))).tolist()
    return found
