"""`SimpleARPipeline`: prompts in, pictures out, with the names that users of diffusers know."""

from __future__ import annotations

import dataclasses
import functools
import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from simplear.device import resolve_device
from simplear.errors import UserError
from simplear.generation.engine import Engine, GenerationStats, engine_class, make_engine
from simplear.generation.memory import with_memory_error
from simplear.generation.sampling import SamplingSettings
from simplear.language_model import CheckpointError, CheckpointSettings, LanguageModel, load_checkpoint
from simplear.pictures import as_mask, as_rgb
from simplear.sequence import encode_captions, prompt_sequence
from simplear.text_files import valid_unicode
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, to_pixels

OutputType = Literal["pil", "pt", "codes"]
SEEDS = 2**64
"""How many there are: the hash of a draw takes 64 bits."""
Entry = TypeVar("Entry", str, Image.Image)


@dataclass
class PipelineOutput:
    """What a call of the pipeline gives."""

    images: list[Image.Image] | Tensor | None
    """"pil": a list; "pt": (B, 3, H, W) float32 in [0, 1]; "codes": None. Images of one prompt follow each other."""
    codes: Tensor
    """(B, h, w) int64 on CPU."""
    stats: GenerationStats
    """Summed over batches."""
    seeds: list[int]
    """Of each image, to draw it again."""
    sampling: SamplingSettings
    """The settings of the draw, with the checkpoint's defaults filled in."""


