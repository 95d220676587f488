"""A pretrained tokenizer of another codebook and patch size, from pictures to a checkpoint that draws with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

from simplear import SimpleARPipeline
from simplear.cli import main
from simplear.data import ScenesSource, TokenShards, tokenize
from simplear.language_model import CheckpointSettings, save_checkpoint
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import CODEBOOK, model_config, write_pretraining
from visual_tokenizer.cosmos_files import write
from visual_tokenizer.test_janus import NETWORK

RESOLUTION = 32


def janus(directory: Path) -> Path:
    torch.manual_seed(0)
    JanusVQVAE(JanusVQVAEConfig(**NETWORK)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("make", "codes", "downsample"), [(janus, 48, 4), (write, 64_000, 16)])
def test_from_pictures_to_a_checkpoint_that_draws(
    make: Any, codes: int, downsample: int, tmp_path: Path, tiny_text_tokenizer: str
) -> None:
    directory = make(tmp_path / "tokenizer")
    source = ScenesSource(8, RESOLUTION, rows_per_unit=4)
    tokenize(source=source, visual_tokenizer=str(directory), out=str(tmp_path / "shards"), accelerator="cpu")
    shards, side = TokenShards(tmp_path / "shards"), RESOLUTION // downsample
    assert (shards.codebook_size, shards.downsample, shards.grids) == (codes, downsample, {(side, side): 8})
    config = write_pretraining(tmp_path, tiny_text_tokenizer, str(directory), str(tmp_path / "shards"))
    main(
        [
            "fit", "--config", str(config), "--trainer.max_steps", "2", "--trainer.logger", "false",
            "--model.init_args.language_model.codebook_size", str(codes),
            "--model.init_args.language_model.architecture.max_position_embeddings", "128",
        ]
    )  # fmt: skip
    checkpoint = tmp_path / "run" / "model"
    carried = load_visual_tokenizer(checkpoint / "visual_tokenizer")
    assert carried.fingerprint == load_visual_tokenizer(directory).fingerprint == shards.fingerprint
    pipeline = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    drawn = pipeline("one star", seed=0, output_type="pt")
    assert drawn.images.shape == (1, 3, RESOLUTION, RESOLUTION)
    assert torch.equal(drawn.images[0], ((carried.decode(drawn.codes)[0] + 1) / 2).clamp(0, 1))
    with pytest.raises(ValueError, match="fingerprint"):
        other = janus if make is write else write
        wrong = SimpleARPipeline.from_pretrained(checkpoint, device="cpu", visual_tokenizer=other(tmp_path / "other"))
        wrong("one star", seed=0)


def test_a_released_directory_is_decoded_with_cosmos_from_the_hub(
    tmp_path: Path, tiny_text_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosmos, released = write(tmp_path / "cosmos"), tmp_path / "released"
    model, tokenizer = model_config(tiny_text_tokenizer, max_position_embeddings=8192).build()
    save_checkpoint(
        released, model, tokenizer, CheckpointSettings(model.layout.image_token_offset, CODEBOOK, (2, 2), 16)
    )
    (released / "simplear.json").unlink()
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps({**config, "architectures": ["SimpARForCausalLM"]}))
    given = {"nvidia/Cosmos-1.0-Tokenizer-DV8x16x16": str(cosmos)}
    monkeypatch.setattr(
        "simplear.visual_tokenizer.checkpoint.snapshot_download", lambda repository, **options: given[repository]
    )
    options = {"seed": 0, "height": 32, "width": 48, "output_type": "pt"}
    drawn = SimpleARPipeline.from_pretrained(released, device="cpu")("one star", **options)
    named = SimpleARPipeline.from_pretrained(released, device="cpu", visual_tokenizer=cosmos)("one star", **options)
    assert drawn.images.shape == (1, 3, 32, 48) and torch.equal(drawn.images, named.images)
    expected = load_visual_tokenizer(cosmos).decode(drawn.codes)
    assert torch.equal(drawn.images, ((expected + 1) / 2).clamp(0, 1))
    with pytest.raises(ValueError, match=r"4 pixels a code along each side, .* and 16: use the one that belongs to it"):
        wrong = SimpleARPipeline.from_pretrained(released, device="cpu", visual_tokenizer=janus(tmp_path / "janus"))
        wrong("one star", **options)
