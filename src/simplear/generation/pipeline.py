"""`SimpleARPipeline`: prompts in, pictures out, with the names that users of diffusers know."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from simplear.device import resolve_device
from simplear.errors import UserError
from simplear.generation.engine import Engine, GenerationStats, RowCallback, engine_class, make_engine
from simplear.generation.memory import OutOfMemoryError, is_out_of_memory, out_of_memory
from simplear.generation.sampling import SamplingSettings
from simplear.generation.vllm_plugin.engine import VLLMEngine
from simplear.language_model import CheckpointError, CheckpointSettings, LanguageModel, load_checkpoint
from simplear.pictures import as_mask, as_rgb
from simplear.sequence import encode_captions, prompt_sequence
from simplear.visual_tokenizer import VisualTokenizer, load_visual_tokenizer, to_pixels

OutputType = Literal["pil", "pt", "codes"]
SEEDS = 2**64
"""How many there are: the hash of a draw takes 64 bits."""


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
    """What was drawn with, the checkpoint's defaults filled in."""


class SimpleARPipeline:
    """A language model, its text tokenizer and its visual tokenizer, ready to draw.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: the checkpoint's text tokenizer.
        settings: the content of ``simplear.json``; None in a call means its defaults.
        visual_tokenizer: an object, a directory, a hub id, or None when only codes are asked for.
        engine: one of `simplear.generation.ENGINES`, or an engine over the same model.
        device: where pictures are decoded if the model has no weights, for vLLM has them; else that is the model's.
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
            ValueError: an unknown engine or device, or one that cannot be had here.
        """
        on_vllm = engine == "vllm"
        engine_class(engine, engine_options or {})
        place = resolve_device(device)
        checkpoint = load_checkpoint(path_or_hub_id, dtype=dtype, with_weights=not on_vllm)
        if visual_tokenizer is None:
            visual_tokenizer = checkpoint.default_visual_tokenizer
        model: LanguageModel = checkpoint.model
        drawer: Engine
        if on_vllm:
            drawer = VLLMEngine(model, checkpoint.directory, **(engine_options or {}))
        else:
            model = model.to(place)
            drawer = make_engine(engine, model, **(engine_options or {}))
        return cls(model, checkpoint.tokenizer, checkpoint.settings, visual_tokenizer, engine=drawer, device=place)

    @property
    def device(self) -> torch.device:
        """Where the language model is; where vLLM has its weights, the device that was asked for."""
        device = next(self.model.parameters()).device
        return self._device if device.type == "meta" else device

    @property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer, loaded when first asked for.

        Raises CheckpointError where there is none, or where it is not the one whose codes the model learned, and
        FileNotFoundError or ValueError where it cannot be loaded.
        """
        if self._visual_tokenizer is None:
            source = self._visual_tokenizer_source
            if source is None:
                raise CheckpointError(
                    "the checkpoint carries no visual tokenizer: name one (visual_tokenizer=…), or ask for codes "
                    '(output_type="codes").'
                )
            tokenizer = load_visual_tokenizer(source, self.device) if isinstance(source, (str, Path)) else source
            wanted = self.settings.visual_tokenizer_fingerprint
            if wanted is not None and tokenizer.fingerprint != wanted:
                raise CheckpointError(
                    f"the visual tokenizer has fingerprint {tokenizer.fingerprint[:12]}…, but the checkpoint learned "
                    f"the codes of {wanted[:12]}…: use the one that belongs to it."
                )
            if tokenizer.downsample != self.settings.downsample:
                raise CheckpointError(
                    f"a code of the visual tokenizer stands for {tokenizer.downsample} pixels a side, one of the "
                    f"checkpoint for {self.settings.downsample}: use the one that belongs to it."
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
        progress: bool = False,
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
            progress: show a bar over the codes.
            on_row: called after each row of codes, with the number of the batch's first image in this call and its
                codes so far (B, rows, w), which `decode` turns into the upper part of the pictures.

        Raises:
            OutOfMemoryError: batch_size is too large for the memory; the message gives one that fits.
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
        sampling = self.sampling_settings(guidance_scale, do_sample, temperature, top_k, top_p)
        pictures = _pictures(image, mask, len(prompts), height, width)
        if pictures:
            width, height = pictures[0][0].size
        grid = self.grid(height, width)
        prefix = defaults.prompt_prefix if prompt_prefix is None else prompt_prefix
        negative = defaults.negative_prompt if negative_prompt is None else negative_prompt
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each.")
        prompt_ids = self._encode(prompts, "prompt", grid, prefix)
        negative_ids = self._encode(negatives, "negative prompt", grid)
        order = [index for index in range(len(prompts)) for _ in range(num_images_per_prompt)]
        seeds = _seeds(seed, len(order))
        given = self._kept_codes(pictures) if pictures else None
        codes, stats = [], GenerationStats(engine="")
        with tqdm(total=len(order) * grid[0], unit="row", disable=not progress, desc="drawing") as bar:
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]

                def finished(row: int, so_far: Tensor, first: int = start) -> None:
                    bar.update(len(so_far))
                    if on_row is not None:
                        on_row(first, so_far.view(len(so_far), row, grid[1]))

                drawn, cost = self._draw(
                    [prompt_ids[index] for index in part],
                    [negative_ids[index] for index in part],
                    grid,
                    sampling,
                    seeds[start : start + batch_size],
                    finished,
                    None if given is None else given[part],
                )
                codes.append(drawn.cpu())
                stats = replace(
                    cost,
                    images=stats.images + cost.images,
                    tokens=stats.tokens + cost.tokens,
                    steps=stats.steps + cost.steps,
                    seconds=stats.seconds + cost.seconds,
                )
        all_codes = torch.cat(codes)
        images = None if output_type == "codes" else self.decode(all_codes, batch_size)
        shown = pil_images(images) if output_type == "pil" and images is not None else images
        return PipelineOutput(shown, all_codes, stats, seeds, sampling)

    def _draw(
        self,
        prompt_ids: Sequence[Tensor],
        negative_ids: Sequence[Tensor],
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
        on_row: RowCallback,
        given: Tensor | None,
    ) -> tuple[Tensor, GenerationStats]:
        try:
            return self.engine.generate(prompt_ids, negative_ids, grid, sampling, seeds, on_row, given)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error that it handled held all that was allocated.
        _release_memory()
        longest, rows = max(len(ids) for ids in (*prompt_ids, *negative_ids)), 1 + (sampling.guidance_scale != 1.0)
        width = getattr(self.engine, "tokens_a_pass", 1)
        raise out_of_memory(self.model, len(prompt_ids), longest, grid[0] * grid[1], rows, width)

    def sampling_settings(
        self,
        guidance_scale: float | None = None,
        do_sample: bool = True,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> SamplingSettings:
        """What a call with these arguments draws with, the checkpoint's defaults filled in.

        Raises ValueError for a number outside its range.
        """
        defaults = self.settings.generation
        return SamplingSettings(
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            do_sample=do_sample,
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
        )

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
        prefix = self.settings.generation.prompt_prefix if prompt_prefix is None else prompt_prefix
        return [len(ids) for ids in self._encode(prompts, "prompt", self.grid(height, width), prefix)]

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = 32) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [0, 1], on CPU, of codes (B, h, w).

        Raises OutOfMemoryError if `batch_size` pictures are too many to decode at once.
        """
        tokenizer: Any = self.visual_tokenizer
        device = next(tokenizer.parameters()).device if isinstance(tokenizer, nn.Module) else self.device
        try:
            decoded = [tokenizer.decode(part.to(device)).float().cpu() for part in codes.split(batch_size)]
            return ((torch.cat(decoded) + 1) / 2).clamp(0, 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        _release_memory()
        count = min(batch_size, len(codes))
        height, width = (side * self.settings.downsample for side in codes.shape[1:])
        remedy = f"Decode fewer at once (batch_size={count // 2})." if count > 1 else "Ask for a smaller picture."
        raise OutOfMemoryError(
            f"decoding {count} pictures of {height} × {width} pixels at once ran out of memory on {device}. {remedy}"
        )

    @torch.no_grad()
    def _kept_codes(self, pictures: Sequence[tuple[Image.Image, Image.Image]]) -> Tensor:
        """Codes (P, h, w) of pictures, -1 where their mask is not black."""
        tokenizer, downsample = self.visual_tokenizer, self.settings.downsample
        pixels = torch.from_numpy(to_pixels(np.stack([np.asarray(picture) for picture, _ in pictures])))
        masks = torch.from_numpy(np.stack([np.asarray(mask) for _, mask in pictures]))
        anew = torch.nn.functional.max_pool2d(masks[:, None].float(), downsample)[:, 0] > 0
        return torch.where(anew, -1, tokenizer.encode(pixels.to(self.device)).cpu())

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of codes of a picture of this size in pixels; None is the checkpoint's.

        Raises ValueError for a size that is no whole number of codes, or more than the model has positions for.
        """
        downsample = self.settings.downsample
        sides = []
        for name, pixels, default in zip(("height", "width"), (height, width), self.settings.grid, strict=True):
            if pixels is not None and (pixels < downsample or pixels % downsample):
                raise UserError(f"{name} {pixels} is no multiple of {downsample}, the pixels that one code stands for.")
            sides.append(default if pixels is None else pixels // downsample)
        if self._positions_left(sides[0], sides[1]) < 0:
            raise UserError(
                f"a picture of {sides[0]} × {sides[1]} = {sides[0] * sides[1]} codes and two control tokens take more "
                f"than the {self.model.max_positions} positions that the model has: ask for a smaller one."
            )
        return sides[0], sides[1]

    def _positions_left(self, rows: int, columns: int) -> int:
        """Positions for a caption, beside ``<|t2i|>``, ``<|soi|>`` and the codes."""
        return self.model.max_positions - rows * columns - 2

    def _encode(self, captions: Sequence[str], noun: str, grid: tuple[int, int], prefix: str = "") -> list[Tensor]:
        for name, text in (
            *((f"{noun} {number}", caption) for number, caption in enumerate(captions)),
            ("prefix", prefix),
        ):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{name} is not valid text: {error}.") from error
        room = min(self.settings.max_text_tokens, self._positions_left(*grid))
        # The empty caption is what condition dropout trains, and that has no prefix either.
        encoded = encode_captions(self.tokenizer, [prefix + caption if caption else "" for caption in captions])
        for number, (caption, ids) in enumerate(zip(captions, encoded, strict=True)):
            if len(ids) > room:
                raise UserError(
                    f"{noun} {number} ({caption[:40]!r}…) has {len(ids)} tokens; there is room for {room} beside "
                    f"{grid[0]} × {grid[1]} codes. Shorten it."
                )
        return [prompt_sequence(ids, self.model.layout) for ids in encoded]


def _pictures(
    image: Image.Image | Sequence[Image.Image] | None,
    mask: Image.Image | Sequence[Image.Image] | None,
    prompts: int,
    height: int | None,
    width: int | None,
) -> list[tuple[Image.Image, Image.Image]]:
    """Picture and mask of each prompt; none where there is no picture."""
    if image is None or mask is None:
        if image is not None or mask is not None:
            raise UserError("image and mask go together: the mask is white, or transparent, where to draw.")
        return []
    images = [as_rgb(image)] * prompts if isinstance(image, Image.Image) else [as_rgb(each) for each in image]
    masks = [as_mask(mask)] * prompts if isinstance(mask, Image.Image) else [as_mask(each) for each in mask]
    if not len(images) == len(masks) == prompts:
        raise UserError(
            f"{len(images)} images and {len(masks)} masks for {prompts} prompts: give one, or one for each."
        )
    sizes = {item.size for item in (*images, *masks)}
    asked = (width or images[0].width, height or images[0].height)
    if sizes != {asked}:
        raise UserError(
            f"images and masks have the sizes (width, height) {sorted(sizes)}, and {asked} is to be drawn: resize them."
        )
    return list(zip(images, masks, strict=True))


def _release_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
            f"seed {seed} lies outside [0, 2**64). For a random one leave it out; simplear generate then takes 0, and "
            "--seed $RANDOM gives others."
        )
    return [(seed + index) % SEEDS for index in range(count)]


def pil_images(images: Tensor) -> list[Image.Image]:
    """Pictures of (B, 3, H, W) float on CPU, in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
