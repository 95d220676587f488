"""The server as an ASGI application: OpenAI's image generation over batchers, health, metrics, the page."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import simplear
from simplear.serving.batcher import QueueFullError, StoppedError
from simplear.serving.gate import METRICS, Gate, Service
from simplear.serving.job import ImageJob, as_api_error
from simplear.serving.schema import MAX_BODY, APIError, ImageRequest
from simplear.serving.served import ServedModel

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be fulfilled"},
    "5XX": {"description": "The server cannot fulfil the request now"},
}
ROUTES = "POST /v1/images/generations, GET /v1/models and GET /v1/models/MODEL"
PAGE = Path(__file__).parent / "page"


def create_app(models: Sequence[ServedModel], service: Service) -> FastAPI:
    """The application.

    Args:
        models: started; the first is the default. They are closed with the application.
        service: key, limits, metrics.
    """
    by_name = {served.name: served for served in models}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(served.batcher.close) for served in models))

    def find_model(name: str) -> ServedModel:
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
    secured = [Depends(HTTPBearer(auto_error=False))] if service.api_key else []  # for /openapi.json; Gate checks

    async def start_job(request: ImageRequest) -> AsyncIterator[ImageJob]:
        if request.partial_images and not request.stream:
            raise APIError(400, "Unfinished images are shown only with stream=true.", "partial_images")
        if request.output_format in (None, "png") and request.output_compression not in (None, 100):
            message = "PNG files are compressed without loss: below 100, output_format must be jpeg or webp."
            raise APIError(400, message, "output_compression", "invalid_png_output_compression")
        served = find_model(request.model) if request.model is not None else models[0]
        # Tokenizing the longest prompts takes tenths of a second, too long for the event loop.
        job = ImageJob(served, request, *await asyncio.to_thread(served.check, request), service.timeout)
        served.batcher.submit(job.drawings)
        try:
            yield job
        finally:  # the answer was sent, or the client has disconnected
            job.cancel()

    @app.post(
        "/v1/images/generations",
        responses={**ERRORS, 200: {"content": {"text/event-stream": {}}}},
        dependencies=secured,
        max_body_size=MAX_BODY,
    )
    async def create_image(connection: Request, job: ImageJob = Depends(start_job)) -> Response:
        """Draw images of a prompt, all at once or, with ``stream``, row by row as server-sent events."""
        if job.request.stream:
            headers = {"X-Accel-Buffering": "no"}
            return StreamingResponse(job.events(), media_type="text/event-stream", headers=headers)
        answer = await _unless_disconnected(connection, job.answer())
        return Response(status_code=499) if answer is None else JSONResponse(answer)

    @app.get("/v1/models", responses=ERRORS, dependencies=secured)
    async def list_models() -> dict[str, Any]:
        """The served checkpoints; the first is the default."""
        return {"object": "list", "data": [served.description for served in models]}

    @app.get("/v1/models/{model}", responses=ERRORS, dependencies=secured)
    async def retrieve_model(model: str) -> dict[str, Any]:
        """One of them."""
        return find_model(model).description

    @app.get("/healthz", responses={503: {"description": "A model cannot draw"}})
    async def health(response: Response) -> dict[str, str]:
        """Whether requests should be sent here."""
        broken = [served.name for served in models if not served.batcher.healthy]
        response.status_code = 503 if broken else 200
        return {"status": "broken: " + ", ".join(broken) if broken else "ok"}

    @app.get(METRICS, include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    app.frontend("/", directory=PAGE, fallback=None)
    for kind in (HTTPException, RequestValidationError, QueueFullError, StoppedError, MemoryError, Exception):
        app.add_exception_handler(kind, _answer)
    return app


async def _unless_disconnected(connection: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The result of the work; None, and the work is cancelled, if the client disconnects before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(connection.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's format."""
    if isinstance(error, RequestValidationError):
        error = _refused(error)
    elif isinstance(error, HTTPException) and not isinstance(error, APIError):
        message = f"{error.detail}."
        if error.status_code in (404, 405):
            message = f"There is no {request.method} {request.scope['path'][:80]} here. There are {ROUTES}."
        error = APIError(error.status_code, message, headers=error.headers)
    return as_api_error(error).response


def _refused(error: RequestValidationError) -> APIError:
    """The first mistake in a request, by the parameter's name."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])[:80].encode(errors="replace").decode()
    if first["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.", code="invalid_json")
    if not name:
        return APIError(400, "The body must be a JSON object, with Content-Type: application/json.")
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, ImageRequest.model_fields, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        return APIError(400, f"There is no parameter {name} here{hint}", name, "unknown_parameter")
    field = ImageRequest.model_fields.get(name)
    return APIError(
        400, f"{name}: {first['msg']}. {(field and field.description) or ''}".rstrip(), name, "invalid_value"
    )
