"""The norm of the gradient before it is clipped, as a curve of every training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs ``train/gradient_norm``; every stage with automatic optimization has it, and GRPO measures its own."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning clips after this."""
        pl_module.log("train/gradient_norm", gradient_norm(optimizer))


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Euclidean norm over all gradients, scalar, shards of all ranks included; all ranks call together."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm: Any = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
