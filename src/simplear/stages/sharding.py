"""FSDP2 for a language model: one function that every stage's ``configure_model`` calls, and one for drawing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

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
    for method in ("hidden_states", "image_logits", "image_log_probs"):
        register_fsdp_forward_method(model, method)
    return model


@contextmanager
def gathered(model: LanguageModel) -> Iterator[None]:
    """Keep a sharded model's weights whole inside, so that drawing gathers them once and not once a code.

    All ranks enter and leave together. A model that is not sharded is left as it is.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    layers = [part for part in parts if part is not model]
    for part in parts:
        # Not in inference mode: what is gathered there could not be trained with afterwards.
        part.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()
