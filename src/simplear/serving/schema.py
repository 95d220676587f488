"""Requests and errors of the API: OpenAI's image generation and what this server adds.

OpenAI's parameters that have no effect here are accepted in all their values. Values that need something this server
does not have are refused. Unknown parameters are refused too, since a misspelled ``guidance_scale`` would otherwise go
unnoticed. null means the default for any parameter.
"""

from __future__ import annotations

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
LARGEST_SEED = 2**53 - 1 - MAX_IMAGES
"""JavaScript's numbers hold no larger integers."""
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_ELSEWHERE = {"Retry-After": "5"}

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Integer = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
"""Clients whose numbers are all floating-point write 1.0."""
Finite = Annotated[float, Field(allow_inf_nan=False, le=100)]


class ImageRequest(BaseModel):
    """A request for images. What is left out is the checkpoint's default."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    prompt: Prompt = Field(description="What to draw; empty draws anything.")
    model: str | None = Field(None, max_length=200, description="One of /v1/models; the first if not given.")
    n: Integer | None = Field(None, ge=1, le=MAX_IMAGES, description="Image k has seed + k.")
    size: str | None = Field(
        None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto."
    )
    response_format: Literal["b64_json"] | None = Field(None, description="Images are not stored and have no URL.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Integer | None = Field(
        None, ge=0, le=3, description="With stream: how often an unfinished image is shown, unless others wait."
    )
    seed: Integer | None = Field(None, ge=0, le=LARGEST_SEED, description="Random if not given.")
    negative_prompt: Prompt | None = Field(None, description="What guidance leads away from.")
    guidance_scale: Finite | None = Field(None, ge=0, description="1: no guidance.")
    temperature: Finite | None = Field(None, gt=0)
    top_k: Integer | None = Field(None, ge=1, le=2**31)
    top_p: Finite | None = Field(None, gt=0, le=1)
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Integer | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP; 100, the best, if not given. PNG has only 100."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are without transparent areas.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class APIError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the reader, without paths and traces.
        param: the parameter at fault.
        code: for programs.
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
        kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def stopping(cls) -> APIError:
        """The answer to a request that comes too late."""
        return cls(503, "The server is stopping.", code="shutting_down", headers=RETRY_ELSEWHERE)

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status_code, self.headers)
