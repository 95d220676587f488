"""Pictures as the world has them: made into the right RGB, or left out under a reason of their own and counted."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simplear.cli import main
from simplear.data import ImageDataModule, ImageFolderSource, TokenShards, WebDatasetSource
from simplear.data.sample import Drop, Dropped, PictureFile
from simplear.data.sources.base import decoded
from simplear.pictures import open_rgb

CUT, NO_PICTURE, BOMB = "truncated or damaged picture", "not a picture", "decompression bomb"
RED, GREEN = (255, 0, 0), (0, 255, 0)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def halves() -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", (16, 16), RED)
    image.paste(GREEN, (8, 0, 16, 16))
    return image


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """Some kilobytes that would be 3.6 thousand million pixels."""
    return png(60_000, 60_000, 1, 0, bytes(1_000_000))


def text_bomb() -> bytes:
    """A picture of one pixel with a comment that inflates to more than Pillow accepts."""
    return png(1, 1, 8, 0, bytes(2), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))))


def sixteen_bit(channels: int) -> bytes:
    """Red left, green right, 16 bits a channel; opaque where there is a fourth."""
    pixels = np.zeros((16, 16, channels), ">u2")
    pixels[:, :8, 0] = pixels[:, 8:, 1] = 65535
    pixels[..., 3:] = 65535
    return png(16, 16, 16, 2 if channels == 3 else 6, b"".join(b"\0" + row.tobytes() for row in pixels))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as the camera lay: a quarter turn clockwise makes it upright
    return saved(halves().transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())


def transparent() -> bytes:
    image = halves().convert("RGBA")
    image.putalpha(255)
    return saved(image)


RIGHT: dict[str, Callable[[], bytes]] = {
    "plain": lambda: saved(halves()),
    "cmyk": lambda: saved(halves().convert("CMYK"), "JPEG", quality=95, subsampling=0),
    "palette": lambda: saved(halves().quantize(2)),
    "palette_gif": lambda: saved(halves().quantize(2), "GIF"),
    "alpha": transparent,
    "sixteen_bit": lambda: sixteen_bit(3),
    "sixteen_bit_alpha": lambda: sixteen_bit(4),
    "turned": turned,
}
DROPPED: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut_png": (lambda: saved(noise())[:-100], CUT),
    "cut_jpeg": (lambda: saved(noise(), "JPEG")[:-100], CUT),
    "cut_webp": (lambda: saved(noise(), "WEBP")[:-100], CUT),
    "nearly_nothing": (lambda: saved(noise())[:20], CUT),
    "text": (lambda: b"<html>404 not found</html>", NO_PICTURE),
    "nothing": (lambda: b"", NO_PICTURE),
    "bomb": (bomb, BOMB),
    "text_bomb": (text_bomb, CUT),
    "floats": (lambda: saved(Image.new("F", (4, 4)), "TIFF"), "picture of mode F, whose range is unknown"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_every_kind_becomes_the_same_rgb(kind: str) -> None:
    pixels = np.asarray(open_rgb(io.BytesIO(RIGHT[kind]()))).astype(int)
    wanted = np.asarray(halves()).astype(int)
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= (30 if kind == "cmyk" else 0)  # JPEG and the inks round


@pytest.mark.parametrize("kind", DROPPED)
def test_what_cannot_be_used_says_why(kind: str) -> None:
    content, reason = DROPPED[kind]
    with pytest.raises(Drop) as dropped:
        PictureFile(content()).open()
    assert str(dropped.value) == reason


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_anywhere_a_picture_is_cut(form: str) -> None:
    """From the fifth byte on, where its format shows; a few last bytes of some formats hold no pixels."""
    whole = saved(noise(), form)
    for length in range(4, len(whole) - 20, 3):
        with pytest.raises(Drop, match=f"{CUT}|{NO_PICTURE}"):
            PictureFile(whole[:length]).open()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damage_never_escapes_as_another_error(form: str) -> None:
    """Decoders answer damaged headers with errors of all kinds, and one would end a tokenization of days."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "described"
    whole, random = saved(noise(), form, exif=exif.tobytes()), np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1500):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 200), 3):
                damaged[place] = random.integers(256)
            try:
                PictureFile(bytes(damaged)).open()
            except Drop as reason:
                reasons[str(reason)] += 1
    assert reasons[CUT] > 100 and set(reasons) <= {CUT, NO_PICTURE, BOMB}


def test_a_file_that_the_system_cannot_read_is_an_error_and_no_drop(tmp_path: Path) -> None:
    """Else a network disk that fails for a minute would thin the data out in silence."""
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(OSError, match=r"loop\.png"):
        open_rgb(tmp_path / "loop.png")


REASONS = Counter(reason for _, reason in DROPPED.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every kind of picture, with a caption."""
    directory = tmp_path / "pictures"
    directory.mkdir()
    contents = {**RIGHT, **{name: content for name, (content, _) in DROPPED.items()}}
    for name, content in contents.items():
        (directory / f"{name}.png").write_bytes(content())
        (directory / f"{name}.txt").write_text(name)
    return directory


def test_tokenizing_counts_each_reason_and_says_so(
    folder: Path, tmp_path: Path, tiny_visual_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "tokens"
    arguments = ["--source", "ImageFolderSource", "--source.path", str(folder), "--height", "16", "--width", "16"]
    main(["tokenize", *arguments, "--visual-tokenizer", tiny_visual_tokenizer, "--out", str(out)])
    sidecar = json.loads((out / "images-000000000.json").read_text())
    assert sidecar["drops"] == REASONS and sidecar["rows"] == len(RIGHT)
    for reason, count in REASONS.items():
        assert f"{count} pictures dropped on rank 0: {reason}" in caplog.text
    shards = TokenShards(out)
    rows = shards.read(np.arange(len(shards)))
    codes = dict(zip(rows.keys, rows.codes.tolist(), strict=True))
    for name in set(RIGHT) - {"cmyk"}:
        assert codes[f"{name}.png"] == codes["plain.png"], name


def test_training_on_pictures_counts_each_reason(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageDataModule(ImageFolderSource(str(folder)), len(RIGHT), 16, 16)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["keys"]) == len(RIGHT)
    for reason, count in REASONS.items():
        assert f"{count} pictures dropped: {reason}" in caplog.text


def test_tars_count_each_reason_and_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
        for suffix in ("png", "txt"):
            tar.add(folder / f"plain.{suffix}", f"caf\udce9.{suffix}")  # in Latin-1
    dropped: list[Dropped] = []
    source = WebDatasetSource(str(tmp_path / "all.tar"))
    samples = [sample for unit in source.units() for sample in decoded(source.read(unit, dropped), dropped)]
    assert [sample.key for sample in samples] == sorted(RIGHT)
    assert Counter(reason for _, reason in dropped) == REASONS + Counter({"text is not UTF-8": 1})


def test_a_listing_that_is_no_text_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n{"file_name": "caf\xe9.png"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8 \(line 2\)"):
        ImageFolderSource(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\\ud800.png", "text": "x"}')
    dropped: list[Dropped] = []
    source = ImageFolderSource(str(tmp_path))
    assert list(source.read(source.units()[0], dropped)) == []
    assert [reason for _, reason in dropped] == ["text is not UTF-8"]
