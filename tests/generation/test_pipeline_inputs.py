"""What the pipeline hands to its engine, and what it needs and leaves alone until then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simplear.generation import SimpleARPipeline
from simplear.language_model import CheckpointSettings, GenerationDefaults, save_checkpoint
from simplear.sequence import encode_captions, prompt_sequence
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import model_config

DEFAULTS = GenerationDefaults(prompt_prefix="a photo of ", negative_prompt="two blue", guidance_scale=3.0)


class Recorder:
    """Passes requests on and keeps them."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.requests: list[tuple] = []

    def generate(self, *request, **options):
        self.requests.append(request)
        return self.engine.generate(*request, **options)


def pipeline_of(text_tokenizer: str, visual_tokenizer: str | None = None) -> SimpleARPipeline:
    """In float64, so that batches of any shape draw the same."""
    torch.manual_seed(0)
    model, tokenizer = model_config(text_tokenizer).build()
    settings = CheckpointSettings(model.layout.image_token_offset, 27, (2, 3), 8, generation=DEFAULTS)
    pipe = SimpleARPipeline(model.double().eval(), tokenizer, settings, visual_tokenizer)
    pipe.engine = Recorder(pipe.engine)
    return pipe


def test_prefix_stands_before_prompts_and_not_before_negative_or_empty_ones(tiny_text_tokenizer):
    pipe = pipeline_of(tiny_text_tokenizer)
    pipe(["one star", ""], seed=0, output_type="codes")
    pipe(["one star", "two"], negative_prompt=["red", "blue"], prompt_prefix="the ", seed=0, output_type="codes")
    expected = [
        (["a photo of one star", ""], ["two blue", "two blue"]),
        (["the one star", "the two"], ["red", "blue"]),
    ]
    for request, captions in zip(pipe.engine.requests, expected, strict=True):
        for encoded, texts in zip(request[:2], captions, strict=True):
            wanted = [prompt_sequence(ids, pipe.model.layout) for ids in encode_captions(pipe.tokenizer, texts)]
            assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids in wanted]


def test_a_typed_control_token_does_not_begin_the_image(tiny_text_tokenizer):
    pipe = pipeline_of(tiny_text_tokenizer)
    pipe("a <|soi|> star <|t2i|>", seed=0, output_type="codes")
    ids, layout = pipe.engine.requests[0][0][0].tolist(), pipe.model.layout
    assert ids.count(layout.start_of_image_id) == ids.count(layout.text_to_image_id) == 1
    assert (ids[0], ids[-1]) == (layout.text_to_image_id, layout.start_of_image_id)


def test_what_is_not_said_is_the_checkpoints(tiny_text_tokenizer):
    out = pipeline_of(tiny_text_tokenizer)("one star", top_k=5, seed=0, output_type="codes")
    assert (out.sampling.guidance_scale, out.sampling.temperature, out.sampling.top_k) == (3.0, 1.0, 5)


def test_each_image_can_be_drawn_again_from_its_seed_alone(tiny_text_tokenizer):
    pipe = pipeline_of(tiny_text_tokenizer)
    texts = ["one star", "a photo of a red circle"]
    out = pipe(texts, num_images_per_prompt=3, seed=np.int64(9), batch_size=4, output_type="codes")
    assert out.seeds == list(range(9, 15))
    assert (out.stats.images, out.stats.tokens, out.stats.steps) == (6, 36, 12)
    assert len(out.codes.unique(dim=0)) == 6
    for image, seed in enumerate(out.seeds):
        alone = pipe(texts[image // 3], seed=seed, output_type="codes")
        assert torch.equal(alone.codes[0], out.codes[image])


def test_codes_and_pictures_can_be_trained_on_and_changed(tiny_text_tokenizer, tiny_visual_tokenizer):
    """Neither is an inference tensor, which autograd would refuse."""
    pipe = pipeline_of(tiny_text_tokenizer, tiny_visual_tokenizer)
    out = pipe("one star", seed=0, output_type="pt")
    embedded = pipe.model.decoder.get_input_embeddings()(pipe.model.layout.ids_of_codes(out.codes))
    embedded.sum().backward()
    out.images.mul_(2.0)
    assert out.images.shape == (1, 3, 16, 24)


def test_the_visual_tokenizer_is_read_when_first_needed(tiny_text_tokenizer, tmp_path):
    pipe = pipeline_of(tiny_text_tokenizer, str(tmp_path / "missing"))
    assert pipe("one star", seed=0, output_type="codes").images is None
    with pytest.raises(FileNotFoundError, match="missing"):
        pipe("one star", seed=0)


def test_pictures_are_the_same_from_an_object_and_from_its_directory(tiny_text_tokenizer, tiny_visual_tokenizer):
    by_path = pipeline_of(tiny_text_tokenizer, tiny_visual_tokenizer)("one star", seed=0, output_type="pt").images
    loaded = load_visual_tokenizer(tiny_visual_tokenizer)
    assert torch.equal(pipeline_of(tiny_text_tokenizer, loaded)("one star", seed=0, output_type="pt").images, by_path)
    assert by_path.min() >= 0 and by_path.max() <= 1


def test_a_released_directory_draws_with_the_releases_defaults(tiny_text_tokenizer, tmp_path: Path, monkeypatch):
    model, tokenizer = model_config(tiny_text_tokenizer, max_position_embeddings=8192).build()
    save_checkpoint(
        tmp_path / "ckpt", model, tokenizer, CheckpointSettings(model.layout.image_token_offset, 27, (2, 2), 8)
    )
    (tmp_path / "ckpt" / "simplear.json").unlink()
    config = tmp_path / "ckpt" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["SimpARForCausalLM"]}))
    pipe = SimpleARPipeline.from_pretrained(tmp_path / "ckpt", device="cpu")
    out = pipe("one star", seed=0, height=32, width=48, output_type="codes")
    assert out.codes.shape == (1, 2, 3)
    assert (out.sampling.guidance_scale, out.sampling.top_k) == (6.0, 27)
    asked = []

    def no_network(repository: str, **options) -> str:
        asked.append(repository)
        raise OSError("no network")

    monkeypatch.setattr("simplear.visual_tokenizer.checkpoint.snapshot_download", no_network)
    with pytest.raises(FileNotFoundError, match="visual_tokenizer="):
        pipe("one star", seed=0, height=32, width=48)
    assert asked == ["nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"]


def test_prompts_are_checked_before_any_is_drawn(tiny_text_tokenizer):
    pipe = pipeline_of(tiny_text_tokenizer)
    pipe.check_prompts(["one star"])
    with pytest.raises(ValueError, match=r"prompt 1 .* has .* tokens; there is room for 88 beside 2 × 3 codes"):
        pipe.check_prompts(["one star", "a red circle " * 60])
    assert pipe.engine.requests == []
