"""The pipeline as a user calls it, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import simplear
from simplear.generation import SimpleARPipeline, generate
from simplear.language_model import CheckpointError, CheckpointSettings, GenerationDefaults, save_checkpoint
from simplear.sequence import encode_captions
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import make_visual_tokenizer, model_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> Path:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    directory = tmp_path_factory.mktemp("pipeline") / "checkpoint"
    settings = CheckpointSettings(
        model.layout.image_token_offset,
        model.layout.codebook_size,
        (2, 3),
        8,
        max_text_tokens=20,
        generation=GenerationDefaults(prompt_prefix="a photo of ", guidance_scale=2.0, top_k=20),
        visual_tokenizer_fingerprint=load_visual_tokenizer(tiny_visual_tokenizer).fingerprint,
    )
    save_checkpoint(directory, model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    return directory


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> SimpleARPipeline:
    return simplear.SimpleARPipeline.from_pretrained(checkpoint)


def test_images_follow_each_prompt(pipe: SimpleARPipeline) -> None:
    out = pipe(["a red circle", "two blue squares"], num_images_per_prompt=2, seed=5)
    assert [image.size for image in out.images] == [(24, 16)] * 4
    assert out.codes.shape == (4, 2, 3) and out.seeds == [5, 6, 7, 8]
    assert out.stats.images == 4 and out.stats.tokens == 24
    again = pipe(["two blue squares"], seed=[7])
    assert torch.equal(again.codes[0], out.codes[2])


def test_batches_do_not_change_codes(pipe: SimpleARPipeline) -> None:
    prompts = ["a red circle", "two blue squares", "one star"]
    whole = pipe(prompts, seed=1, output_type="codes")
    split = pipe(prompts, seed=1, output_type="codes", batch_size=2)
    assert torch.equal(whole.codes, split.codes) and whole.images is None


def test_pixels_are_the_tokenizers(pipe: SimpleARPipeline, checkpoint: Path) -> None:
    out = pipe("a red circle", seed=1, output_type="pt", height=16, width=8)
    tokenizer = load_visual_tokenizer(checkpoint / "visual_tokenizer")
    assert out.codes.shape == (1, 2, 1)
    expected = ((tokenizer.decode(out.codes) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(out.images, expected)


def test_defaults_are_the_checkpoints(pipe: SimpleARPipeline) -> None:
    plain = pipe("a red circle", seed=3, output_type="codes")
    spelled = pipe(
        "a photo of a red circle",
        prompt_prefix="",
        negative_prompt="",
        guidance_scale=2.0,
        temperature=1.0,
        top_k=20,
        seed=3,
        output_type="codes",
    )
    other = pipe("a red circle", prompt_prefix="", seed=3, output_type="codes", guidance_scale=20.0)
    assert torch.equal(plain.codes, spelled.codes)
    assert not torch.equal(plain.codes, other.codes)


def test_seed_none_is_reported(pipe: SimpleARPipeline) -> None:
    out = pipe("one star", output_type="codes")
    assert torch.equal(pipe("one star", seed=out.seeds, output_type="codes").codes, out.codes)


def test_typed_control_tokens_stay_text(pipe: SimpleARPipeline) -> None:
    typed = "a <|soi|> circle <|t2i|>"
    (ids,) = encode_captions(pipe.tokenizer, [typed])
    assert {pipe.model.layout.start_of_image_id, pipe.model.layout.text_to_image_id}.isdisjoint(ids)
    assert pipe(typed, prompt_prefix="", seed=0, output_type="codes", num_images_per_prompt=1).codes.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": "a red circle " * 30}, "prompt 0 .* tokens; there is room for 20"),
        ({"prompt": "a \ud800 circle"}, "prompt 0 is not valid text"),
        ({"prompt": "x", "height": 12}, "height 12 must be a multiple of 8"),
        ({"prompt": "x", "top_k": 0}, "top_k 0"),
        ({"prompt": "x", "temperature": -1.0}, "temperature -1.0"),
        ({"prompt": ["x", "y"], "seed": [1]}, "1 seeds for 2 images"),
        ({"prompt": ["x", "y"], "negative_prompt": ["z"]}, "1 negative prompts for 2 prompts"),
        ({"prompt": "x", "output_type": "jpg"}, "output_type 'jpg'"),
        ({"prompt": "x", "height": 160, "width": 160}, "20 × 20 = 400 codes"),
    ],
)
def test_bad_requests_are_named(pipe: SimpleARPipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)  # type: ignore[arg-type]
    assert pipe("one star", seed=0, output_type="codes").codes.shape == (1, 2, 3)


def test_unknown_engine_names_the_known(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="no engine 'warp'; there are: baseline, cached"):
        SimpleARPipeline.from_pretrained(checkpoint, engine="warp")


def test_visual_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_visual_tokenizer(tmp_path / "other", seed=9)
    pipe = SimpleARPipeline.from_pretrained(checkpoint, visual_tokenizer=other)
    assert pipe("one star", seed=0, output_type="codes").codes.shape == (1, 2, 3)
    with pytest.raises(CheckpointError, match="fingerprint"):
        pipe("one star", seed=0)


def test_checkpoint_without_visual_tokenizer_says_what_to_do(tiny_checkpoint: Path) -> None:
    pipe = SimpleARPipeline.from_pretrained(tiny_checkpoint)
    assert pipe("one star", output_type="codes").codes.shape == (1, 2, 2)
    with pytest.raises(CheckpointError, match="visual_tokenizer="):
        pipe("one star")


def test_generate_writes_pictures_that_say_how(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "../../etc"}\n\n{"prompt": "ein Kreis, gr."}\n')
    generate(str(checkpoint), out=str(tmp_path / "out"), prompt="", prompts_file=str(prompts), seed=4)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["00000-0.png", "00001-etc-0.png", "00002-ein-kreis-gr-0.png"]
    with Image.open(files[2]) as image:
        assert json.loads(image.text["simplear"])["seed"] == 6  # type: ignore[attr-defined]
    assert not (tmp_path / "etc").exists()


def test_generate_names_the_bad_line(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"words": "y"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2"):
        generate(str(checkpoint), out=str(tmp_path), prompts_file=str(prompts))
    with pytest.raises(ValueError, match="no prompt"):
        generate(str(checkpoint), out=str(tmp_path))


def test_package_is_lazy() -> None:
    code = """
