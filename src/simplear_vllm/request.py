"""What a vLLM request says of the image that it draws: the ``extra_args`` of its sampling parameters.

The names are flat and the values plain, so that they also pass through ``vllm_xargs`` of vLLM's HTTP server. The
scheduler and the worker read them from the request. Nothing here imports vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from simplear.generation.sampling import SamplingSettings

Role = Literal["conditional", "negative"]

PREFIX = "simplear_"
"""Begins every name of ours among a request's extra arguments."""
REQUIRED = {
    "n": 1,
    "temperature": 0.0,
    "ignore_eos": True,
    "stop": [],
    "stop_token_ids": [],
    "repetition_detection": None,
}
"""vLLM's own sampling parameters, so that only the number of codes ends an image, and vLLM takes the one id that the
logits processor leaves. Others, such as penalties, cannot change what is drawn."""


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
    """A name that only the two rows of a guided image share; None without guidance."""
    role: Role = "conditional"
    fixed_codes: tuple[int, ...] | None = None
    """Codes to keep in raster order, -1 where one is drawn."""

    def __post_init__(self) -> None:
        guided = self.sampling.guidance_scale != 1.0
        if (self.pair is not None) != guided or self.role not in get_args(Role)[: 2 if guided else 1]:
            raise ValueError(
                f"guidance_scale {self.sampling.guidance_scale} with pair {self.pair!r} and role {self.role!r}: an "
                "image with guidance is two requests that name one pair, one conditional and one negative; an image "
                "without (scale 1) is one conditional request that names none."
            )
        fixed = (-1,) * self.codes if self.fixed_codes is None else self.fixed_codes
        numbers_fit = self.codes >= 1 and self.image_token_offset >= 0 and 0 <= self.seed < 2**64
        if not numbers_fit or len(fixed) != self.codes or not -1 <= min(fixed) <= max(fixed) < self.codebook_size:
            raise ValueError(
                f"{self.codes} codes with seed {self.seed} from id {self.image_token_offset} on, {len(fixed)} of them "
                f"fixed_codes: there is at least one code, a seed lies in [0, 2**64), an id is not negative, and "
                f"fixed_codes are as many, in [0, {self.codebook_size}) or -1 where a code is drawn."
            )

    def matches(self, other: ImageRequest) -> bool:
        """Whether two requests are the two rows of one image."""
        return self.role != other.role and replace(self, role=other.role) == other

    def extra_args(self) -> dict[str, Any]:
        """As a request carries it; None is left out."""
        values = {**vars(self), **vars(self.sampling), "fixed_codes": self.fixed_codes and list(self.fixed_codes)}
        del values["sampling"], values["codes"]
        return {PREFIX + name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, params: Any) -> ImageRequest:
        """Read from vLLM's sampling parameters.

        Raises:
            ValueError: they do not ask for an image, or have values that an image cannot have; the message names it.
        """
        extra = getattr(params, "extra_args", None) or {}
        values = {name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)}
        if not values:
            raise ValueError(
                f"this engine only draws images, and the request has no {PREFIX}… among its extra arguments: send text "
                "to another engine."
            )
        for name, required in REQUIRED.items():
            if (value := getattr(params, name, None)) != required and (value or required):
                raise ValueError(f"{name}={value!r} in a request for an image: it must be {required!r}.")
        if params.max_tokens is None:
            raise ValueError("max_tokens is missing: it is the number of codes of the image.")
        own = {name: values.pop(name) for name in list(values) if name in cls.__dataclass_fields__}
        try:
            if "fixed_codes" in own:
                own["fixed_codes"] = tuple(int(code) for code in own["fixed_codes"])
            return cls(codes=params.max_tokens, sampling=SamplingSettings(**values), **own)
        except TypeError as error:
            raise ValueError(f"arguments {PREFIX}… of the request: {error}.") from error
