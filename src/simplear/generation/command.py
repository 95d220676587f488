"""`simplear generate`: prompts to PNG files that say how they were made.

Image k of a run, prompts in order and the images of a prompt together, is drawn with seed + k, whatever else is drawn
beside it. So a run that was stopped goes on by drawing the files that are missing, and those there are compared with
what would be drawn: a directory never mixes two checkpoints or two settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from simplear.generation.pipeline import SimpleARPipeline
from simplear.generation.png import file_name, read_metadata, write_png
from simplear.language_model import checkpoint_hash, find_checkpoint

STANDARD_INPUT = "-"
"""In place of a file's name."""
SHOWN = 40
"""Characters of a setting in a message."""


def generate(
    checkpoint: str,
    *,
    out: str,
    prompt: str | list[str] | None = None,
    prompts_file: str | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    do_sample: bool = True,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    negative_prompt: str | None = None,
    prompt_prefix: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: str | None = None,
    mask: str | None = None,
    engine: str = "cached",
    engine_options: dict[str, Any] | None = None,
    visual_tokenizer: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Draw prompts into PNG files, with prompt, seed, settings and the checkpoint's hash in each file's metadata.

    Started again with the same settings, it draws what is missing. Other settings need another directory.

    Args:
        checkpoint: directory or hub id.
        out: directory for the pictures.
        prompt: one caption, or a list in brackets.
        prompts_file: file with a caption a line, or .jsonl with a "prompt" in each line, or - for captions on standard
            input; blank lines do not count.
        num_images_per_prompt: images of each prompt.
        seed: image k uses seed + k, counted over all prompts and, where a run goes on, over what is there already.
        guidance_scale: classifier-free guidance; the checkpoint's default if not given.
        do_sample: false takes the most probable code each time.
        temperature: the checkpoint's default if not given.
        top_k: the checkpoint's default if not given.
        top_p: the checkpoint's default if not given.
        negative_prompt: the checkpoint's default if not given.
        prompt_prefix: put before every prompt; the checkpoint's default if not given.
        height: pixels; the checkpoint's grid if not given.
        width: pixels; the checkpoint's grid if not given.
        image: picture to keep a part of, for all prompts; height and width are its own.
        mask: picture of the same size: where it is not black, the image is drawn anew.
        engine: how codes are drawn.
        engine_options: of the engine, as ``'{window: 7}'`` for jacobi.
        visual_tokenizer: directory or hub id to use in place of the checkpoint's own.
        batch_size: images drawn at once.
        device: where to draw; a GPU where there is one if not given.

    Raises:
        ValueError: no prompt, a line of the file that is none, a prompt that cannot be drawn, or a directory with
            pictures of other settings.
    """
    prompts = _prompts(prompt, prompts_file)
    if num_images_per_prompt < 1 or batch_size < 1:
        raise ValueError("num_images_per_prompt and batch_size must be 1 or more.")
    source = find_checkpoint(checkpoint)
    pipeline = SimpleARPipeline.from_pretrained(
        source, engine=engine, engine_options=engine_options, device=device, visual_tokenizer=visual_tokenizer
    )
    picture, anew = (None if file is None else Image.open(file) for file in (image, mask))
    size = (height, width) if picture is None else (picture.height, picture.width)
    pipeline.check_prompts(prompts, prompt_prefix, *size)
    sampling = pipeline.sampling_settings(guidance_scale, do_sample, temperature, top_k, top_p)
    defaults = pipeline.settings.generation
    settings = {
        **dataclasses.asdict(sampling),
        "prompt_prefix": defaults.prompt_prefix if prompt_prefix is None else prompt_prefix,
        "negative_prompt": defaults.negative_prompt if negative_prompt is None else negative_prompt,
        "size": [rows * pipeline.settings.downsample for rows in pipeline.grid(*size)],
        "engine": engine,
        "engine_options": engine_options or {},
        "visual_tokenizer": pipeline.visual_tokenizer.fingerprint,
        "checkpoint_hash": checkpoint_hash(source),
    }
    for name, file in (("image", image), ("mask", mask)):
        content = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        settings |= {name: file, f"{name}_hash": content}
    directory = Path(out)
    images = [
        (
            directory / file_name(number, text, sample),
            {"prompt": text, "seed": seed + number * num_images_per_prompt + sample, **settings},
        )
        for number, text in enumerate(prompts)
        for sample in range(num_images_per_prompt)
    ]
    there = _drawn_already(directory, dict(images), settings)
    missing = [(path, made) for path, made in images if path not in there]
    directory.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(images), initial=len(there), unit="image", desc="drawing") as bar:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            drawn = pipeline(
                [made["prompt"] for _, made in part],
                negative_prompt=negative_prompt,
                prompt_prefix=prompt_prefix,
                **dataclasses.asdict(sampling),
                seed=[made["seed"] for _, made in part],
                height=height,
                width=width,
                image=picture,
                mask=anew,
                batch_size=batch_size,
            )
            assert isinstance(drawn.images, list)
            for (path, made), made_image in zip(part, drawn.images, strict=True):
                write_png(path, made_image, {**made, "checkpoint": checkpoint})
            bar.update(len(part))
    print(f"{len(images)} images in {directory}" + (f", {len(there)} of them from before" if there else ""))


def _drawn_already(directory: Path, wanted: dict[Path, dict[str, Any]], settings: dict[str, Any]) -> set[Path]:
    """Files of those wanted that are there.

    Raises ValueError for one that is there and is another picture, and for any picture of other settings beside them.
    """
    there = set()
    for path in sorted(directory.glob("*.png")):
        found = read_metadata(path)
        expected = wanted.get(path, settings)
        if found is None:
            if path in wanted:
                raise ValueError(
                    f"{path} was not drawn by simplear generate and has the name of a picture to draw: move it, or "
                    "name another directory (--out)."
                )
            continue
        other = [
            f"{name} {_short(found.get(name))}, now {_short(value)}"
            for name, value in expected.items()
            if found.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{path} was drawn with other settings ({'; '.join(other)}): name another directory (--out), or remove "
                "what is in this one."
            )
        if path in wanted:
            there.add(path)
    return there


def _short(value: Any) -> str:
    """A setting in a message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _prompts(prompt: str | list[str] | None, prompts_file: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        prompts += read_prompts(prompts_file)
    if not prompts:
        raise ValueError('no prompt: give --prompt "…" or --prompts-file FILE.')
    return prompts


def read_prompts(file: str | Path) -> list[str]:
    """The captions of a file, one a line, or of .jsonl the "prompt" of each line; - is standard input, a line each.

    Blank lines do not count. Raises ValueError, naming file and line, for what is no text.
    """
    from_input = str(file) == STANDARD_INPUT
    try:
        content = sys.stdin.buffer.read() if from_input else Path(file).read_bytes()
        lines = content.decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{'standard input' if from_input else file} is not UTF-8: {error}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not str(file).endswith(".jsonl"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error}).") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{file}, line {number}: no object with a text "prompt".')
        try:
            row["prompt"].encode()  # JSON can spell half of a surrogate pair
        except UnicodeEncodeError as error:
            raise ValueError(f"{file}, line {number}: the prompt is no valid text ({error}).") from error
        prompts.append(row["prompt"])
    return prompts
