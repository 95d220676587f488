"""The images of one request, between the thread that draws them and the client that waits for them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from PIL import ExifTags, Image

from simplear.generation.png import png_bytes
from simplear.serving.batcher import BatchKey, Drawing, Picture, QueueFullError, StoppedError
from simplear.serving.schema import APIError, ImageRequest
from simplear.serving.served import ServedModel

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
"""Between comments on a stream that has nothing to show, so that proxies keep it open."""
SEED_BITS = 31
EXIF_BYTES = 60_000
"""A JPEG file holds little more."""


class ImageJob:
    """The images of one request.

    Args:
        served: the checkpoint.
        request: what was asked for.
        key: of the images' batch.
        prompt_tokens: of the prompt, prefix and control tokens included.
        timeout: seconds without progress of the batcher after which the request fails.
    """

    def __init__(
        self, served: ServedModel, request: ImageRequest, key: BatchKey, prompt_tokens: int, timeout: float
    ) -> None:
        self.served, self.request, self.key, self.prompt_tokens = served, request, key, prompt_tokens
        self.timeout, self.rows = timeout, key.height // served.settings.downsample
        self.described = {
            "model": served.name,
            "size": f"{key.width}x{key.height}",
            "output_format": request.output_format or "png",
            "background": "opaque",
        }
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Picture | Exception]] = asyncio.Queue()
        seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
        parts = 1 + (request.partial_images or 0) * bool(request.stream)
        partial_rows = {part * self.rows // parts for part in range(1, parts)} - {0}
        self.drawings = [
            Drawing(request.prompt, seed + index, key, partial(self._notify, index), set(partial_rows))
            for index in range(request.n or 1)
        ]

    def cancel(self) -> None:
        """Leave undrawn what nobody waits for any more."""
        for drawing in self.drawings:
            drawing.cancelled = True

    def _notify(self, index: int, event: Picture | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def _pictures(self) -> AsyncIterator[tuple[int, Picture] | None]:
        """Index and picture as they come, until all images are complete; None after a while without any.

        Raises APIError when an image cannot be drawn, or when the batcher makes no progress.
        """
        left, batcher = len(self.drawings), self.served.batcher
        while left:
            patience = self.timeout - batcher.idle_seconds(self.drawings[0])
            try:
                async with asyncio.timeout(min(patience, HEARTBEAT_SECONDS)):
                    index, event = await self._events.get()
            except TimeoutError:
                if batcher.idle_seconds(self.drawings[0]) >= self.timeout:
                    raise APIError(504, "Drawing has come to a standstill.", code="timeout") from None
                yield None
                continue
            if isinstance(event, Exception):
                raise as_api_error(event) from event
            left -= event.rows == self.rows
            yield index, event

    async def _encoded(self, index: int, picture: Picture) -> dict[str, Any]:
        """Fields of an image: its file, which says in its metadata how it was made, and its seed."""
        made = {
            "prompt": self.request.prompt,
            "seed": self.drawings[index].seed,
            **dataclasses.asdict(self.key.sampling),
            "prompt_prefix": self.served.settings.generation.prompt_prefix,
            "negative_prompt": self.key.negative_prompt,
            "checkpoint": self.served.name,
            "dtype": self.served.dtype,
            "batch_size": picture.batch_size,
        }
        compression, output_format = self.request.output_compression, self.described["output_format"]
        quality = 100 if compression is None else compression
        # Compressing a large picture takes long: in a thread of the loop, not in the one that draws.
        file = await asyncio.to_thread(encode, picture.image, self.key.height, made, output_format, quality)
        return {"b64_json": file, "seed": made["seed"], "batch_size": picture.batch_size}

    def _usage(self, images: int) -> dict[str, Any]:
        text = images * self.prompt_tokens
        codes = images * self.rows * (self.key.width // self.served.settings.downsample)
        return {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": codes,
            "total_tokens": text + codes,
        }

    async def answer(self) -> dict[str, Any]:
        """All images at once, in the order of their seeds."""
        images: dict[int, dict[str, Any]] = {}
        async for event in self._pictures():
            if event is not None:
                images[event[0]] = await self._encoded(*event)
        data = [images[index] for index in sorted(images)]
        return {"created": int(time.time()), "data": data, "usage": self._usage(len(data)), **self.described}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: of each image its finished rows, then ``image_generation.completed``."""
        shown = [0] * len(self.drawings)
        try:
            async for event in self._pictures():
                if event is None:
                    yield ": still drawing\n\n"
                    continue
                index, picture = event
                content = {
                    "type": "image_generation.completed",
                    "created_at": int(time.time()),
                    "index": index,
                    "rows": picture.rows,
                    "quality": "auto",
                    **self.described,
                    **await self._encoded(index, picture),
                }
                if picture.rows == self.rows:
                    content["usage"] = self._usage(1)
                else:
                    content |= {"type": "image_generation.partial_image", "partial_image_index": shown[index]}
                    shown[index] += 1
                yield f"event: {content['type']}\ndata: {json.dumps(content)}\n\n"
        except Exception as error:
            if not isinstance(error, APIError):
                log.exception("%s: a stream failed", self.served.name)
            yield f"event: error\ndata: {json.dumps(as_api_error(error).body)}\n\n"


def encode(image: Image.Image, height: int, made: dict[str, Any], format: str, quality: int) -> str:
    """Base64 of a file that says how it was made.

    Args:
        image: rows up to the height are added where some are missing: transparent, or white in a JPEG.
        height: pixels.
        made: for the metadata, in a text chunk of PNG and else as JSON in EXIF's ImageDescription. A JPEG does without
            if they are longer than 60,000 bytes.
        format: png, jpeg or webp.
        quality: of JPEG and WebP, from 0 to 100.
    """
    if image.height < height:
        size = (image.width, height)
        whole = Image.new("RGB", size, "white") if format == "jpeg" else Image.new("RGBA", size)
        whole.paste(image)
        image = whole
    if format == "png":
        return base64.b64encode(png_bytes(image, made)).decode()
    file, exif, description = io.BytesIO(), Image.Exif(), json.dumps(made)
    if format == "webp" or len(description) < EXIF_BYTES:
        exif[ExifTags.Base.ImageDescription] = description
    image.save(file, format, quality=quality, exif=exif)
    return base64.b64encode(file.getvalue()).decode()


def as_api_error(error: Exception) -> APIError:
    """What a client is told of a failure: nothing about the inside of the server, whose log has the rest."""
    match error:
        case APIError():
            return error
        case QueueFullError():
            message = f"Too many images are waiting; try again in {error.retry_after} s."
            return APIError(429, message, code="queue_full", headers={"Retry-After": str(error.retry_after)})
        case StoppedError():
            return APIError.stopping()
        case MemoryError():
            return APIError(503, "There is not enough memory for a picture of this size.", "size", "out_of_memory")
        case _:
            return APIError(500, "Drawing failed; the server's log says more.", code="internal_error")
