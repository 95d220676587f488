"""`simplear generate`: prompts to PNG files that say how they were made."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from simplear.generation.pipeline import SimpleARPipeline

NAME_LENGTH = 60
"""Letters of the prompt in a file's name."""
METADATA_KEY = "simplear"
"""Name of the PNG text chunk, a JSON object."""


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
    """Draw prompts into PNG files, with prompt, seed and settings in each file's metadata.

    Args:
        checkpoint: directory or hub id.
        out: directory for the pictures.
        prompt: one caption, or a list in brackets.
        prompts_file: file with a caption a line, or .jsonl with a "prompt" in each line; blank lines do not count.
        num_images_per_prompt: images of each prompt.
        seed: image k uses seed + k.
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
        ValueError: no prompt, a line of the file that is none, or a prompt that cannot be drawn.
    """
    prompts = _prompts(prompt, prompts_file)
    pipeline = SimpleARPipeline.from_pretrained(
        checkpoint, engine=engine, engine_options=engine_options, device=device, visual_tokenizer=visual_tokenizer
    )
    picture, anew = (None if file is None else Image.open(file) for file in (image, mask))
    size = (height, width) if picture is None else (picture.height, picture.width)
    pipeline.check_prompts(prompts, prompt_prefix, *size)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    step = max(1, batch_size // max(1, num_images_per_prompt))
    defaults = pipeline.settings.generation
    with tqdm(total=len(prompts) * num_images_per_prompt, unit="image", desc="drawing") as bar:
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            drawn = pipeline(
                part,
                negative_prompt=negative_prompt,
                prompt_prefix=prompt_prefix,
                guidance_scale=guidance_scale,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_images_per_prompt=num_images_per_prompt,
                seed=seed + start * num_images_per_prompt,
                height=height,
                width=width,
                image=picture,
                mask=anew,
                batch_size=batch_size,
            )
            assert isinstance(drawn.images, list)
            settings = {
                **dataclasses.asdict(drawn.sampling),
                "prompt_prefix": defaults.prompt_prefix if prompt_prefix is None else prompt_prefix,
                "negative_prompt": defaults.negative_prompt if negative_prompt is None else negative_prompt,
                "checkpoint": checkpoint,
                "engine": engine,
                **({"image": image, "mask": mask} if image else {}),
            }
            for index, made_image in enumerate(drawn.images):
                number, sample = divmod(index, num_images_per_prompt)
                made = {"prompt": part[number], "seed": drawn.seeds[index], **settings}
                information = PngInfo()
                information.add_itxt(METADATA_KEY, json.dumps(made, ensure_ascii=False))
                made_image.save(directory / _file_name(start + number, part[number], sample), pnginfo=information)
            bar.update(len(drawn.images))
    print(f"{len(prompts) * num_images_per_prompt} images in {directory}")


def _prompts(prompt: str | list[str] | None, prompts_file: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        prompts += read_prompts(Path(prompts_file))
    if not prompts:
        raise ValueError('no prompt: give --prompt "…" or --prompts-file FILE.')
    return prompts


def read_prompts(file: Path) -> list[str]:
    """The captions of a file, one a line, or of .jsonl the "prompt" of each line; blank lines do not count.

    Raises ValueError, naming file and line, for what is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix != ".jsonl":
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


def _file_name(number: int, prompt: str, sample: int) -> str:
    """Safe on any file system, whatever the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return f"{number:05d}-{words}-{sample}.png" if words else f"{number:05d}-{sample}.png"
