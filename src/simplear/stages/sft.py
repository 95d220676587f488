"""Supervised fine-tuning: the same objective at a higher resolution on better data, from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from simplear.language_model import LanguageModel, load_checkpoint
from simplear.stages.next_token import NextTokenModule


class SFTModule(NextTokenModule):
    """The paper's second stage (section 3.2; lr 2e-5, 256 images a batch, 1024 px).

    Args:
        checkpoint: directory or hub id of a pretraining checkpoint, or of one released with the paper.
        kwargs: the arguments of `NextTokenModule`; where ``generation`` is None the checkpoint's defaults stay, where
            ``visual_tokenizer`` is None the checkpoint's own is kept.
    """

    def __init__(self, checkpoint: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """Load the checkpoint's weights in float32, to be trained."""
        loaded = load_checkpoint(self.checkpoint, dtype=torch.float32)
        self.start_fingerprint = loaded.settings.visual_tokenizer_fingerprint
        self.start_downsample = loaded.settings.downsample
        if self.generation is None:
            self.generation = loaded.settings.generation
        if self.visual_tokenizer_path is None and loaded.visual_tokenizer_path is not None:
            self.visual_tokenizer_path = str(loaded.visual_tokenizer_path)
        return loaded.model, loaded.tokenizer
