"""TorchScript files with the interface of Cosmos DV8x16x16 and a few hundred weights."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

LEVELS = (8, 8, 8, 5, 5, 5)
RELEASED_CONFIG = '{"architectures": ["CosmosTokenizer"],}'
"""What stands beside the released files: a comma too many for JSON."""


class Encoder(nn.Module):
    """(B, 3, T, H, W) → indices (B, T, h, w) int32, quantised values (B, 6, T, h, w), a loss: as the real one gives."""

    def __init__(self, shift: int = 0, patch: int = 16) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, 6, (1, patch, patch), (1, patch, patch))
        self.register_buffer("levels", torch.tensor(LEVELS))
        self.register_buffer("basis", torch.tensor([1, 8, 64, 512, 2560, 12800]))
        self.shift = shift

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bounded = torch.sigmoid(4 * self.convolution(video)).movedim(1, -1)
        digits = (bounded * self.levels).floor().minimum(self.levels - 1)
        values = (digits - self.levels // 2) / (self.levels // 2)
        indices = (digits.float() * self.basis).sum(-1).int() + self.shift
        return indices, values.movedim(-1, 1), video.new_zeros(1)


class Decoder(nn.Module):
    """Indices (B, T, h, w) → (B, 3, T, H, W)."""

    def __init__(self, patch: int = 16) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose3d(6, 3, (1, patch, patch), (1, patch, patch))
        self.register_buffer("levels", torch.tensor(LEVELS))
        self.register_buffer("basis", torch.tensor([1, 8, 64, 512, 2560, 12800]))

    def forward(self, indices: Tensor) -> Tensor:
        digits = (indices.unsqueeze(-1) // self.basis) % self.levels
        values = ((digits - self.levels // 2) / (self.levels // 2)).movedim(-1, 1)
        return self.convolution(values.to(self.convolution.weight.dtype))


def write(
    directory: Path, encoder: nn.Module | None = None, decoder: nn.Module | None = None, sums: bool = True
) -> Path:
    """Both files, with their hashes beside them if `sums`."""
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch no longer recommends TorchScript; the files stay
        for name, module in (("encoder.jit", encoder or Encoder()), ("decoder.jit", decoder or Decoder())):
            torch.jit.script(module.eval()).save(str(directory / name))
            lines.append(f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n")
    (directory / "config.json").write_text(RELEASED_CONFIG)
    if sums:
        (directory / "SHA256SUMS").write_text("".join(lines))
    return directory
