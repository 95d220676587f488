"""Fréchet distance of two sets of pictures, and the pictures of a folder in batches.

    d² = |m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½)

with mean and unbiased covariance of each set's features, summed in float64 as the pictures stream by (torchmetrics).
The network that computes the features decides what the number means, so results carry its name. `InceptionFeatures` is
the one of published FIDs; another is a class of yours: an ``nn.Module`` from pictures (B, 3, H, W) uint8 to features
(B, num_features), with the attributes ``name`` and ``num_features``.

The distance is biased upwards when there are few pictures: compare only runs of equally many.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from simplear.data.prepare.crops import resize_and_crop
from simplear.errors import MissingFileError, UserError
from simplear.pictures import read_rgb

logger = logging.getLogger(__name__)


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of the Inception-v3 of published FIDs, with the weights of 2015, by torch-fidelity.

    Pictures of any size are resized to 299 × 299 as TensorFlow 1 did it, bilinear and without antialiasing: part of the
    published definition, and the reason why FIDs of pictures of different sizes do not compare.
    """

    name = "inception-v3"
    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        """
        Args:
            weights: File of torch-fidelity's converted weights; if not given, the one in PyTorch's hub cache,
                downloaded at the first use.

        Raises:
            FileNotFoundError: no such file, or it could not be downloaded.
            ValueError: the file is damaged or holds other weights.
        """
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        try:
            if weights is not None:  # torch-fidelity would unpickle anything
                torch.load(weights, map_location="meta", weights_only=True)
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except OSError as error:
            raise MissingFileError(
                f"{weights or 'the cached file'}, the weights of Inception-v3, could not be read or downloaded "
                f"({error}): download {URL_INCEPTION_V3} where there is a network and name the file "
                "(--extractor InceptionFeatures --extractor.weights FILE)."
            ) from error
        except Exception as error:  # pickle, zipfile and load_state_dict raise a dozen kinds
            raise UserError(
                f"{weights} does not hold the weights of torch-fidelity's Inception-v3, or is damaged ({error}): "
                "download it again."
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) float32 of pictures (B, 3, H, W) uint8."""
        return self.network(images)[0]


class FrechetDistance:
    """The distance of drawn pictures from real ones, batch by batch."""

    def __init__(self, extractor: nn.Module | None = None, device: torch.device | str = "cpu") -> None:
        """
        Args:
            extractor: As the module's description says; `InceptionFeatures` if not given.
            device: Where features are computed and summed.
        """
        self.extractor: Any = (extractor or InceptionFeatures()).eval().requires_grad_(False)
        # Only one of several processes measures; it would wait for the others without this.
        self.metric = FrechetInceptionDistance(feature=self.extractor, sync_on_compute=False).to(device)

    @property
    def name(self) -> str:
        """Of the extractor; its class's name if it has none."""
        return str(getattr(self.extractor, "name", type(self.extractor).__name__))

    def update(self, images: Tensor, real: bool) -> None:
        """Add pictures (B, 3, H, W) uint8 to one of the two sets."""
        device = self.metric.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.metric.update(images.to(device), real=real)

    def compute(self) -> float:
        """The distance, 0 or more; a line is logged if there are too few pictures for it to mean much.

        Raises ValueError for fewer than two pictures in a set, and for features that are not finite.
        """
        real, drawn = int(self.metric.real_features_num_samples), int(self.metric.fake_features_num_samples)
        if min(real, drawn) < 2:
            raise UserError(f"FID needs two or more pictures of each kind; there are {real} real and {drawn} drawn.")
        if min(real, drawn) <= self.metric.real_features_sum.numel():
            logger.warning(
                "FID of %d and %d pictures: there are more features than pictures, so the covariances are singular and "
                "the number is far too high. Compare it only with runs of as many pictures.",
                real,
                drawn,
            )
        distance = float(self.metric.compute())
        if not math.isfinite(distance):
            raise UserError(f"features of {self.name} are not finite: its weights are damaged.")
        return max(0.0, distance)  # rounding can take equal sets below 0


def picture_batches(
    files: Sequence[Path], batch_size: int, size: tuple[int, int] | None = None, title: str = "reading"
) -> Iterator[Tensor]:
    """Pictures (B, 3, H, W) uint8 of files, batch after batch, under a progress bar.

    What measures a set of pictures must not leave any out, so one that cannot be read is an error here.

    Args:
        files: pictures.
        batch_size: pictures at a time.
        size: height and width, to which pictures are resized and cropped at the centre; enlarged ones are counted in a
            warning. If not given, all must have the size of the first.
        title: of the progress bar.

    Raises ValueError, naming the file, for a picture that cannot be read or, if no size is given, has another size.
    """
    resize, enlarged = size is not None, 0
    bar = tqdm(total=len(files), desc=title, unit="picture", disable=None, leave=False)
    with bar, ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            pictures = []
            for file, picture in zip(part, pool.map(read_rgb, part), strict=True):
                height, width = size = size or (picture.height, picture.width)
                if not resize and picture.size != (width, height):
                    raise UserError(
                        f"{file} has {picture.height} × {picture.width} pixels, {files[0]} {height} × {width}: name "
                        "the height and width to which all are resized and cropped."
                    )
                enlarged += picture.height < height or picture.width < width
                pictures.append(resize_and_crop(picture, height, width))
            yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
            bar.update(len(part))
    if enlarged:
        logger.warning("%d of %d pictures were smaller than %d × %d and enlarged", enlarged, len(files), *(size or ()))
