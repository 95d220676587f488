"""Pictures of a folder in batches of one size, each named where it cannot be used.

What measures a set of pictures must not leave any out in silence, so a broken one is an error here, where training
drops and counts it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simplear.data.prepare.crops import resize_and_crop
from simplear.data.sources.folders import pictures_below
from simplear.errors import UserError
from simplear.pictures import read_rgb

logger = logging.getLogger(__name__)

READERS = min(8, os.cpu_count() or 1)
"""Threads that decode; Pillow lets them run side by side."""


def picture_files(folder: str | Path) -> list[Path]:
    """All pictures below a folder, in the order of their paths, hidden files and folders left out.

    Raises FileNotFoundError where there are none.
    """
    return pictures_below(Path(folder))


def picture_batches(
    files: Sequence[Path], batch_size: int, size: tuple[int, int] | None = None
) -> Iterator[tuple[Sequence[Path], NDArray[np.uint8]]]:
    """Files and their pictures (B, H, W, 3) uint8, batch after batch; no more than one batch is held.

    Args:
        files: pictures.
        batch_size: pictures at a time.
        size: height and width; pictures of another size are resized and their middle is cut out (see
            `simplear.data.sample.resize_and_crop`), and a line says how many were smaller and so enlarged. If not
            given, all must have the size of the first.

    Raises ValueError, naming the file, for a picture that cannot be read or, where no size is given, has another size.
    """
    enlarged, resize = 0, size is not None
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            pictures = []
            for file, opened in zip(part, pool.map(read_rgb, part), strict=True):
                picture = np.asarray(opened)
                height, width = picture.shape[:2]
                size = size or (height, width)
                if not resize and (height, width) != size:
                    raise UserError(
                        f"{file} has {height} × {width} pixels, {files[0]} {size[0]} × {size[1]}: name the height and "
                        "width to which all are resized and cropped."
                    )
                enlarged += height < size[0] or width < size[1]
                pictures.append(resize_and_crop(opened, *size))
            yield part, np.stack(pictures)
    if enlarged:
        logger.warning("%d of %d pictures were smaller than %d × %d and enlarged", enlarged, len(files), *(size or ()))
