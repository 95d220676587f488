"""The networks of ``geneval-hf``: Mask2Former through transformers finds objects, CLIP through open_clip tells colours.

The official program finds objects with mmdetection's Mask2Former (Swin-S, COCO instances). The same architecture,
trained by its authors, is what transformers loads by default here; its weights are others, so its numbers are not the
official ones and go by their own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from simplear.errors import UserError, first_line
from simplear.evaluation.geneval_rules import COLORS, THRESHOLD, Detection
from simplear.rewards import LoadedCLIP, preprocess

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DETECTOR_SIZE = 800
"""Pixels of the shorter side of what the detector sees, as the official program scales."""
LONGEST_OVER_SHORTEST = 1333 / 800
MOST_DETECTIONS = 100
"""Of an image, over all classes, before any threshold."""
OTHER_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "computer mouse": ("mouse",),
    "computer keyboard": ("keyboard",),
    "tv remote": ("remote",),
    "tv": ("tvmonitor", "television"),
    "motorcycle": ("motorbike",),
    "airplane": ("aeroplane",),
    "couch": ("sofa",),
    "hair drier": ("hair dryer",),
    "donut": ("doughnut",),
}
"""What detectors call classes of GenEval that they name otherwise; the first three are COCO's own names."""
GREY = (0x99, 0x99, 0x99)
"""Put in place of what is no part of an object, when its colour is looked at."""
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def class_names(labels: Mapping[int, str], wanted: Sequence[str]) -> dict[int, str]:
    """GenEval's name of each label of a detector, for those that have one.

    Args:
        labels: of the detector, its ``id2label``.
        wanted: GenEval's classes.

    Raises:
        ValueError: the detector lacks one of them.
    """
    spelled = {_spelling(label): number for number, label in labels.items()}
    numbers = {}
    for name in wanted:
        candidates = [_spelling(text) for text in (name, *OTHER_SPELLINGS.get(name, ()))]
        present = [spelled[text] for text in candidates if text in spelled]
        if not present:
            others = " or ".join(OTHER_SPELLINGS.get(name, ())) or "another word"
            raise UserError(
                f"the detector has no class {name!r} (nor {others}) among its {len(labels)}: take one trained on "
                f"the 80 classes of COCO, such as {DETECTOR}."
            )
        numbers[present[0]] = name
    return numbers


def _spelling(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


class InstanceDetector:
    """Mask2Former of any size, trained on instances of COCO.

    Args:
        model: hub id or directory.
        wanted: classes to look for.
        size: pixels of the shorter side of what it sees.

    Raises:
        ValueError: it cannot be read, or lacks a class.
    """

    def __init__(self, model: str, wanted: Sequence[str], size: int = DETECTOR_SIZE) -> None:
        loader: Any = Mask2FormerForUniversalSegmentation
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(
                model,
                size={"shortest_edge": size, "longest_edge": round(size * LONGEST_OVER_SHORTEST)},
                trust_remote_code=False,
            )
            network, loading = loader.from_pretrained(model, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise UserError(
                f"the detector {model} cannot be read ({reason}): name the directory or hub id of a Mask2Former for "
                "instances (--detector), or leave judging to the official program (--score false)."
            ) from error
        # Buffers, such as the loss's, may be left out of the file; transformers would draw missing weights at random.
        if missing := sorted({name for name, _ in network.named_parameters()} & set(loading["missing_keys"])):
            raise UserError(
                f"the weights of the detector {model} are not those of a Mask2Former: {len(missing)} are missing, such "
                f"as {missing[0]}."
            )
        self.network: Any = network.eval()
        self.names = class_names(self.network.config.id2label, wanted)

    def to(self, device: torch.device) -> InstanceDetector:
        """Bring the network to a device."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Objects of images of one size, those above `THRESHOLD` in confidence."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.network.device)
        found = self.network(**inputs)
        height, width = images[0].height, images[0].width
        pairs = zip(found.class_queries_logits.float(), found.masks_queries_logits.float(), strict=True)
        return [detections(classes, masks, height, width, self.names) for classes, masks in pairs]


def detections(
    class_logits: Tensor, mask_logits: Tensor, height: int, width: int, names: Mapping[int, str]
) -> list[Detection]:
    """Objects of one image from Mask2Former's queries.

    A confidence is the probability of the class times the mean probability of the mask over its own pixels, and a query
    may be several classes: section 4.2 of Cheng et al. 2022, "Masked-attention mask transformer for universal image
    segmentation", as its authors' and mmdetection's programs compute it.

    Args:
        class_logits: (Q, classes + 1), the last for no object.
        mask_logits: (Q, h, w), of the whole image.
        height: of the image.
        width: of the image.
        names: of the labels that are wanted.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1].flatten()
    best = probabilities.topk(min(MOST_DETECTIONS, len(probabilities)))
    found = []
    for probability, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(place, class_logits.shape[1] - 1)
        if probability <= THRESHOLD or label not in names:
            continue  # the mask can only lower it
        logits = torch.nn.functional.interpolate(
            mask_logits[None, None, query], size=(height, width), mode="bilinear", align_corners=False
        )[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        score = probability * float(logits[mask].sigmoid().mean())
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        if score > THRESHOLD:
            found.append(Detection(names[label], score, box, mask.cpu().numpy()))
    return found


class ColorClassifier:
    """CLIP's zero-shot choice among GenEval's colours, for an object cut out of its image.

    Args:
        clip: as `simplear.rewards.load_clip` gives it.
    """

    def __init__(self, clip: LoadedCLIP) -> None:
        self.clip = clip
        self.device = torch.device("cpu")
        self._weights: dict[str, Tensor] = {}
        """(colours, D) of each class, normalised."""

    def to(self, device: torch.device) -> ColorClassifier:
        """Bring the network to a device."""
        self.clip.network.to(device)
        self.device = device
        self._weights.clear()
        return self

    @torch.no_grad()
    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each of the objects of one class."""
        crops = [_crop(image, item) for item in objects]
        pixels = torch.cat([preprocess(crop.to(self.device), self.clip.preprocessing) for crop in crops])
        features = self.clip.network.encode_image(pixels.to(self.clip.dtype)).float()
        return [COLORS[number] for number in (features @ self._classifier(name).T).argmax(dim=1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        if name not in self._weights:
            rows = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in COLOR_TEMPLATES]
                ids = self.clip.tokenizer(texts).to(self.device)
                features = torch.nn.functional.normalize(self.clip.network.encode_text(ids).float(), dim=1)
                rows.append(torch.nn.functional.normalize(features.mean(dim=0), dim=0))
            self._weights[name] = torch.stack(rows)
        return self._weights[name]

    def colors_in(self, image: Image.Image) -> Callable[[Sequence[Detection], str], list[str]]:
        """The classifier for one image, as `simplear.evaluation.geneval_rules.judge` asks it."""
        return lambda objects, name: self(image, objects, name)


def _crop(image: Image.Image, item: Detection) -> Tensor:
    """(1, 3, h, w) float in [0, 1]: the box, with `GREY` where the mask is not."""
    if item.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(item.mask))
    left, top, right, bottom = map(round, item.box)
    pixels = np.asarray(image.crop((left, top, right, bottom)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
