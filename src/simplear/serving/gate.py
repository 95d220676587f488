"""Middleware before every request: host, key, security headers, counting."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simplear.serving.metrics import Metrics
from simplear.serving.schema import APIError

API = "/v1/"
METRICS = "/metrics"
CLIENT_GONE = "499"
RESPONSE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """Settings and metrics of one server."""

    metrics: Metrics = field(default_factory=Metrics)
    api_key: str | None = None
    """What ``Authorization: Bearer`` must hold; None asks for none."""
    timeout: float = 120.0
    """Seconds without progress after which a request fails."""
    allowed_hosts: Sequence[str] = ("*",)
    """Names and addresses that the Host header may hold, ``*`` for any part of one. They protect from pages that point
    their own name at this machine (DNS rebinding)."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may use the API from a browser; ``*`` for all."""


class Gate:
    """ASGI middleware.

    Args:
        app: the application behind it.
        service: keys, hosts and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        if scope["path"].startswith(API):
            scope["path"] = scope["path"].rstrip("/")
        status, answered = "", False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = str(message["status"])
                MutableHeaders(scope=message).update(RESPONSE_HEADERS)
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            if refusal := self._refusal(scope["path"], Headers(scope=scope)):
                await refusal.response(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
                status = status if answered else CLIENT_GONE
        except asyncio.CancelledError:  # the server stops and does not wait any longer
            if not status:
                await APIError.stopping().response(scope, receive, send_with_headers)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(path, status or "500").inc()
            self.service.metrics.latency.labels(path).observe(time.perf_counter() - began)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        if not any(fnmatchcase(host, allowed) for allowed in self.service.allowed_hosts):
            message = f"This server does not answer to the name {host[:100]!r}; its operator can allow it with "
            return APIError(403, f"{message}--allowed-hosts {host[:100]}.", code="host_not_allowed")
        if self.service.api_key is not None and (path.startswith(API) or path == METRICS):
            expected = f"Bearer {self.service.api_key}".encode()
            if not hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), expected):
                message = "This server asks for an API key: Authorization: Bearer KEY."
                return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None
