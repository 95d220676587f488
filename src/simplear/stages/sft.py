"""Supervised fine-tuning: the same objective at a higher resolution on better data, from a checkpoint."""

from __future__ import annotations

from typing import Any

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
