"""Verifiable reward on drawn scenes: an exact detector (`simplear.scenes`) checks what each prompt's metadata asks for.

The score is the judge's verdict together with grades of how much of what is asked for is there, so that among wrong
images the nearer ones score more. Costs are subtracted for what the judge accepts and a policy soon exploits: extra
objects, litter below the detector's threshold, and colours and a background other than the caption's. An image scores 1
only if the judge accepts it and nothing costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simplear.errors import UserError
from simplear.rewards.protocol import RewardOfParts
from simplear.scenes import BACKGROUNDS, MATCH, Detection, background_name, detect, judge, residue

GRADES = ("correct", "objects", "color", "count", "relation")
"""Parts in [0, 1], 1 for right. A part that the category does not ask for is 1 and does not count in the score."""

COSTS = ("extra", "residue", "looseness", "details")
"""Parts from 0: number of extra objects, residue as a share of the area, looseness of the shapes in [0, 1], share of
wrong details."""

GOOD_MATCH = 0.9
"""Overlap with its mask from which on a shape is not loose; drawings reach 0.96, the detector accepts `MATCH`."""

WELL_PLACED = 0.8
"""Largest grade of a relation that does not hold; the further the direction is off, the lower the grade."""


class SceneReward(RewardOfParts):
    """Scores in [0, 1].

    score = (weighted mean of the grades that the category asks for) · exp(−(weighted sum of the costs)), which orders
    bad images too.
    """

    def __init__(
        self,
        *,
        correct_weight: float = 1.0,
        objects_weight: float = 1.0,
        color_weight: float = 1.0,
        count_weight: float = 1.0,
        relation_weight: float = 1.0,
        extra_weight: float = 0.1,
        residue_weight: float = 5.0,
        looseness_weight: float = 0.1,
        details_weight: float = 0.2,
    ) -> None:
        """
        Args:
            correct_weight: Of the judge's verdict, 0 or 1.
            objects_weight: Of the share of the asked objects that are there, by shape.
            color_weight: Of the share that are there in their colour; asked for by "colors" and "color_attr".
            count_weight: Of how near the number is: 1 − |difference| / number; asked for by "counting".
            relation_weight: Of the direction between the two objects; asked for by "position".
            extra_weight: Cost of each object more than asked for, of any shape: 0.1 takes about a tenth of the score.
            residue_weight: Cost of the share of the area that `simplear.scenes.residue` finds unexplained: 5 takes 5 %
                of the score for a hundredth of the picture.
            looseness_weight: Cost of shapes that fit their masks less than `GOOD_MATCH`, in full where they barely
                count as shapes.
            details_weight: Cost of the share of the caption's details that are wrong though no judge asks for them:
                the objects' colours outside of "colors" and "color_attr", and a background named in the caption.

        Raises:
            ValueError: a negative weight, or no positive one among those that every category asks for.
        """
        self.weights = {
            "correct": correct_weight,
            "objects": objects_weight,
            "color": color_weight,
            "count": count_weight,
            "relation": relation_weight,
            "extra": extra_weight,
            "residue": residue_weight,
            "looseness": looseness_weight,
            "details": details_weight,
        }
        if min(self.weights.values()) < 0 or correct_weight + objects_weight == 0:
            raise UserError(f"weights {self.weights}: none may be negative, nor correct and objects both be 0.")

    def parts(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """`GRADES`, `COSTS`, and ``quality``, the weighted mean of the grades asked for.

        Raises ValueError for an image whose metadata is not that of a scene, naming its caption.
        """
        pictures = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = []
        for picture, caption, prompt in zip(pictures, captions, metadata, strict=True):
            try:
                rows.append(self._image_parts(picture, caption, prompt))
            except ValueError as error:
                raise UserError(f"SceneReward cannot judge the caption {caption!r}: {error}") from error
        return {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float32, device=images.device)
            for name in rows[0]
        }

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scores (B,); see the class."""
        costs = torch.stack([self.weights[name] * parts[name] for name in COSTS]).sum(dim=0)
        return parts["quality"] * torch.exp(-costs)

    def _image_parts(self, picture: np.ndarray, caption: str, prompt: Mapping[str, Any]) -> dict[str, float]:
        found = detect(picture)
        correct = judge(prompt, found)
        grades = {"correct": float(correct), **_grades(prompt, found, correct)}
        weights = {name: self.weights[name] for name in grades}
        quality = sum(weights[name] * grade for name, grade in grades.items()) / sum(weights.values())
        costs = {
            "extra": float(_extra(prompt, found)),
            "residue": residue(picture, found),
            "looseness": _looseness(found),
            "details": _details(prompt, found, caption, picture),
        }
        return {**dict.fromkeys(GRADES, 1.0), **grades, **costs, "quality": quality}


