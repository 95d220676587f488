"""Photographs that come with scikit-learn and scikit-image, cut into crops with captions: a corpus without a download.

python tests/photographs.py pictures        writes pictures/train and pictures/validation
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = {
    "astronaut": "an astronaut in an orange suit",
    "cat": "a ginger cat",
    "china": "a Chinese palace under a blue sky",
    "coffee": "a cup of coffee on a wooden table",
    "flower": "an orange flower among green leaves",
    "motorcycle": "a motorcycle in a garage",
    "rocket": "a rocket before its start",
}
HOLD_OUT_EVERY = 10
"""Every tenth crop goes to validation; crops do not overlap, so no pixel is in both."""


def photographs() -> dict[str, np.ndarray]:
    """Arrays (H, W, 3) uint8 by the names of `CAPTIONS`."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": skimage.data.astronaut(),
        "cat": skimage.data.cat(),
        "china": load_sample_image("china.jpg"),
        "coffee": skimage.data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket(),
    }


def cut(directory: Path, side: int = 64) -> dict[str, int]:
    """Write crops as ``train/*.png`` and ``validation/*.png``, each with a .txt of two captions; returns how many.

    Crops are squares of `side` pixels side by side, from the top left; what is left over at the edges is not used.
    """
    counts = {"train": 0, "validation": 0}
    for name, picture in photographs().items():
        rows, columns = picture.shape[0] // side, picture.shape[1] // side
        for number in range(rows * columns):
            top, left = number // columns * side, number % columns * side
            split = "validation" if number % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2 else "train"
            file = directory / split / f"{name}-{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[top : top + side, left : left + side]).save(file)
            file.with_suffix(".txt").write_text(f"{CAPTIONS[name]}\npart of a photo of {CAPTIONS[name]}\n")
            counts[split] += 1
    return counts


if __name__ == "__main__":
    print(cut(Path(sys.argv[1])))
