"""`simplear generate`: its files tell how to draw them again, and mistakes are found before the first is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simplear.generation import SimpleARPipeline, generate
from simplear.language_model import CheckpointSettings, GenerationDefaults, save_checkpoint
from toys import model_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> str:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    settings = CheckpointSettings(
        model.layout.image_token_offset,
        model.layout.codebook_size,
        (2, 2),
        8,
        generation=GenerationDefaults(
            prompt_prefix="a photo of ", negative_prompt="two", guidance_scale=2.0, top_p=0.9
        ),
    )
    directory = tmp_path_factory.mktemp("command") / "checkpoint"
    save_checkpoint(directory, model.double(), tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    return str(directory)


def test_an_image_can_be_drawn_again_from_what_its_file_says(checkpoint, tmp_path: Path, capsys):
    asked = ["a red circle", "one star, two squares!"]
    generate(
        checkpoint, out=str(tmp_path), prompt=asked, num_images_per_prompt=2, seed=7, temperature=1.5, batch_size=2
    )
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        "00000-a-red-circle-0.png",
        "00000-a-red-circle-1.png",
        "00001-one-star-two-squares-0.png",
        "00001-one-star-two-squares-1.png",
    ]
    assert f"4 images in {tmp_path}" in capsys.readouterr().out
    made = [json.loads(Image.open(file).text["simplear"]) for file in files]
    assert [entry["seed"] for entry in made] == [7, 8, 9, 10]
    settings = ("prompt_prefix", "negative_prompt", "guidance_scale", "do_sample", "temperature", "top_k", "top_p")
    assert [made[3][name] for name in settings] == ["a photo of ", "two", 2.0, True, 1.5, None, 0.9]
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    again = pipe(made[3]["prompt"], seed=made[3]["seed"], **{name: made[3][name] for name in settings}).images[0]
    # Decoding is in float32, where another batch size may round a pixel the other way.
    assert np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(files[3])).astype(int)).max() <= 1


def test_a_picture_is_continued_where_its_mask_says(checkpoint, tmp_path: Path):
    """The upper half stays, code for code; the file says what it was made from."""
    generate(checkpoint, out=str(tmp_path), prompt="a red circle", seed=1)
    before = tmp_path / "00000-a-red-circle-0.png"
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "after"
    generate(checkpoint, out=str(out), prompt="one star", seed=2, image=str(before), mask=str(tmp_path / "mask.png"))
    made = Image.open(out / "00000-one-star-0.png")
    assert json.loads(made.text["simplear"])["image"] == str(before)
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    again = pipe("one star", seed=2, image=Image.open(before), mask=mask)
    assert np.abs(np.asarray(again.images[0]).astype(int) - np.asarray(made).astype(int)).max() <= 1
    pixels = torch.from_numpy(np.array(Image.open(before))).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert torch.equal(again.codes[0, 0], pipe.visual_tokenizer.encode(pixels)[0, 0])


def test_prompts_come_from_a_text_file_a_line_each(checkpoint, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("one star\r\n\r\ntwo\u2028squares\n", encoding="utf-8", newline="")
    generate(checkpoint, out=str(tmp_path / "out"), prompt="first", prompts_file=str(file))
    prompts = [json.loads(Image.open(png).text["simplear"])["prompt"] for png in sorted((tmp_path / "out").iterdir())]
    assert prompts == ["first", "one star", "two\u2028squares"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', r"p\.jsonl, line 2: no object"),
        ("p.jsonl", b'{"prompt": "x"}\n\n{"prompt"\n', r"p\.jsonl, line 3: no JSON"),
        ("p.txt", b"caf\xe9\n", r"p\.txt is not UTF-8"),
        ("p.txt", b"one star\n" + b"a red circle " * 60, "prompt 1 .* tokens"),
        ("p.txt", b"\n \n", "no prompt"),
    ],
)
def test_a_bad_file_is_named_and_nothing_drawn(checkpoint, tmp_path: Path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        generate(checkpoint, out=str(tmp_path / "out"), prompts_file=str(tmp_path / name), batch_size=1)
    assert not (tmp_path / "out").exists()


def test_no_images_of_a_prompt_is_an_error(checkpoint, tmp_path: Path):
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        generate(checkpoint, out=str(tmp_path), prompt="one star", num_images_per_prompt=0)
