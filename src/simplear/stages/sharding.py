"""FSDP2 for a language model: one function that every stage's ``configure_model`` calls."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from simplear.language_model import LanguageModel


def shard_language_model(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Shard in place: each decoder layer by itself, embeddings, final norm and head with the root.

    Args:
        model: whole and equal on every rank.
        mesh: the data-parallel mesh.
    """
    for layer in model.decoder.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("hidden_states", "image_logits"):
        register_fsdp_forward_method(model, method)
    return model
