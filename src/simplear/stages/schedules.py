"""The learning-rate schedule of the paper's released GRPO runs, by class_path."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from simplear.errors import UserError


class CosineWithWarmup(LambdaLR):
    """Linear warm-up from 0, then half a cosine down to a share of the configured rate.

    Args:
        optimizer: its groups' learning rates are the highest.
        total_steps: optimizer steps in all; afterwards the rate stays at the end.
        warmup: share of the steps that warm up, in [0, 1).
        end: share of the rate at the end, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, end: float = 0.1) -> None:
        if total_steps < 1 or not 0 <= warmup < 1 or not 0 <= end <= 1:
            raise UserError(f"total_steps {total_steps}, warmup {warmup}, end {end}: need ≥ 1, [0, 1) and [0, 1].")
        self.total_steps, self.warmup, self.end = total_steps, warmup, end
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        warm = self.warmup * self.total_steps
        if step < warm:
            return (step + 1) / (math.ceil(warm) + 1)
        progress = min((step - warm) / max(self.total_steps - warm, 1), 1.0)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * progress)) / 2