class SimpleARPipeline:
    """A language model, its text tokenizer and its visual tokenizer, ready to draw.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: the checkpoint's text tokenizer.
        settings: the content of ``simplear.json``; None in a call means its defaults.
        visual_tokenizer: an object, a directory, a hub id, or None when only codes are asked for.
        engine: one of `simplear.generation.ENGINES`, or an engine over the same model.
        device: where pictures are decoded if vLLM has the model's weights; otherwise it is the model's device.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: CheckpointSettings,
        visual_tokenizer: VisualTokenizer | str | Path | None = None,
        engine: str | Engine = "fused",
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.engine = make_engine(engine, model) if isinstance(engine, str) else engine
        self._visual_tokenizer_source = visual_tokenizer
        self._visual_tokenizer: VisualTokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        engine: str = "fused",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        visual_tokenizer: VisualTokenizer | str | Path | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> SimpleARPipeline:
        """Load a checkpoint of this project or one released with the paper.

        Args:
            path_or_hub_id: directory or hub id.
            engine: one of `simplear.generation.ENGINES`.
            device: None takes the GPU where there is one. vLLM has its own, and this is where pictures are decoded.
            dtype: of the weights; None keeps the file's.
            visual_tokenizer: directory, hub id or object in place of the checkpoint's own, which for directories
                released with the paper is Cosmos DV8x16x16 from the hub; it is read when first needed.
            engine_options: arguments of the engine's class, such as ``{"window": 7, "compiled": True}`` for "jacobi";
                for "vllm", which reads the weights itself, arguments of ``vllm.EngineArgs``.

        Raises:
            CheckpointError: missing or damaged files.
            ValueError: the engine or device is unknown or not available here.
        """
        options, on_vllm = dict(engine_options or {}), engine == "vllm"
        engine_class(engine, options)
        place = resolve_device(device)
        checkpoint = load_checkpoint(path_or_hub_id, dtype=dtype, with_weights=not on_vllm)
        model: LanguageModel = checkpoint.model
        if on_vllm:
            options["directory"] = checkpoint.directory
        else:
            model = model.to(place)
        if visual_tokenizer is None:
            visual_tokenizer = checkpoint.default_visual_tokenizer
        drawer = make_engine(engine, model, **options)
        return cls(model, checkpoint.tokenizer, checkpoint.settings, visual_tokenizer, engine=drawer, device=place)

    @property
    def device(self) -> torch.device:
        """Where the language model is; where vLLM has its weights, the device that was asked for."""
        device = next(self.model.parameters()).device
        return self._device if device.type == "meta" else device

    @property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer, loaded when first asked for.

        Raises CheckpointError if there is none, or if it is not the one whose codes the model learned, and
        FileNotFoundError or ValueError if it cannot be loaded.
        """
        if self._visual_tokenizer is None:
            source = self._visual_tokenizer_source
            if source is None:
                raise CheckpointError(
                    "the checkpoint carries no visual tokenizer: name one (visual_tokenizer=…), or ask for codes "
                    '(output_type="codes").'
                )
            tokenizer = load_visual_tokenizer(source, self.device) if isinstance(source, (str, Path)) else source
            wanted = self.settings.visual_tokenizer_fingerprint or tokenizer.fingerprint
            if (tokenizer.fingerprint, tokenizer.downsample) != (wanted, self.settings.downsample):
                raise CheckpointError(
                    f"the visual tokenizer has fingerprint {tokenizer.fingerprint[:12]}… and {tokenizer.downsample} "
                    f"pixels a code along each side, but the checkpoint learned the codes of one with {wanted[:12]}… "
                    f"and {self.settings.downsample}: use the one that belongs to it."
                )
            self._visual_tokenizer = tokenizer
        return self._visual_tokenizer

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        prompt_prefix: str | None = None,
        guidance_scale: float | None = None,
        do_sample: bool = True,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        output_type: OutputType = "pil",
        batch_size: int = 32,
        on_row: Callable[[int, Tensor], None] | None = None,
    ) -> PipelineOutput:
        """Draw. None means the checkpoint's default.

        Args:
            prompt: one caption or several; an empty one gets no prefix and draws anything.
            negative_prompt: caption of the unconditional rows, one for all or one a prompt; gets no prefix.
            prompt_prefix: put before every prompt.
            guidance_scale: classifier-free guidance; 1 is none.
            do_sample: False takes the most probable code each time.
            temperature: divides log-weights.
            top_k: keep the k most probable codes.
            top_p: keep the most probable codes up to this probability.
            num_images_per_prompt: images of each prompt, one after another in the result.
            seed: in [0, 2**64); image k of the call uses seed + k, after the last one 0 again; a list gives each image
                its own; None draws one.
            height: pixels, a multiple of the visual tokenizer's downsample factor.
            width: pixels, likewise.
            image: picture to keep a part of, one for all or one a prompt; height and width are its own.
            mask: where to draw, of the picture's size: transparent where it has transparent areas (OpenAI's form), else
                not black. A code whose patch is touched is drawn. Codes are drawn in raster order, so what is drawn
                continues what is above it and to its left, and does not see what is kept below.
            output_type: "pil", "pt", or "codes", which needs no visual tokenizer.
            batch_size: images drawn at once.
            on_row: called after each row of codes, with the number of the batch's first image in this call and its
                codes so far (B, rows, w), which `decode` turns into the upper part of the pictures.

        Raises:
            OutOfMemoryError: batch_size is too large for the memory; the message suggests a smaller one.
            ValueError: an empty list, a prompt that is not valid text or too long, a size that is not a whole number of
                codes, a picture and a mask that do not belong together, or a number outside its range; the message
                names it.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1 or batch_size < 1:
            raise UserError("give at least one prompt, and num_images_per_prompt and batch_size of 1 or more.")
        if output_type not in ("pil", "pt", "codes"):
            raise UserError(f'output_type {output_type!r} is unknown: "pil", "pt" or "codes".')
        defaults = self.settings.generation
        sampling = self.sampling_settings(
            do_sample, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        negative = defaults.negative_prompt if negative_prompt is None else negative_prompt
        pictures, masks = _pictures_and_masks(image, mask, len(prompts), height, width)
        if pictures:
            width, height = pictures[0].size
        grid = self.grid(height, width)
        prompt_ids = self._encode(prompts, "prompt", grid, prompt_prefix)
        negative_ids = self._encode(_one_each(negative, "negative prompts", len(prompts)), "negative prompt", grid, "")
        prompt_of_image = [number for number in range(len(prompts)) for _ in range(num_images_per_prompt)]
        seeds = _seeds(seed, len(prompt_of_image))
        fixed_codes = self._codes_to_keep(pictures, masks) if pictures else None
        codes, stats = [], GenerationStats("")
        for start in range(0, len(seeds), batch_size):
            part = prompt_of_image[start : start + batch_size]

            def show(row: int, so_far: Tensor, first: int = start) -> None:
                assert on_row is not None
                on_row(first, so_far.view(len(so_far), row, grid[1]))

            call = functools.partial(
                self.engine.generate,
                [prompt_ids[number] for number in part],
                [negative_ids[number] for number in part],
                grid,
                sampling,
                seeds[start : start + batch_size],
                None if on_row is None else show,
                None if fixed_codes is None else fixed_codes[part],
            )
            drawn, cost = with_memory_error(call, "drawing", len(part))
            codes.append(drawn.cpu())
            stats.engine = cost.engine
            for name in ("images", "tokens", "steps", "seconds"):
                setattr(stats, name, getattr(stats, name) + getattr(cost, name))
        all_codes = torch.cat(codes)
        images = None if output_type == "codes" else self.decode(all_codes, batch_size)
        shown = pil_images(images) if output_type == "pil" and images is not None else images
        return PipelineOutput(shown, all_codes, stats, seeds, sampling)

    def sampling_settings(self, do_sample: bool = True, **numbers: float | None) -> SamplingSettings:
        """The settings of a call with these arguments.

        Args:
            do_sample: as for a call.
            numbers: guidance_scale, temperature, top_k and top_p; None is the checkpoint's default.

        Raises ValueError for a number outside its range.
        """
        defaults = dataclasses.asdict(self.settings.generation)
        chosen: dict[str, Any] = {name: defaults[name] if value is None else value for name, value in numbers.items()}
        return SamplingSettings(do_sample=do_sample, **chosen)

    def check_prompts(
        self,
        prompts: Sequence[str],
        prompt_prefix: str | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[int]:
        """Raise what drawing these prompts would raise, before any is drawn. Arguments as for a call.

        Returns:
            Tokens of each, the two control tokens included.
        """
        return [len(ids) for ids in self._encode(prompts, "prompt", self.grid(height, width), prompt_prefix)]

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = 32) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [0, 1], on CPU, of codes (B, h, w).

        Raises OutOfMemoryError if `batch_size` pictures are too many to decode at once.
        """
        tokenizer: Any = self.visual_tokenizer
        device = next(tokenizer.parameters()).device if isinstance(tokenizer, nn.Module) else self.device

        def decoded() -> Tensor:
            return torch.cat([tokenizer.decode(part.to(device)).float().cpu() for part in codes.split(batch_size)])

        return ((with_memory_error(decoded, "decoding", min(batch_size, len(codes))) + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def _codes_to_keep(self, pictures: Sequence[Image.Image], masks: Sequence[Image.Image]) -> Tensor:
        """Codes (P, h, w) of pictures, -1 where their mask is not black."""
        pixels = torch.from_numpy(to_pixels(np.stack([np.asarray(picture) for picture in pictures])))
        brightness = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks]))[:, None].float()
        to_draw = torch.nn.functional.max_pool2d(brightness, self.settings.downsample)[:, 0] > 0
        return torch.where(to_draw, -1, self.visual_tokenizer.encode(pixels.to(self.device)).cpu())

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of codes of a picture of this size in pixels; None is the checkpoint's.

        Raises ValueError for a size that is not a whole number of codes, or that exceeds the model's positions.
        """
        downsample = self.settings.downsample
        sides = []
        for name, pixels, default in zip(("height", "width"), (height, width), self.settings.grid, strict=True):
            if pixels is not None and (pixels < downsample or pixels % downsample):
                raise UserError(f"{name} {pixels} must be a multiple of {downsample}, the pixels of one code.")
            sides.append(default if pixels is None else pixels // downsample)
        if self._positions_left(sides[0], sides[1]) < 0:
            raise UserError(
                f"a picture of {sides[0]} × {sides[1]} = {sides[0] * sides[1]} codes and two control tokens take more "
                f"than the model's {self.model.max_positions} positions: ask for a smaller one."
            )
        return sides[0], sides[1]

    def _positions_left(self, rows: int, columns: int) -> int:
        """Positions for a caption, beside ``<|t2i|>``, ``<|soi|>`` and the codes."""
        return self.model.max_positions - rows * columns - 2

    def _encode(self, captions: Sequence[str], noun: str, grid: tuple[int, int], prefix: str | None) -> list[Tensor]:
        prefix = self.settings.generation.prompt_prefix if prefix is None else prefix
        room = min(self.settings.max_text_tokens, self._positions_left(*grid))
        # The empty caption is what condition dropout trains, and that has no prefix either.
        texts = [prefix + caption if caption else "" for caption in captions]
        for number, text in enumerate(texts):
            if not valid_unicode(text):
                wrong = f"{noun} {number}" if valid_unicode(prefix) else "the prefix"
                raise UserError(f"{wrong} is not valid text: it has half of a surrogate pair, which UTF-8 cannot hold.")
        encoded = encode_captions(self.tokenizer, texts)
        for number, (caption, ids) in enumerate(zip(captions, encoded, strict=True)):
            if len(ids) > room:
                raise UserError(
                    f"{noun} {number} ({caption[:40]!r}…) has {len(ids)} tokens; there is room for {room} beside "
                    f"{grid[0]} × {grid[1]} codes. Shorten it."
                )
        return [prompt_sequence(ids, self.model.layout) for ids in encoded]


def _one_each(value: Entry | Sequence[Entry], noun: str, prompts: int) -> list[Entry]:
    """One entry for each prompt."""
    entries: list[Any] = [value] * prompts if isinstance(value, str | Image.Image) else list(value)
    if len(entries) != prompts:
        raise UserError(f"{len(entries)} {noun} for {prompts} prompts: give one, or one for each.")
    return entries


def _pictures_and_masks(
    image: Image.Image | Sequence[Image.Image] | None,
    mask: Image.Image | Sequence[Image.Image] | None,
    prompts: int,
    height: int | None,
    width: int | None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Of each prompt, converted; none if there is no picture."""
    if image is None or mask is None:
        if image is not None or mask is not None:
            raise UserError("image and mask go together: the mask is white, or transparent, where to draw.")
        return [], []
    pictures = [as_rgb(each) for each in _one_each(image, "images", prompts)]
    masks = [as_mask(each) for each in _one_each(mask, "masks", prompts)]
    sizes = {item.size for item in (*pictures, *masks)}
    wanted = (width or pictures[0].width, height or pictures[0].height)
    if sizes != {wanted}:
        raise UserError(
            f"images and masks have the sizes (width, height) {sorted(sizes)}, but {wanted} is to be drawn: resize "
            "them."
        )
    return pictures, masks


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(31)
    if not isinstance(seed, Sequence):
        return seeds_from(seed, count)
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} images: give one for each, or a single number.")
    return [each for one in seed for each in seeds_from(one, 1)]


def seeds_from(seed: int, count: int) -> list[int]:
    """Seeds of images, one after another. Raises UserError for one outside [0, 2**64)."""
    seed = operator.index(seed)
    if not 0 <= seed < SEEDS:
        raise UserError(
            f"seed {seed} lies outside [0, 2**64). Leave it out for a random one; simplear generate then takes 0, and "
            "--seed $RANDOM gives others."
        )
    return [(seed + index) % SEEDS for index in range(count)]


def pil_images(images: Tensor) -> list[Image.Image]:
    """Pictures of (B, 3, H, W) float on CPU, in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
