"""Picture grids: their sizes, that images appear unchanged, captions whole, and marks where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from simplear.evaluation import Cell, image_grid
from simplear.evaluation.grid import CAPTION_SIZE, GAP, GREEN, MARGIN, RED, fit, wrap

BLUE = (10, 20, 250)


def square(side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), BLUE)


def share_of(page: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(page) == np.array(color)).all(axis=2).sum())


@pytest.mark.parametrize(("cells", "columns", "shown"), [(5, 4, 4), (2, 4, 2), (3, 1, 1)])
def test_width_follows_from_columns(cells: int, columns: int, shown: int) -> None:
    page = image_grid({"": [Cell("a", (square(),))] * cells}, columns=columns, image_size=128)
    assert page.width == shown * 128 + (shown + 1) * MARGIN


def test_cells_of_two_images_and_more_rows_and_headings_take_room() -> None:
    cell = Cell("a", (square(), square()), (True, False), ("one", "two"))
    single = image_grid({"": [cell]})
    assert single.width == 2 * 128 + GAP + 2 * MARGIN
    two_rows = image_grid({"": [cell] * 2}, columns=1)
    assert two_rows.height - MARGIN == 2 * (single.height - MARGIN)
    assert image_grid({"title": [cell]}).height > single.height


def test_images_are_enlarged_pixel_by_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shown = np.asarray(fit(Image.fromarray(pixels), 192))
    assert (shown == pixels.repeat(3, axis=0).repeat(3, axis=1)).all()
    assert fit(Image.new("RGB", (1024, 512)), 128).size == (128, 64)
    # All of the image but its frame is on the page.
    assert share_of(image_grid({"": [Cell("", (square(),))]}, image_size=128), BLUE) == 126 * 126


def test_captions_are_wrapped_to_the_width_and_lose_nothing() -> None:
    font = ImageFont.load_default(size=CAPTION_SIZE)
    text = "a photo of a blue triangle together with a " + "very" * 20 + "long word"
    lines = wrap(text, 120)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(font.getlength(line) for line in lines) <= 120
    assert wrap("", 120) == [""]


def test_marks_are_green_for_right_red_for_wrong_and_hide_nothing() -> None:
    def page(*marks: bool | None) -> Image.Image:
        return image_grid({"": [Cell("a", (square(),) * len(marks), marks)]})

    both, none = page(True, False), page(None, None)
    assert share_of(page(True), GREEN) > 10 and share_of(page(True), RED) == 0
    assert share_of(page(False), RED) > 10 and share_of(page(False), GREEN) == 0
    assert share_of(none, GREEN) == share_of(none, RED) == 0
    assert share_of(both, BLUE) == share_of(none, BLUE)
    left, right = (np.nonzero((np.asarray(both) == color).all(axis=2))[1].mean() for color in (GREEN, RED))
    assert left < both.width / 2 < right


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        image_grid({"colors": []})
