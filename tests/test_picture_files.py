"""Picture files that people give: opened by one function, in the formats that are listed and no others."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from simplear.pictures import FORMATS, PICTURE_SUFFIXES, PictureError, as_mask, as_rgb, open_mask, open_rgb

RED, GREEN = (255, 0, 0), (0, 255, 0)


def halves() -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    return image


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES))
def test_every_suffix_of_a_picture_opens(tmp_path: Path, suffix: str) -> None:
    form = Image.registered_extensions().get(suffix, "JPEG2000")  # Pillow writes no .jpx
    content = saved(halves(), form)
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        (tmp_path / name).write_bytes(content)
        opened = np.asarray(open_rgb(tmp_path / name)).astype(int)
        assert np.abs(opened - np.asarray(halves()))[:, [2, -3]].max() < 40, name  # away from the edge, which rings
    assert np.array_equal(np.asarray(open_rgb(io.BytesIO(content))), opened)


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"


@pytest.mark.parametrize(
    "content",
    [eps, lambda: b"<svg/>", *(partial(saved, halves(), form) for form in ("PDF", "PPM", "TGA"))],
    ids=["EPS", "SVG", "PDF", "PPM", "TGA"],
)
def test_other_formats_are_not_pictures_and_start_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes]
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program would have been started"))
    for name in ("a.jpg", "a.eps", "a.png"):
        (tmp_path / name).write_bytes(content())
        for opener in (open_rgb, open_mask):
            with pytest.raises(PictureError, match="not a picture"):
                opener(tmp_path / name)


@pytest.mark.parametrize("name", ["none.png", "x" * 300 + ".png", "file/b.png", "caf\udce9.png", "."])
def test_a_name_that_no_file_has_or_can_have_is_a_missing_picture(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PictureError, match="picture file missing"):
        open_rgb(tmp_path / name)


def test_formats_have_a_signature() -> None:
    """One without, as TGA is, would take almost any bytes for a picture."""
    for form in set(FORMATS):
        Image.init()
        accepts = Image.OPEN[form][1]
        assert accepts is not None and not accepts(b"almost any bytes")


def modes() -> dict[str, Image.Image]:
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (40, 24, 3), dtype=np.uint8))
    layered = colours.copy()
    layered.putalpha(Image.fromarray(random.integers(0, 256, (40, 24), dtype=np.uint8)))
    palette = Image.open(io.BytesIO(saved(colours.quantize(9), "PNG", transparency=bytes([0, 90, 200]))))
    key = Image.open(io.BytesIO(saved(colours, "PNG", transparency=colours.getpixel((0, 0)))))
    deep = Image.fromarray(random.integers(0, 2**16, (40, 24), dtype=np.uint16))
    kinds = {mode: colours.convert(mode) for mode in ("L", "1", "P", "CMYK", "YCbCr", "HSV")}
    return kinds | {"RGBA": layered, "LA": layered.convert("LA"), "palette": palette, "key": key, "16-bit": deep}


def over_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


@pytest.mark.parametrize("kind", modes())
def test_every_mode_becomes_rgb_over_white(kind: str) -> None:
    picture = modes()[kind]
    pixels, wanted = (np.asarray(each).astype(int) for each in (as_rgb(picture), over_white(picture)))
    assert np.abs(pixels - wanted).max() <= (1 if picture.has_transparency_data else 0)  # they round differently


def peak() -> int:
    """Most bytes that this process has had in memory since the count was reset."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


@pytest.mark.parametrize(
    ("mode", "form", "most"),
    [("RGB", "PNG", 4), ("RGB", "JPEG", 4), ("RGBA", "PNG", 8), ("LA", "PNG", 12), ("P", "PNG", 5), ("I;16", "PNG", 7)],
)
def test_memory_while_a_picture_is_opened(mode: str, form: str, most: int) -> None:
    """Bytes a pixel beside the file, as `open_rgb` and `PixelLimit` say; some slack comes on top."""
    side = 3000
    grey = np.zeros((side, side), np.uint16 if mode == "I;16" else np.uint8)
    content = saved(Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey).convert(mode), form)
    open_rgb(io.BytesIO(content))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    open_rgb(io.BytesIO(content))
    assert (peak() - before) / side**2 < most + 1.5


Column = Callable[[int], int]


def layered(alpha: Column, brightness: Column) -> Image.Image:
    """Grey columns, eight pixels across."""
    image = Image.new("RGBA", (8, 4))
    for x in range(8):
        image.paste((*[brightness(x)] * 3, alpha(x)), (x, 0, x + 1, 4))
    return image


def opaque(x: int) -> int:
    return 255


def black(x: int) -> int:
    return 0


def right(x: int) -> int:
    return 255 if x > 3 else 0


def left(x: int) -> int:
    return 255 - right(x)


def turned(image: Image.Image) -> Image.Image:
    """As a camera that lay on its side stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.open(io.BytesIO(saved(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif.tobytes())))


MASKS: dict[str, tuple[Callable[[], Image.Image], Column]] = {
    "white means draw": (lambda: layered(opaque, right).convert("RGB"), right),
    "an opaque layer changes nothing": (lambda: layered(opaque, right), right),
    "transparent means draw": (lambda: layered(left, black), right),
    "whatever is hidden under it": (lambda: layered(left, opaque), right),
    "in grey": (lambda: layered(left, opaque).convert("LA"), right),
    "in a palette": (lambda: layered(opaque, right).convert("L").quantize(2), right),
    "half transparent": (lambda: layered(lambda x: 255 - 32 * x, black), lambda x: 32 * x),
    "upright": (lambda: turned(layered(left, black)), right),
    "upright, by brightness": (lambda: turned(layered(opaque, right).convert("RGB")), right),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    make, wanted = MASKS[kind]
    mask = as_mask(make())
    assert mask.mode == "L" and np.asarray(mask).tolist() == [[wanted(x) for x in range(8)]] * 4
