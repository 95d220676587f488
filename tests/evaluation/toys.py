"""A Mask2Former of a few thousand weights with COCO's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from simplear.evaluation.geneval import object_names

COCO_SPELLING = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
COCO = [COCO_SPELLING.get(name, name) for name in object_names()]
"""The 80 classes as COCO spells them, in its order."""


def save_detector(directory: Path, labels: list[str] = COCO, certain_of: str | None = None) -> None:
    """Save one with random weights, and its processor.

    Args:
        directory: to write.
        labels: of the classes.
        certain_of: a class that all queries are made to name with certainty.
    """
    torch.manual_seed(0)
    backbone: Any = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    network = Mask2FormerForUniversalSegmentation(config)
    if certain_of is not None:
        with torch.no_grad():
            network.class_predictor.bias[labels.index(certain_of)] = 20.0
    network.save_pretrained(directory)
    Mask2FormerImageProcessor(ignore_index=255, do_reduce_labels=False).save_pretrained(directory)
