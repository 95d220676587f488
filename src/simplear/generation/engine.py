"""What an engine is: prompts, a grid and seeds in, codes out. It knows token ids, but neither text nor pixels."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simplear.errors import UserError
from simplear.generation.sampling import SamplingSettings
from simplear.language_model import LanguageModel

RowCallback = Callable[[int, Tensor], None]
"""Called with the number of finished rows and the codes so far (B, rows · w), after each row of the grid."""


@dataclass
class GenerationStats:
    """What a generation cost."""

    engine: str
    images: int = 0
    tokens: int = 0
    """Codes of all images together, fixed ones included."""
    steps: int = 0
    """Forward passes of the decoder, prefill included."""
    seconds: float = 0.0


@dataclass(frozen=True)
class DrawRequest:
    """The arguments of `Engine.generate`, checked."""

    prompt_ids: Sequence[Tensor]
    negative_ids: Sequence[Tensor]
    """Empty without guidance."""
    grid: tuple[int, int]
    sampling: SamplingSettings
    seeds: Sequence[int]
    on_row: RowCallback | None
    fixed_codes: Tensor | None

    @property
    def images(self) -> int:
        """B."""
        return len(self.prompt_ids)

    @property
    def count(self) -> int:
        """Codes of an image, N."""
        return self.grid[0] * self.grid[1]

    def initial_codes(self, device: torch.device) -> Tensor:
        """(B, N) codes in raster order: a copy of the fixed ones, and -1 where a code is drawn."""
        if self.fixed_codes is None:
            return torch.full((self.images, self.count), -1, device=device)
        return self.fixed_codes.flatten(1).to(device, copy=True)

    def show(self, codes: Tensor, finished: int) -> None:
        """Call ``on_row`` if the first ``finished`` of codes (B, at least N) end with a row."""
        if self.on_row is not None and finished % self.grid[1] == 0:
            self.on_row(finished // self.grid[1], codes[:, :finished])


class Engine(ABC):
    """Draws codes from a language model.

    Args:
        model: on the device where it is to run, in evaluation mode.
    """

    name: str

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        negative_ids: Sequence[Tensor],
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
        on_row: RowCallback | None = None,
        fixed_codes: Tensor | None = None,
    ) -> tuple[Tensor, GenerationStats]:
        """Codes (B, h, w) int64 for B prompts.

        Args:
            prompt_ids: B 1-D tensors that end with ``<|soi|>``.
            negative_ids: B more, for the unconditional rows; unused when the guidance scale is 1.
            grid: rows and columns of codes.
            sampling: how a code is drawn.
            seeds: B integers.
            on_row: called after each row of codes.
            fixed_codes: (B, h, w) int64 codes to keep, and -1 where a code is drawn; None draws all. A code is drawn
                given all codes before it in raster order, fixed or drawn, and does not depend on fixed codes behind it.

        Raises:
            ValueError: the lists differ in length, the longest sequence exceeds the model's positions, or
                ``fixed_codes`` has another shape or codes outside the codebook.
        """
        _check(self.model, prompt_ids, negative_ids, grid, seeds, fixed_codes)
        begin = time.perf_counter()
        negative_ids = list(negative_ids) if sampling.guidance_scale != 1.0 else []
        request = DrawRequest(prompt_ids, negative_ids, grid, sampling, seeds, on_row, fixed_codes)
        codes, steps = self._draw(request)
        if codes.is_cuda:
            torch.cuda.synchronize(codes.device)  # so that the seconds are those of the whole drawing
        seconds = time.perf_counter() - begin
        stats = GenerationStats(self.name, request.images, request.images * request.count, steps, seconds)
        return codes.view(request.images, *grid), stats

    @abstractmethod
    def _draw(self, request: DrawRequest) -> tuple[Tensor, int]:
        """Codes (B, N) int64 and the number of forward passes."""


ENGINES = {
    "baseline": "simplear.generation.plain.BaselineEngine",
    "kv-cache": "simplear.generation.plain.KVCacheEngine",
    "cached": "simplear.generation.cached.CachedEngine",
    "fused": "simplear.generation.fused.FusedEngine",
    "compiled": "simplear.generation.fused.CompiledEngine",
    "jacobi": "simplear.generation.fused.JacobiEngine",
    "vllm": "simplear_vllm.engine.VLLMEngine",
}
"""Names that the pipeline takes, and their classes, which are imported when they are needed."""


def make_engine(name: str, model: LanguageModel, **options: Any) -> Engine:
    """The engine of that name over a model, with options of its class. Raises ValueError for unknown ones."""
    return engine_class(name, options)(model, **options)


def engine_class(name: str, options: Mapping[str, Any]) -> Any:
    """The class of that name. Raises ValueError for an unknown name, and for options that the class does not have.

    Options of ``vllm`` are not checked here: they are those of ``vllm.EngineArgs``.
    """
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}; there are: {', '.join(sorted(ENGINES))}.")
    module, _, attribute = ENGINES[name].rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if options and name != "vllm":
        from jsonargparse import ArgumentError, ArgumentParser  # here, since most callers have no options

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(found, skip={"model"})
        try:
            parser.parse_object(dict(options))
        except ArgumentError as error:
            known = ", ".join(vars(parser.get_defaults())) or "none"
            raise UserError(f"engine options of {name!r}: {error}. Its options are: {known}.") from error
    return found


def _check(
    model: LanguageModel,
    prompt_ids: Sequence[Tensor],
    negative_ids: Sequence[Tensor],
    grid: tuple[int, int],
    seeds: Sequence[int],
    fixed_codes: Tensor | None,
) -> None:
    images, (height, width) = len(prompt_ids), grid
    if not images == len(negative_ids) == len(seeds):
        raise ValueError(
            f"{images} prompts, {len(negative_ids)} negative prompts and {len(seeds)} seeds: give as many of each."
        )
    longest = max(len(ids) for ids in (*prompt_ids, *negative_ids))
    if longest + height * width > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and a grid of {height} × {width} codes take {longest + height * width} "
            f"positions; the model has {model.max_positions}. Shorten the prompt or ask for a smaller picture."
        )
    if fixed_codes is None:
        return
    size = model.layout.codebook_size
    if fixed_codes.shape != (images, *grid) or fixed_codes.min() < -1 or fixed_codes.max() >= size:
        raise ValueError(f"fixed_codes must be ({images}, {height}, {width}) codes in [0, {size}), or -1 to draw one.")


def round_up(tokens: int, multiple: int) -> int:
    """Tokens that prompts are padded to: the longest one's rounded up, so that few shapes of batches occur."""
    return -(-tokens // multiple) * multiple
