"""What stands before every request: the key, the end of service, time limits, security headers, counting."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass, field

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simplear.serving.metrics import Metrics
from simplear.serving.schema import APIError

log = logging.getLogger(__name__)

API = "/v1/"
PATHS = ("/v1/images/generations", "/v1/models", "/healthz", "/metrics", "/openapi.json", "/")
"""Those that are counted by name."""
TRANSFER_SECONDS = 30.0
"""For reading a request and writing its answer, beside the time for drawing."""
RETRY_ELSEWHERE = {"Retry-After": "5"}
CLIENT_GONE = "499"
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Service:
    """What the parts of one server share."""

    metrics: Metrics = field(default_factory=Metrics)
    api_key: str | None = None
    """What ``Authorization: Bearer`` must hold; None asks for none."""
    timeout: float = 120.0
    """Seconds that drawing may take, waiting included."""
    draining: bool = False
    """No new requests: the server is going down."""
    in_flight: int = 0
    """Requests of the API that are not answered yet."""


class Gate:
    """ASGI middleware.

    Args:
        app: what it stands before.
        service: whose key and limits hold.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, path, began = self.service, scope["path"], time.perf_counter()
        status: str | None = None
        whole = gone = answered = False

        async def receiving() -> Message:
            nonlocal whole, gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not answered)
            whole = whole or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if service.draining:
                    headers["Connection"] = "close"
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def refuse(error: APIError) -> None:
            answer = JSONResponse(error.body.model_dump(), error.status, error.headers)
            await answer(scope, receive, sending)

        counted = path.startswith(API)
        service.in_flight += counted
        limit = asyncio.timeout(service.timeout + TRANSFER_SECONDS)
        try:
            if counted and (refusal := self._refusal(Headers(scope=scope))):
                await refuse(refusal)
                return
            async with limit:
                await self.app(scope, receiving, sending)
        except Exception as error:
            if status is not None:  # too late for another answer: the connection ends in the middle
                raise
            if limit.expired():
                await refuse(
                    APIError(504, "The request took too long.") if whole else APIError(408, "No whole request came.")
                )
            elif not gone:
                log.error("%s %s failed", scope["method"], path, exc_info=error)
                await refuse(APIError(500, "The server failed; its log says more.", code="internal_error"))
        finally:
            service.in_flight -= counted
            name = path if path in PATHS else "other"
            service.metrics.requests.labels(name, CLIENT_GONE if gone or status is None else status).inc()
            service.metrics.latency.labels(name).observe(time.perf_counter() - began)

    def _refusal(self, headers: Headers) -> APIError | None:
        key = self.service.api_key
        if key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not same:
                return APIError(
                    401,
                    "This server asks for an API key: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.service.draining:
            return APIError(503, "The server is going down.", code="shutting_down", headers=RETRY_ELSEWHERE)
        return None
