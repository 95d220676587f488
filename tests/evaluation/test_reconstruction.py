"""A visual tokenizer measured: PSNR and SSIM against scikit-image, the codebook's use, the command, its refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import torch
from PIL import Image
from torch import Tensor, nn

from simplear.cli import main
from simplear.data.sources.folders import pictures_below
from simplear.evaluation import compare
from simplear.evaluation.fid import picture_batches
from simplear.evaluation.reconstruction import PSNR_CEILING, codebook_use, evaluate_tokenizer, picture_scores
from toys import make_visual_tokenizer


class MeanColors(nn.Module):
    """Mean of each channel over the two halves of a picture."""

    name = "mean-colors"
    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), (1, 2)).flatten(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty smooth random pictures of 16 × 24 pixels, some in a sub-folder."""
    random = np.random.default_rng(0)
    for number in range(20):
        file = tmp_path / "pictures" / ("more" if number % 3 == 0 else "") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        small.resize((24, 16), Image.Resampling.BICUBIC).save(file)
    return tmp_path / "pictures"


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    random = np.random.default_rng(1)
    originals = random.integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    noise = random.normal(0, [[[[2]]], [[[20]]], [[[60]]]], originals.shape)
    decoded = (originals + noise).round().clip(0, 255).astype(np.uint8)
    psnr, ssim = picture_scores(*(torch.from_numpy(images).permute(0, 3, 1, 2) for images in (originals, decoded)))
    for given, found, decibels, similarity in zip(originals, decoded, psnr.tolist(), ssim.tolist(), strict=True):
        assert decibels == pytest.approx(skimage.metrics.peak_signal_noise_ratio(given, found), abs=1e-5)
        oracle = skimage.metrics.structural_similarity(
            given, found, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert similarity == pytest.approx(oracle, abs=1e-6)
    assert psnr[0] > psnr[1] > psnr[2] and ssim[0] > ssim[1] > ssim[2]


def test_an_exact_picture_has_the_psnr_of_rounding() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    psnr, ssim = picture_scores(images, images)
    assert psnr.tolist() == [PSNR_CEILING] * 2 and torch.allclose(ssim, torch.ones(2, dtype=ssim.dtype))
    assert pytest.approx(10 * math.log10(255**2 / (1 / 12))) == PSNR_CEILING


def test_use_of_the_codebook() -> None:
    assert codebook_use(torch.tensor([5, 0, 0, 0])) == (0.25, pytest.approx(1))
    assert codebook_use(torch.tensor([3, 3, 3, 3])) == (1, pytest.approx(4))
    used, perplexity = codebook_use(torch.tensor([2, 1, 1, 0]))
    assert (used, perplexity) == (0.75, pytest.approx(2**1.5))


def test_the_report_says_what_scikit_image_says_of_each_picture(
    folder: Path, tmp_path: Path, tiny_visual_tokenizer: str
) -> None:
    report = evaluate_tokenizer(
        tiny_visual_tokenizer, out=str(tmp_path / "out"), images=str(folder), extractor=MeanColors(), batch_size=7
    )
    (name,) = report["runs"]
    result = report["runs"][name]
    assert list(result) == [
        "overall",
        "rfid-mean-colors",
        "psnr",
        "ssim",
        "codebook-used",
        "codebook-perplexity",
    ]
    directory = tmp_path / "out" / "reconstruction" / name
    rows = [json.loads(line) for line in (directory / "pictures.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    values = [row["psnr"] for row in rows]
    margin = 1.96 * np.std(values, ddof=1) / np.sqrt(20)
    psnr = result["psnr"]
    assert psnr["score"] == pytest.approx(np.mean(values)) and psnr["n"] == 20
    assert psnr["high"] - psnr["score"] == pytest.approx(margin, rel=1e-3)
    assert result["codebook-used"]["n"] == 20 * 2 * 3 and "low" not in result["rfid-mean-colors"]
    assert result["overall"] == result["rfid-mean-colors"]
    assert Image.open(directory.with_name(f"{name}.png")).width > 500
    assert "rfid-mean-colors" in (tmp_path / "out" / "report.md").read_text()
    # Batches do not matter.
    again = evaluate_tokenizer(
        tiny_visual_tokenizer, out=str(tmp_path / "out"), images=str(folder), extractor=MeanColors(), batch_size=20
    )["runs"][name]
    for measure, entry in result.items():
        assert again[measure] == pytest.approx(entry, rel=1e-5), measure


def test_two_tokenizers_are_compared_picture_by_picture(
    folder: Path, tmp_path: Path, tiny_visual_tokenizer: str
) -> None:
    other = make_visual_tokenizer(tmp_path / "other", seed=1)
    for name, tokenizer in (("a", tiny_visual_tokenizer), ("b", other)):
        report = evaluate_tokenizer(tokenizer, out=str(tmp_path), images=str(folder), run=name, rfid=False)
    found = compare(f"{tmp_path}:a-reconstruction", f"{tmp_path}:b-reconstruction")["differences"]["overall"]
    first, second = (report["runs"][f"{name}-reconstruction"]["psnr"]["score"] for name in "ab")
    assert found["difference"] == pytest.approx(second - first) and found["n"] == 20


def test_a_size_resizes_and_says_what_was_enlarged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = pictures_below(folder)
    (pictures,) = picture_batches(files, 32, (8, 8))
    assert pictures.shape == (20, 3, 8, 8) and not caplog.messages
    assert next(picture_batches(files, 32, (32, 16))).shape == (20, 3, 32, 16)
    list(picture_batches(files, 9, (32, 16)))
    assert "20 of 20 pictures were smaller than 32 × 16 and enlarged" in caplog.text


def test_what_programs_keep_beside_pictures_is_not_measured(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("._1.png", ".ipynb_checkpoints/01.png", "__MACOSX/01.png", "notes.pdf", "01.txt", "more/.1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "01.png").read_bytes())
    assert sorted(file.name for file in pictures_below(folder)) == [f"{number:02d}.png" for number in range(20)]
    assert f"1 files passed over in {folder}: 1 .pdf" in caplog.text


def broken(folder: Path) -> None:
    file = folder / "07.png"
    file.write_bytes(file.read_bytes()[:60])


def odd(folder: Path) -> None:
    Image.new("RGB", (24, 8)).save(folder / "07.png")


def unpatched(folder: Path) -> None:
    for file in pictures_below(folder):
        Image.new("RGB", (24, 20)).save(file)


def empty(folder: Path) -> None:
    for file in pictures_below(folder):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken, r"07\.png: truncated or damaged picture"),
        (odd, r"07\.png has 8 × 24 pixels, .*01.png 16 × 24"),
        (unpatched, r"20 x 24 pixels is not made of whole patches of 8 x 8"),
        (empty, r"pictures holds no picture"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(
    folder: Path, tmp_path: Path, tiny_visual_tokenizer: str, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_tokenizer(tiny_visual_tokenizer, out=str(tmp_path / "out"), images=str(folder), rfid=False)
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_command_line(
    folder: Path, tmp_path: Path, tiny_visual_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", str(folder), "--out", str(tmp_path / "out"), "--rfid", "false", "--limit", "5"]
    main(["evaluate", "tokenizer", tiny_visual_tokenizer, *arguments])
    assert "| psnr |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "tokenizer", tiny_visual_tokenizer, *arguments, "--height", "16"])
    assert "height and width go together" in capsys.readouterr().err
