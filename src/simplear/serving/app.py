"""The server as an ASGI application: OpenAI's image generation over batchers, health, metrics, the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import simplear
from simplear.generation import OutOfMemoryError, SamplingSettings, SimpleARPipeline
from simplear.generation.command import METADATA_KEY
from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher, Drawing, Picture, QueueFullError, Shared, StoppedError
from simplear.serving.gate import RETRY_ELSEWHERE, Gate, Service
from simplear.serving.schema import (
    MAX_BODY,
    APIError,
    ErrorBody,
    GeneratedImage,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    Model,
    ModelList,
    Usage,
)

HEARTBEAT_SECONDS = 15.0
"""Between comments on a stream that has nothing to show, so that no proxy takes it for dead."""
SEED_BITS = 31
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be fulfilled"},
    "5XX": {"model": ErrorBody, "description": "The server cannot fulfil the request now"},
}
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
ASIDE = "event: error\ndata: "


class ServedModel:
    """A checkpoint that is served, and what may be asked of it.

    Args:
        name: how requests call it.
        batcher: draws; its pipeline is left alone from here on.
        max_codes: of one image; None takes the number that the checkpoint was trained on.
    """

    def __init__(self, name: str, batcher: Batcher, max_codes: int | None = None) -> None:
        pipeline = batcher.pipeline
        self.name, self.batcher, self.settings = name, batcher, pipeline.settings
        rows, columns = self.settings.grid
        self.max_codes = rows * columns if max_codes is None else max_codes
        self.created = int(time.time())
        # A text tokenizer of its own: the batcher's thread uses the other at the same time.
        self._checker: SimpleARPipeline = copy.copy(pipeline)
        self._checker.tokenizer = copy.deepcopy(pipeline.tokenizer)

    @property
    def description(self) -> Model:
        """For `/v1/models`."""
        rows, columns = (side * self.settings.downsample for side in self.settings.grid)
        return Model(
            id=self.name,
            created=self.created,
            size=f"{columns}x{rows}",
            downsample=self.settings.downsample,
            max_codes=self.max_codes,
            defaults=dataclasses.asdict(self.settings.generation),
        )

    def shared(self, asked: ImageRequest) -> tuple[Shared, Usage]:
        """What decides about the batch, and the tokens of all images. Raises APIError for what cannot be drawn."""
        defaults, downsample = self.settings.generation, self.settings.downsample
        if asked.size in (None, "auto"):
            height, width = (side * downsample for side in self.settings.grid)
        else:
            width, height = map(int, str(asked.size).split("x"))
        codes = (height // downsample) * (width // downsample)
        if codes > self.max_codes:
            raise APIError(400, f"size {asked.size} takes {codes} codes; at most {self.max_codes} are drawn.", "size")
        check = self._checker.check_prompts
        with _naming("size"):
            check([], None, height, width)
        with _naming("prompt"):
            prompt = check([asked.prompt], None, height, width)[0]
        negative_prompt = defaults.negative_prompt if asked.negative_prompt is None else asked.negative_prompt
        with _naming("negative_prompt"):
            negative = check([negative_prompt], "", height, width)[0]
        sampling = SamplingSettings(
            **{
                name: getattr(defaults, name) if getattr(asked, name) is None else getattr(asked, name)
                for name in ("guidance_scale", "temperature", "top_k", "top_p")
            }
        )
        if sampling.guidance_scale == 1:  # then nothing reads it
            negative_prompt, negative = "", 0
        tokens = -(-max(prompt, negative) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        images = asked.n or 1
        return Shared(height, width, sampling, negative_prompt, tokens), Usage.of(images * prompt, images * codes)


@contextlib.contextmanager
def _naming(parameter: str) -> Any:
    """The pipeline's own refusals become answers that name the parameter."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), parameter) from error


