"""Cosmos DV8x16x16, the visual tokenizer of the paper, from the two TorchScript files that NVIDIA released.

It is a video tokenizer: it takes (B, 3, T, H, W) and its first frame stands alone, so a picture is a video of one
frame and gives one plane of codes. A code is the index of one of 8·8·8·5·5·5 = 64,000 points (FSQ), the first level
counting fastest. The paper's release decodes its codes in the same way.

TorchScript files are programs, so each is held against its SHA-256 before anything of it is loaded. What to expect
is what the hub stated when it gave the file or what the user wrote into ``SHA256SUMS``; no hash stands in this code.
A hash says that a file is what was sent, and not that the sender means well, so a program that names an operator with
access to files, or anything beyond PyTorch's own operators, is not loaded either.

Left out: the network as a module of our own with the weights of these files. NVIDIA's own code does that, but whether a
second implementation gives the same codes can only be shown with the real weights.

Sources: Cosmos World Foundation Model Platform (arXiv 2501.03575); NVIDIA's inference code (NVIDIA/Cosmos-Tokenizer,
``video_lib.py`` for shapes and outputs, ``quantizers.py`` for the order of indices).
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplear.errors import MissingFileError, UserError, first_line
from simplear.hashing import sha256_of
from simplear.hub import stated_sha256
from simplear.text_files import read_lines
from simplear.visual_tokenizer import protocol

ENCODER_FILE, DECODER_FILE = "encoder.jit", "decoder.jit"
FILES = (ENCODER_FILE, DECODER_FILE)
SUMS_FILE = "SHA256SUMS"
LEVELS = (8, 8, 8, 5, 5, 5)
"""Of the finite scalar quantiser; their product is the codebook."""
OLD_FORMAT = "model.json"
"""In archives whose programs may have any name."""
FORBIDDEN = re.compile(rb"\b(save|from_file|getattr|classes)\b|\bops\b(?!\.(?:aten|prim)\.)")
"""In a program: operators that read or write files, a way to name these in pieces, and all but PyTorch's operators."""


