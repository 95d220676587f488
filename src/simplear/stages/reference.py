"""The frozen reference of GRPO: the policy as it was at the start, kept out of the training state.

It is not a submodule of the stage, so no .ckpt holds it and no optimizer, wrapper or precision plugin finds it; after a
resume it is read from the same checkpoint again. In the policy's own compute dtype it gives the policy's log-probs bit
for bit as long as their weights are equal. With an adapter the reference is the policy with its adapter off, and there
is no copy.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from simplear.errors import UserError
from simplear.language_model import LanguageModel, adapter_off
from simplear.stages.sharding import shard_language_model


@dataclass(frozen=True)
class ReferenceSettings:
    """Where the reference lives, and in which precision; with an adapter there is no copy, and neither counts."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of its weights; None is the policy's, with which the KL term is exactly 0 at the first update."""
    offload: bool = False
    """Keep the weights on CPU between uses; they travel to the device once a rollout. Not with FSDP2."""


class Reference:
    """Log-probs under frozen weights.

    Args:
        policy: the language model before training; whole.
        settings: where and in which precision.
        shared: the policy has an adapter, without which it is the reference.
        mesh: shard the copy over these processes, as the policy is; None keeps it whole.
        precision: the Trainer's, in which a sharded copy's weights are gathered.
    """

    def __init__(
        self,
        policy: LanguageModel,
        settings: ReferenceSettings,
        shared: bool = False,
        mesh: DeviceMesh | None = None,
        precision: str = "32-true",
    ) -> None:
        self.shared, self.sharded = shared, mesh is not None
        self.dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        self.offload = settings.offload and not shared
        if self.offload and self.sharded:
            raise UserError("a sharded reference is never whole on one device: leave reference.offload out.")
        self.model = policy if shared else copy.deepcopy(policy).eval().requires_grad_(False)
        if mesh is not None:
            if self.dtype is not None:
                self.model.to(self.dtype)
            shard_language_model(self.model, mesh, precision)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move a whole copy to the policy's device and, unless the settings name another, its dtype; before use."""
        self.device = device
        if not (self.sharded or self.shared):
            self.model.to("cpu" if self.offload else device, self.dtype or dtype)

    @torch.no_grad()
    def log_probs(self, sequences: list[Tensor], grid: tuple[int, int], **options: Any) -> list[Tensor]:
        """Log-probs (B, T) of the codes of each micro-batch of sequences (B, L).

        Args:
            options: of `LanguageModel.image_log_probs`.
        """
        if self.offload:
            self.model.to(self.device)
        with adapter_off(self.model) if self.shared else nullcontext():
            options = {**options, "with_entropies": False}
            log_probs = [self.model.image_log_probs(ids, grid, **options)[0] for ids in sequences]
        if self.offload:
            self.model.to("cpu")
        return log_probs
