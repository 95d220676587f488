"""The networks of ``geneval-hf``: Mask2Former through transformers finds objects, CLIP through open_clip tells colours.

The official program finds objects with mmdetection's Mask2Former (Swin-S, COCO instances). The same architecture with
the weights that its authors published is the default here, so the numbers are not the official ones and have their own
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from simplear.errors import UserError, first_line
from simplear.evaluation.geneval_rules import COLORS, THRESHOLD, Detection
from simplear.evaluation.visual_questions import load_complete
from simplear.rewards import LoadedCLIP, preprocess

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
"""Pixels of what the detector sees, as the official program scales."""
EXAMPLE = "a Mask2Former for COCO's instances (--detector); --score false leaves judging to the official program"
COCO_NAMES = {"mouse": "computer mouse", "keyboard": "computer keyboard", "remote": "tv remote"}
"""Classes that GenEval names differently."""
MOST_DETECTIONS = 100
"""Of an image, over all classes, before any threshold."""
GREY = (0x99, 0x99, 0x99)
"""Replaces the surroundings of an object when its colour is classified."""
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class InstanceDetector:
    """Mask2Former of any size, trained on instances of COCO.

    Args:
        model: hub id or directory.
        wanted: classes to look for.

    Raises:
        ValueError: it cannot be read, or lacks a class.
    """

    def __init__(self, model: str, wanted: Sequence[str]) -> None:
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(model, size=DETECTOR_SIZE, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{model} is not {EXAMPLE} ({first_line(error)}).") from error
        self.network = load_complete(Mask2FormerForUniversalSegmentation, model, EXAMPLE)
        self.names = {number: COCO_NAMES.get(name, name) for number, name in self.network.config.id2label.items()}
        if missing := sorted({*wanted} - {*self.names.values()}):
            raise UserError(f"{model} is not {EXAMPLE}: it has no class {missing[0]!r}.")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Objects of images of one size, those above `THRESHOLD` in confidence."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.network.device)
        found = self.network(**inputs)
        size = images[0].height, images[0].width
        pairs = zip(found.class_queries_logits.float(), found.masks_queries_logits.float(), strict=True)
        return [detections(classes, masks, size, self.names) for classes, masks in pairs]


def detections(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], names: Mapping[int, str]
) -> list[Detection]:
    """Objects of one image from Mask2Former's queries.

    A confidence is the probability of the class times the mean probability of the mask over its own pixels, and a query
    may be several classes: section 4.2 of Cheng et al. 2022, "Masked-attention mask transformer for universal image
    segmentation", as in the programs of its authors and of mmdetection. Transformers' own post-processing does the same
    at 384 × 384 pixels, and for each query, most of which are far below the threshold.

    Args:
        class_logits: (Q, classes + 1), the last for no object.
        mask_logits: (Q, h, w), of the whole image.
        size: height and width of the image.
        names: of the labels.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1].flatten()
    best = probabilities.topk(min(MOST_DETECTIONS, len(probabilities)))
    found = []
    for probability, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(place, class_logits.shape[1] - 1)
        if probability <= THRESHOLD or label not in names:
            continue  # the mask can only lower it
        logits = torch.nn.functional.interpolate(mask_logits[None, None, query], size, mode="bilinear")[0, 0]
        mask = logits > 0
        score = probability * float(logits[mask].sigmoid().mean())  # NaN if the mask is empty
        if score > THRESHOLD:
            left, top, right, bottom = masks_to_boxes(mask[None])[0].tolist()
            box = (left, top, right + 1, bottom + 1)
            found.append(Detection(names[label], score, box, mask.cpu().numpy()))
    return found


class ColorClassifier:
    """CLIP's zero-shot choice among GenEval's colours, for objects cut out of their image.

    Args:
        clip: as `simplear.rewards.load_clip` gives it.
    """

    def __init__(self, clip: LoadedCLIP, device: torch.device | str = "cpu") -> None:
        self.clip, self.device = clip, torch.device(device)
        clip.network.to(device)
        self._classifiers: dict[str, Tensor] = {}
        """(D, colours) for each class, normalised."""

    @torch.no_grad()
    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each of the objects of one class."""
        if name not in self._classifiers:
            templates = [lambda color, text=text: text.format(color=color, name=name) for text in COLOR_TEMPLATES]
            self._classifiers[name] = open_clip.build_zero_shot_classifier(
                self.clip.network, self.clip.tokenizer, COLORS, templates, device=self.device
            )
        crops = [_crop(image, item).to(self.device) for item in objects]
        pixels = torch.cat([preprocess(crop, self.clip.preprocessing) for crop in crops])
        features = self.clip.network.encode_image(pixels.to(self.clip.dtype))
        return [COLORS[number] for number in (features @ self._classifiers[name]).argmax(dim=1).tolist()]


def _crop(image: Image.Image, item: Detection) -> Tensor:
    """(1, 3, h, w) float in [0, 1]: the box, with `GREY` outside the mask."""
    if item.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(item.mask))
    left, top, right, bottom = map(round, item.box)
    pixels = np.asarray(image.crop((left, top, right, bottom)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
