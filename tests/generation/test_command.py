"""`simplear generate`: its files tell how to draw them again, and mistakes are found before the first is drawn."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simplear.cli import main
from simplear.device import default_dtype
from simplear.errors import UserError
from simplear.generation import DrawingOptions, SimpleARPipeline, generate
from simplear.generation.png import file_name, read_metadata, write_png
from simplear.language_model import CheckpointSettings, GenerationDefaults, checkpoint_hash, save_checkpoint
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
    assert {entry["checkpoint_hash"] for entry in made} == {checkpoint_hash(checkpoint)}
    settings = ("prompt_prefix", "negative_prompt", "guidance_scale", "do_sample", "temperature", "top_k", "top_p")
    assert [made[3][name] for name in settings] == ["a photo of ", "two", 2.0, True, 1.5, None, 0.9]
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    again = pipe(made[3]["prompt"], seed=made[3]["seed"], **{name: made[3][name] for name in settings}).images[0]
    # Decoding is in float32, where another batch size may round a pixel the other way.
    assert np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(files[3])).astype(int)).max() <= 1


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_pictures_are_drawn_in_the_dtype_that_their_files_name(checkpoint, tmp_path: Path, dtype: str | None):
    """Of a checkpoint in float64, which neither GPUs nor CPUs draw with unless a caller of the pipeline asks for it."""
    arguments = [checkpoint, "--out", str(tmp_path), "--prompt", "one star", "--num-images-per-prompt", "4"]
    main(["generate", *arguments, "--seed", "1", "--device", "cpu", *(["--dtype", dtype] if dtype else [])])
    files = sorted(tmp_path.iterdir())
    assert [read_metadata(file)["dtype"] for file in files] == [dtype or "float32"] * 4
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu", dtype=getattr(torch, dtype or "float32"))
    again = pipe("one star", seed=1, num_images_per_prompt=4).images
    for file, picture in zip(files, again, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(file)))


@pytest.mark.parametrize(("device", "dtype"), [("cuda:1", "bfloat16"), ("cpu", "float32"), ("mps", "float32")])
def test_the_dtype_follows_the_device_if_it_is_not_given(device: str, dtype: str):
    assert default_dtype(torch.device(device)) == dtype


def test_evaluations_state_a_dtype_that_is_given():
    """And none otherwise, so that what was begun before there was a choice goes on."""
    settings = CheckpointSettings(0, 8, (2, 2), 8)
    assert "dtype" not in DrawingOptions().stated(settings)
    assert DrawingOptions(dtype="bfloat16").stated(settings)["dtype"] == "bfloat16"


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
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', r"p\.jsonl, line 2 has no text .prompt"),
        ("p.jsonl", b'{"prompt": "x"}\n\n{"prompt"\n', r"p\.jsonl, line 3 is not JSON"),
        ("p.txt", b"caf\xe9\n", r"p\.txt is not UTF-8"),
        ("p.txt", b"one star\n" + b"a red circle " * 60, "prompt 1 .* tokens"),
        ("p.txt", b"\n \n", r"p\.txt holds no prompt"),
        ("p.txt", "one star\n".encode("utf-16"), r"p\.txt is not UTF-8"),
        ("p.json", '["one star"]'.encode("utf-16-le"), r"p\.json is not UTF-8"),
        ("p.json", b'{"prompt": "one star"}', r"p\.json is not a JSON list"),
        ("p.json", b'["one star", {"text": 1}]', r"p\.json, entry 2 has no text"),
        ("p.csv", b"prompt\none star\n", r"p\.csv: prompts are read from .*not from \.csv"),
        ("p.tsv", b"prompt\none star\n", r"p\.tsv: .*not from \.tsv"),
        ("p.xlsx", b"PK", r"p\.xlsx: .*not from \.xlsx"),
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


PROMPTS = ["a red circle", "one star", "two squares"]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def draw(checkpoint: str, out: Path, prompts: Any = PROMPTS, **options: Any) -> None:
    generate(checkpoint, out=str(out), prompt=prompts, **{"num_images_per_prompt": 2, "seed": 5, **options})


@pytest.mark.parametrize("lost", [[0], [1, 4], [0, 1, 2, 3, 4]])
def test_a_run_that_was_stopped_draws_what_is_missing_as_if_it_had_not_been(checkpoint, tmp_path, monkeypatch, lost):
    """Whatever is missing: image k has seed + k. One image at a time, so that files are equal to the last byte."""
    draw(checkpoint, tmp_path, batch_size=1)
    whole = contents(tmp_path)
    files = sorted(tmp_path.iterdir())
    for index in lost:
        files[index].unlink()
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    asked: list[Any] = []
    call = SimpleARPipeline.__call__
    monkeypatch.setattr(
        SimpleARPipeline, "__call__", lambda self, *a, **k: (asked.extend(k["seed"]), call(self, *a, **k))[1]
    )
    draw(checkpoint, tmp_path, batch_size=1)
    assert contents(tmp_path) == whole and asked == [5 + index for index in lost]
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_a_finished_run_draws_nothing_and_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    draw(checkpoint, tmp_path)
    monkeypatch.delattr(SimpleARPipeline, "__call__")
    draw(checkpoint, tmp_path)
    assert "6 images in" in (said := capsys.readouterr().out) and "6 of them from before" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance_scale": 3.0}, r"00000-a-red-circle-0\.png .*\(guidance_scale 2.0, now 3.0\).*--out"),
        ({"seed": 6}, r"00000-a-red-circle-0\.png .*\(seed 5, now 6\)"),
        ({"num_images_per_prompt": 3}, r"00001-one-star-0\.png .*\(seed 7, now 8\)"),
        ({"height": 8, "width": 24}, r"size \[16, 16\], now \[8, 24\]"),
        ({"engine": "jacobi", "engine_options": {"window": 2}}, r'engine "fused", now "jacobi"; engine_options \{\}'),
        ({"dtype": "bfloat16"}, r'dtype "float32", now "bfloat16"'),
        ({"prompts": ["four circles"], "temperature": 0.5}, r"00000-a-red-circle-0\.png .*temperature 1.0, now 0.5"),
        ({"prompts": ["A red circle!"]}, r'prompt "a red circle", now "A red circle!"'),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(checkpoint, tmp_path: Path, change, words):
    draw(checkpoint, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words):
        draw(checkpoint, tmp_path, **change)
    assert contents(tmp_path) == before


def test_another_checkpoint_under_the_same_name_is_refused(checkpoint, tmp_path: Path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    draw(str(copy), tmp_path / "out")
    assert read_metadata(tmp_path / "out" / "00001-one-star-1.png")["checkpoint_hash"] == checkpoint_hash(copy)
    settings = copy / "simplear.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(ValueError, match="checkpoint_hash"):
        draw(str(copy), tmp_path / "out")


def test_pictures_of_others_are_left_alone_and_never_taken_for_ones_own(checkpoint, tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    (tmp_path / "no-picture.png").write_bytes(b"\x89PNG")
    before = contents(tmp_path)
    draw(checkpoint, tmp_path, "a red circle")
    draw(checkpoint, tmp_path, "one star")
    assert len(contents(tmp_path)) == 6 and contents(tmp_path).items() > before.items()
    Image.new("RGB", (4, 4)).save(tmp_path / "00000-two-squares-1.png")
    with pytest.raises(ValueError, match=r"00000-two-squares-1\.png was not drawn by simplear"):
        draw(checkpoint, tmp_path, "two squares")


def cut(content: bytes) -> bytes:
    return content[:-30]


def zeroed(content: bytes) -> bytes:
    middle = content.index(b"IDAT") + 20
    return content[:middle] + bytes(10) + content[middle + 10 :]


@pytest.mark.parametrize("damage", [cut, zeroed])
def test_a_damaged_picture_is_drawn_again(checkpoint, tmp_path, damage, caplog):
    draw(checkpoint, tmp_path, batch_size=1)
    whole = contents(tmp_path)
    file = tmp_path / "00001-one-star-0.png"
    file.write_bytes(damage(whole[file.name]))
    draw(checkpoint, tmp_path, batch_size=1)
    assert contents(tmp_path) == whole and f"{file} is damaged or cut short, and is drawn again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x89PNG", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_a_file_in_the_place_of_a_picture_is_named(checkpoint, tmp_path: Path, content: bytes):
    (tmp_path / "00000-a-red-circle-0.png").write_bytes(content)
    (tmp_path / "a directory.png").mkdir()
    with pytest.raises(ValueError, match=r"00000-a-red-circle-0\.png was not drawn .* or is damaged"):
        draw(checkpoint, tmp_path)


LAST = 2**64 - 1


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (0, [0, 1]),
        (558740513626235, [558740513626235, 558740513626236]),
        (2**63 - 1, [2**63 - 1, 2**63]),
        (LAST, [LAST, 0]),
        (-1, None),
        (-(2**63), None),
        (2**64, None),
        (10**30, None),
    ],
)
def test_seeds_are_64_bits_and_others_are_refused(checkpoint, tmp_path: Path, seed: int, seeds: list[int] | None):
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    if seeds is None:
        for refusing in (
            lambda: draw(checkpoint, tmp_path, "one star", seed=seed),
            lambda: pipe("one star", seed=seed),
            lambda: pipe(["one star"] * 2, seed=[0, seed]),
        ):
            with pytest.raises(ValueError, match=rf"seed {seed} lies outside \[0, 2\*\*64\)"):
                refusing()
        assert not list(tmp_path.iterdir())
        return
    draw(checkpoint, tmp_path, "one star", seed=seed, batch_size=1)
    assert [read_metadata(file)["seed"] for file in sorted(tmp_path.iterdir())] == seeds
    drawn = pipe("one star", seed=seed, num_images_per_prompt=2, output_type="codes")
    assert drawn.seeds == seeds
    alone = [pipe("one star", seed=each, output_type="codes").codes[0] for each in seeds]
    assert torch.equal(drawn.codes, torch.stack(alone))


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.json", b'["one star", {"text": "two squares"}]', ["one star", "two squares"]),
        (
            "p.jsonl",
            b'\xef\xbb\xbf{"caption": "one star"}\n\n{"prompt": "two\xe2\x80\xa8squares"}',
            ["one star", "two\u2028squares"],
        ),
        ("p.TXT", b"\xef\xbb\xbfone star\rtwo squares\r", ["one star", "two squares"]),
        ("prompts", b"one star\n# two squares\n", ["one star", "# two squares"]),
    ],
)
def test_prompts_are_read_from_files_of_these_kinds(checkpoint, tmp_path: Path, name: str, content: bytes, prompts):
    (tmp_path / name).write_bytes(content)
    main(["generate", checkpoint, "--prompts-file", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert [read_metadata(file)["prompt"] for file in sorted((tmp_path / "out").iterdir())] == prompts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": "file"}, r"cannot be saved in .*file"),
        ({"out": "file/below"}, r"cannot be saved in .*below"),
        ({"device": "cuda:9"}, "device 'cuda:9' is not available"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"engine": "fast"}, "no engine 'fast'"),
        ({"temperature": 0.0}, "temperature"),
        ({"image": "file"}, "file: not a picture"),
        ({"image": "missing.png"}, "missing.png: picture file missing"),
        ({"image": "picture.png", "mask": "file"}, "file: not a picture"),
        ({"image": "picture.png"}, "image and mask go together"),
        ({"mask": "picture.png"}, "image and mask go together"),
        ({"image": "picture.png", "mask": "small.png"}, r"have the sizes \(width, height\)"),
        ({"image": "picture.png", "mask": "picture.png", "height": 8}, r"\(16, 8\) is to be drawn"),
    ],
    ids=str,
)
def test_mistakes_are_said_in_words(checkpoint, tmp_path: Path, monkeypatch, options: dict[str, Any], words: str):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("words")
    for name, side in (("picture.png", 16), ("small.png", 8)):
        Image.new("RGB", (side, side), "white").save(name)
    with pytest.raises(UserError, match=words):
        generate(checkpoint, **{"out": "out", "prompt": "one star", **options})
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_a_run_that_ends_while_writing_leaves_whole_pictures_alone(checkpoint, tmp_path: Path, monkeypatch):
    write = Path.write_bytes

    def half(self, content):
        if "-one-" not in self.name:
            return write(self, content)
        write(self, content[:-30])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        draw(checkpoint, tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "00000-a-red-circle-0.png",
        "00000-a-red-circle-1.png",
    ]
    assert all(np.asarray(Image.open(file)).shape == (16, 16, 3) for file in tmp_path.iterdir())


def test_prompts_come_from_standard_input(checkpoint, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("one star\r\n\nzwei Größen\n".encode()), "ascii"))
    main(["generate", checkpoint, "--prompts-file", "-", "--out", str(tmp_path)])
    assert [read_metadata(file)["prompt"] for file in sorted(tmp_path.iterdir())] == ["one star", "zwei Größen"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        generate(checkpoint, out=str(tmp_path), prompts_file="-")


NASTY = [
    "🦊" * 9,
    "مرحبا",
    "../../etc/passwd",
    "a\0b",
    "x" * 10_000,
    "..",
    "CON",
    "a\u202eb",
    "",
    "\n",
    "-",
    "é/è\\:*?",
]


@pytest.mark.parametrize("prompt", NASTY, ids=lambda prompt: ascii(prompt[:12]))
def test_file_names_are_safe_on_any_file_system(prompt, tmp_path: Path):
    """Only letters, digits and hyphens, never a reserved name; the prompt itself comes back from the file."""
    name = file_name(3, prompt, 1)
    assert re.fullmatch(r"00003-([a-z0-9-]+-)?1\.png", name) and len(name) < 100
    write_png(tmp_path / name, Image.new("RGB", (2, 2)), {"prompt": prompt})
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert read_metadata(tmp_path / name) == {"prompt": prompt}


@pytest.mark.long
def test_a_killed_run_goes_on(checkpoint, tmp_path: Path):
    arguments = [
        sys.executable,
        "-m",
        "simplear.cli",
        "generate",
        checkpoint,
        "--prompts-file",
        str(tmp_path / "p.txt"),
    ]
    (tmp_path / "p.txt").write_text("".join(f"{number} stars\n" for number in range(200)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*arguments, "--out", str(whole)], check=True, capture_output=True)
    for wanted in (1, 60, 130):
        run = subprocess.Popen([*arguments, "--out", str(killed)], stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(killed.glob("*.png"))) < wanted:
            time.sleep(0.01)
        run.kill()
        run.wait()
        found = {file.name: file.read_bytes() for file in killed.glob("*.png")}
        assert wanted <= len(found) < 200 and found.items() <= contents(whole).items()
    subprocess.run([*arguments, "--out", str(killed)], check=True, capture_output=True)
    assert {name: data for name, data in contents(killed).items() if name.endswith(".png")} == contents(whole)
