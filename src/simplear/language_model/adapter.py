"""LoRA: the decoder's matrices stay as they are, and small ones beside them are trained (Hu et al. 2021).

`peft` puts its layers into the decoder in place, so that everything that calls the decoder goes through them. Where a
matrix itself is read, by the fused engines and by exports, `merged_weight` gives it with what the adapter adds.

Rows of codes are trained as a tensor of their own (`CodeRows`). peft's ``trainable_token_indices`` would copy the whole
matrix in each pass, keep the original rows in every state, and give the trained rows as ``weight`` also while it is
switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplear.errors import UserError

if TYPE_CHECKING:
    from simplear.language_model.model import LanguageModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a decoder layer."""
NAME = "default"
"""Of the adapter within peft's layers."""


@dataclass(frozen=True)
class Adapter:
    """What is trained in place of all weights."""

    r: int = 16
    """Rank of what is added to a matrix."""
    alpha: float | None = None
    """What is added is multiplied by alpha / r; None is 2 r."""
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    """Matrices of each layer: some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    code_rows: bool = False
    """Train the rows of the codes in embedding and head too; those of text stay."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers outside their range and for other matrices."""
        names = set(self.target_modules)
        if self.r < 1 or self.scale <= 0 or not names or not names <= set(TARGETS):
            raise UserError(
                f"{self}: r must be at least 1, alpha above 0, and target_modules some of {', '.join(TARGETS)}; "
                "embedding and head have code_rows."
            )

    @property
    def scale(self) -> float:
        """alpha."""
        return 2 * self.r if self.alpha is None else self.alpha


class CodeRows(nn.Module):
    """An embedding or head whose rows of codes are trained and whose other rows stay.

    Args:
        base_layer: the whole one.
        first_code: its row; the codes are the last rows.
        tied: the embedding whose trained rows are this head's too.
    """

    rows: nn.Parameter

    def __init__(self, base_layer: nn.Embedding | nn.Linear, first_code: int, tied: CodeRows | None = None) -> None:
        super().__init__()
        self.base_layer, self.first_code, self.enabled = base_layer.requires_grad_(False), first_code, True
        self.rows = nn.Parameter(base_layer.weight[first_code:].detach().clone()) if tied is None else tied.rows

    def enable_adapters(self, enabled: bool) -> None:
        """The method of peft's layers: False gives the rows that training began with."""
        self.enabled = enabled

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the weight, in the dtype of those that stay; nothing is copied that is of one kind."""
        base = self.base_layer.weight
        if not self.enabled or rows.stop <= self.first_code:
            return base[rows]
        trained = self.rows.to(base.dtype)[max(rows.start - self.first_code, 0) : rows.stop - self.first_code]
        return trained if rows.start >= self.first_code else torch.cat([base[rows.start : self.first_code], trained])

    @property
    def weight(self) -> Tensor:
        """All rows."""
        return self[0 : len(self.base_layer.weight)]

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of ids, or logits of hidden states."""
        if isinstance(self.base_layer, nn.Linear):
            return F.linear(x, self.weight)
        embedded = self.base_layer(x)
        if not self.enabled:
            return embedded
        trained = F.embedding((x - self.first_code).clamp(min=0), self.rows).to(embedded.dtype)
        return torch.where((x >= self.first_code)[..., None], trained, embedded)


def add_adapter(model: LanguageModel, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
    """Freeze a model and put an adapter into it, which at first changes nothing.

    Args:
        model: whole. The adapter's random half comes from torch's global generator.
        adapter: which.
        dtype: of the weights that stay; None leaves it. What is trained keeps the model's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.scale,  # type: ignore[arg-type]  # peft divides it and says int
        target_modules=list(adapter.target_modules),
    )
    inject_adapter_in_model(config, model.decoder, NAME)
    layer: Any
    for layer in model.decoder.modules():
        if hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = False  # autocast has the right dtype, and peft's copy would be kept
    if adapter.code_rows:
        decoder, first_code = model.decoder, model.layout.image_token_offset
        rows = CodeRows(decoder.model.embed_tokens, first_code)
        decoder.lm_head = CodeRows(decoder.lm_head, first_code, rows if decoder.config.tie_word_embeddings else None)  # type: ignore[assignment]
        decoder.model.embed_tokens = rows  # type: ignore[assignment]
    if dtype is not None:
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(dtype)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before training, inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, (BaseTunerLayer, CodeRows))]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_weight(layer: Any) -> Tensor:
    """Weight of a linear layer or embedding with what is trained in it; in float32 or wider if something is added."""
    if isinstance(layer, CodeRows):
        return torch.cat([layer.base_layer.weight[: layer.first_code].to(layer.rows.dtype), layer.rows])
    if not hasattr(layer, "lora_A"):
        return layer.weight
    added = layer.get_delta_weight(NAME)
    return layer.weight + added.to(torch.promote_types(added.dtype, torch.float32))


@torch.no_grad()
def merged_model(model: LanguageModel) -> LanguageModel:
    """The plain model that a model with an adapter computes, on CPU; its weights are copies.

    In float32 or wider: what was added to weights in bfloat16 would partly be lost in them.
    """
    trained, merged = trained_names(model), {}
    for name, weight in model.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner and rest == "weight":
            weight = merged_weight(model.get_submodule(owner))
        if name not in trained:
            wide = torch.promote_types(weight.dtype, torch.float32)
            merged[f"{owner}.{rest}" if owner else name] = weight.to("cpu", wide, copy=True)
    with torch.device("meta"):
        plain = type(model)(type(model.decoder)(copy.deepcopy(model.decoder.config)), model.layout)
    plain.load_state_dict(merged, assign=True)
    plain.decoder.tie_weights()
    plain.decoder.model.rotary_emb = copy.deepcopy(model.decoder.model.rotary_emb).cpu()
    plain.decoder.generation_config = model.decoder.generation_config
    return plain.eval()


def trained_names(model: nn.Module) -> set[str]:
    """Names in the state of the weights that are trained, a tied one's both."""
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in trained}
