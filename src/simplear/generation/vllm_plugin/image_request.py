"""What a vLLM request says of the image that it draws: the ``extra_args`` of its sampling parameters.

The names are flat and the values plain, so that they also pass through ``vllm_xargs`` of vLLM's HTTP server. Read where
a request enters, in the scheduler and in the worker alike. Nothing here imports vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from simplear.generation.sampling import SamplingSettings

Role = Literal["conditional", "negative"]

PREFIX = "simplear_"
"""Begins every name of ours among a request's extra arguments."""

NEUTRAL = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 0.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "ignore_eos": True,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "logit_bias": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
}
"""vLLM's own sampling parameters as a request for an image has them: our logits processor draws, at temperature 0 vLLM
takes what it leaves, and nothing but the number of codes ends an image."""


@dataclass(frozen=True)
class ImageRequest:
    """One row of one image."""

    codes: int
    """Codes to draw; the request's max_tokens."""
    seed: int
    """In [0, 2**64)."""
    image_token_offset: int
    """Id of code 0."""
    codebook_size: int
    sampling: SamplingSettings
    pair: str | None = None
    """A name that the two rows of a guided image share and no other has; None without guidance."""
    role: Role = "conditional"
    given: tuple[int, ...] | None = None
    """Codes to keep in raster order, -1 where one is drawn."""

    def __post_init__(self) -> None:
        if (self.pair is not None) != (self.sampling.guidance_scale != 1.0):
            raise ValueError(
                f"guidance_scale {self.sampling.guidance_scale} with pair {self.pair!r}: an image with guidance is two "
                "requests that name one pair, an image without (scale 1) is one request that names none."
            )
        if self.role not in get_args(Role) or (self.pair is None and self.role != "conditional"):
            raise ValueError(f"role {self.role!r} of pair {self.pair!r}: a pair is one conditional, one negative row.")
        if self.codes < 1 or self.codebook_size < 1 or self.image_token_offset < 0 or not 0 <= self.seed < 2**64:
            raise ValueError(
                f"{self.codes} codes out of {self.codebook_size} from id {self.image_token_offset} on with seed "
                f"{self.seed}: codes and codebook begin at 1, ids at 0, and a seed lies in [0, 2**64)."
            )
        if self.given is not None and (
            len(self.given) != self.codes or not -1 <= min(self.given) <= max(self.given) < self.codebook_size
        ):
            raise ValueError(
                f"{len(self.given)} given codes for {self.codes}: give one for each in [0, {self.codebook_size}), "
                "and -1 where one is drawn."
            )

    def matches(self, other: ImageRequest) -> bool:
        """Whether two requests are the two rows of one image."""
        return self.role != other.role and replace(self, role=other.role) == other

    def extra_args(self) -> dict[str, Any]:
        """As a request carries it; None is left out."""
        values = {**vars(self), **vars(self.sampling), "given": None if self.given is None else list(self.given)}
        left_out = ("sampling", "codes")
        return {PREFIX + name: v for name, v in values.items() if name not in left_out and v is not None}

    @classmethod
    def of(cls, params: Any) -> ImageRequest:
        """Read from vLLM's sampling parameters.

        Raises:
            ValueError: they ask for no image, or for something that an image cannot have; the message names it.
        """
        given = {
            name.removeprefix(PREFIX): value
            for name, value in (getattr(params, "extra_args", None) or {}).items()
            if name.startswith(PREFIX)
        }
        if not given:
            raise ValueError(
                f"this engine draws images alone, and the request has no {PREFIX}… among its extra arguments: send "
                "text to another engine."
            )
        for name, neutral in NEUTRAL.items():
            if (value := getattr(params, name, None)) != neutral and (value or neutral):
                raise ValueError(f"{name}={value!r} in a request for an image: it must be {neutral!r}.")
        if params.max_tokens is None:
            raise ValueError("max_tokens is missing: it is the number of codes of the image.")
        own = {name: given.pop(name) for name in list(given) if name in cls.__dataclass_fields__}
        try:
            if "given" in own:
                own["given"] = tuple(int(code) for code in own["given"])
            return cls(codes=params.max_tokens, sampling=SamplingSettings(**given), **own)
        except TypeError as error:
            raise ValueError(f"arguments {PREFIX}… of the request: {error}.") from error
