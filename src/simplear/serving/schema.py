"""What goes over the wire: OpenAI's image generation, its errors, and what this server adds.

Parameters of OpenAI's that cannot matter here are accepted in all their values and change nothing; values that would
need what this server does not have are refused with the reason. Unknown parameters are refused too, since a typing
error in ``guidance_scale`` would otherwise go unnoticed; null means the default for any parameter.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

MAX_IMAGES = 10
MAX_PROMPT = 32_000
"""Characters; how many tokens fit depends on the checkpoint."""
MAX_BODY = 1024 * 1024
"""Bytes: two prompts of that length, each character written as two escapes."""
MAX_PARTIAL_IMAGES = 3
LARGEST_SEED = 2**53 - 1 - MAX_IMAGES
"""JavaScript's numbers hold no larger integers."""

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
"""An integer; clients whose numbers are all floating-point write 1.0."""
OutputFormat = Literal["png", "jpeg", "webp"]
REASONS = {
    "background": "Pictures are drawn without transparent areas",
    "response_format": "Images are not kept here, so they have no URL",
}
"""Why other values of a parameter are refused."""


class ImageRequest(BaseModel):
    """A request for images. What is left out is the checkpoint's default."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    prompt: Prompt = Field(description="What to draw; empty draws anything.")
    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first if not given.")
    n: Whole | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images; image k has seed + k.")
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto."
    )
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Whole | None = Field(
        None,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="With stream: how often an image is shown while it is drawn, if nobody else waits.",
    )
    seed: Whole | None = Field(
        None, ge=0, le=LARGEST_SEED, description="A random one if not given; the answer says which."
    )
    negative_prompt: Prompt | None = Field(None, description="What guidance leads away from.")
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="1: no guidance.")
    temperature: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    top_k: Whole | None = Field(None, ge=1, le=2**31)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    output_format: OutputFormat | None = None
    output_compression: Whole | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP: 100, the default, is the best. PNG has only 100."
    )
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="There is one quality."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Not used.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Not used.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is moderated.")
    user: str | None = Field(None, max_length=1000, description="Not used.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Not used.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @classmethod
    def nearest(cls, name: str) -> str | None:
        """The parameter that is spelled most like this one."""
        return next(iter(difflib.get_close_matches(name, cls.model_fields, n=1)), None)


class Usage(BaseModel):
    """Tokens that a request took, prefix and control tokens included."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    """Codes."""
    total_tokens: int

    @classmethod
    def of(cls, text: int, codes: int) -> Usage:
        """Of so many tokens read and codes drawn."""
        details = {"text_tokens": text, "image_tokens": 0}
        return cls(input_tokens=text, input_tokens_details=details, output_tokens=codes, total_tokens=text + codes)


class GeneratedImage(BaseModel):
    """One image of an answer."""

    b64_json: str = Field(description="The file, which says in its metadata how it was made.")
    seed: int = Field(description="Draws it again.")
    batch_size: int = Field(description="Shape of the batch it was drawn in, at which it is bit for bit the same.")


class ImagesResponse(BaseModel):
    """Images, in the order of their seeds."""

    created: int
    model: str
    data: list[GeneratedImage]
    size: str
    output_format: OutputFormat = "png"
    background: Literal["opaque"] = "opaque"
    usage: Usage


class ImageEvent(GeneratedImage):
    """A server-sent event; the last of each image is ``image_generation.completed``."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    created_at: int
    model: str
    index: int
    """Of the image, from 0."""
    size: str
    output_format: OutputFormat = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    rows: int
    """Rows of codes that are drawn; what is below them is transparent, in JPEG white."""
    partial_image_index: int | None = None
    usage: Usage | None = None

    def text(self) -> str:
        """As it is sent."""
        return f"event: {self.type}\ndata: {self.model_dump_json(exclude_none=True)}\n\n"


class Model(BaseModel):
    """A checkpoint that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "simplear"
    size: str
    """What ``auto`` draws."""
    downsample: int
    """Pixels a code: width and height are multiples."""
    max_codes: int
    """Of an image."""
    engine: str
    """That draws its codes."""
    dtype: str
    """Of its weights."""
    defaults: dict[str, Any]
    """Of generation."""


class ModelList(BaseModel):
    """The checkpoints there are; the first is the default."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's words."""

    class Error(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Error


class APIError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the reader; no path and no trace.
        param: the parameter it is about.
        code: what a program looks at.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> ErrorBody:
        """In OpenAI's format."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return ErrorBody(error=ErrorBody.Error(message=self.detail, type=kind, param=self.param, code=self.code))

    @property
    def response(self) -> JSONResponse:
        """As it is sent."""
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)
