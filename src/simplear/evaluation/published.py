"""Numbers published elsewhere, to stand beside ours, never among them: other weights, other scorers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Numbers of one benchmark."""

    rows: Mapping[str, Mapping[str, float]]
    """By model: ``overall`` and categories, all in [0, 1]."""
    source: str
    """Where they stand, and what they were measured with."""


PUBLISHED: Mapping[str, Published] = {
    "geneval": Published(
        {
            "0.5B SFT": {"two_object": 0.73, "position": 0.22, "color_attr": 0.23, "overall": 0.53},
            "0.5B GRPO": {"two_object": 0.82, "position": 0.26, "color_attr": 0.38, "overall": 0.59},
            "1.5B SFT": {"two_object": 0.87, "position": 0.27, "color_attr": 0.33, "overall": 0.61},
            "1.5B GRPO": {"two_object": 0.90, "position": 0.28, "color_attr": 0.45, "overall": 0.63},
        },
        "published, not measured here: SimpleAR (arXiv 2504.11455), Table 4, by GenEval's official program; GRPO with "
        "the CLIP reward.",
    ),
    "dpg": Published(
        {
            "0.5B SFT": {"overall": 0.7934},
            "0.5B GRPO": {"global": 0.8664, "relation": 0.8851, "overall": 0.7966},
            "1.5B, Table 1": {"global": 0.8797, "relation": 0.8833, "overall": 0.8197},
            "1.5B SFT": {"overall": 0.8011},
            "1.5B GRPO": {"overall": 0.8131},
        },
        "published, not measured here: SimpleAR (arXiv 2504.11455), Table 1 (0.5B GRPO and 1.5B), and its repository "
        "(the others), by the benchmark's official judge.",
    ),
}
"""By benchmark, as the setting ``benchmark`` of a run names it."""
