"""What a visual tokenizer is to the rest of the system, and what the tokenizers of this package share.

Left out on purpose: losses, training and the code vectors themselves. Whoever holds codes needs only this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from simplear.errors import UserError


class VisualTokenizer(Protocol):
    """Turns pictures into codes and codes into pictures; fully convolutional, so one serves every resolution."""

    codebook_size: int
    """Number of codes; every code lies in ``[0, codebook_size)``."""
    downsample: int
    """Pixels a code stands for along each side."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights: names what a set of codes was made with."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, H / downsample, W / downsample) int64 of pixels (B, 3, H, W) float in [-1, 1].

        Raises ValueError when H or W is not a multiple of `downsample`.
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, h * downsample, w * downsample) float in [-1, 1] of codes (B, h, w) int64.

        Raises ValueError, with value and place, on a code outside ``[0, codebook_size)``.
        """
        ...


class TokenizerBase(nn.Module):
    """Checks, precision and fingerprint; a class adds the network.

    Pictures may have any size in multiples of `downsample`. Encoding and decoding compute in the dtype of the weights,
    whatever autocast and TF32 are set to, so that a picture keeps its codes from one use to the next.
    """

    codebook_size: int
    downsample: int
    init_args: dict[str, Any]
    """The constructor's arguments, as plain JSON values."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of arguments and weights, computed at each call."""
        return fingerprint(self.init_args, self.state_dict())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, H / downsample, W / downsample) int64 of pixels (B, 3, H, W) float in [-1, 1].

        Raises ValueError when H or W is not a multiple of `downsample`.
        """
        require_whole_patches(pixels, self.downsample)
        weights = (weight for weight in self.parameters() if weight.is_floating_point())
        dtype = next((weight.dtype for weight in weights), torch.float32)
        with full_precision(pixels.device):
            return self._encode(pixels.to(dtype)).long()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, h · downsample, w · downsample) float32 in [-1, 1] of codes (B, h, w) integer.

        Raises ValueError, with value and place, on a code outside ``[0, codebook_size)``.
        """
        require_codes(codes, self.codebook_size)
        with full_precision(codes.device):
            return self._decode(codes.long()).float().clamp(-1, 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, h, w) of checked pixels."""
        raise NotImplementedError

    def _decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), not bounded, of checked codes."""
        raise NotImplementedError


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products in the dtype of their operands: without autocast, and without TF32.

    GPUs compute float32 convolutions in TF32 by default, 10 bits of mantissa, which moves pictures across the border
    between two codes: they must keep their codes from one use to the next.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def to_pixels(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float32 in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1


def require_whole_patches(pixels: Tensor, downsample: int) -> None:
    """Raise ValueError unless pixels are (B, 3, H, W) with H and W multiples of `downsample`."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}, not (B, 3, H, W).")
    height, width = pixels.shape[-2:]
    if height % downsample or width % downsample:
        raise UserError(
            f"a picture of {height} x {width} pixels is not made of whole patches of {downsample} x {downsample}: "
            f"resize or crop it to multiples of {downsample}."
        )


def require_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise ValueError unless codes are (B, h, w) in ``[0, codebook_size)``."""
    if codes.ndim != 3:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, not (B, h, w).")
    outside = (codes < 0) | (codes >= codebook_size)
    if outside.any():
        image, row, column = outside.nonzero()[0].tolist()
        raise UserError(
            f"code {int(codes[image, row, column])} at image {image}, row {row}, column {column} lies outside "
            f"[0, {codebook_size}): the codes were made with another visual tokenizer or are damaged. Decode them "
            "with the tokenizer that made them."
        )


def fingerprint(init_args: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over arguments and weights; the same on every device, another when one weight differs."""
    digest = hashlib.sha256(json.dumps(dict(init_args), sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
