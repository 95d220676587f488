"""A served checkpoint: what requests may ask of it, checked before anything waits in its queue."""

from __future__ import annotations

import dataclasses
import time

from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher, BatchKey
from simplear.serving.schema import APIError, ImageRequest


class ServedModel:
    """A checkpoint that is served.

    Args:
        name: how requests call it.
        batcher: draws its images.
        max_codes: of one image; None takes the number that the checkpoint was trained on.
        engine: the name of the pipeline's.
    """

    def __init__(self, name: str, batcher: Batcher, max_codes: int | None = None, engine: str = "fused") -> None:
        self.name, self.batcher, self.pipeline = name, batcher, batcher.pipeline
        self.settings = settings = self.pipeline.settings
        rows, columns = settings.grid
        self.dtype = str(self.pipeline.model.decoder.dtype).removeprefix("torch.")
        self.size = f"{columns * settings.downsample}x{rows * settings.downsample}"
        self.max_codes = max_codes or rows * columns
        self.description = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "simplear",
            "size": self.size,
            "downsample": settings.downsample,
            "max_codes": self.max_codes,
            "engine": engine,
            "dtype": self.dtype,
            "defaults": dataclasses.asdict(settings.generation),
        }

    def check(self, request: ImageRequest) -> tuple[BatchKey, int]:
        """The key of the images' batch, and the number of tokens of the prompt.

        The text tokenizer is used beside the batcher's thread, which changes nothing in it.

        Raises APIError for what cannot be drawn.
        """
        size = self.size if request.size in (None, "auto") else str(request.size)
        width, height = map(int, size.split("x"))
        codes = (height // self.settings.downsample) * (width // self.settings.downsample)
        if codes > self.max_codes:
            largest = f"at most {self.max_codes} are drawn, {self.size} by default"
            raise APIError(400, f"size {size} takes {codes} codes; {largest}.", "size")
        numbers = request.model_dump(include={"guidance_scale", "temperature", "top_k", "top_p"})
        sampling = self.pipeline.sampling_settings(**numbers)
        negative_prompt = request.negative_prompt
        if negative_prompt is None:
            negative_prompt = self.settings.generation.negative_prompt
        texts = {"size": ([], None), "prompt": ([request.prompt], None), "negative_prompt": ([negative_prompt], "")}
        lengths = []
        for parameter, (prompts, prefix) in texts.items():
            try:
                lengths += self.pipeline.check_prompts(prompts, prefix, height, width)
            except ValueError as error:
                raise APIError(400, str(error), parameter) from error
        if sampling.guidance_scale == 1:  # the negative prompt has no effect
            negative_prompt, lengths = "", lengths[:1]
        tokens = -(-max(lengths) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        return BatchKey(height, width, sampling, negative_prompt, tokens), lengths[0]
