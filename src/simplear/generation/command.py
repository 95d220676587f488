"""`simplear generate`: prompts to PNG files that say how they were made.

Image k of a run, prompts in order and the images of a prompt together, is drawn with seed + k, whatever else is drawn
beside it. So a run that was stopped goes on by drawing the files that are missing, and those there are compared with
what would be drawn: a directory never mixes two checkpoints or two settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from simplear.errors import UserError
from simplear.generation.pipeline import SimpleARPipeline
from simplear.generation.png import file_name, read_metadata, write_png
from simplear.language_model import checkpoint_hash, find_checkpoint
from simplear.pictures import PictureError, open_mask, open_rgb
from simplear.text_files import FreeText, read_prompts

SHOWN = 40
"""Characters of a setting in a message."""


def generate(
    checkpoint: str,
    *,
    out: str,
    prompt: FreeText | list[FreeText] | None = None,
    prompts_file: str | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    do_sample: bool = True,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    negative_prompt: FreeText | None = None,
    prompt_prefix: FreeText | None = None,
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
        prompt: what to draw, taken as it is typed; give the option again for each further prompt.
        prompts_file: .txt with a prompt a line, .jsonl or .json with objects that have a "prompt", or - for lines on
            standard input; blank lines do not count.
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
        mask: picture of the same size that says where to draw: where it is transparent, or, if it has no transparency,
            where it is not black.
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
        raise UserError("num_images_per_prompt and batch_size must be 1 or more.")
    source = find_checkpoint(checkpoint)
    pipeline = SimpleARPipeline.from_pretrained(
        source, engine=engine, engine_options=engine_options, device=device, visual_tokenizer=visual_tokenizer
    )
    picture, anew = _opened(open_rgb, image), _opened(open_mask, mask)
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
                raise UserError(
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
            raise UserError(
                f"{path} was drawn with other settings ({'; '.join(other)}): name another directory (--out), or remove "
                "what is in this one."
            )
        if path in wanted:
            there.add(path)
    return there


def _opened(opener: Callable[[str], Image.Image], file: str | None) -> Image.Image | None:
    """Raises UserError naming a file that cannot be opened as a picture."""
    if file is None:
        return None
    try:
        return opener(file)
    except PictureError as error:
        raise UserError(f"{file}: {error}.") from error


def _short(value: Any) -> str:
    """A setting in a message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _prompts(prompt: str | list[str] | None, prompts_file: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        prompts += [text for text, _ in read_prompts(prompts_file)]
    if not prompts:
        raise UserError('no prompt: give --prompt "…" or --prompts-file FILE.')
    return prompts
