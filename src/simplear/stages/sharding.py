"""FSDP2 for a language model: the strategy, and what every stage's ``configure_model`` calls.

Lightning's own ``fsdp`` is FSDP1, which the stages do not shard for: it refuses CPUs, so that no test runs it here, and
cannot clip gradients by norm.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from simplear.errors import UserError
from simplear.language_model import LanguageModel
from simplear.states import DAMAGED, damage

FSDP2_NAME = "fsdp2"
MIXED = "bf16-mixed"
"""The Trainer's precision under which shards are float32 and gathered weights bfloat16."""


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all processes, however many there are; ``--trainer.strategy fsdp2``.

    Takes the arguments of ModelParallelStrategy; its two sizes follow from the number of processes.
    """

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises UserError, naming it, for a damaged state, which PyTorch would load in part without noticing."""
        state = Path(checkpoint_path)
        reason = self.broadcast(damage(state) if self.global_rank == 0 and state.exists() else None)
        if reason is not None:
            raise UserError(DAMAGED.format(state, reason))
        return super().load_checkpoint(checkpoint_path, weights_only)

    def setup_environment(self) -> None:
        """One mesh of all processes, once their number is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


StrategyRegistry.register(FSDP2_NAME, FSDP2, description="weights, gradients, optimizer sharded over all processes")


def refuse_fsdp1(strategy: Any) -> None:
    """Raises ValueError for Lightning's FSDP1, given by name, class path or object."""
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", type(strategy).__name__)
    if path == "fsdp" or path.startswith("fsdp_") or path.rpartition(".")[2] == "FSDPStrategy":
        raise UserError(
            f"--trainer.strategy {path} is FSDP1, which no stage shards for; write --trainer.strategy {FSDP2_NAME}."
        )


def leave_ranks() -> None:
    """Destroy the process group after the work is done, or saved to be resumed.

    Lightning does so for NCCL alone; gloo's threads, where they outlive the interpreter, can turn an exit code of 0
    into an abort. They end with the last object that refers to the group, such as the mesh of a sharded model. Not to
    be called after an error: the other ranks may be in a collective, for which the group would wait.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def shard_language_model(model: LanguageModel, mesh: DeviceMesh, precision: str = "32-true") -> LanguageModel:
    """Shard in place: each decoder layer by itself, embeddings, final norm and head with the root.

    Under `bf16-mixed` weights are gathered in bfloat16, half of what would travel, and gradients added up in float32;
    shards, and with them the optimizer and exports, stay float32. As with autocast on one process, the residual stream
    is float32: layers get their inputs uncast, and embeddings are widened.

    Args:
        model: whole and equal on every rank. Each rank keeps its shards on the mesh's device and frees the rest.
        mesh: the data-parallel mesh.
        precision: the Trainer's.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if precision == MIXED:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        model.decoder.model.embed_tokens.register_forward_hook(_widened)
    for layer in model.decoder.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for method in ("hidden_states", "image_logits", "image_log_probs"):
        register_fsdp_forward_method(model, method)
    return model


def _widened(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
    return embedded.float()
