"""Pretraining: next-token prediction at low resolution, from random weights or from a language model (Table 2)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from simplear.errors import UserError
from simplear.language_model import LanguageModel, LanguageModelConfig, NamedWeights
from simplear.stages.next_token import NextTokenModule


class PretrainModule(NextTokenModule):
    """The paper's first stage (section 3.2; lr 1e-4, 256 images a batch, 512 px).

    Args:
        language_model: what to build; ``pretrained`` in it is the one key between the two columns of Table 2.
        kwargs: the arguments of `NextTokenModule`.
    """

    def __init__(self, language_model: LanguageModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = language_model
        if self.adapter is not None:
            raise UserError(
                "pretraining gives new rows and all layers their meaning, for which an adapter is too little: leave "
                "model.init_args.adapter to fine-tuning and reinforcement learning."
            )

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """Build from the configuration."""
        return self.config.build()

    def empty_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase, NamedWeights]:
        """As above, one weight at a time."""
        return self.config.build_empty()
