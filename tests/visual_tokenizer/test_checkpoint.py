"""A tokenizer's directory: a round trip, foreign classes, and every way in which files can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simplear.visual_tokenizer import (
    FSQAutoencoder,
    load_visual_tokenizer,
    protocol,
    register_visual_tokenizer,
    save_visual_tokenizer,
)


@register_visual_tokenizer
class Brightness(nn.Module):
    """A user's own tokenizer: one code a patch, its brightness."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.init_args = {"codebook_size": codebook_size}
        self.codebook_size = codebook_size
        self.downsample = 4
        self.gain = nn.Parameter(torch.tensor(1.0))

    @property
    def fingerprint(self):
        return protocol.fingerprint(self.init_args, self.state_dict())

    def encode(self, pixels):
        mean = nn.functional.avg_pool2d(self.gain * pixels, 4).mean(dim=1)
        return ((mean + 1) / 2 * (self.codebook_size - 1)).round().long()

    def decode(self, codes):
        grey = codes / (self.codebook_size - 1) * 2 - 1
        return grey[:, None].repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)


def small(seed: int = 0) -> FSQAutoencoder:
    torch.manual_seed(seed)
    return FSQAutoencoder([4, 3], 4, encoder_channels=8, decoder_channels=8, decoder_blocks=1, refine_channels=4)


@pytest.fixture
def directory(tmp_path):
    save_visual_tokenizer(small(), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_round_trip_keeps_codes_pictures_and_fingerprint(directory):
    loaded, tokenizer = load_visual_tokenizer(directory), small()
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    codes = tokenizer.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_config_names_the_public_class_and_plain_arguments(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["class_path"] == "simplear.visual_tokenizer.FSQAutoencoder"
    assert config["init_args"]["levels"] == [4, 3]
    assert config["fingerprint"] == small().fingerprint
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_and_leaves_nothing_beside(directory):
    save_visual_tokenizer(small(seed=1), directory)
    assert load_visual_tokenizer(directory).fingerprint == small(seed=1).fingerprint != small().fingerprint
    assert [entry.name for entry in directory.parent.iterdir()] == ["tokenizer"]


def test_save_that_fails_leaves_the_old_tokenizer_and_nothing_beside(directory, monkeypatch):
    def full_disk(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("simplear.visual_tokenizer.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_visual_tokenizer(small(seed=1), directory)
    assert load_visual_tokenizer(directory).fingerprint == small().fingerprint
    assert [entry.name for entry in directory.parent.iterdir()] == ["tokenizer"]


def test_a_users_own_class_that_is_registered_is_found_again(tmp_path):
    save_visual_tokenizer(Brightness(16), tmp_path / "own")
    loaded = load_visual_tokenizer(tmp_path / "own")
    assert type(loaded).__name__ == "Brightness"
    codes = torch.arange(16).reshape(1, 4, 4)
    assert torch.equal(loaded.encode(loaded.decode(codes)), codes)


def test_class_without_init_args_cannot_be_saved(tmp_path):
    tokenizer = Brightness(16)
    del tokenizer.init_args
    with pytest.raises(ValueError, match="Brightness has no init_args"):
        save_visual_tokenizer(tokenizer, tmp_path / "own")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_visual_tokenizer(directory)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a visual tokenizer"):
        load_visual_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_is_named(directory, name, kept):
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=name):
        load_visual_tokenizer(directory)


def test_changed_weight_is_refused(directory):
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["encoder.1.bias"][0] += 1
    save_file(weights, file)
    with pytest.raises(ValueError, match="does not have the fingerprint"):
        load_visual_tokenizer(directory)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("init_args", {"levels": [5, 3], "downsample": 4}, "does not fit the init_args"),
        ("init_args", {"levels": [4, 3], "downsample": 4, "colour": 1}, "does not fit the init_args .*colour"),
        ("init_args", [4, 3], "does not fit the init_args"),
        ("fingerprint", None, "no key 'fingerprint'"),
    ],
)
def test_config_that_does_not_fit_is_refused(directory, key, value, message):
    config = json.loads((directory / "config.json").read_text())
    del config[key]
    if value is not None:
        config[key] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_visual_tokenizer(directory)
