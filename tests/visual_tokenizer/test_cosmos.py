"""Cosmos DV8x16x16 from TorchScript files of its interface: shapes, the order of indices, and what is never loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from vector_quantize_pytorch import FSQ

import simplear.visual_tokenizer.cosmos as cosmos
from simplear.visual_tokenizer import (
    CosmosTokenizer,
    copy_visual_tokenizer,
    load_visual_tokenizer,
    save_visual_tokenizer,
)
from visual_tokenizer.cosmos_files import LEVELS, Decoder, Encoder, write


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cosmos") / "downloaded")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pictures_are_videos_of_one_frame(files: Path, pixels: torch.Tensor) -> None:
    tokenizer = load_visual_tokenizer(files)
    assert isinstance(tokenizer, CosmosTokenizer)
    assert (tokenizer.codebook_size, tokenizer.downsample) == (64_000, 16)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (3, 3, 2) and codes.dtype == torch.int64 and len(codes.unique()) > 10
    indices, _, _ = torch.jit.load(str(files / "encoder.jit"))(pixels[:, :, None])
    assert torch.equal(codes, indices[:, 0].long())
    decoded = tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.jit.load(str(files / "decoder.jit"))(indices)[:, :, 0].clamp(-1, 1))
    alone = torch.cat([tokenizer.encode(picture[None]) for picture in pixels])
    assert torch.equal(alone, codes)


def test_the_first_level_counts_fastest_as_in_other_fsq(files: Path, pixels: torch.Tensor) -> None:
    """So the toy's order, which is that of NVIDIA's quantiser, is also that of the quantiser trained here."""
    indices, values, _ = torch.jit.load(str(files / "encoder.jit"))(pixels[:, :, None])
    quantizer = FSQ(list(LEVELS))
    assert torch.allclose(quantizer.indices_to_codes(indices[:, 0].long()), values[:, :, 0])
    assert quantizer.codebook_size == CosmosTokenizer.codebook_size
    slowest_first = FSQ(list(LEVELS[::-1]))
    assert not torch.allclose(slowest_first.indices_to_codes(indices[:, 0].long()), values.flip(1)[:, :, 0])


def test_weights_of_another_type_are_computed_in_it(tmp_path: Path, pixels: torch.Tensor) -> None:
    """The released files are in bfloat16."""
    write(tmp_path, Encoder().bfloat16(), Decoder().bfloat16())
    tokenizer = load_visual_tokenizer(tmp_path)
    with torch.autocast("cpu", torch.float16):
        decoded = tokenizer.decode(tokenizer.encode(pixels))
    assert decoded.dtype == torch.float32 and decoded.shape == pixels.shape


def test_it_is_carried_along_with_the_files_as_they_were(files: Path, tmp_path: Path, pixels: torch.Tensor) -> None:
    loaded = load_visual_tokenizer(files)
    save_visual_tokenizer(loaded, tmp_path / "saved")
    copy_visual_tokenizer(files, tmp_path / "copied")
    copy_visual_tokenizer(tmp_path / "saved", tmp_path / "copied again")
    for name in ("saved", "copied", "copied again"):
        again = load_visual_tokenizer(tmp_path / name)
        assert again.fingerprint == loaded.fingerprint
        assert torch.equal(again.encode(pixels), loaded.encode(pixels))
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "config.json",
            "decoder.jit",
            "encoder.jit",
        ]
        for file in cosmos.FILES:
            assert (tmp_path / name / file).read_bytes() == (files / file).read_bytes()
    assert load_visual_tokenizer(write(tmp_path / "other", Encoder(shift=1))).fingerprint != loaded.fingerprint


def test_nothing_is_loaded_before_its_hash_is_right(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(cosmos, "_load", lambda file: loaded.append(file))
    for name in cosmos.FILES:
        directory = tmp_path / name
        directory.mkdir()
        for file in files.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} has SHA-256 .* was not loaded"):
            load_visual_tokenizer(directory)
        (directory / name).write_bytes((files / name).read_bytes()[:1000])
        with pytest.raises(ValueError, match=rf"{name} has SHA-256 .* cut short"):
            load_visual_tokenizer(directory)
    assert not loaded


def test_a_file_of_unknown_hash_is_not_loaded(files: Path, tmp_path: Path) -> None:
    write(tmp_path, sums=False)
    with pytest.raises(ValueError, match=r"no SHA-256 is known for .*encoder\.jit.* SHA256SUMS"):
        load_visual_tokenizer(tmp_path)
    sums = [line.split() for line in (files / "SHA256SUMS").read_text().splitlines()]
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digest} * {name}\n" for digest, name in sums))  # git lfs ls-files
    assert load_visual_tokenizer(tmp_path).fingerprint == load_visual_tokenizer(files).fingerprint
    wrong = {"encoder.jit": "0" * 64, "decoder.jit": "0" * 64}
    with pytest.raises(ValueError, match=r"not the stated 000000000000"):
        CosmosTokenizer.from_directory(tmp_path, wrong)


def test_what_the_hub_stated_at_the_download_is_enough(files: Path, tmp_path: Path) -> None:
    """In both places where a download leaves it."""
    digests = {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in cosmos.FILES}
    local, cache = tmp_path / "local", tmp_path / "cache" / "snapshots" / "revision"
    notes = local / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    cache.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for name, digest in digests.items():
        (local / name).write_bytes((files / name).read_bytes())
        (notes / f"{name}.metadata").write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
        (tmp_path / "cache" / "blobs" / digest).write_bytes((files / name).read_bytes())
        (cache / name).symlink_to(f"../../blobs/{digest}")
    for directory in (local, cache):
        assert load_visual_tokenizer(directory).fingerprint == load_visual_tokenizer(files).fingerprint
        with (directory / "decoder.jit").open("ab") as damaged:
            damaged.write(b"x")
        with pytest.raises(ValueError, match=r"decoder\.jit has SHA-256"):
            load_visual_tokenizer(directory)


def test_a_hub_id_is_downloaded(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def give(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, {"encoder.jit", "decoder.jit"} <= set(allow_patterns)))
        return str(files)

    monkeypatch.setattr("simplear.visual_tokenizer.checkpoint.snapshot_download", give)
    assert load_visual_tokenizer("nvidia/Cosmos-1.0-Tokenizer-DV8x16x16").codebook_size == 64_000
    assert asked == [("nvidia/Cosmos-1.0-Tokenizer-DV8x16x16", True)]


def test_a_missing_or_unreadable_file_is_named(files: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "decoder.jit").unlink()
    with pytest.raises(FileNotFoundError, match=r"decoder\.jit is missing"):
        load_visual_tokenizer(tmp_path)
    (tmp_path / "decoder.jit").write_bytes((files / "decoder.jit").read_bytes()[:-2000])
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in cosmos.FILES}
    with pytest.raises(ValueError, match=r"decoder\.jit is not a TorchScript module"):
        CosmosTokenizer.from_directory(tmp_path, digests)
    saved = tmp_path / "saved"
    save_visual_tokenizer(load_visual_tokenizer(files), saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="does not have the fingerprint"):
        load_visual_tokenizer(saved)


class Continuous(nn.Module):
    """What the continuous tokenizers of the same family give."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :1, :, ::16, ::16].contiguous()[:, 0]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Continuous(), r"encoder\.jit gave torch\.float32 of shape \(3, 1, 3, 2\)"),
        (
            Encoder(patch=8),
            r"encoder\.jit gave torch\.int32 of shape \(3, 1, 6, 4\).* not whole numbers of shape \(3, 1, 3, 2\)",
        ),
        (Encoder(shift=64_000), r"encoder\.jit gave .* in \[\d+, \d{5,6}\] .* in \[0, 64000\)"),
        (Encoder(shift=-64_000), r"encoder\.jit gave .* in \[-\d+, -?\d+\]"),
    ],
)
def test_what_is_not_cosmos_is_an_error_that_names_the_file(
    tmp_path: Path, pixels: torch.Tensor, encoder: nn.Module, message: str
) -> None:
    write(tmp_path, encoder)
    with pytest.raises(ValueError, match=message):
        load_visual_tokenizer(tmp_path).encode(pixels)


def test_wrong_sizes_and_codes_are_named(files: Path, tmp_path: Path) -> None:
    tokenizer = load_visual_tokenizer(files)
    with pytest.raises(ValueError, match="40 x 32 pixels is not made of whole patches of 16 x 16"):
        tokenizer.encode(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"code 64000 at image 0, row 1, column 0"):
        tokenizer.decode(torch.tensor([[[0, 1], [64_000, 2]]]))
    with pytest.raises(ValueError, match=r"decoder\.jit gave shape \(1, 3, 1, 16, 16\)"):
        load_visual_tokenizer(write(tmp_path, decoder=Decoder(patch=8))).decode(torch.zeros(1, 2, 2, dtype=torch.int64))
