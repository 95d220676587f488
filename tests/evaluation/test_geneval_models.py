"""The networks of geneval-hf, held against transformers' own post-processing and open_clip's own classification."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mask2FormerImageProcessor

from evaluation.toys import COCO, save_detector
from rewards.toys import pictures
from simplear.evaluation.geneval import object_names
from simplear.evaluation.geneval_models import (
    COLOR_TEMPLATES,
    ColorClassifier,
    InstanceDetector,
    detections,
)
from simplear.evaluation.geneval_rules import COLORS, Detection
from simplear.rewards import LoadedCLIP, load_clip

SIDE = 384
"""What transformers scales masks to before anything else."""


def test_detections_are_those_of_transformers() -> None:
    """Boxes aside, which it gives none of: scores, classes and masks of 100 queries, some of them of two classes."""
    generator = torch.Generator().manual_seed(0)
    classes = 4 * torch.randn(1, 100, 81, generator=generator)
    masks = torch.nn.functional.interpolate(3 * torch.randn(1, 100, 6, 6, generator=generator), (96, 96))
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    [theirs] = Mask2FormerImageProcessor(ignore_index=255).post_process_instance_segmentation(
        outputs, threshold=0.3, return_binary_maps=True, target_sizes=[(SIDE, SIDE)]
    )
    ours = detections(classes[0], masks[0], (SIDE, SIDE), dict(enumerate(COCO)))
    assert len(ours) == len(theirs["segments_info"]) > 20
    order = sorted(range(len(ours)), key=lambda place: -theirs["segments_info"][place]["score"])
    for place, item in zip(order, sorted(ours, key=lambda item: -item.score), strict=True):
        info = theirs["segments_info"][place]
        assert item.name == COCO[info["label_id"]] and item.score == pytest.approx(info["score"], abs=1e-5)
        assert item.mask is not None and (item.mask == theirs["segmentation"][place].numpy().astype(bool)).all()
        rows, columns = np.nonzero(item.mask)
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_the_score_is_the_class_probability_times_the_masks() -> None:
    """A confident class with a faint mask falls below the threshold; an empty mask is nothing; no object is none."""
    classes = torch.full((4, 3), -20.0)
    classes[0, 0] = classes[1, 1] = classes[2, 0] = classes[3, 2] = 20.0
    masks = torch.full((4, 8, 8), -20.0)
    masks[0, 2:4, 4:8] = 20.0
    masks[1, :, :] = 0.02
    masks[3, :, :] = 20.0
    [first, second] = detections(classes, masks, (8, 8), {0: "dog", 1: "cat"})
    assert (first.name, first.box, round(first.score, 4)) == ("dog", (4, 2, 8, 4), 1.0)
    assert second.name == "cat" and second.score == pytest.approx(0.505, abs=1e-3)
    assert detections(classes, masks, (8, 8), {0: "dog"}) != []
    half = classes.clone()
    half[1] = torch.tensor([-20.0, 0.0, 0.0])
    assert [item.name for item in detections(half, masks, (8, 8), {0: "dog", 1: "cat"})] == ["dog"]


def test_classes_have_genevals_names(tiny_detector: str) -> None:
    names = InstanceDetector(tiny_detector, object_names()).names
    assert [names[number] for number in range(80)] == object_names()


def test_a_saved_detector_finds_boxes_in_pixels_of_the_image(tiny_detector: str) -> None:
    detector = InstanceDetector(tiny_detector, object_names())
    images, _ = pictures(2, 40, 60)
    both = detector(images)
    for found in both:
        assert {item.name for item in found} == {"bench"}
        for item in found:
            assert item.mask is not None and item.mask.shape == (40, 60)
            assert 0 <= item.box[0] < item.box[2] <= 60 and 0 <= item.box[1] < item.box[3] <= 40
            assert 0.3 < item.score <= 1
    alone = detector(images[1:])[0]
    assert [item.box for item in alone] == [item.box for item in both[1]]


def test_what_is_no_detector_is_refused(tmp_path: Path, tiny_detector: str) -> None:
    with pytest.raises(ValueError, match=r"none is not a Mask2Former"):
        InstanceDetector(str(tmp_path / "none"), object_names())
    save_detector(tmp_path / "few", COCO[:5])
    with pytest.raises(ValueError, match="no class 'boat'"):
        InstanceDetector(str(tmp_path / "few"), ["person", "boat"])
    weights = load_file(Path(tiny_detector) / "model.safetensors")
    shutil.copytree(tiny_detector, tmp_path / "half")
    save_file(
        {k: v for k, v in weights.items() if k != "class_predictor.bias"}, tmp_path / "half" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 weights are missing, such as class_predictor.bias"):
        InstanceDetector(str(tmp_path / "half"), object_names())
    other = {k: v[:3] if k == "class_predictor.bias" else v for k, v in weights.items()}
    save_file(other, tmp_path / "half" / "model.safetensors")
    with pytest.raises(ValueError, match="is not a Mask2Former"):
        InstanceDetector(str(tmp_path / "half"), object_names())
    no_loss = {k: v for k, v in weights.items() if not k.startswith("criterion.")}
    assert len(no_loss) < len(weights)
    save_file(no_loss, tmp_path / "half" / "model.safetensors")
    InstanceDetector(str(tmp_path / "half"), object_names())


def test_colors_are_open_clips_zero_shot_classes(tiny_clip: tuple[str, str]) -> None:
    """Its own PIL transform and encoders, each colour the mean of three normalised texts."""
    images, _ = pictures(12, 50, 40)
    network, transform = open_clip.create_model_from_pretrained(*tiny_clip)
    tokenizer = open_clip.get_tokenizer(tiny_clip[0])
    classifier = ColorClassifier(load_clip(*tiny_clip))
    agree = []
    for name in ("fire hydrant", "dog"):
        rows = []
        with torch.no_grad():
            for color in COLORS:
                texts = tokenizer([text.format(color=color, name=name) for text in COLOR_TEMPLATES])
                features = torch.nn.functional.normalize(network.eval().encode_text(texts), dim=1).mean(dim=0)
                rows.append(features / features.norm())
            crops = torch.stack([transform(image.crop((3, 5, 35, 45))) for image in images])
            logits = torch.nn.functional.normalize(network.encode_image(crops), dim=1) @ torch.stack(rows).T
        ours = [classifier(image, [Detection(name, 0.9, (3, 5, 35, 45))], name)[0] for image in images]
        margin = logits.topk(2).values
        agree += [
            color == COLORS[int(best)]
            for color, best, gap in zip(ours, logits.argmax(dim=1), margin[:, 0] - margin[:, 1], strict=True)
            if gap > 1e-3
        ]
    assert len(agree) > 10 and all(agree)


class MeanColor:
    """Stands in for a CLIP: a picture's feature is its mean colour, a text's the colour that it names."""

    RGB: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def to(self, device: torch.device) -> MeanColor:
        return self

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        return torch.nn.functional.normalize(ids.float(), dim=1) if normalize else ids.float()

    def __call__(self, texts: list[str]) -> Tensor:
        """As the tokenizer."""
        words = [next(word for word in re.split(r"[ -]", text) if word in COLORS) for text in texts]
        return torch.tensor([self.RGB.get(word, (-1.0, -1.0, -1.0)) for word in words])


def test_the_object_is_looked_at_within_its_box_and_mask() -> None:
    """A small red square before green in a blue picture; without the mask its box is green, and without that blue."""
    pixels = np.full((60, 60, 3), (0, 0, 255), np.uint8)
    pixels[10:30, 10:30] = (0, 255, 0)
    mask = np.zeros((60, 60), bool)
    mask[15:22, 15:22] = True
    pixels[mask] = (255, 0, 0)
    preprocessing: Any = open_clip.transform.PreprocessCfg(size=(20, 20), mean=(0, 0, 0), std=(1, 1, 1))
    classifier = ColorClassifier(LoadedCLIP(MeanColor(), MeanColor(), preprocessing))
    image = Image.fromarray(pixels)
    box = (10.0, 10.0, 30.0, 30.0)
    boxes = [
        Detection("dog", 0.9, box, mask),
        Detection("dog", 0.8, box),
        Detection("dog", 0.7, (0, 0, 60, 60)),
    ]
    assert classifier(image, boxes, "dog") == ["red", "green", "blue"]
