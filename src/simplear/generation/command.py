"""`simplear generate`: prompts to PNG files that say how they were made.

Image k of a run, prompts in order and the images of a prompt together, is drawn with seed + k, whatever else is drawn
beside it. So a stopped run resumes by drawing the files that are missing. The metadata of the others is compared with
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
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts_file is not None:
        prompts += [text for text, _ in read_prompts(prompts_file)]
    if not prompts:
        missing_in = "no prompt" if prompts_file is None else f"{prompts_file} holds no prompt"
        raise UserError(f'{missing_in}: give --prompt "…" or --prompts-file FILE.')
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt {num_images_per_prompt} must be at least 1.")
    place = resolve_device(device)
    seeds = seeds_from(seed, len(prompts) * num_images_per_prompt)
    options = DrawingOptions(**drawing)
    options = dataclasses.replace(options, dtype=options.dtype or default_dtype(place))
    picture, opened_mask = _opened(open_rgb, image), _opened(open_mask, mask)
    source = find_checkpoint(checkpoint)
    pipeline = options.pipeline(source, place)
    size = (options.height, options.width) if picture is None else (picture.height, picture.width)
    pipeline.check_prompts(prompts, options.prompt_prefix, *size)
    settings = {
        **options.stated(pipeline.settings),
        "do_sample": options.do_sample,
        "size": [rows * pipeline.settings.downsample for rows in pipeline.grid(*size)],
        "visual_tokenizer": pipeline.visual_tokenizer.fingerprint,
        "checkpoint_hash": checkpoint_hash(source),
        "image": image,
        "image_hash": image and sha256_of(Path(image)),
        "mask": mask,
        "mask_hash": mask and sha256_of(Path(mask)),
    }
    del settings["height"], settings["width"]
    directory = Path(out)
    names = [file_name(number, text, k) for number, text in enumerate(prompts) for k in range(num_images_per_prompt)]
    texts = [text for text in prompts for _ in range(num_images_per_prompt)]
    images = {
        directory / name: {"prompt": text, "seed": each, **settings}
        for name, text, each in zip(names, texts, seeds, strict=True)
    }
    finished = _finished(directory, images, settings)
    missing = [path for path in images if path not in finished]
    require_writable(directory, "pictures", "--out")
    with tqdm(total=len(images), initial=len(finished), unit="image", desc="drawing") as bar:
        for start in range(0, len(missing), options.batch_size):
            part = missing[start : start + options.batch_size]
            drawn = pipeline(
                [images[path]["prompt"] for path in part],
                seed=[images[path]["seed"] for path in part],
                image=picture,
                mask=opened_mask,
                **options.arguments(),
            )
            assert isinstance(drawn.images, list)
            for path, made in zip(part, drawn.images, strict=True):
                write_png(path, made, {**images[path], "checkpoint": checkpoint})
            bar.update(len(part))
    print(f"{len(images)} images in {directory}" + (f", {len(finished)} of them from before" if finished else ""))


def _finished(directory: Path, wanted: dict[Path, dict[str, Any]], settings: dict[str, Any]) -> set[Path]:
    """The wanted files that exist and are complete.

    Raises ValueError for a wanted file that is another picture, and for any picture of other settings beside them.
    """
    finished = set()
    for path in sorted(file for file in directory.glob("*.png") if file.is_file()):
        metadata = read_metadata(path)
        if metadata is None and path in wanted:
            raise UserError(
                f"{path} was not drawn by simplear generate, or is damaged, and has the name of a picture to draw: "
                "move it, or name another directory (--out)."
            )
        if metadata is None:
            continue
        differences = [
            f"{name} {json.dumps(metadata.get(name))[:SHOWN]}, now {json.dumps(value)[:SHOWN]}"
            for name, value in wanted.get(path, settings).items()
            if metadata.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{path} was drawn with other settings ({'; '.join(differences)}): name another directory (--out), or "
                "remove what is in this one."
            )
        if path in wanted and is_whole(path):
            finished.add(path)
        elif path in wanted:
            logger.warning("%s is damaged or cut short, and is drawn again", path)
    return finished


def _opened(opener: Callable[[str], Image.Image], file: str | None) -> Image.Image | None:
    """Raises UserError naming a file that cannot be opened as a picture."""
    try:
        return opener(file) if file is not None else None
    except PictureError as error:
        raise UserError(f"{file}: {error}.") from error
