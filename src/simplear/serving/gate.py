"""What stands before every request: host, key, the end of service, limits, security headers, counting."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simplear.serving.metrics import Metrics
from simplear.serving.schema import MAX_BODY, APIError

log = logging.getLogger(__name__)

API = "/v1/"
METRICS = "/metrics"
PATHS = ("/v1/images/generations", "/v1/models", "/healthz", METRICS, "/openapi.json", "/")
"""Those that are counted by name."""
TRANSFER_SECONDS = 30.0
"""For the body of a request, and for each piece of an answer."""
PIECE = 256 * 1024
"""Bytes of an answer that must be taken in that time."""
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
    """Seconds without progress after which a request is given up."""
    allowed_hosts: Sequence[str] = ("*",)
    """Names and addresses that the Host header may hold, ``*`` for any part of one. A page whose own name was made to
    point here (DNS rebinding) is refused by it."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may use the API from a browser; ``*`` for all."""
    draining: bool = False
    """No new requests: the server is going down."""
    in_flight: int = 0
    """Requests of the API that are not answered yet."""


def going_down() -> APIError:
    """The answer to what comes too late."""
    return APIError(503, "The server is going down.", code="shutting_down", headers=RETRY_ELSEWHERE)


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
        service, began = self.service, time.perf_counter()
        read_by = asyncio.get_running_loop().time() + TRANSFER_SECONDS
        path = scope["path"]
        if path.startswith(API):
            path = path.rstrip("/")
            scope = {**scope, "path": path}
        status: str | None = None
        whole = gone = answered = stalled = False
        size = 0

        async def receiving() -> Message:
            nonlocal whole, gone, size
            try:
                async with asyncio.timeout_at(None if whole else read_by):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, "No whole request came in time.", headers={"Connection": "close"}) from None
            gone = gone or (message["type"] == "http.disconnect" and not answered)
            whole = whole or not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise APIError(413, f"The body is too large: at most {MAX_BODY} bytes are read.")
            return message

        async def sending(message: Message) -> None:
            nonlocal status, answered, stalled
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if service.draining:
                    headers["Connection"] = "close"
            body, more = message.get("body", b""), message.get("more_body", False)
            answered = message["type"] == "http.response.body" and not more
            starts = range(PIECE, len(body), PIECE)
            pieces = [{**message, "body": body[start - PIECE : start], "more_body": True} for start in starts]
            try:
                for piece in (*pieces, {**message, "body": body[len(starts) * PIECE :]} if pieces else message):
                    async with asyncio.timeout(TRANSFER_SECONDS):
                        await send(piece)
            except TimeoutError:
                stalled = True
                raise

        counted = path.startswith(API)
        service.in_flight += counted
        try:
            if refusal := self._refusal(path, Headers(scope=scope)):
                await refusal.response(scope, receive, sending)
            else:
                await self.app(scope, receiving, sending)
        except asyncio.CancelledError:
            if not service.draining or status is not None:
                raise
            await going_down().response(scope, receive, sending)
        except Exception as error:
            if stalled:
                log.warning("%s %.80r: the client does not read its answer", scope["method"], path)
            elif status is not None:  # too late for another answer: the connection ends in the middle
                raise
            elif not gone:
                log.error("%s %.80r failed", scope["method"], path, exc_info=error)
                failure = APIError(500, "The server failed; its log says more.", code="internal_error")
                await failure.response(scope, receive, sending)
        finally:
            service.in_flight -= counted
            name = path if path in PATHS else "other"
            service.metrics.requests.labels(name, CLIENT_GONE if gone or status is None else status).inc()
            service.metrics.latency.labels(name).observe(time.perf_counter() - began)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        service = self.service
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        if not any(fnmatchcase(host, allowed) for allowed in service.allowed_hosts):
            return APIError(
                403,
                f"This server does not answer to the name {host[:100]!r}; its operator can allow it with "
                f"--allowed-hosts {host[:100]}.",
                code="host_not_allowed",
            )
        if service.api_key is not None and (path.startswith(API) or path == METRICS):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), service.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                return APIError(
                    401,
                    "This server asks for an API key: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if service.draining and path.startswith(API):
            return going_down()
        return None
