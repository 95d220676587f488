"""`simplear generate`: prompts to PNG files that say how they were made.

Image k of a run, prompts in order and the images of a prompt together, is drawn with seed + k, whatever else is drawn
beside it. So a run that was stopped goes on by drawing the files that are missing, and those there are compared with
what would be drawn: a directory never mixes two checkpoints or two settings.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from simplear.atomic import require_writable
from simplear.device import default_dtype, resolve_device
from simplear.errors import UserError
from simplear.generation.options import DrawingOptions
from simplear.generation.pipeline import seeds_from
from simplear.generation.png import file_name, is_whole, read_metadata, write_png
from simplear.hashing import sha256_of
from simplear.language_model import checkpoint_hash, find_checkpoint
from simplear.pictures import PictureError, open_mask, open_rgb
from simplear.text_files import FreeText, read_prompts

logger = logging.getLogger(__name__)

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
    image: str | None = None,
    mask: str | None = None,
    device: str | None = None,
    **drawing: Any,
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
        seed: in [0, 2**64); image k uses seed + k, counted over all prompts, those that are drawn already among them.
        image: picture to keep a part of, for all prompts; height and width are its own.
        mask: picture of the same size that says where to draw: where it is transparent, or, if it has no transparency,
            where it is not black.
        device: where to draw; a GPU where there is one if not given.
        drawing: what is drawn with, see `simplear.generation.DrawingOptions`.

    Raises:
        ValueError: no prompt, an entry of the file without one, a prompt that cannot be drawn, or a directory with
            pictures of other settings.
    """
    prompts = _prompts(prompt, prompts_file)
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt {num_images_per_prompt} must be at least 1.")
    place = resolve_device(device)
    seeds = seeds_from(seed, len(prompts) * num_images_per_prompt)
    options = DrawingOptions(**drawing)
    options = dataclasses.replace(options, dtype=options.dtype or default_dtype(place))
    picture, anew = _opened(open_rgb, image), _opened(open_mask, mask)
    source = find_checkpoint(checkpoint)
    pipeline = options.pipeline(source, place)
    size = (options.height, options.width) if picture is None else (picture.height, picture.width)
    pipeline.check_prompts(prompts, options.prompt_prefix, *size)
    stated = options.stated(pipeline.settings)
    del stated["height"], stated["width"]
    settings = {
        **stated,
        "do_sample": options.do_sample,
        "size": [rows * pipeline.settings.downsample for rows in pipeline.grid(*size)],
        "visual_tokenizer": pipeline.visual_tokenizer.fingerprint,
        "checkpoint_hash": checkpoint_hash(source),
    }
    for name, file in (("image", image), ("mask", mask)):
        settings |= {name: file, f"{name}_hash": None if file is None else sha256_of(Path(file))}
    directory = Path(out)
    texts = [(number, text, k) for number, text in enumerate(prompts) for k in range(num_images_per_prompt)]
    images = [
        (directory / file_name(number, text, sample), {"prompt": text, "seed": each, **settings})
        for (number, text, sample), each in zip(texts, seeds, strict=True)
    ]
    there = _drawn_already(directory, dict(images), settings)
    missing = [(path, made) for path, made in images if path not in there]
    require_writable(directory, "pictures", "--out")
    with tqdm(total=len(images), initial=len(there), unit="image", desc="drawing") as bar:
        for start in range(0, len(missing), options.batch_size):
            part = missing[start : start + options.batch_size]
            drawn = pipeline(
                [made["prompt"] for _, made in part],
                seed=[made["seed"] for _, made in part],
                image=picture,
                mask=anew,
                **options.arguments(),
            )
            assert isinstance(drawn.images, list)
            for (path, made), made_image in zip(part, drawn.images, strict=True):
                write_png(path, made_image, {**made, "checkpoint": checkpoint})
            bar.update(len(part))
    print(f"{len(images)} images in {directory}" + (f", {len(there)} of them from before" if there else ""))


def _drawn_already(directory: Path, wanted: dict[Path, dict[str, Any]], settings: dict[str, Any]) -> set[Path]:
    """Files of those wanted that are there, whole.

    Raises ValueError for one that is there and is another picture, and for any picture of other settings beside them.
    """
    there = set()
    for path in sorted(file for file in directory.glob("*.png") if file.is_file()):
        found = read_metadata(path)
        expected = wanted.get(path, settings)
        if found is None:
            if path in wanted:
                raise UserError(
                    f"{path} was not drawn by simplear generate, or is damaged, and has the name of a picture to draw: "
                    "move it, or name another directory (--out)."
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
    for path in [path for path in there if not is_whole(path)]:
        logger.warning("%s is damaged or cut short, and is drawn again", path)
        there.remove(path)
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
        there_is = "no prompt" if prompts_file is None else f"{prompts_file} holds no prompt"
        raise UserError(f'{there_is}: give --prompt "…" or --prompts-file FILE.')
    return prompts