class Pending:
    """The images of one request, on their way from the batcher's thread to the event loop.

    Args:
        served: who draws.
        asked: the request.
        timeout: seconds until it is given up.
    """

    def __init__(self, served: ServedModel, asked: ImageRequest, timeout: float) -> None:
        self.served, self.asked = served, asked
        self.shared, self.usage = served.shared(asked)
        self.rows = self.shared.height // served.settings.downsample
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._events: asyncio.Queue[tuple[Drawing, Picture | Exception]] = asyncio.Queue()
        seed = secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed
        parts = 1 + (asked.partial_images or 0) * bool(asked.stream)
        self.drawings: list[Drawing] = []
        for index in range(asked.n or 1):
            drawing = Drawing(asked.prompt, seed + index, self.shared, lambda event: None)
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

        Raises APIError when one cannot be drawn, or not in time.
        """
        left = len(self.drawings)
        while left:
            try:
                async with asyncio.timeout_at(min(self._deadline, self._loop.time() + HEARTBEAT_SECONDS)):
                    drawing, event = await self._events.get()
            except TimeoutError:
                if self._loop.time() >= self._deadline:
                    raise APIError(504, "The images were not drawn in time.", code="timeout") from None
                yield None
                continue
            if isinstance(event, Exception):
                raise _as_answer(event)
            left -= event.rows == self.rows
            yield self.drawings.index(drawing), event

    async def encoded(self, index: int, picture: Picture) -> dict[str, Any]:
        """The fields of a `GeneratedImage`."""
        shared, seed = self.shared, self.drawings[index].seed
        made = {
            "prompt": self.asked.prompt,
            "seed": seed,
            **dataclasses.asdict(shared.sampling),
            "prompt_prefix": self.served.settings.generation.prompt_prefix,
            "negative_prompt": shared.negative_prompt,
            "checkpoint": self.served.name,
            "batch_size": picture.batch_size,
        }
        # Compressing takes long for large pictures, and the thread that draws has better things to do.
        file = await asyncio.to_thread(png, picture.image, shared.height, made)
        return {"b64_json": base64.b64encode(file).decode(), "seed": seed, "batch_size": picture.batch_size}

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
                    rows=picture.rows,
                    partial_image_index=None if whole else shown[index],
                    usage=Usage.of(self.usage.input_tokens // images, self.usage.output_tokens // images)
                    if whole
                    else None,
                ).text()
                shown[index] += 1
        except APIError as error:
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


def png(image: Image.Image, height: int, made: dict[str, Any]) -> bytes:
    """A file that says how it was made; rows up to the height are added, transparent, where some are missing."""
    if image.height < height:
        whole = Image.new("RGBA", (image.width, height))
        whole.paste(image)
        image = whole
    information, file = PngInfo(), io.BytesIO()
    information.add_itxt(METADATA_KEY, json.dumps(made, ensure_ascii=False))
    image.save(file, "PNG", pnginfo=information)
    return file.getvalue()


def create_app(models: Sequence[ServedModel], service: Service) -> FastAPI:
    """The application.

    Args:
        models: by their names, started; the first is the default. They are closed with the application.
        service: key, limits, metrics.
    """
    by_name = {served.name: served for served in models}
    page = resources.files(simplear) / "serving" / "page"

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(served.batcher.close) for served in models))

    app = FastAPI(
        title="SimpleAR",
        version=simplear.__version__,
        description="Images from text, as OpenAI's clients ask for them.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        max_body_size=MAX_BODY,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Gate, service=service)
    key = Depends(HTTPBearer(auto_error=False, description="Where the server has a key.")) if service.api_key else None
    secured: list[Any] = [] if key is None else [key]

    @app.post(
        "/v1/images/generations",
        responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        dependencies=secured,
    )
    async def create_image(request: Request, asked: ImageRequest) -> ImagesResponse:
        """Draw images of a prompt, all at once or, with ``stream``, row by row as server-sent events."""
        if asked.response_format == "url":
            raise APIError(400, 'Images are not kept here, so they have no URL: ask for "b64_json".', "response_format")
        if asked.partial_images and not asked.stream:
            raise APIError(400, "Images are shown while they are drawn with stream=true alone.", "partial_images")
        served = models[0] if asked.model is None else by_name.get(asked.model)
        if served is None:
            raise APIError(404, f"No such model; there are: {', '.join(by_name)}.", "model", "model_not_found")
        pending = Pending(served, asked, service.timeout)
        pending.submit()
        if asked.stream:
            return EventStream(pending)  # type: ignore[return-value]  # a response is sent as it is
        try:
            answer = await _unless_gone(request, pending.answer())
        finally:
            pending.cancel()
        return Response(status_code=499) if answer is None else answer  # type: ignore[return-value]

    @app.get("/v1/models", responses=ERRORS, dependencies=secured)
    async def list_models() -> ModelList:
        """The checkpoints there are."""
        return ModelList(data=[served.description for served in models])

    @app.get("/healthz", responses={503: {"description": "Going down, or a model does not draw"}})
    async def health(response: Response) -> dict[str, str]:
        """Whether requests should be sent here."""
        broken = [served.name for served in models if not served.batcher.healthy]
        status = "going down" if service.draining else "broken: " + ", ".join(broken) if broken else "ok"
        response.status_code = 200 if status == "ok" else 503
        return {"status": status}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (file, media_type) in PAGE.items():
        content = (page / file).read_bytes()
        app.add_api_route(path, _constant(content, media_type), include_in_schema=False)
    app.add_exception_handler(APIError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    return app


def _constant(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return answer


async def _unless_gone(request: Request, work: Coroutine[Any, Any, ImagesResponse]) -> ImagesResponse | None:
    """What the work gives; None, and the work stopped, once the client has hung up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


def _as_answer(error: Exception) -> APIError:
    """What a client is told of a failure: nothing that it should not know."""
    match error:
        case QueueFullError():
            message = f"Too many images are waiting; try again in {error.retry_after} s."
            return APIError(429, message, code="queue_full", headers={"Retry-After": str(error.retry_after)})
        case StoppedError():
            return APIError(503, "The server is going down.", code="shutting_down", headers=RETRY_ELSEWHERE)
        case OutOfMemoryError():
            return APIError(503, "There is not enough memory for a picture of this size.", "size", "out_of_memory")
        case _:
            return APIError(500, "Drawing failed; the server's log says more.", code="internal_error")


async def _answer(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = _refused(error)
    elif isinstance(error, HTTPException):
        error = APIError(error.status_code, str(error.detail) + ".", headers=dict(error.headers or {}))
    assert isinstance(error, APIError)
    return JSONResponse(error.body.model_dump(), error.status, error.headers)


def _refused(error: RequestValidationError) -> APIError:
    """The first thing that is wrong with a request, named."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])[:80].encode(errors="replace").decode()
    if first["type"] == "json_invalid":
        return APIError(400, "The body is no valid JSON.", code="invalid_json")
    if not name:
        return APIError(400, "The body must be a JSON object, with Content-Type: application/json.")
    if first["type"] == "extra_forbidden":
        return APIError(400, f"There is no parameter {name} here.", name, "unknown_parameter")
    return APIError(400, f"{name}: {first['msg']}.", name, "invalid_value")
