"""Janus's visual tokenizer against transformers' class, on small random weights that this class saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
)

from simplear.visual_tokenizer import (
    JanusTokenizer,
    copy_visual_tokenizer,
    load_visual_tokenizer,
    save_visual_tokenizer,
)

NETWORK: dict[str, Any] = {
    "num_embeddings": 48,
    "embed_dim": 4,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
}
PATCHES = 4


@pytest.fixture(scope="module")
def vqvae() -> JanusVQVAE:
    torch.manual_seed(0)
    model = JanusVQVAE(JanusVQVAEConfig(**NETWORK, num_patches=PATCHES)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)  # of many lengths
    return model


@pytest.fixture(scope="module")
def directory(vqvae: JanusVQVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("janus") / "vqvae"
    vqvae.save_pretrained(directory)
    return directory


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_a_code_is_the_vector_of_the_smallest_angle(vqvae: JanusVQVAE, directory: Path, pixels: torch.Tensor) -> None:
    """By the formula of DeepSeek's own code, place by place; transformers' encode gives other codes."""
    tokenizer = load_visual_tokenizer(directory)
    assert isinstance(tokenizer, JanusTokenizer)
    assert (tokenizer.codebook_size, tokenizer.downsample) == (48, 4)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.int64 and len(codes.unique()) > 5
    vectors = vqvae.quant_conv(vqvae.encoder(pixels))
    unit = [vector / vector.norm() for vector in vqvae.quantize.embedding.weight]
    for picture in range(3):
        for row in range(4):
            for column in range(4):
                vector = vectors[picture, :, row, column] / vectors[picture, :, row, column].norm()
                distances = torch.stack([((vector - other) ** 2).sum() for other in unit])
                assert distances[codes[picture, row, column]] <= distances.min() + 1e-6
    assert not torch.equal(vqvae.encode(pixels).image_tokens.view(3, 4, 4), codes)


@torch.no_grad()
def test_with_vectors_of_one_length_codes_are_those_of_transformers(
    vqvae: JanusVQVAE, tmp_path: Path, pixels: torch.Tensor
) -> None:
    same = JanusVQVAE(vqvae.config).eval()
    same.load_state_dict(vqvae.state_dict())
    same.quantize.embedding.weight.data = torch.nn.functional.normalize(same.quantize.embedding.weight.data, dim=-1)
    same.save_pretrained(tmp_path)
    codes = load_visual_tokenizer(tmp_path).encode(pixels)
    assert torch.equal(codes, same.encode(pixels).image_tokens.view(3, 4, 4))


@torch.no_grad()
def test_pictures_are_those_of_transformers_and_any_grid_decodes(
    vqvae: JanusVQVAE, directory: Path, pixels: torch.Tensor
) -> None:
    tokenizer = load_visual_tokenizer(directory)
    codes = tokenizer.encode(pixels)
    assert torch.equal(tokenizer.decode(codes), vqvae.decode(codes.flatten(1)).clamp(-1, 1))
    wide = torch.rand(2, 3, 8, 24) * 2 - 1
    assert tokenizer.encode(wide).shape == (2, 2, 6)
    assert tokenizer.decode(tokenizer.encode(wide)).shape == wide.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), codes)


def test_a_whole_janus_gives_the_same_tokenizer(vqvae: JanusVQVAE, directory: Path, tmp_path: Path) -> None:
    """From its own sub-weights, in the dtype of the file."""
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, projection_dim=16
        ),
        vq_config=JanusVQVAEConfig(**NETWORK, projection_dim=16, image_token_embed_dim=16),
    )
    whole = JanusForConditionalGeneration(config)
    whole.model.vqmodel.load_state_dict(vqvae.state_dict())
    whole.save_pretrained(tmp_path / "janus")
    assert json.loads((tmp_path / "janus" / "config.json").read_text())["model_type"] == "janus"
    loaded = load_visual_tokenizer(tmp_path / "janus")
    assert loaded.fingerprint == load_visual_tokenizer(directory).fingerprint
    copy_visual_tokenizer(tmp_path / "janus", tmp_path / "copied")
    assert sorted(file.name for file in (tmp_path / "copied").iterdir()) == ["config.json", "model.safetensors"]
    assert load_visual_tokenizer(tmp_path / "copied").fingerprint == loaded.fingerprint


def test_round_trip_in_our_layout(directory: Path, tmp_path: Path, pixels: torch.Tensor) -> None:
    tokenizer = load_visual_tokenizer(directory)
    save_visual_tokenizer(tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["class_path"] == "simplear.visual_tokenizer.JanusTokenizer"
    assert torch.equal(load_visual_tokenizer(tmp_path / "saved").encode(pixels), tokenizer.encode(pixels))


def damaged(directory: Path, out: Path, change: Any) -> Path:
    out.mkdir()
    (out / "config.json").write_bytes((directory / "config.json").read_bytes())
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_damaged_and_foreign_weights_are_named(directory: Path, tmp_path: Path) -> None:
    lacking = damaged(directory, tmp_path / "lacking", lambda weights: weights.pop("quantize.embedding.weight"))
    with pytest.raises(ValueError, match=r"lacking lacks 1 weights .*quantize\.embedding\.weight"):
        load_visual_tokenizer(lacking)
    other = damaged(directory, tmp_path / "other", lambda weights: weights.update({"quant_conv.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"other cannot be read"):
        load_visual_tokenizer(other)
    (other / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"other cannot be read"):
        load_visual_tokenizer(other)


def test_wrong_pixels_and_codes_are_named(directory: Path) -> None:
    tokenizer = load_visual_tokenizer(directory)
    with pytest.raises(ValueError, match="18 x 16 pixels is not made of whole patches of 4 x 4"):
        tokenizer.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"code 48 at image 0, row 0, column 1"):
        tokenizer.decode(torch.tensor([[[0, 48]]]))
