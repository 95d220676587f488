"""How large a Qwen2 decoder is and how many floating-point operations it takes: exact, without building it.

FLOPs are counted as PyTorch's `FlopCounterMode` and the literature do: two for each multiplication with its addition
in a matrix product, attention over all pairs of places whether causal or not (Chowdhery et al. 2022, PaLM, appendix B),
nothing for a look-up of embeddings, norms or rotary angles. A backward pass takes twice the forward pass. Layers that
are computed again under activation checkpointing are counted apart: the model does not need them.

The sums are linear in the number of tokens and in the sum of squared lengths, so both may be tensors that stay on their
device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

from simplear.language_model.adapter import Adapter

Count = TypeVar("Count", int, float, Tensor)

TRAINING_PASSES = 3
"""Forward and backward, in forward passes."""


@dataclass(frozen=True)
class Architecture:
    """The numbers of a Qwen2 decoder that its size and its FLOPs follow from; ``vocab_size`` includes the codes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Of a transformers Qwen2Config."""
        numbers: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        numbers["head_dim"] = numbers["head_dim"] or config.hidden_size // config.num_attention_heads
        return cls(**numbers)

    @property
    def attention_width(self) -> int:
        """Of the queries of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Of the keys, or the values, of all heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by their names in transformers."""
        stream, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (stream, self.attention_width),
            "k_proj": (stream, self.key_value_width),
            "v_proj": (stream, self.key_value_width),
            "o_proj": (self.attention_width, stream),
            "gate_proj": (stream, inner),
            "up_proj": (stream, inner),
            "down_proj": (inner, stream),
        }

    @property
    def matrix_parameters_a_layer(self) -> int:
        """Of queries, keys, values, output and the three matrices of the MLP."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def parameters_a_layer(self) -> int:
        """With the biases of queries, keys and values, and two norms."""
        biases = self.attention_width + 2 * self.key_value_width
        return self.matrix_parameters_a_layer + biases + 2 * self.hidden_size

    @property
    def root_parameters(self) -> int:
        """Embedding, head where it is a matrix of its own, and the final norm."""
        matrices = 1 if self.tie_word_embeddings else 2
        return matrices * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the whole decoder."""
        return self.num_hidden_layers * self.parameters_a_layer + self.root_parameters

    def adapter_parameters(self, adapter: Adapter | None) -> int:
        """Of the small matrices beside those of the layers."""
        targets = [] if adapter is None else [adapter.r * sum(self.matrices[name]) for name in adapter.target_modules]
        return self.num_hidden_layers * sum(targets)

    def trained_parameters(self, adapter: Adapter | None, codebook_size: int) -> int:
        """All, or the adapter's with the rows of the codes if it trains them."""
        if adapter is None:
            return self.parameters
        rows = codebook_size * (1 if self.tie_word_embeddings else 2) if adapter.code_rows else 0
        return self.adapter_parameters(adapter) + rows * self.hidden_size

    def layer_flops(self, tokens: Count, squared_lengths: Count) -> Count:
        """One forward pass through all layers.

        Args:
            tokens: of all sequences together.
            squared_lengths: sum of the squares of their lengths.
        """
        products = 2 * self.num_hidden_layers * self.matrix_parameters_a_layer * tokens
        return products + 4 * self.num_hidden_layers * self.attention_width * squared_lengths

    def training_flops(self, tokens: Any, squared_lengths: Any, choices: Any, adapter: Adapter | None = None) -> Any:
        """Forward and backward pass through layers and head; arguments as `layer_flops` and `head_flops`.

        Frozen matrices need no gradient, which is one product of three.
        """
        head = self.head_flops(choices)
        added = 2 * self.adapter_parameters(adapter) * tokens
        everything = TRAINING_PASSES * (self.layer_flops(tokens, squared_lengths) + added + head)
        if adapter is None:
            return everything
        frozen = 2 * self.num_hidden_layers * self.matrix_parameters_a_layer * tokens
        return everything - frozen - (0 if adapter.code_rows else head)

    def recomputed_flops(self, tokens: Count, squared_lengths: Count, adapter: Adapter | None = None) -> Count:
        """What full activation checkpointing computes again: of each layer all but the last product.

        Its inputs alone are needed, and PyTorch's checkpoints stop when they have what is needed. Selective activation
        checkpointing computes no product of the model again, hence nothing that is counted here.
        """
        adapted = adapter is not None and "down_proj" in adapter.target_modules
        width = adapter.r if adapter is not None and adapted else self.intermediate_size
        last = 2 * self.num_hidden_layers * self.hidden_size * width * tokens
        return self.layer_flops(tokens, squared_lengths) + 2 * self.adapter_parameters(adapter) * tokens - last

    def head_flops(self, choices: Count) -> Count:
        """One forward pass through the head.

        Args:
            choices: sum over all predicted tokens of the number of ids that each is chosen among.
        """
        return 2 * self.hidden_size * choices

    def key_value_numbers(self, tokens: int) -> int:
        """Numbers in the KV cache of so many tokens."""
        return 2 * self.num_hidden_layers * self.key_value_width * tokens


@dataclass(frozen=True)
class StepWork:
    """What one training step processes on this rank; tensors stay on their device until somebody reads them.

    Args:
        images: sequences with an image, or images drawn.
        tokens: without padding.
        flops: those that the model needs, forward and backward; recomputed layers are not counted.
    """

    images: int
    tokens: int | Tensor
    flops: int | Tensor
