"""`simplear generate`: prompts to PNG files that say how they were made."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from simplear.generation.pipeline import SimpleARPipeline

NAME_LENGTH = 60
"""Letters of the prompt in a file's name."""


def generate(
    checkpoint: str,
    *,
    out: str,
    prompt: str | list[str] | None = None,
    prompts_file: str | None = None,
    num_images_per_prompt: int = 1,
    seed: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    engine: str = "cached",
    visual_tokenizer: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> None:
    """Draw prompts into PNG files, with prompt, seed and settings in each file's metadata.

    Args:
        checkpoint: directory or hub id.
        out: directory for the pictures.
        prompt: one caption, or a list in brackets.
        prompts_file: file with a caption a line, or .jsonl with a "prompt" in each line.
        num_images_per_prompt: images of each prompt.
        seed: image k uses seed + k; drawn at random if not given.
        guidance_scale: classifier-free guidance; the checkpoint's default if not given.
        temperature: the checkpoint's default if not given.
        top_k: the checkpoint's default if not given.
        top_p: the checkpoint's default if not given.
        negative_prompt: the checkpoint's default if not given.
        height: pixels; the checkpoint's grid if not given.
        width: pixels; the checkpoint's grid if not given.
        engine: how codes are drawn.
        visual_tokenizer: directory to use in place of the checkpoint's own.
        batch_size: images drawn at once.
        device: where to draw; a GPU where there is one if not given.

    Raises:
        ValueError: no prompt, or a line of the file that is none.
    """
    prompts = _prompts(prompt, prompts_file)
    pipeline = SimpleARPipeline.from_pretrained(
        checkpoint, engine=engine, device=device, visual_tokenizer=visual_tokenizer
    )
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    first_seed = secrets.randbits(31) if seed is None else seed
    step = max(1, batch_size // num_images_per_prompt)
    with tqdm(total=len(prompts) * num_images_per_prompt, unit="image", desc="drawing") as bar:
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            drawn = pipeline(
                part,
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_images_per_prompt=num_images_per_prompt,
                seed=first_seed + start * num_images_per_prompt,
                height=height,
                width=width,
                batch_size=batch_size,
            )
            assert isinstance(drawn.images, list)
            for index, image in enumerate(drawn.images):
                number, sample = divmod(index, num_images_per_prompt)
                caption = part[number]
                information = PngInfo()
                settings = {
                    "prompt": caption,
                    "seed": drawn.seeds[index],
                    "checkpoint": checkpoint,
                    "guidance_scale": guidance_scale,
                    "temperature": temperature,
                    "top_k": top_k,
                    "top_p": top_p,
                    "negative_prompt": negative_prompt,
                    "engine": engine,
                }
                information.add_itxt("simplear", json.dumps(settings, ensure_ascii=False))
                image.save(directory / _file_name(start + number, caption, sample), pnginfo=information)
            bar.update(len(drawn.images))
    print(f"{len(prompts) * num_images_per_prompt} images in {directory}")


def _prompts(prompt: str | list[str] | None, prompts_file: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        for number, line in enumerate(Path(prompts_file).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            if prompts_file.endswith(".jsonl"):
                try:
                    line = json.loads(line)["prompt"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f'{prompts_file}, line {number}: no JSON object with a "prompt".') from error
            prompts.append(line)
    if not prompts:
        raise ValueError('no prompt: give --prompt "…" or --prompts-file FILE.')
    return prompts


def _file_name(number: int, prompt: str, sample: int) -> str:
    """Safe on any file system, whatever the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return f"{number:05d}-{words}-{sample}.png" if words else f"{number:05d}-{sample}.png"
