"""How good drawn pictures are, by three measures that need no judge of their content.

FID says how far the set of drawn pictures is from a set of real ones, CLIPScore how well each fits its caption, and HPS
v2.1 which people would rather have. Each needs a network, and only those that are named are used.

Drawing goes on after a stop and runs on any number of processes; measuring is the first process's work.
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
from tqdm import tqdm

from simplear.data.sample import Drop
from simplear.data.sources.folders import ImageFolderSource
from simplear.errors import UserError
from simplear.evaluation.drawing import draw_prompts
from simplear.evaluation.fid import FrechetDistance, InceptionFeatures
from simplear.evaluation.folder import picture_batches
from simplear.evaluation.intervals import ratio_interval
from simplear.evaluation.publish import publish
from simplear.evaluation.report import OVERALL, Result, name_run
from simplear.rewards import CLIPReward, HPSv2Reward, score
from simplear.text_files import FreeText, read_prompts

FOLDER = "quality"
IMAGES = "images"
MEASURES = "measures"
SCORES_FILE = "scores.jsonl"
HPS_V2_1_FILE = "HPS_v2.1"
"""How the file of the weights of version 2.1 begins."""
PERCENT = 100


class FolderLayout:
    """A directory for each prompt, ``images/00012/0.png``."""

    is_folder = True

    def name(self, number: int, row: Mapping[str, Any]) -> str:
        """See `simplear.evaluation.drawing.Layout`."""
        return f"{IMAGES}/{number:05d}"

    def write(self, path: Path, row: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        """See `simplear.evaluation.drawing.Layout`."""
        for sample, image in enumerate(images):
            image.save(path / f"{sample}.png")

    def is_whole(self, path: Path, samples: int) -> bool:
        """See `simplear.evaluation.drawing.Layout`."""
        return path.is_dir()  # it has its name only when all are there


def evaluate_quality(
    checkpoint: str,
    *,
    out: str,
    run: FreeText | None = None,
    prompts_file: str | None = None,
    references: str | None = None,
    extractor: nn.Module | None = None,
    fid: bool = True,
    clip: CLIPReward | None = None,
    hps: HPSv2Reward | None = None,
    samples: int = 1,
    measure_batch_size: int = 32,
    **drawing: Any,
) -> dict[str, Any] | None:
    """FID, CLIPScore and HPS v2.1 of a checkpoint's pictures; what is measured is what is named.

    Draws the captions of a file, or the first caption of each reference picture. Writes into OUT: under
    ``quality/RUN/`` the images and ``measures/``, the scores of each image (``scores.jsonl``) and events for
    TensorBoard; the picture and the page ``quality/RUN-quality``; and run RUN-quality in ``report.json`` (other runs
    stay) and its table ``report.md``. Stopped and started again it goes on drawing where it was.

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
        fid: false leaves FID out, where references are given for their captions alone.
        clip: the network of CLIPScore: ``--clip CLIPReward --clip.model ViT-L-14 --clip.pretrained openai``, or a
            file, a directory, a hub repository. Left out if not given.
        hps: ``--hps HPSv2Reward`` with ``--hps.pretrained FILE``, or the weights of the hub. Left out if not given.
        samples: images of each prompt.
        measure_batch_size: images measured at once.
        drawing: what is drawn with.

    Returns:
        the whole report; None on all processes but the first.

    Raises:
        FileNotFoundError: no prompts, references, or weights.
        ValueError: nothing to measure or to draw, a reference without a caption, or one that cannot be read.
    """
    if measure_batch_size < 1:
        raise UserError(f"measure_batch_size {measure_batch_size} must be at least 1.")
    wants_fid = fid and references is not None
    if not wants_fid and clip is None and hps is None:
        raise UserError("nothing to measure: name references (FID), clip (CLIPScore) or hps.")
    name = name_run(run, checkpoint, out)
    source = None if references is None else ImageFolderSource(references)
    captions = _captions(source) if prompts_file is None else [text for text, _ in read_prompts(prompts_file)]
    if min(drawing.get("limit") or len(captions), len(captions)) < 2:
        raise UserError(f"{len(captions)} prompts: a mean and its interval need two or more.")
    distance = None
    networks = {name: network for name, network in (("clip", clip), ("hps", hps)) if network is not None}
    if getattr(rank_zero_only, "rank", 0) == 0:  # weights that are missing are missed before the first image
        distance = FrechetDistance(extractor or InceptionFeatures()) if wants_fid else None
        for network in networks.values():
            network.to("cpu")
    directory = Path(out) / FOLDER / name
    rows = [{"prompt": caption} for caption in captions]
    drawn = draw_prompts(checkpoint, rows, directory, FolderLayout(), samples=samples, **drawing)
    if not drawn.trainer.is_global_zero:
        return None

    device = drawn.trainer.strategy.root_device
    files = [path / f"{sample}.png" for path in drawn.paths for sample in range(samples)]
    if distance is not None and source is not None:
        distance.to(device)
        size = drawn.settings["height"], drawn.settings["width"]
        real = [source.entry(index)[0] for index in range(len(source))]
        _add(distance, real, measure_batch_size, size, real=True)
        _add(distance, files, measure_batch_size, None, real=False)
    prompts = [row["prompt"] for row in drawn.rows for _ in range(samples)]
    scores = {
        measure_name(network): _scores(network, files, prompts, measure_batch_size, device)
        for network in networks.values()
    }
    settings = {
        "benchmark": FOLDER,
        "checkpoint": checkpoint,
        "prompts_file": prompts_file,
        "references": references,
        **{key: f"{network.model} {network.pretrained}" for key, network in networks.items()},
        **drawn.settings,
        "prompts": len(drawn.rows),
    }
    if scores:
        settings["verdict"] = next(iter(scores))
    lines: list[dict[str, Any]] = [
        {"file": str(file.relative_to(directory)), "prompt": prompt, **{key: scores[key][place] for key in scores}}
        for place, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    result = quality_result(scores, prompts, distance)
    run_name = f"{name}-{FOLDER}"
    return publish(directory, run_name, result, settings, lines, title="Quality", part=MEASURES, rows_file=SCORES_FILE)


def measure_name(network: CLIPReward) -> str:
    """Of a measure in the report: "clip-score-" and the model, or "hps-v2.1"; for other weights of HPS, their file."""
    if isinstance(network, HPSv2Reward):
        stem = Path(network.pretrained or network.model).stem
        return "hps-v2.1" if stem.startswith(HPS_V2_1_FILE) else f"hps-{stem}"
    parts = (network.model, network.pretrained)
    return "-".join(["clip-score", *(Path(part).stem for part in parts if part)])


def quality_result(
    scores: Mapping[str, Sequence[float]], prompts: Sequence[str], distance: FrechetDistance | None = None
) -> Result:
    """FID, and the mean of each measure with its 95 % interval, the prompt as the unit; the first is the overall.

    All images of one prompt are one unit, those of references that share a caption among them. Where there is only one
    prompt, the spread of prompts is unknown, and the interval is left out.

    Args:
        scores: by measure, of each image.
        prompts: of each image.
        distance: of all the images, where there is one.
    """
    result: Result = {}
    if distance is not None:
        result[f"fid-{distance.name}"] = {"score": distance.compute(), "n": len(prompts)}
    for name, values in scores.items():
        of_prompts: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            of_prompts.setdefault(prompt, []).append(value)
        result[name] = {"score": fmean(values), "n": len(prompts)}
        if len(of_prompts) > 1:
            _, low, high = ratio_interval([(sum(images), len(images)) for images in of_prompts.values()])
            result[name] |= {"low": low, "high": high}
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


def _add(
    distance: FrechetDistance, files: Sequence[Path], batch_size: int, size: tuple[int, int] | None, real: bool
) -> None:
    title = "features of references" if real else "features of images"
    with tqdm(total=len(files), desc=title, unit="image", disable=None, leave=False) as bar:
        for part, pictures in picture_batches(files, batch_size, size):
            distance.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real)
            bar.update(len(part))


def _scores(
    network: CLIPReward, files: Sequence[Path], prompts: Sequence[str], batch_size: int, device: torch.device
) -> list[float]:
    """Of each image, a hundred times the cosine; CLIPScore is 0 where that is negative (Hessel et al. 2021)."""
    found: list[float] = []
    with tqdm(total=len(files), desc=measure_name(network), unit="image", disable=None, leave=False) as bar:
        for part, pictures in picture_batches(files, batch_size):
            images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float() / 255
            texts = prompts[len(found) : len(found) + len(part)]
            cosines, _ = score(network, images, texts, [{}] * len(part))
            found += (PERCENT * (cosines if isinstance(network, HPSv2Reward) else cosines.clamp(min=0))).tolist()
            bar.update(len(part))
    return found
