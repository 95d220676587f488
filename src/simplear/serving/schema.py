"""What goes over the wire: OpenAI's image generation, its errors, and what this server adds.

Parameters of OpenAI's that mean nothing here are either harmless, and taken in the values that change nothing, or
refused by name; unknown ones are refused too, since a typing error in ``guidance_scale`` would else go unnoticed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES = 10
MAX_PROMPT = 4000
"""Characters; how many tokens fit is the checkpoint's affair."""
MAX_BODY = 128 * 1024
"""Bytes: two prompts of that length, each character written as two escapes."""
MAX_PARTIAL_IMAGES = 64
LARGEST_SEED = 2**53 - 1 - MAX_IMAGES
"""JavaScript's numbers hold no larger integers."""

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]


class ImageRequest(BaseModel):
    """A request for images. What is not said is the checkpoint's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Prompt = Field(description="What to draw; empty draws anything.")
    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first if not given.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images; image k has seed + k.")
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto."
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json; url is refused.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="With stream: how often an image is shown while it is drawn."
    )
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="A random one if not given; the answer says which."
    )
    negative_prompt: Prompt | None = Field(None, description="What guidance leads away from.")
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="1 is no guidance.")
    temperature: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1, le=2**31)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = Field(None, description="There is one quality.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is moderated.")
    user: str | None = Field(None, max_length=1000, description="Not used.")


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

    b64_json: str = Field(description="A PNG file, which says in its metadata how it was made.")
    seed: int = Field(description="Draws it again.")
    batch_size: int = Field(description="Shape of the batch it was drawn in, at which it is bit for bit the same.")


class ImagesResponse(BaseModel):
    """Images, in the order of their seeds."""

    created: int
    model: str
    data: list[GeneratedImage]
    size: str
    output_format: Literal["png"] = "png"
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
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    rows: int
    """Rows of codes that are drawn; what is below them is transparent."""
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


class APIError(Exception):
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
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> ErrorBody:
        """In OpenAI's format."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return ErrorBody(error=ErrorBody.Error(message=self.message, type=kind, param=self.param, code=self.code))
