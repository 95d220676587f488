from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simplear.data import AspectBuckets, CentreCrop, ImageFolderSource, ScenesSource, TokenShards, tokenize
from simplear.data.prepare.crops import Crop, resize_and_crop
from simplear.data.shards import MANIFEST_FILE

from .conftest import MeanTokenizer


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_the_centre_is_what_it_was() -> None:
    image = ramp(60, 20)
    np.testing.assert_array_equal(CentreCrop()(image, "k", (20, 20), 4), resize_and_crop(image, 20, 20))


@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("side", [8, 32, 64])
def test_grids_stay_within_the_codes_asked_for_and_waste_few(side: int, step: int, max_aspect: float) -> None:
    grids = AspectBuckets(max_aspect, step).grids(side, side)
    assert (side, side) in grids and len(set(grids)) == len(grids)
    for height, width in grids:
        assert height * width <= side * side < height * (width + step)
        assert max(height / width, width / height) <= max_aspect
        assert (height, width) == (side, side) or not (height % step or width % step)


def test_the_grid_is_the_nearest_in_shape() -> None:
    """Against trying all of them by the share of the picture that is cut off."""
    buckets = AspectBuckets(2.0, 2)
    grids = buckets.grids(16, 16)

    def cut_off(grid: tuple[int, int], width: int, height: int) -> float:
        scale = min(width / grid[1], height / grid[0])
        return 1 - scale * grid[0] * scale * grid[1] / (width * height)

    for width, height in [(100, 100), (100, 150), (97, 61), (30, 90), (400, 100), (101, 99)]:
        pixels = buckets(Image.new("RGB", (width, height)), "k", (64, 64), 4)
        chosen = (pixels.shape[0] // 4, pixels.shape[1] // 4)
        assert chosen in grids
        assert cut_off(chosen, width, height) == min(cut_off(grid, width, height) for grid in grids)


def hashes(directory: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.glob("*.arrow"))]


@pytest.mark.parametrize("crop", [AspectBuckets(2.0, 1)])
def test_shards_do_not_depend_on_batches_or_workers(tmp_path: Path, crop: Crop) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        size = random.integers(10, 40, 2)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("x")
    found = []
    for workers, batch_size in ((0, 64), (0, 1), (2, 3)):
        out = tmp_path / f"out-{workers}-{batch_size}"
        source = ImageFolderSource(str(folder), rows_per_unit=5)
        tokenize(
            source=source, visual_tokenizer=MeanTokenizer(), out=str(out), height=16, width=16, crop=crop,
            batch_size=batch_size, num_workers=workers, accelerator="cpu",
        )  # fmt: skip
        found.append(hashes(out))
        shards = TokenShards(out)
        assert shards.read(np.arange(len(shards)) if len(shards.grids) == 1 else np.array([0])).keys[0] == "00.png"
        assert len(shards) == 12 and (len(shards.grids) > 1) == isinstance(crop, AspectBuckets)
        assert json.loads((out / MANIFEST_FILE).read_text())["crop"] == crop.describe()
    assert found[0] == found[1] == found[2]


def test_a_crop_without_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a AspectBuckets needs height and width"):
        tokenize(
            source=ScenesSource(1, 16), visual_tokenizer=MeanTokenizer(), out=f"{tmp_path}/out", crop=AspectBuckets()
        )
    assert not (tmp_path / "out").exists()
