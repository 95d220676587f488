"""The weights of a decoder one at a time, for a model of which no process may hold the whole.

The decoder itself is on the meta device: names, shapes and types without memory. It may be sharded once the functions
here have returned. Whoever takes the weights keeps what it wants of each before it asks for the next. They are, bit for
bit, those that the decoder has when it is built whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from simplear.errors import UserError

NamedWeights = Iterator[tuple[str, Tensor]]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def random_weights(decoder: Qwen2ForCausalLM) -> NamedWeights:
    """Random weights as transformers draws them, from torch's global generator: seed it first.

    A decoder that is built whole has its layers filled twice, by PyTorch as they are constructed and by transformers
    afterwards, first those of the model, then the head. The same numbers are drawn here in the same order, and the
    first ones dropped.
    """
    return _drawn(copy.deepcopy(decoder))


@torch.no_grad()
def _drawn(decoder: Qwen2ForCausalLM) -> NamedWeights:
    shared = decoder.lm_head.weight is decoder.model.embed_tokens.weight
    for part, prefix in ((decoder.model, "model."), (decoder.lm_head, "lm_head.")):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                _with_memory(module).reset_parameters()
        for name, module in part.named_modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            filled = _with_memory(module)
            decoder._init_weights(filled)
            if part is decoder.lm_head and shared:
                continue
            for suffix, weight in filled.named_parameters(recurse=False):
                yield f"{prefix}{name}.{suffix}" if name else f"{prefix}{suffix}", weight


def _with_memory(module: nn.Module) -> Any:
    return copy.deepcopy(module).to_empty(device="cpu")


def stored_weights(decoder: Qwen2ForCausalLM, directory: str | Path, text_rows: int | None = None) -> NamedWeights:
    """Weights from the safetensors files of a directory, mapped: what is not looked at is not read.

    Args:
        decoder: of the architecture that is stored.
        text_rows: embeddings are grown (or cut) to the decoder's rows: those from here on are the mean of those before.
            None cuts the padding of embeddings that have more rows than the decoder.

    Raises ValueError naming the first one that the files lack or have in another shape.
    """
    files = [safe_open(file, "pt") for file in sorted(Path(directory).glob("*.safetensors"))]
    if not files:
        raise UserError(
            f"{directory} has no *.safetensors, which sharded training reads its weights from: save the model in that "
            "format."
        )
    stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no dict
    shapes = {name: list(weight.shape) for name, weight in decoder.named_parameters()}
    # A model without head is stored without the decoder's prefix.
    names = {name: name if name in stored else name.removeprefix("model.") for name in shapes}
    wrong = []
    for name, wanted in shapes.items():
        shape = stored[names[name]].get_slice(names[name]).get_shape() if names[name] in stored else None
        if text_rows is not None and name in EMBEDDINGS and shape is not None:
            require_rows(text_rows, shape[0])
            shape = [wanted[0], *shape[1:]]
        elif name in EMBEDDINGS and shape is not None:
            shape = [min(shape[0], wanted[0]), *shape[1:]]
        if shape != wanted:
            wrong.append(name)
    require_all(directory, wrong)

    def read() -> NamedWeights:
        for name, wanted in shapes.items():
            weight = stored[names[name]].get_tensor(names[name])
            if text_rows is not None and name in EMBEDDINGS:
                weight = _grown(weight.float(), text_rows, wanted[0])
            elif name in EMBEDDINGS:
                weight = weight[: wanted[0]]
            yield name, weight

    return read()


def _grown(weight: Tensor, text_rows: int, rows: int) -> Tensor:
    grown = weight.new_empty(rows, weight.shape[1])
    grown[:text_rows] = weight[:text_rows]
    fill_new_rows(grown, text_rows)
    return grown


def fill_new_rows(weight: Tensor, text_rows: int) -> None:
    """Set the rows of an embedding (rows, D) from ``text_rows`` on, in place, to the mean of those before."""
    weight[text_rows:] = weight[:text_rows].mean(dim=0)


def require_rows(text_rows: int, rows: int) -> None:
    """Raises ValueError where a tokenizer has more ids than a model has rows."""
    if text_rows > rows:
        raise UserError(
            f"the tokenizer has {text_rows} ids but the pretrained model {rows} rows: they do not belong together."
        )


def require_all(directory: str | Path, wrong: list[str]) -> None:
    """Raises ValueError where weights of a directory are missing or of another shape."""
    if wrong:
        raise UserError(
            f"the weights in {directory} are no Qwen2 of this configuration: {len(wrong)} are missing or of another "
            f"shape, the first is {min(wrong)}."
        )