def _grades(prompt: Mapping[str, Any], found: Sequence[Detection], correct: bool) -> dict[str, float]:
    """The graded parts that the prompt's category asks for."""
    tag, include = prompt["tag"], prompt["include"]
    grades = {"objects": float(np.mean([_present(found, item["class"], None, item["count"]) for item in include]))}
    if tag in ("colors", "color_attr"):
        present = [_present(found, item["class"], item["color"], item["count"]) for item in include]
        grades["color"] = float(np.mean(present))
    if tag == "counting":
        differences = [
            abs(sum(item["class"] == other.shape for other in found) - item["count"]) / item["count"]
            for item in include
        ]
        grades["count"] = float(np.mean([max(0.0, 1 - difference) for difference in differences]))
    if tag == "position":
        grades["relation"] = 1.0 if correct else _direction(prompt, found)
    return grades


def _present(found: Sequence[Detection], shape: str, color: str | None, count: int) -> float:
    """Share of the ``count`` objects that are there."""
    return min(sum(item.shape == shape and color in (None, item.color) for item in found), count) / count


def _direction(prompt: Mapping[str, Any], found: Sequence[Detection]) -> float:
    """0 where the second object stands opposite to where it should or one is missing, up to `WELL_PLACED`."""
    first, second = (next((o for o in found if o.shape == item["class"]), None) for item in prompt["include"])
    if first is None or second is None:
        return 0.0
    across, down = first.x - second.x, first.y - second.y
    along = {"left of": -across, "right of": across, "above": -down, "below": down}[prompt["relation"]]
    return WELL_PLACED * (1 + along / max(math.hypot(across, down), 1e-6)) / 2


def _extra(prompt: Mapping[str, Any], found: Sequence[Detection]) -> int:
    """Objects more than asked for: of shapes that are, those above their number; of others, all."""
    asked: dict[str, int] = {}
    for item in prompt["include"]:
        asked[item["class"]] = asked.get(item["class"], 0) + item["count"]
    return sum(
        max(0, sum(other.shape == shape for other in found) - asked.get(shape, 0))
        for shape in {item.shape for item in found}
    )


def _looseness(found: Sequence[Detection]) -> float:
    """Mean over the objects, 0 from `GOOD_MATCH` on, 1 at the detector's threshold."""
    loose = [max(0.0, (GOOD_MATCH - item.match) / (GOOD_MATCH - MATCH)) for item in found]
    return float(np.mean(loose)) if loose else 0.0


def _details(prompt: Mapping[str, Any], found: Sequence[Detection], caption: str, picture: np.ndarray) -> float:
    """Share of the details that are wrong: colours that the category does not ask for, and a background named."""
    right = []
    if prompt["tag"] not in ("colors", "color_attr"):
        named = [item for item in prompt["include"] if "color" in item]
        right += [_present(found, item["class"], item["color"], item["count"]) for item in named]
    words = caption.lower().replace(",", " ").split()
    right += [float(background_name(picture) == word) for word in words if word in BACKGROUNDS]
    return 1 - float(np.mean(right)) if right else 0.0
