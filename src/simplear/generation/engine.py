"""What an engine is: prompts, a grid and seeds in, codes out. It knows token ids and nothing of text or pixels."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

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
    """Codes produced, all images together."""
    steps: int = 0
    """Forward passes of the decoder, prefill included."""
    seconds: float = 0.0


class Engine(Protocol):
    """Draws codes from a language model."""

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        negative_ids: Sequence[Tensor],
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
        on_row: RowCallback | None = None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, GenerationStats]:
        """Codes (B, h, w) int64 for B prompts.

        Args:
            prompt_ids: B 1-D tensors that end with ``<|soi|>``.
            negative_ids: B more, for the unconditional rows; not drawn with when the guidance scale is 1.
            grid: rows and columns of codes.
            sampling: how a code is drawn.
            seeds: B integers.
            on_row: called after each row of codes.
            given: (B, h, w) int64 codes to keep, -1 where one is drawn; None draws all. A code is drawn given what
                stands before it in raster order, kept or drawn, and knows nothing of what is kept behind it.

        Raises:
            ValueError: different numbers of prompts and seeds, a sequence longer than the model's positions, or given
                codes of another shape or outside the codebook.
        """
        ...


ENGINES = {
    "baseline": "simplear.generation.plain.BaselineEngine",
    "kv-cache": "simplear.generation.plain.KVCacheEngine",
    "cached": "simplear.generation.cached.CachedEngine",
    "fused": "simplear.generation.fused.FusedEngine",
    "compiled": "simplear.generation.fused.CompiledEngine",
    "jacobi": "simplear.generation.jacobi.JacobiEngine",
    "vllm": "simplear.generation.vllm_plugin.engine.VLLMEngine",
}
"""Names that the pipeline takes, and their classes."""


def make_engine(name: str, model: LanguageModel, **options: Any) -> Engine:
    """The engine of that name over a model, with options of its class. Raises ValueError for unknown ones."""
    return engine_class(name, options)(model, **options)


def engine_class(name: str, options: Mapping[str, Any]) -> Any:
    """The class of that name, which takes these options. Raises ValueError for unknown ones."""
    if name not in ENGINES:
        raise UserError(f"no engine {name!r}; there are: {', '.join(sorted(ENGINES))}.")
    module, _, attribute = ENGINES[name].rpartition(".")
    made = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(made).parameters
    unknown = options.keys() - known.keys()
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in known.values()):
        there_are = ", ".join(option for option in known if option != "model") or "none"
        raise UserError(f"the engine {name!r} has no option {', '.join(sorted(unknown))}; it has: {there_are}.")
    hints = get_type_hints(made.__init__)
    for option, value in options.items():
        if option in hints and not _is_of(value, hints[option]):
            hint = hints[option]
            kind = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
            raise UserError(f"the engine {name!r} takes another kind of {option} than {value!r}: {kind}.")
    return made


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a class, of one of a union, or among the values of a Literal."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return callable(value) or type(value) in [get_origin(kind) or kind for kind in kinds]


def check_request(
    model: LanguageModel,
    prompt_ids: Sequence[Tensor],
    negative_ids: Sequence[Tensor],
    grid: tuple[int, int],
    seeds: Sequence[int],
    given: Tensor | None = None,
) -> None:
    """Raises ValueError where there is no prompt, numbers of them differ, the longest sequence has no room, or what is
    given are no codes.
    """
    if not prompt_ids:
        raise UserError("no prompts: there is nothing to draw.")
    if not len(prompt_ids) == len(negative_ids) == len(seeds):
        raise ValueError(
            f"{len(prompt_ids)} prompts, {len(negative_ids)} negative prompts and {len(seeds)} seeds: "
            "give as many of each."
        )
    height, width = grid
    if min(grid) < 1:
        raise UserError(f"a grid of {height} × {width} holds no codes.")
    longest = max(len(ids) for ids in (*prompt_ids, *negative_ids))
    if longest + height * width > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and a grid of {height} × {width} codes take {longest + height * width} "
            f"positions; the model has {model.max_positions}. Shorten the prompt or ask for a smaller picture."
        )
    if given is not None:
        if given.shape != (len(prompt_ids), *grid):
            raise ValueError(
                f"given codes of shape {tuple(given.shape)} for {len(prompt_ids)} images of {height} × {width} codes."
            )
        if not -1 <= int(given.min()) <= int(given.max()) < model.layout.codebook_size:
            raise UserError(
                f"given codes lie in [{int(given.min())}, {int(given.max())}]: a code lies in "
                f"[0, {model.layout.codebook_size}), and -1 stands where one is drawn."
            )


def kept_codes(given: Tensor | None, images: int, count: int, device: torch.device) -> Tensor:
    """(B, N) codes in raster order, a copy of the given ones (B, h, w); -1 where one is drawn."""
    if given is None:
        return torch.full((images, count), -1, device=device)
    return given.flatten(1).to(device, copy=True)


def leading(given: Tensor | None) -> int:
    """How many codes from the first on are given for all images (B, h, w); never all, for something must be drawn."""
    if given is None:
        return 0
    kept = (given.flatten(1) >= 0).all(dim=0)[:-1]
    return int(kept.long().cumprod(dim=0).sum())


def read_once(
    prompt_ids: Sequence[Tensor], negative_ids: Sequence[Tensor], first: int
) -> tuple[list[Tensor], list[int]]:
    """Sequences to prefill, and for each row which it begins with: an unconditional prompt that all share is read once.

    Args:
        prompt_ids: B.
        negative_ids: B more, or none.
        first: codes that are read with the prompts; these differ by image, so with any nothing is shared.
    """
    images = len(prompt_ids)
    if first == 0 and len(negative_ids) > 1 and all(torch.equal(ids, negative_ids[0]) for ids in negative_ids[1:]):
        return [*prompt_ids, negative_ids[0]], [*range(images), *[images] * images]
    return [*prompt_ids, *negative_ids], list(range(images + len(negative_ids)))


def require_multiple(multiple: int) -> int:
    """A number of tokens that prompts are padded to a multiple of. Raises ValueError for less than 1."""
    if multiple < 1:
        raise UserError(f"prompt_multiple {multiple} must be at least 1.")
    return multiple


def prompt_width(prompts: Sequence[Tensor], multiple: int) -> int:
    """Tokens that prompts are padded to: the longest one's, rounded up, so that few shapes of batches occur."""
    return -(-max(len(ids) for ids in prompts) // multiple) * multiple


def draw_in_order(
    codes: Tensor,
    first: int,
    width: int,
    next_codes: Callable[[int], Tensor],
    on_row: RowCallback | None,
) -> None:
    """Fill codes (B, N) in place, one of all images at a time, from place ``first`` on, but those that are kept.

    Args:
        codes: -1 where one is drawn.
        first: codes that all images have from the beginning.
        width: codes in a row.
        next_codes: the codes (B,) of a place, drawn given all before it.
        on_row: shown the rows that were given too.
    """
    for row in range(1, first // width + 1):
        if on_row is not None:
            on_row(row, codes[:, : row * width])
    for place in range(first, codes.shape[1]):
        codes[:, place] = torch.where(codes[:, place] < 0, next_codes(place), codes[:, place])
        if on_row is not None and (place + 1) % width == 0:
            on_row((place + 1) // width, codes[:, : place + 1])