import sys, simplear
assert "torch" not in sys.modules
simplear.SimpleARPipeline
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_masked_is_drawn_anew_and_the_rest_stays(pipe: SimpleARPipeline) -> None:
    """Of 2 × 3 patches, one pixel of the mask's second patch is white; and each prompt has a picture of its own."""
    before = pipe(["a red circle", "one star"], seed=[3, 4])
    assert isinstance(before.images, list)
    mask = Image.new("L", (24, 16))
    mask.putpixel((15, 7), 1)
    after = pipe(["one star", "a red circle"], image=before.images, mask=mask, num_images_per_prompt=8, seed=0)
    kept = pipe.visual_tokenizer.encode(
        torch.from_numpy(np.stack(before.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    ).repeat_interleave(8, dim=0)
    changed = (after.codes != kept).any(dim=0)
    assert changed.tolist() == [[False, True, False], [False, False, False]]
    black, white = Image.new("L", (24, 16)), Image.new("L", (24, 16), 255)
    assert torch.equal(pipe("one star", image=before.images[0], mask=black, seed=1).codes, kept[:1])
    anew = pipe("one star", image=before.images[0], mask=white, seed=1)
    assert torch.equal(anew.codes, pipe("one star", seed=1).codes)


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        ((24, 16), None, "image and mask go together"),
        ((24, 16), (16, 24), r"have the sizes .*\(16, 24\), \(24, 16\)\], but \(24, 16\) is to be drawn: resize them"),
        ((20, 16), (20, 16), "width 20 must be a multiple of 8"),
    ],
)
def test_a_picture_and_a_mask_that_do_not_belong_together_are_refused(
    pipe: SimpleARPipeline, image: tuple[int, int], mask: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pipe("one star", image=Image.new("RGB", image), mask=mask and Image.new("L", mask), seed=0)
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        pipe("one star", image=[Image.new("RGB", (24, 16))] * 2, mask=Image.new("L", (24, 16)), seed=0)


def test_rows_are_shown_as_they_are_finished(pipe: SimpleARPipeline) -> None:
    seen = []
    out = pipe(
        ["one star", "a red circle", "two circles"],
        seed=0,
        batch_size=2,
        on_row=lambda first, codes: seen.append((first, codes.clone())),
    )
    height = out.codes.shape[1]
    assert [(first, tuple(codes.shape[:2])) for first, codes in seen] == [
        (first, (images, row)) for first, images in ((0, 2), (2, 1)) for row in range(1, height + 1)
    ]
    assert all(torch.equal(codes, out.codes[first : first + len(codes), : codes.shape[1]]) for first, codes in seen)
    assert pipe.decode(seen[0][1]).shape[2] == out.images[0].height // height
