"""What a visual tokenizer keeps of pictures: each is encoded and decoded, and both are compared.

PSNR and SSIM say how close a picture comes back, rFID how close the whole set does, and the use of the codebook how
much of what codes could say they do. Reconstructions are rounded to 8 bits before anything is measured, as they would
be saved; no model on top of the tokenizer can draw better than they look.

Left out: LPIPS, whose network would have to be downloaded too.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from simplear.atomic import require_writable
from simplear.device import resolve_device
from simplear.errors import UserError
from simplear.evaluation.fid import FrechetDistance, InceptionFeatures
from simplear.evaluation.folder import picture_batches, picture_files
from simplear.evaluation.intervals import clustered_interval
from simplear.evaluation.page import PageImage
from simplear.evaluation.publish import SHOWN, publish
from simplear.evaluation.report import OVERALL, Result, name_run
from simplear.text_files import FreeText
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, to_pixels

FOLDER = "reconstruction"
ROWS_FILE = "pictures.jsonl"
SMALLEST_SIDE = 11
"""Pixels of SSIM's window."""
PSNR_CEILING = 10 * float(np.log10(255**2 * 12))
"""dB, 58.9: the noise of rounding to 8 bits alone, a twelfth of a level squared. A picture that comes back exactly
counts as this, for its own ratio is infinite."""


@dataclass(frozen=True)
class Reconstruction:
    """A picture and what came back."""

    file: Path
    original: NDArray[np.uint8]
    """(H, W, 3)."""
    decoded: NDArray[np.uint8]
    """(H, W, 3)."""
    psnr: float
    """dB, at most `PSNR_CEILING`."""
    ssim: float
    """-1 to 1."""


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
    """What a visual tokenizer keeps of pictures: rFID, PSNR, SSIM, and how much of its codebook it uses.

    Writes into OUT: ``report.json`` (other runs stay) and its table ``report.md``; under ``reconstruction/`` the page
    ``RUN-reconstruction.png`` of originals beside reconstructions, and in ``RUN-reconstruction/`` PSNR and SSIM of each
    picture (``pictures.jsonl``) and events for TensorBoard.

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
        device: where to encode and decode; a GPU where there is one if not given.

    Returns:
        the whole report.

    Raises:
        FileNotFoundError: the folder has no pictures, or weights are missing.
        ValueError: a picture that cannot be read or has another size (the message names it), or a number too small.
    """
    if (height is None) != (width is None):
        raise UserError("height and width go together: give both, or neither where all pictures have one size.")
    if batch_size < 1 or (limit is not None and limit < 2):
        raise UserError(f"batch_size {batch_size} must be at least 1 and limit {limit} at least 2.")
    name = f"{name_run(run, tokenizer, out)}-{FOLDER}"
    files = picture_files(images)
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    if len(files) < 2:
        raise UserError(f"{images} holds one picture: a mean and its interval need two or more.")
    require_writable(out, "the report", "--out")
    place = resolve_device(device)
    visual_tokenizer = load_visual_tokenizer(tokenizer, place)
    distance = FrechetDistance(extractor or InceptionFeatures(), place) if rfid else None
    size = None if height is None or width is None else (height, width)
    _, pictures = next(picture_batches(files[:1], 1, size))
    _check_size(pictures.shape[1], pictures.shape[2], visual_tokenizer.downsample)

    counts = torch.zeros(visual_tokenizer.codebook_size, dtype=torch.long)
    batches = picture_batches(files, batch_size, size)
    scores: list[tuple[Path, float, float]] = []
    first: list[Reconstruction] = []
    worst: list[tuple[float, int, Reconstruction]] = []
    with tqdm(total=len(files), desc="reconstructing", unit="picture", disable=None, leave=False) as bar:
        for item in reconstructions(visual_tokenizer, batches, counts, distance, place):
            if len(first) < SHOWN:
                first.append(item)
            entry = (-item.psnr, -len(scores), item)
            (heapq.heappush if len(worst) < SHOWN else heapq.heappushpop)(worst, entry)
            scores.append((item.file, item.psnr, item.ssim))
            bar.update()

    result = reconstruction_result([(psnr, ssim) for _, psnr, ssim in scores], counts, distance)
    settings = {
        "benchmark": FOLDER,
        "tokenizer": tokenizer,
        "fingerprint": visual_tokenizer.fingerprint,
        "images": images,
        "size": list(first[0].original.shape[:2]),
        "resized": size is not None,
        "verdict": "psnr",
    }
    # A picture stands where other evaluations have a prompt: it is what two runs are compared by.
    rows = [{"prompt": _path_in(images, file), "psnr": psnr, "ssim": ssim} for file, psnr, ssim in scores]
    shown = [
        PageImage(Image.fromarray(image), _path_in(images, item.file), score=item.psnr, label=label)
        for item in {item.file: item for item in [*first, *(item for _, _, item in worst)]}.values()
        for image, label in ((item.original, "original"), (item.decoded, "decoded"))
    ]
    return publish(Path(out) / FOLDER / name, name, result, settings, rows, shown=shown, rows_file=ROWS_FILE)


