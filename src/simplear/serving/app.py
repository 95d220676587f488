"""The server as an ASGI application: OpenAI's image generation over batchers, health, metrics, the page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import simplear
from simplear.serving.gate import Gate, Service
from simplear.serving.pending import EventStream, Pending
from simplear.serving.schema import REASONS, APIError, ErrorBody, ImageRequest, ImagesResponse, Model, ModelList
from simplear.serving.served import ServedModel

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be fulfilled"},
    "5XX": {"model": ErrorBody, "description": "The server cannot fulfil the request now"},
}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json", "description": "An image, or an error."},
    },
}
"""Of a stream, as OpenAPI 3.2 has it."""
ROUTES = "POST /v1/images/generations, GET /v1/models and GET /v1/models/MODEL"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


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

    def named(name: str) -> ServedModel:
        if name not in by_name:
            raise APIError(404, f"No such model; there are: {', '.join(by_name)}.", "model", "model_not_found")
        return by_name[name]

    app = FastAPI(
        title="SimpleAR",
        version=simplear.__version__,
        description="Images from text, as OpenAI's clients ask for them.",
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Gate, service=service)
    if service.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # names those that a page asks for, Authorization among them
            allow_private_network=True,
            expose_headers=("Retry-After",),
        )
    secured = [Depends(HTTPBearer(auto_error=False))] if service.api_key else []  # for /openapi.json; Gate looks

    @app.post(
        "/v1/images/generations",
        responses={**ERRORS, 200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}},
        dependencies=secured,
    )
    async def create_image(request: Request, asked: ImageRequest) -> ImagesResponse:
        """Draw images of a prompt, all at once or, with ``stream``, row by row as server-sent events."""
        if asked.partial_images and not asked.stream:
            raise APIError(400, "Images are shown while they are drawn only with stream=true.", "partial_images")
        if asked.output_format in (None, "png") and asked.output_compression not in (None, 100):
            message = "PNG files are compressed without loss: below 100, output_format must be jpeg or webp."
            raise APIError(400, message, "output_compression", "invalid_png_output_compression")
        served = named(asked.model) if asked.model is not None else models[0]
        pending = Pending(served, asked, *await served.checked(asked), service.timeout)
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

    @app.get("/v1/models/{model}", responses=ERRORS, dependencies=secured)
    async def retrieve_model(model: str) -> Model:
        """One of them."""
        return named(model).description

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


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = _refused(error)
    elif isinstance(error, HTTPException) and not isinstance(error, APIError):
        route = f"{request.method} {request.scope['path'][:80]}"
        message = {
            404: f"There is no {route} here. There are {ROUTES}.",
            405: f"There is no {route} here, only {(error.headers or {}).get('Allow')}.",
        }.get(error.status_code, f"{error.detail}.")
        error = APIError(error.status_code, message, headers=error.headers)
    assert isinstance(error, APIError)
    return error.response


def _refused(error: RequestValidationError) -> APIError:
    """The first thing that is wrong with a request, named."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])[:80].encode(errors="replace").decode()
    if first["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.", code="invalid_json")
    if not name:
        return APIError(400, "The body must be a JSON object, with Content-Type: application/json.")
    if first["type"] == "extra_forbidden":
        nearest = ImageRequest.nearest(name)
        hint = f"; did you mean {nearest}?" if nearest else "."
        return APIError(400, f"There is no parameter {name} here{hint}", name, "unknown_parameter")
    reason = f" {REASONS[name]}." if name in REASONS else ""
    return APIError(400, f"{name}: {first['msg']}.{reason}", name, "invalid_value")
