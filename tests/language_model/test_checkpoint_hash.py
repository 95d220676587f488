"""The hash that names a checkpoint: what `sha256sum` says of its files, and of nothing else beside them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from simplear.language_model import CheckpointError, checkpoint_hash


def test_it_is_what_sha256sum_prints(tiny_checkpoint: Path):
    command = "LC_ALL=C sha256sum *.safetensors simplear.json | sha256sum"
    said = subprocess.run(command, shell=True, cwd=tiny_checkpoint, capture_output=True, text=True, check=True).stdout
    assert checkpoint_hash(tiny_checkpoint) == said.split()[0]


def test_weights_and_settings_change_it_and_what_is_only_read_by_people_does_not(tiny_checkpoint: Path, tmp_path: Path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, copy)
    hashes = [checkpoint_hash(copy)]
    (copy / "README.md").write_text("a card\n")
    assert checkpoint_hash(str(copy)) == hashes[0] == checkpoint_hash(tiny_checkpoint)
    for file in ("model.safetensors", "simplear.json"):
        content = bytearray((copy / file).read_bytes())
        content[-3] ^= 1
        (copy / file).write_bytes(content)
        hashes.append(checkpoint_hash(copy))
    assert len(set(hashes)) == 3


def test_a_directory_without_weights_has_none(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no \\*\\.safetensors"):
        checkpoint_hash(tmp_path)