def reconstructions(
    tokenizer: VisualTokenizer,
    batches: Iterable[tuple[Sequence[Path], NDArray[np.uint8]]],
    counts: Tensor,
    distance: FrechetDistance | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Reconstruction]:
    """Each picture with what came back.

    Args:
        tokenizer: encodes and decodes, on the device.
        batches: files and their pictures (B, H, W, 3) uint8.
        counts: (codebook size,) int64 on CPU; how often each code occurred is added.
        distance: is given originals as real and reconstructions as drawn.
        device: where to compute.
    """
    for files, originals in batches:
        codes = tokenizer.encode(torch.from_numpy(to_pixels(originals)).to(device))
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        decoded = ((tokenizer.decode(codes).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        given = torch.from_numpy(originals).permute(0, 3, 1, 2).to(device)
        if distance is not None:
            distance.update(given, real=True)
            distance.update(decoded, real=False)
        psnr, ssim = picture_scores(given, decoded)
        shown = decoded.permute(0, 2, 3, 1).cpu().numpy()
        for rows in zip(files, originals, shown, psnr.tolist(), ssim.tolist(), strict=True):
            yield Reconstruction(*rows)


def picture_scores(originals: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR (B,) in dB, at most `PSNR_CEILING`, and SSIM (B,) of pictures (B, 3, H, W) uint8.

    Both over the three channels of RGB; SSIM with a Gaussian window of 11 × 11 and σ = 1.5, over the windows that lie
    within the picture (Wang et al. 2004).
    """
    given, found = originals.double() / 255, decoded.double() / 255
    psnr = peak_signal_noise_ratio(found, given, data_range=1.0, reduction="none", dim=(1, 2, 3))
    _, map_of_windows = structural_similarity_index_measure(
        found, given, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SMALLEST_SIDE // 2
    within = map_of_windows[..., border:-border, border:-border]
    return psnr.clamp(max=PSNR_CEILING), within.flatten(1).mean(dim=1)


def reconstruction_result(
    scores: Sequence[tuple[float, float]], counts: Tensor, distance: FrechetDistance | None = None
) -> Result:
    """PSNR and SSIM with 95 % intervals over pictures, use of the codebook, and rFID, which is the overall.

    Intervals are of means; rFID and the codebook's numbers are of the whole set and have none. Without rFID PSNR is
    the overall.

    Args:
        scores: PSNR and SSIM of each picture, two pictures or more.
        counts: (codebook size,), how often each code occurred.
        distance: of all the pictures.
    """
    result: Result = {}
    if distance is not None:
        result[f"rfid-{distance.name}"] = {"score": distance.compute(), "n": len(scores)}
    for name, values in zip(("psnr", "ssim"), zip(*scores, strict=True), strict=True):
        mean, low, high = clustered_interval([values])
        result[name] = {"score": mean, "low": low, "high": high, "n": len(scores)}
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
    shares = counts.double() / counts.sum()
    return float((counts > 0).double().mean()), float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _check_size(height: int, width: int, downsample: int) -> None:
    if height % downsample or width % downsample:
        raise UserError(
            f"pictures of {height} × {width} pixels are not made of whole patches of {downsample} × {downsample}: name "
            "a height and width that are multiples, to which they are resized and cropped."
        )
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(f"pictures of {height} × {width} pixels are smaller than SSIM's window of {SMALLEST_SIDE}.")


def _path_in(folder: str, file: Path) -> str:
    """A picture's path in its folder as text: a name may hold bytes that are not."""
    return os.fsencode(file.relative_to(folder)).decode(errors="replace")
