"""How varied a set of drawn scenes is: what reinforcement learning loses first, and no accuracy shows.

A policy that draws each caption rightly but always alike, on one background, scores as well as one that draws it in all
its ways. These three numbers, beside the accuracy and before and after training, tell the two apart.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from simplear.scenes import background_name, detect

LARGEST_PIXEL = 255.0


def diversity(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> dict[str, float]:
    """Variety of images drawn for prompts.

    Args:
        images: (H, W, 3) uint8 each; those of one prompt have one size.
        prompts: of each image; images of equal prompts are samples of one distribution.

    Returns:
        ``background_entropy``: bits, 0 where all backgrounds are alike, log2(3) where the three are equally frequent;
        ``color_entropy``: bits, of the colours of all detected objects, 0 to 3; and, where a prompt has several images,
        ``sample_distance``: root mean square difference of two images of one prompt on [0, 1], the mean over all pairs
        of a prompt, then over prompts.
    """
    groups: dict[str, list[NDArray[np.float64]]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        groups.setdefault(prompt, []).append(image / LARGEST_PIXEL)
    found = {
        "background_entropy": entropy(map(background_name, images)),
        "color_entropy": entropy(item.color for image in images for item in detect(image)),
    }
    distances = [
        float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(members, 2)]))
        for members in groups.values()
        if len(members) > 1
    ]
    return {**found, "sample_distance": float(np.mean(distances))} if distances else found


def entropy(names: Iterable[str]) -> float:
    """Of the frequencies of names, in bits; 0 for none."""
    counts = Counter(names)
    total = sum(counts.values())
    return sum(-count / total * math.log2(count / total) for count in counts.values())
