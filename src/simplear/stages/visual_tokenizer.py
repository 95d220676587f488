"""Training a visual tokenizer: reconstruct pictures through their codes.

The stage asks two things of the tokenizer: ``forward(pixels) → (reconstruction, codes)`` for training and the methods
of `VisualTokenizer` for everything after. It draws no random numbers of its own, so a resumed run repeats an
uninterrupted one bit for bit as soon as its data does. Adversarial and perceptual losses are left out: the tokenizer
of the paper comes pretrained, and flat drawings need neither.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from simplear.atomic import require_replaceable
from simplear.data import ImageDataModule
from simplear.errors import UserError
from simplear.stages.optimized import OptimizedModule
from simplear.stages.picture_loggers import log_picture, picture_loggers
from simplear.visual_tokenizer import save_visual_tokenizer

LARGEST_DIFFERENCE = 2.0
"""Between two values of pixels in [-1, 1]."""

GRID_PICTURES = 8
"""Of the first validation batch, shown over their reconstructions."""

CONTRAST_THRESHOLD = 0.05
"""Difference from a picture's median colour, a share of the largest one, above which a pixel stands out."""

CONTRAST_REACH = 2
"""Pixels around one that stands out which count as much as it does; without them, outlines swell and notches fill."""


def reconstruction_loss(reconstruction: Tensor, pixels: Tensor, contrast_weight: float = 0.0) -> Tensor:
    """Mean absolute error, scalar; what differs from its picture's background may count more, with its surroundings.

    Args:
        reconstruction: (B, 3, H, W) float.
        pixels: (B, 3, H, W) float in [-1, 1].
        contrast_weight: added to the weight, 1, of each pixel that differs from its picture's median colour by more
            than `CONTRAST_THRESHOLD` in some channel, and of all pixels up to `CONTRAST_REACH` away. 0: the plain mean.
    """
    error = (reconstruction - pixels).abs()
    if contrast_weight == 0:
        return error.mean()
    median = pixels.flatten(2).median(dim=2).values[:, :, None, None]
    contrast = (pixels - median).abs().amax(dim=1, keepdim=True) / LARGEST_DIFFERENCE
    stands_out = (contrast > CONTRAST_THRESHOLD).to(pixels.dtype)
    near = F.max_pool2d(stands_out, 2 * CONTRAST_REACH + 1, stride=1, padding=CONTRAST_REACH)
    return (error * (1 + contrast_weight * near)).mean()


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of (B, 3, H, W) in [-1, 1], as on [0, 1]; infinite where they are equal."""
    squared = ((reconstruction.clamp(-1, 1) - pixels) / LARGEST_DIFFERENCE).square().flatten(1).mean(dim=1)
    return -10 * squared.log10()


def codebook_use(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the codebook that occurs, in [0, 1], and perplexity of the codes, in [1, size], from counts (size,)."""
    probability = counts.double() / counts.sum()
    entropy = -torch.xlogy(probability, probability).sum()
    return (counts > 0).double().mean(), entropy.exp()


def reconstruction_grid(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Originals in a row over their reconstructions, (3, 2 H, B W) in [0, 1], from two (B, 3, H, W) in [-1, 1]."""
    rows = [torch.cat(list(pictures), dim=2) for pictures in (pixels, reconstruction.clamp(-1, 1))]
    return (torch.cat(rows, dim=1) + 1) / 2


class VisualTokenizerModule(OptimizedModule):
    """Batches are ``{"pixels": (B, 3, H, W) float in [-1, 1], …}``; other keys are not read."""

    def __init__(
        self,
        tokenizer: nn.Module,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        contrast_weight: float = 0.0,
        export_dir: str | None = None,
    ) -> None:
        """Takes the tokenizer's weights as they are.

        Args:
            tokenizer: the visual tokenizer to train, such as simplear.visual_tokenizer.FSQAutoencoder.
            optimizer: any torch optimizer class by class_path. Biases get no weight decay.
            lr_scheduler: any scheduler class by class_path, stepped every optimizer step; none keeps the rate constant.
            contrast_weight: extra weight in the loss of what stands out from its picture's median colour; 0 for none.
            export_dir: where to write the trained tokenizer when training ends; none writes nothing.
        """
        super().__init__(optimizer, lr_scheduler, export_dir)
        self.tokenizer = tokenizer
        self.contrast_weight = contrast_weight
        self.code_counts = torch.empty(0)
        """(codebook_size,) int64 of the running validation; not a buffer, since averaging callbacks average those."""

    @property
    def trained_module(self) -> nn.Module:
        """The visual tokenizer."""
        return self.tokenizer

    def on_fit_start(self) -> None:
        """Check sizes and ``export_dir`` before the first step is paid for."""
        if self.export_dir is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            require_replaceable(self.export_dir, "the trained tokenizer", "--model.init_args.export_dir")
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """Check the size of pictures; `on_fit_start` does so too."""
        data, downsample = getattr(self.trainer, "datamodule", None), self.tokenizer.downsample
        if isinstance(data, ImageDataModule) and (data.height % downsample or data.width % downsample):  # type: ignore[operator]
            raise UserError(
                f"--data.height {data.height} and --data.width {data.width} must be multiples of the tokenizer's "
                f"downsample, {downsample} pixels a code."
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        reconstruction, _ = self.tokenizer(batch["pixels"])
        loss = reconstruction_loss(reconstruction, batch["pixels"], self.contrast_weight)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        size = int(self.tokenizer.codebook_size)  # type: ignore[arg-type]
        self.code_counts = torch.zeros(size, dtype=torch.long, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pixels = batch["pixels"]
        reconstruction, codes = self.tokenizer(pixels)
        self.code_counts += codes.flatten().bincount(minlength=len(self.code_counts))
        values = {
            "validation/loss": reconstruction_loss(reconstruction, pixels, self.contrast_weight),
            "validation/psnr": psnr(reconstruction, pixels).mean(),
        }
        self.log_dict(values, prog_bar=True, batch_size=len(pixels), sync_dist=True)
        if batch_idx == 0 and picture_loggers(self.trainer):
            shown = slice(GRID_PICTURES)
            grid = reconstruction_grid(reconstruction[shown].float(), pixels[shown].float())
            picture = (grid * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            log_picture(self.trainer, "validation/reconstructions", picture)

    def on_validation_epoch_end(self) -> None:
        counts = self.trainer.strategy.reduce(self.code_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        used, perplexity = codebook_use(counts)
        values = {"validation/codebook_used": used.float(), "validation/code_perplexity": perplexity.float()}
        self.log_dict(values, sync_dist=True)

    def export(self, directory: str) -> None:
        """Write the tokenizer."""
        save_visual_tokenizer(self.tokenizer, directory)  # type: ignore[arg-type]
