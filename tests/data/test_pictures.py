from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simplear.data.prepare.crops import resize_and_crop
from simplear.data.sample import Drop, PictureFile
from simplear.pictures import open_rgb
from simplear.visual_tokenizer import to_pixels


def saved(image: Image.Image, form: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def test_plain_pictures_come_back_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(open_rgb(saved(Image.fromarray(pixels)))), pixels)


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left edge is the top
    upright = open_rgb(saved(image, exif=exif.tobytes()))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_goes_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    file = saved(image.convert(mode)) if mode != "P" else saved(image.quantize(4))
    opened = open_rgb(file)
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_red_is_pink() -> None:
    red, green, blue = open_rgb(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))).getpixel((0, 0))
    assert red == 255 and green == blue and abs(green - 127) <= 1


def test_palette_grey_and_bilevel() -> None:
    palette = Image.new("RGB", (2, 2), (10, 200, 30)).quantize(2)
    assert open_rgb(saved(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert open_rgb(saved(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_rgb(saved(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 257 * 128, 65535]], dtype=np.uint16)
    opened = np.asarray(open_rgb(saved(Image.fromarray(values))))
    np.testing.assert_array_equal(opened[0, :, 0], [0, 128, 255])


def test_cmyk_is_converted() -> None:
    opened = open_rgb(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = opened.getpixel((4, 4))
    assert red > 230 and green < 30 and blue < 30


def test_what_no_picture_can_be_made_of_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(Drop, match="picture file missing"):
        PictureFile(tmp_path / "none.png").open()
    with pytest.raises(Drop, match="mode F"):
        PictureFile(saved(Image.new("F", (2, 2)), "TIFF").getvalue()).open()


def test_crop_takes_the_centre() -> None:
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 200
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(pixels), 20, 20), np.full((20, 20, 3), 200))
    cropped = resize_and_crop(Image.fromarray(pixels), 10, 10)
    assert cropped.shape == (10, 10, 3) and np.abs(cropped.astype(int) - 200).max() < 15  # ringing at the edges


def test_crop_follows_the_aspect_asked_for() -> None:
    rows = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, None, None], 30, 1).repeat(3, 2)  # 60 high, 30 wide
    cropped = resize_and_crop(Image.fromarray(rows), 10, 20)  # the middle quarter of the height
    assert cropped.shape == (10, 20, 3)
    assert abs(int(cropped[0].mean()) - 4 * 22.5) < 8 and abs(int(cropped[-1].mean()) - 4 * 37.5) < 8


def test_a_picture_of_that_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_and_crop(Image.fromarray(pixels), 8, 12), pixels)


def test_pixels_span_minus_one_to_one() -> None:
    images = np.zeros((1, 2, 3, 3), dtype=np.uint8)
    images[0, 1, 2] = (255, 0, 51)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 2, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, :, 1, 2], [1, -1, -0.6], atol=1e-6)
