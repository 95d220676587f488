"""Fréchet distance of two sets of pictures: how far apart the Gaussians of their features are.

    d² = |m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½)

with mean and unbiased covariance of each set's features, summed in float64 as the pictures stream by (torchmetrics).
The network that gives the features decides what the number means, so results carry its name. `InceptionFeatures` is
the one of published FIDs; another is a class of one's own, named by its class path: an ``nn.Module`` that maps pictures
(B, 3, H, W) uint8 to features (B, num_features), with the attributes ``name`` and ``num_features``.

The distance is biased upwards by the number of pictures: compare only runs of equally many.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium".
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from simplear.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)

INCEPTION_HASH = "6726825d"
"""The file's SHA-256 begins so."""


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
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = _cached_weights() if weights is None else Path(weights)
        if not file.is_file():
            raise MissingFileError(f"{file}, the weights of Inception-v3, is no file: check the path.")
        try:
            # torch-fidelity unpickles whatever is in the file: what this refuses does not get there.
            torch.load(file, map_location="meta", weights_only=True)
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        except Exception as error:  # pickle, zipfile and load_state_dict raise a dozen kinds
            raise UserError(
                f"{file} holds no weights of torch-fidelity's Inception-v3, or is damaged ({error}): fetch it again."
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) float32 of pictures (B, 3, H, W) uint8."""
        return self.network(images)[0]


def _cached_weights() -> Path:
    """Where PyTorch's hub keeps the weights, downloaded if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), INCEPTION_HASH, progress=False)
        except Exception as error:
            raise MissingFileError(
                f"the weights of Inception-v3 are not in {file} and could not be downloaded ({error}). Download "
                f"{URL_INCEPTION_V3} where there is a network and name the file "
                "(--extractor InceptionFeatures --extractor.weights FILE)."
            ) from error
    return file


class FrechetDistance:
    """The distance of drawn pictures from real ones, batch by batch."""

    def __init__(self, extractor: nn.Module, device: torch.device | str = "cpu") -> None:
        """
        Args:
            extractor: As the module's description says.
            device: Where features are computed and summed.

        Raises ValueError where the extractor has no ``num_features``.
        """
        if not isinstance(getattr(extractor, "num_features", None), int):
            raise ValueError(f"{type(extractor).__name__} has no num_features: say how many features it gives.")
        self.extractor: Any = extractor.eval().requires_grad_(False)
        # Measured by one process of several, which would else wait for the others to give theirs.
        self.metric = FrechetInceptionDistance(feature=self.extractor, sync_on_compute=False).to(device)
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> FrechetDistance:
        """Go on on another device."""
        self.metric, self.device = self.metric.to(device), torch.device(device)
        return self

    @property
    def name(self) -> str:
        """Of the extractor, its class's where it has none."""
        return str(getattr(self.extractor, "name", type(self.extractor).__name__))

    def update(self, images: Tensor, real: bool) -> None:
        """Take pictures (B, 3, H, W) uint8 into the one set or the other.

        Raises ValueError for pictures of another type, for [0, 1] and [-1, 1] would pass as black, and for features
        that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"FID takes pictures (B, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}.")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self.metric.update(images.to(self.device), real=real)
        sums = self.metric.real_features_sum if real else self.metric.fake_features_sum
        if not sums.isfinite().all():
            raise UserError(f"features of {self.name} are not finite: its weights are damaged, or it is another's.")

    def compute(self) -> float:
        """The distance, 0 or more; a line is logged where there are too few pictures for it to mean much.

        Raises ValueError for fewer than two pictures in a set.
        """
        real, drawn = int(self.metric.real_features_num_samples), int(self.metric.fake_features_num_samples)
        if min(real, drawn) < 2:
            raise UserError(f"FID needs two pictures or more of each kind; there are {real} real and {drawn} drawn.")
        if min(real, drawn) <= self.extractor.num_features:
            logger.warning(
                "FID of %d and %d pictures by %d features: there are more features than pictures, so the covariances "
                "are singular and the number is far too high. Compare it only with runs of as many pictures.",
                real,
                drawn,
                self.extractor.num_features,
            )
        return max(0.0, float(self.metric.compute()))  # rounding can take equal sets below 0
