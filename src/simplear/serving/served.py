"""A checkpoint that is served: what requests may ask of it, checked before anything waits in its queue."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from simplear.generation import SamplingSettings, SimpleARPipeline
from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher, Shared
from simplear.serving.schema import APIError, ImageRequest, Model, Usage

LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383}
"""Pixels, of these formats."""


class ServedModel:
    """A checkpoint that is served, and what may be asked of it.

    Args:
        name: how requests call it.
        batcher: draws; its pipeline is left alone from here on.
        max_codes: of one image; None takes the number that the checkpoint was trained on.
        engine: the name of the pipeline's.
    """

    def __init__(self, name: str, batcher: Batcher, max_codes: int | None = None, engine: str = "fused") -> None:
        pipeline = batcher.pipeline
        self.name, self.batcher, self.settings, self.engine = name, batcher, pipeline.settings, engine
        rows, columns = self.settings.grid
        self.max_codes = rows * columns if max_codes is None else max_codes
        self.dtype = str(pipeline.model.decoder.dtype).removeprefix("torch.")
        self.created = int(time.time())
        # A text tokenizer of its own: the batcher's thread uses the other at the same time.
        self._checker: SimpleARPipeline = copy.copy(pipeline)
        self._checker.tokenizer = copy.deepcopy(pipeline.tokenizer)
        self._checking = ThreadPoolExecutor(1, f"checking {name}")

    @property
    def description(self) -> Model:
        """For `/v1/models`."""
        rows, columns = (side * self.settings.downsample for side in self.settings.grid)
        return Model(
            id=self.name,
            created=self.created,
            size=f"{columns}x{rows}",
            downsample=self.settings.downsample,
            max_codes=self.max_codes,
            engine=self.engine,
            dtype=self.dtype,
            defaults=dataclasses.asdict(self.settings.generation),
        )

    async def checked(self, asked: ImageRequest) -> tuple[Shared, Usage]:
        """`shared`, beside the event loop: tokenizing the longest prompts takes tenths of a second."""
        return await asyncio.get_running_loop().run_in_executor(self._checking, self.shared, asked)

    def shared(self, asked: ImageRequest) -> tuple[Shared, Usage]:
        """What decides about the batch, and the tokens of all images. Raises APIError for what cannot be drawn."""
        defaults, downsample = self.settings.generation, self.settings.downsample
        if asked.size in (None, "auto"):
            height, width = (side * downsample for side in self.settings.grid)
        else:
            width, height = map(int, str(asked.size).split("x"))
        codes = (height // downsample) * (width // downsample)
        if codes > self.max_codes:
            largest = f"at most {self.max_codes} are drawn, {self.description.size} by default"
            raise APIError(400, f"size {asked.size} takes {codes} codes; {largest}.", "size")
        if max(height, width) > LONGEST_SIDE.get(asked.output_format or "png", max(height, width)):
            limit = LONGEST_SIDE[str(asked.output_format)]
            raise APIError(400, f"size {asked.size}: {asked.output_format} has at most {limit} pixels a side.", "size")
        check = self._checker.check_prompts
        with _naming("size"):
            check([], None, height, width)
        with _naming("prompt"):
            prompt = check([asked.prompt], None, height, width)[0]
        negative_prompt = defaults.negative_prompt if asked.negative_prompt is None else asked.negative_prompt
        with _naming("negative_prompt"):
            negative = check([negative_prompt], "", height, width)[0]
        sampling = SamplingSettings(
            **{
                name: getattr(defaults, name) if getattr(asked, name) is None else getattr(asked, name)
                for name in ("guidance_scale", "temperature", "top_k", "top_p")
            }
        )
        if sampling.guidance_scale == 1:  # then nothing reads it
            negative_prompt, negative = "", 0
        tokens = -(-max(prompt, negative) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        images = asked.n or 1
        return Shared(height, width, sampling, negative_prompt, tokens), Usage.of(images * prompt, images * codes)


@contextlib.contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """The pipeline's own refusals become answers that name the parameter."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), parameter) from error
