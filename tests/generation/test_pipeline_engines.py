"""All that a call of the pipeline takes, with every engine: lists, seeds, rows as they are finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simplear.generation import ENGINES, SimpleARPipeline
from simplear.language_model import CheckpointSettings, save_checkpoint
from toys import CODEBOOK, model_config

ENGINES_HERE = [name for name in ENGINES if name != "vllm"]
"""vLLM has an environment and tests of its own."""
REQUEST = {
    "prompt": ["a red circle", "one star", "two blue squares"],
    "negative_prompt": ["", "two blue squares", "one star"],
    "num_images_per_prompt": 2,
    "seed": [7, 3, 2**40, 0, 3, 11],
    "guidance_scale": 2.0,
    "temperature": 1.2,
    "top_k": 20,
    "top_p": 0.9,
    "batch_size": 4,
    "output_type": "codes",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str) -> Path:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer, initializer_range=0.3).build()
    directory = tmp_path_factory.mktemp("engines") / "checkpoint"
    settings = CheckpointSettings(model.layout.image_token_offset, CODEBOOK, (3, 4), 8)
    save_checkpoint(directory, model.double(), tokenizer, settings)
    return directory


@pytest.mark.parametrize("engine", ENGINES_HERE)
def test_a_call_says_the_same_to_every_engine(engine: str, checkpoint: Path, traced_not_compiled: None) -> None:
    expected = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")(**REQUEST)
    rows = []
    pipe = SimpleARPipeline.from_pretrained(checkpoint, engine=engine, device="cpu")
    out = pipe(**REQUEST, on_row=lambda first, codes: rows.append((first, codes.clone())))
    assert torch.equal(out.codes, expected.codes) and len(out.codes.unique(dim=0)) == 6
    assert out.seeds == REQUEST["seed"] and out.stats.images == 6 and out.stats.tokens == 72
    assert {first for first, _ in rows} == {0, 4}
    for first, codes in rows:
        assert torch.equal(codes, out.codes[first : first + len(codes), : codes.shape[1]])
    for first, images in ((0, 4), (4, 2)):
        seen = [codes.shape for start, codes in rows if start == first]
        assert seen[-1] == (images, 3, 4) and [shape[1] for shape in seen] == [1, 2, 3]
