"""The frozen reference of GRPO: the policy as it was at the start, kept out of the training state.

It is no submodule of the stage, so no .ckpt holds it and no optimizer, wrapper or precision plugin finds it; after a
resume it is read from the same checkpoint again. In the policy's own compute dtype it gives the policy's log-probs bit
for bit as long as their weights are equal. With an adapter the reference is the policy with its adapter off, and there
is no copy.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from simplear.device import resolve_device
from simplear.errors import UserError
from simplear.language_model import LanguageModel, adapter_off
from simplear.stages.sharding import copy_shards, shard_language_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceSettings:
    """Where the reference lives, and in which precision."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of its weights; None is the policy's, with which the KL term is exactly 0 at the first update."""
    device: str | None = None
    """Such as "cuda:1"; None is the policy's."""
    offload: bool = False
    """Keep the weights on CPU between uses; they travel to the device once a rollout."""


class Reference:
    """Log-probs under frozen weights.

    Args:
        policy: the language model to copy, before training; whole, or sharded over ``mesh``.
        settings: where and in which precision.
        mesh: shard the copy over this data-parallel mesh, as the policy is; None keeps it whole.
        precision: the Trainer's, in which a sharded copy's weights are gathered.
        shared: the policy has an adapter, without which it is the reference.

    Raises:
        ValueError: another device or offloading together with sharding, which already spreads the weights.
    """

    def __init__(
        self,
        policy: LanguageModel,
        settings: ReferenceSettings,
        mesh: DeviceMesh | None = None,
        precision: str = "32-true",
        shared: bool = False,
    ) -> None:
        if mesh is not None and (settings.device is not None or settings.offload):
            raise UserError("a sharded reference lives where the policy does: leave reference.device and offload out.")
        self.settings, self.shared = settings, shared
        self.sharded = mesh is not None
        if shared:
            if settings != ReferenceSettings():
                logger.info("%s: with an adapter the reference is the policy itself, and needs none of it", settings)
            self.model, self.settings = policy, ReferenceSettings()
            return
        if mesh is None:
            self.model = copy.deepcopy(policy)
        else:
            with torch.device("meta"):
                self.model = LanguageModel(type(policy.decoder)(policy.decoder.config), policy.layout)
            weight = next(policy.parameters())
            self.model.to(weight.dtype if settings.dtype is None else getattr(torch, settings.dtype))
            shard_language_model(self.model, mesh, precision)
            copy_shards(policy, self.model, weight.device)
        self.model.eval().requires_grad_(False)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take the place and the precision that the settings and the policy's own give; before the first use."""
        self.device = device if self.settings.device is None else resolve_device(self.settings.device)
        if not (self.sharded or self.shared):
            wanted = dtype if self.settings.dtype is None else getattr(torch, self.settings.dtype)
            self.model.to(device="cpu" if self.settings.offload else self.device, dtype=wanted)

    @torch.no_grad()
    def log_probs(
        self, sequences: list[Tensor], grid: tuple[int, int], temperature: float, chunk_rows: int | None, packed: bool
    ) -> list[Tensor]:
        """Log-probs (B, T) of the codes of each micro-batch of sequences (B, L), on the sequences' device."""
        if self.settings.offload:
            self.model.to(self.device)
        options: dict[str, Any] = {"temperature": temperature, "chunk_rows": chunk_rows, "packed": packed}
        with adapter_off(self.model) if self.shared else nullcontext():
            found = [
                self.model.image_log_probs(ids.to(self.device), grid, with_entropies=False, **options)[0].to(ids.device)
                for ids in sequences
            ]
        if self.settings.offload:
            self.model.to("cpu")
        return found
