"""What a visual tokenizer preserves of pictures: each is encoded and decoded, and both are compared.

PSNR and SSIM tell how close a picture comes back, rFID how close the whole set does, and the use of the codebook how
much of it the pictures need. Reconstructions are rounded to 8 bits before anything is measured, as they would be saved;
no model on top of the tokenizer can draw better than they look.

Left out: LPIPS, whose network would have to be downloaded too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from simplear.atomic import require_writable
from simplear.data.sources.folders import pictures_below
from simplear.device import resolve_device
from simplear.errors import UserError
from simplear.evaluation.fid import FrechetDistance, picture_batches
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.intervals import clustered_interval
from simplear.evaluation.publish import publish
from simplear.evaluation.report import OVERALL, Result, name_run
from simplear.text_files import FreeText
from simplear.visual_tokenizer import load_visual_tokenizer

FOLDER = "reconstruction"
ROWS_FILE = "pictures.jsonl"
SHOWN = 16
"""Pictures shown beside their reconstructions, the first ones."""
SSIM_WINDOW = 11
"""Pixels of a side."""
PSNR_CEILING = 10 * float(np.log10(255**2 * 12))
"""dB, 58.9: the noise of rounding to 8 bits alone, a twelfth of a level squared. A picture that comes back exactly
counts as this, since its own ratio is infinite."""


def evaluate_tokenizer(
    tokenizer: str,
    *,
    out: str,
    images: str,
    run: FreeText | None = None,
    height: int | None = None,
    width: int | None = None,
    limit: int | None = None,
    extractor: nn.Module | None = None,
    rfid: bool = True,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """What a visual tokenizer preserves of pictures: rFID, PSNR, SSIM, and how much of its codebook it uses.

    Writes into OUT: ``report.json`` (other runs stay) and its table ``report.md``; under ``reconstruction/`` the
    picture ``RUN-reconstruction.png`` of originals beside reconstructions, and in ``RUN-reconstruction/`` PSNR and SSIM
    of each picture (``pictures.jsonl``).

    Args:
        tokenizer: directory or hub id of a visual tokenizer.
        out: directory of the report.
        images: folder of pictures, sub-folders included.
        run: name of the result, RUN-reconstruction in the report; the tokenizer directory's own name if not given.
        height: pixels; pictures are resized and cropped to height and width. If neither is given, all must have one
            size, a multiple of the tokenizer's downsample factor.
        width: pixels.
        limit: take only so many pictures, evenly spaced in the order of their paths; all if not given.
        extractor: the network of rFID, by class path: `simplear.evaluation.fid.InceptionFeatures` if not given, whose
            weights are ``--extractor InceptionFeatures --extractor.weights FILE``.
        rfid: false leaves rFID out, and needs no such network.
        batch_size: pictures at a time.
        device: where to encode and decode; a GPU if there is one if not given.

    Returns:
        the whole report.

    Raises:
        FileNotFoundError: the folder has no pictures, or weights are missing.
        ValueError: a picture that cannot be read or has another size (the message names it), or a number too small.
    """
    if (height is None) != (width is None):
        raise UserError("height and width go together: give both, or neither if all pictures have one size.")
    if batch_size < 1 or (limit is not None and limit < 2):
        raise UserError(f"batch_size {batch_size} must be at least 1 and limit {limit} at least 2.")
    name = f"{name_run(run, tokenizer, out)}-{FOLDER}"
    files = pictures_below(Path(images))
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    if len(files) < 2:
        raise UserError(f"{images} holds one picture: a mean and its interval need two or more.")
    require_writable(out, "the report", "--out")
    place = resolve_device(device)
    visual_tokenizer = load_visual_tokenizer(tokenizer, place)
    distance = FrechetDistance(extractor, place) if rfid else None
    size = None if height is None or width is None else (height, width)
    counts = torch.zeros(visual_tokenizer.codebook_size, dtype=torch.long)
    rows: list[dict[str, Any]] = []
    cells: list[Cell] = []
    for originals in picture_batches(files, batch_size, size, "reconstructing"):
        originals = originals.to(place)
        codes = visual_tokenizer.encode(originals.float() / 127.5 - 1)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        decoded = ((visual_tokenizer.decode(codes).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if distance is not None:
            distance.update(originals, real=True)
            distance.update(decoded, real=False)
        for psnr, ssim, *pair in zip(*picture_scores(originals, decoded), originals, decoded, strict=True):
            # A picture stands where other evaluations have a prompt: it is what two runs are compared by.
            path = os.fsencode(files[len(rows)].relative_to(images)).decode(errors="replace")
            rows.append({"prompt": path, "psnr": float(psnr), "ssim": float(ssim)})
            if len(cells) < SHOWN:
                shown = tuple(Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in pair)
                cells.append(Cell(f"{path} ({float(psnr):.3f})", shown, labels=("original", "decoded")))

    settings = {
        "benchmark": FOLDER,
        "tokenizer": tokenizer,
        "fingerprint": visual_tokenizer.fingerprint,
        "images": images,
        "size": list(originals.shape[2:]),
        "resized": size is not None,
    }
    return publish(
        Path(out) / FOLDER / name,
        name,
        reconstruction_result(rows, counts, distance),
        settings,
        rows,
        verdict="psnr",
        rows_file=ROWS_FILE,
        picture=image_grid({f"{name}: the first pictures, PSNR in dB": cells}),
    )


def picture_scores(originals: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR (B,) in dB, at most `PSNR_CEILING`, and SSIM (B,) of pictures (B, 3, H, W) uint8.

    Both over the three channels of RGB; SSIM with a Gaussian window of 11 × 11 and σ = 1.5, over the windows that lie
    within the picture (Wang et al. 2004).
    """
    after, before = decoded.double() / 255, originals.double() / 255
    psnr = peak_signal_noise_ratio(after, before, data_range=1.0, reduction="none", dim=(1, 2, 3))
    _, map_of_windows = structural_similarity_index_measure(
        after, before, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    within = map_of_windows[..., border:-border, border:-border]
    return psnr.clamp(max=PSNR_CEILING), within.flatten(1).mean(dim=1)


def reconstruction_result(
    rows: Sequence[dict[str, Any]], counts: Tensor, distance: FrechetDistance | None = None
) -> Result:
    """PSNR and SSIM with 95 % intervals over pictures, use of the codebook, and rFID, which is the overall.

    Intervals are of means; rFID and the codebook's numbers are of the whole set and have none. Without rFID PSNR is
    the overall.

    Args:
        rows: ``psnr`` and ``ssim`` of each picture, two pictures or more.
        counts: (codebook size,), how often each code occurred.
        distance: of all the pictures.
    """
    result: Result = {}
    if distance is not None:
        result[f"rfid-{distance.name}"] = {"score": distance.compute(), "n": len(rows)}
    for name in ("psnr", "ssim"):
        mean, low, high = clustered_interval([[row[name] for row in rows]])
        result[name] = {"score": mean, "low": low, "high": high, "n": len(rows)}
    used, perplexity = codebook_use(counts)
    result["codebook-used"] = {"score": used, "n": int(counts.sum())}
    result["codebook-perplexity"] = {"score": perplexity, "n": int(counts.sum())}
    return {OVERALL: next(iter(result.values())), **result}


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Fraction of codes that occurred, and e to the entropy (in nats) of their frequencies: 1 if all are one
    code, C if all C codes are equally frequent.

    Args:
        counts: (C,), not all 0.
    """
    entropy = torch.distributions.Categorical(probs=counts.double()).entropy()
    return float((counts > 0).double().mean()), float(entropy.exp())
