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

from fastapi.responses import StreamingResponse
from PIL import ExifTags, Image
from starlette.types import Receive, Scope, Send

from simplear.generation.png import png_bytes
from simplear.serving.batcher import Drawing, Picture, QueueFullError, Shared, StoppedError
from simplear.serving.gate import going_down
from simplear.serving.schema import (
    APIError,
    GeneratedImage,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    OutputFormat,
    Usage,
)
from simplear.serving.served import ServedModel

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
"""Between comments on a stream that has nothing to show, so that no proxy takes it for dead."""
SEED_BITS = 31
EXIF_BYTES = 60_000
"""A JPEG file holds little more."""


class Pending:
    """The images of one request, on their way from the batcher's thread to the event loop.

    Args:
        served: who draws.
        asked: the request.
        shared: what decides about its batch.
        usage: tokens of all images.
        timeout: seconds without progress of the batcher until it is given up.
    """

    def __init__(self, served: ServedModel, asked: ImageRequest, shared: Shared, usage: Usage, timeout: float) -> None:
        self.served, self.asked, self.shared, self.usage, self.timeout = served, asked, shared, usage, timeout
        self.rows = shared.height // served.settings.downsample
        self.format: OutputFormat = asked.output_format or "png"
        self.quality = 100 if asked.output_compression is None else asked.output_compression
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Drawing, Picture | Exception]] = asyncio.Queue()
        seed = secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed
        parts = 1 + (asked.partial_images or 0) * bool(asked.stream)
        self.drawings: list[Drawing] = []
        for index in range(asked.n or 1):
            drawing = Drawing(asked.prompt, seed + index, shared, lambda event: None, request=self)
            drawing.rows = {part * self.rows // parts for part in range(1, parts)} - {0}
            drawing.notify = partial(self._notify, drawing)
            self.drawings.append(drawing)

    def submit(self) -> None:
        """Raises APIError where there is no room, or no service any more."""
        try:
            self.served.batcher.submit(self.drawings)
        except (QueueFullError, StoppedError) as error:
            raise _as_answer(error) from error

    def cancel(self) -> None:
        """Nobody waits for what is not drawn yet."""
        for drawing in self.drawings:
            drawing.cancelled = True

    def _notify(self, drawing: Drawing, event: Picture | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, (drawing, event))

    async def pictures(self) -> AsyncIterator[tuple[int, Picture] | None]:
        """Pictures as they come, by number of the image, until all are whole; None after a while without.

        Raises APIError when one cannot be drawn, or when the batcher makes no progress.
        """
        left = len(self.drawings)
        while left:
            patience = self.timeout - self.served.batcher.idle_seconds(self.drawings[0])
            try:
                async with asyncio.timeout(min(patience, HEARTBEAT_SECONDS)):
                    drawing, event = await self._events.get()
            except TimeoutError:
                if self.served.batcher.idle_seconds(self.drawings[0]) >= self.timeout:
                    raise APIError(504, "Drawing has come to a standstill.", code="timeout") from None
                yield None
                continue
            if isinstance(event, Exception):
                raise _as_answer(event)
            left -= event.rows == self.rows
            yield self.drawings.index(drawing), event

    async def encoded(self, index: int, picture: Picture) -> dict[str, Any]:
        """The file of an image, or of its upper rows, and how it was drawn."""
        seed, shared = self.drawings[index].seed, self.shared
        made = {
            "prompt": self.asked.prompt,
            "seed": seed,
            **dataclasses.asdict(shared.sampling),
            "prompt_prefix": self.served.settings.generation.prompt_prefix,
            "negative_prompt": shared.negative_prompt,
            "checkpoint": self.served.name,
            "dtype": self.served.dtype,
            "batch_size": picture.batch_size,
        }
        # Compressing takes long for large pictures, and the thread that draws has better things to do.
        file = await asyncio.to_thread(encode, picture.image, shared.height, made, self.format, self.quality)
        return {"b64_json": file, "seed": seed, "batch_size": picture.batch_size}

    @property
    def size(self) -> str:
        return f"{self.shared.width}x{self.shared.height}"

    async def answer(self) -> ImagesResponse:
        """All images at once."""
        made: dict[int, GeneratedImage] = {}
        async for event in self.pictures():
            if event is not None:
                made[event[0]] = GeneratedImage(**await self.encoded(*event))
        return ImagesResponse(
            created=int(time.time()),
            model=self.served.name,
            data=[made[index] for index in sorted(made)],
            size=self.size,
            output_format=self.format,
            usage=self.usage,
        )

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events."""
        shown = [0] * len(self.drawings)
        images = len(self.drawings)
        try:
            async for event in self.pictures():
                if event is None:
                    yield ": still drawing\n\n"
                    continue
                index, picture = event
                whole = picture.rows == self.rows
                yield ImageEvent(
                    **await self.encoded(index, picture),
                    type="image_generation.completed" if whole else "image_generation.partial_image",
                    created_at=int(time.time()),
                    model=self.served.name,
                    index=index,
                    size=self.size,
                    output_format=self.format,
                    rows=picture.rows,
                    partial_image_index=None if whole else shown[index],
                    usage=Usage.of(self.usage.input_tokens // images, self.usage.output_tokens // images)
                    if whole
                    else None,
                ).text()
                shown[index] += 1
        except Exception as error:
            if not isinstance(error, APIError):
                log.exception("%s: a stream failed", self.served.name)
                error = _as_answer(error)
            yield f"event: error\ndata: {error.body.model_dump_json()}\n\n"


class EventStream(StreamingResponse):
    """Events of a request, which is cancelled when they are not read to their end."""

    media_type = "text/event-stream"

    def __init__(self, pending: Pending) -> None:
        super().__init__(pending.events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.cancel()


def encode(image: Image.Image, height: int, made: dict[str, Any], format: OutputFormat, quality: int) -> str:
    """Base64 of a file that says how it was made.

    Args:
        image: rows up to the height are added where some are missing: transparent, or white in a JPEG.
        height: pixels.
        made: for the metadata: of PNG in a text chunk, else in EXIF's ImageDescription as JSON, which a JPEG has no
            room for where it is longer than 60,000 bytes.
        format: of the file.
        quality: of JPEG and WebP, from 0 to 100.
    """
    if image.height < height:
        size = (image.width, height)
        whole = Image.new("RGB", size, "white") if format == "jpeg" else Image.new("RGBA", size)
        whole.paste(image)
        image = whole
    if format == "png":
        content = png_bytes(image, made)
    else:
        file, exif, description = io.BytesIO(), Image.Exif(), json.dumps(made)
        if format == "webp" or len(description) < EXIF_BYTES:
            exif[ExifTags.Base.ImageDescription] = description
        image.save(file, format, quality=quality, exif=exif)
        content = file.getvalue()
    return base64.b64encode(content).decode()


def _as_answer(error: Exception) -> APIError:
    """What a client is told of a failure: nothing that it should not know."""
    match error:
        case QueueFullError():
            message = f"Too many images are waiting; try again in {error.retry_after} s."
            return APIError(429, message, code="queue_full", headers={"Retry-After": str(error.retry_after)})
        case StoppedError():
            return going_down()
        case MemoryError():
            return APIError(503, "There is not enough memory for a picture of this size.", "size", "out_of_memory")
        case _:
            return APIError(500, "Drawing failed; the server's log says more.", code="internal_error")