class CosmosTokenizer(protocol.TokenizerBase):
    """Pictures of any size in multiples of 16 pixels, made by `from_directory`.

    In bfloat16, which the released files have, codes may differ between kinds of processors
    where a value lies between two levels.
    """

    codebook_size = 64_000
    downsample = 16

    def __init__(self, encoder: nn.Module, decoder: nn.Module, directory: Path, sha256: Mapping[str, str]) -> None:
        """
        Args:
            encoder: of ``encoder.jit``: (B, 3, 1, H, W) in [-1, 1] → a tuple that begins with indices (B, 1, h, w).
            decoder: of ``decoder.jit``: indices (B, 1, h, w) → (B, 3, 1, H, W).
            directory: where the files are, to copy them from.
            sha256: of each of the files, as verified.
        """
        super().__init__()
        self.encoder, self.decoder, self.directory = encoder, decoder, directory
        self.init_args = {"sha256": dict(sha256)}

    @classmethod
    def from_directory(cls, directory: Path, sha256: Mapping[str, str] | None = None) -> CosmosTokenizer:
        """The tokenizer of a directory with ``encoder.jit`` and ``decoder.jit``, on CPU.

        Args:
            directory: as downloaded from the hub, or as `save_visual_tokenizer` wrote it.
            sha256: of each file; None takes ``SHA256SUMS`` beside them (lines as sha256sum or
                ``git lfs ls-files --long`` print them), or else what the hub stated when it gave them.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no hash is known for a file, it has another, or it holds no TorchScript module; names the file.
        """
        expected = {name: _expected(directory / name, sha256) for name in FILES}
        for name, digest in expected.items():
            if (found := sha256_of(directory / name)) != digest:
                raise UserError(
                    f"{directory / name} has SHA-256 {found[:12]}…, not the stated {digest[:12]}…: it is cut short, "
                    "damaged or another file, and was not loaded. Download it again."
                )
        encoder, decoder = (_load(directory / name) for name in FILES)
        return cls(encoder, decoder, directory, expected)

    def save_files(self, directory: Path) -> None:
        """Copy the two files to `directory`. Raises ValueError when one has changed since it was loaded."""
        for name, digest in self.init_args["sha256"].items():
            shutil.copyfile(self.directory / name, directory / name)
            if sha256_of(directory / name) != digest:
                raise UserError(f"{self.directory / name} was changed since it was loaded: download it again.")

    def _encode(self, pixels: Tensor) -> Tensor:
        output = self.encoder(pixels[:, :, None])
        indices = output[0] if isinstance(output, tuple | list) else output
        wanted = (len(pixels), 1, pixels.shape[2] // self.downsample, pixels.shape[3] // self.downsample)
        lowest, highest = indices.min(), indices.max()
        fits = tuple(indices.shape) == wanted and not indices.is_floating_point()
        if not fits or lowest < 0 or highest >= self.codebook_size:
            raise UserError(
                f"{self.directory / ENCODER_FILE} gave {indices.dtype} of shape {tuple(indices.shape)} in [{lowest}, "
                f"{highest}] for pixels of shape {tuple(pixels.shape)}, not whole numbers of shape {wanted} in [0, "
                f"{self.codebook_size}): it is not the encoder of Cosmos DV8x16x16, or a pixel is not a number."
            )
        return indices[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        video = self.decoder(codes[:, None])
        wanted = (len(codes), 3, 1, codes.shape[1] * self.downsample, codes.shape[2] * self.downsample)
        if tuple(video.shape) != wanted:
            raise UserError(
                f"{self.directory / DECODER_FILE} gave shape {tuple(video.shape)} for codes of shape "
                f"{tuple(codes.shape)}, not {wanted}: it is not the decoder of Cosmos DV8x16x16."
            )
        return video[:, :, 0]


def _expected(file: Path, stated: Mapping[str, str] | None) -> str:
    """The hash that the file must have."""
    if not file.is_file():
        raise MissingFileError(
            f"{file} is missing: Cosmos DV8x16x16 is the two files {' and '.join(FILES)} of "
            "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 on the hub."
        )
    if stated is None and (sums := file.parent / SUMS_FILE).is_file():
        stated = _read_sums(sums)
    digest = stated_sha256(file) if stated is None else stated.get(file.name)
    if digest is None:
        raise UserError(
            f"no SHA-256 is known for {file}, and a TorchScript file is a program: download it with `hf download "
            f"--local-dir`, or write the hash that its page on the hub states into {file.parent / SUMS_FILE}, as a "
            f"line `HASH  {file.name}` (in a git clone: git lfs ls-files --long > {SUMS_FILE})."
        )
    return digest


def _read_sums(file: Path) -> dict[str, str]:
    """Hashes by file name; between the two there may be a ``*`` or ``-``."""
    words = [line.split() for _, line in read_lines(file)]
    return {line[-1].lstrip("*"): line[0].lower() for line in words if len(line) > 1}


def _require_harmless(file: Path) -> None:
    """Raises UserError for a TorchScript program that could do more than compute; nothing of it is run."""
    # PyTorch's own reader of archives, so that what is looked at is what would be loaded.
    reader = torch._C.PyTorchFileReader(str(file))
    for name in reader.get_all_records():
        # All but tensors, and the places in the original source, which are for error messages.
        is_program = not name.startswith(("data/", "constants/")) and not name.endswith(".debug_pkl")
        found = FORBIDDEN.search(reader.get_record(name)) if is_program else None
        if found is not None or name.lower() == OLD_FORMAT:
            what = f"names {found[0].decode()!r} in {name}" if found is not None else "is in an old format"
            raise UserError(
                f"{file} {what}: it could read or write files, which a visual tokenizer does not need, and was not "
                "loaded."
            )


def _load(file: Path) -> Any:
    try:
        _require_harmless(file)
        with warnings.catch_warnings():
            # PyTorch advises against TorchScript for new files; these are what was released.
            warnings.filterwarnings("ignore", ".*torch.jit.load.*", FutureWarning)
            return torch.jit.load(str(file), map_location="cpu").eval()
    except RuntimeError as error:
        raise UserError(
            f"{file} is not a TorchScript module that can be read: {first_line(error)} Download it again."
        ) from error
