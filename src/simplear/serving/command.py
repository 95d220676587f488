"""`simplear serve`: checkpoints behind HTTP, until a signal says to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from simplear.command_line import STOPPED
from simplear.device import DType, default_dtype, resolve_device
from simplear.errors import SystemRefusedError, UserError
from simplear.generation import SimpleARPipeline
from simplear.serving.app import create_app
from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher
from simplear.serving.gate import Service
from simplear.serving.served import ServedModel
from simplear.text_files import FreeText

log = logging.getLogger(__name__)

API_KEY_VARIABLE = "SIMPLEAR_API_KEY"
ENGINES = {
    "fused": {"prompt_multiple": PROMPT_MULTIPLE},
    "compiled": {"prompt_multiple": PROMPT_MULTIPLE},
    "jacobi": {},
}
"""Those that can be served, and the options they are served with."""
CONNECTIONS = 500
"""At once; beyond, the server answers 503 before it reads anything."""
KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep idle connections, so that theirs are not closed under a request. A connection on which no
request begins for so long, or which does not take the end of its last answer, is dropped."""
LOCAL_NAMES = ("localhost", "*.localhost", "127.0.0.1", "::1")
HOST = re.compile(r"[\w*.-]+|\[?[\da-f]*:[\da-f]*:[\da-f:.]*\]?", re.IGNORECASE)
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", re.IGNORECASE)
LAST_ANSWERS_SECONDS = 2.0
POLL_SECONDS = 0.05


def serve(
    checkpoints: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: list[FreeText] = [],  # noqa: B006  # never changed
    cors_origins: list[FreeText] = [],  # noqa: B006
    engine: str = "fused",
    engine_options: dict[str, Any] | None = None,
    engines: dict[str, str] | None = None,
    visual_tokenizer: str | None = None,
    device: str | None = None,
    dtype: DType | None = None,
    batch_sizes: list[int] = [1, 2, 4, 8, 16],  # noqa: B006  # never changed
    batch_wait: float = 0.01,
    max_queue: int = 128,
    max_codes: int | None = None,
    timeout: float = 120.0,
    shutdown_timeout: float = 30.0,
) -> None:
    """Serve checkpoints as OpenAI's image API, with a page to draw on at /.

    Args:
        checkpoints: directories or hub ids, or NAME=DIRECTORY; requests name the last part of the path, the first is
            the default.
        host: address to listen on; 0.0.0.0 for all.
        port: 0 takes a free one.
        api_key: what clients must send. The environment variable SIMPLEAR_API_KEY does not show in lists of processes.
        allowed_hosts: another name by which clients reach this server, say through a proxy, or '*.example.com', or
            '*' for any; may be repeated. On a loopback address only localhost and that address are answered unless
            this is given, on other addresses all names.
        cors_origins: an origin whose web pages may use the API, as https://app.example.com, or '*' for all; may be
            repeated. None if not given.
        engine: fused, compiled (compiles each batch size at start) or jacobi (fastest for one user).
        engine_options: of the engine, as '{window: 7}' for jacobi.
        engines: other engines for some of the checkpoints by name: with sft=DIR quick=DIR '{quick: jacobi}' serves one
            checkpoint on two, for requests and the page to choose from.
        visual_tokenizer: directory to use in place of the checkpoints' own.
        device: where to draw; a GPU where there is one if not given.
        dtype: of the language models; bfloat16 on a GPU and float32 elsewhere if not given.
        batch_sizes: numbers of images that batches are filled up to.
        batch_wait: seconds to wait for companions before drawing a batch that is not full.
        max_queue: images that may wait for each checkpoint; beyond, clients are asked to come back later.
        max_codes: codes of the largest picture; as many as a checkpoint was trained on if not given.
        timeout: seconds without progress, a row of codes of any picture, after which a request is given up.
        shutdown_timeout: seconds to finish what runs after SIGTERM or Ctrl-C; a second signal ends at once.

    Raises:
        UserError: an engine that cannot be served or is given to no checkpoint, batch sizes or limits out of range, two
            checkpoints of one name, a device that is missing, or an address or port that cannot be listened on.
    """
    named = _named(checkpoints)
    where = resolve_device(device)
    drawing = {**dict.fromkeys(named, engine), **(engines or {})}
    for name, each in drawing.items():
        if each not in ENGINES:
            raise UserError(f"engine {each!r} cannot be served; one of {', '.join(ENGINES)} can.")
        if name not in named:
            raise UserError(f"engines: no checkpoint is called {name!r}; there are: {', '.join(named)}.")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch_sizes {batch_sizes}: give numbers of 1 or more.")
    if max_queue < 1 or batch_wait < 0 or timeout <= 0 or shutdown_timeout < 0:
        raise UserError("max_queue and timeout must be above 0, batch_wait and shutdown_timeout not below.")
    for name in allowed_hosts:
        if not HOST.fullmatch(name):
            raise UserError(f"allowed_hosts: {name!r} is not a name or address: give one, without scheme and port.")
    for origin in cors_origins:
        if not ORIGIN.fullmatch(origin):
            raise UserError(f"cors_origins: {origin!r} is not an origin: give SCHEME://HOST[:PORT] alone, or *.")
    bound = _bound(host, port)
    service = Service(
        api_key=api_key or os.environ.get(API_KEY_VARIABLE) or None,
        timeout=timeout,
        allowed_hosts=_allowed_hosts(allowed_hosts, host, bound),
        cors_origins=cors_origins,
    )
    models: list[ServedModel] = []
    for name, checkpoint in named.items():
        chosen = drawing[name]
        pipeline = SimpleARPipeline.from_pretrained(
            checkpoint,
            engine=chosen,
            engine_options={**ENGINES[chosen], **((engine_options or {}) if chosen == engine else {})},
            device=where,
            dtype=getattr(torch, dtype or default_dtype(where)),
            visual_tokenizer=visual_tokenizer,
        )
        batcher = Batcher(name, pipeline, batch_sizes, max_queue, batch_wait, service.metrics)
        batcher.start(warm_up=batcher.shapes if chosen == "compiled" else batcher.shapes[:1])
        models.append(ServedModel(name, batcher, max_codes, chosen))
    config = uvicorn.Config(
        create_app(models, service),
        host,
        port,
        http="h11",  # of the choices the one that limits the size of headers
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    _Server(config, models, service, shutdown_timeout).run([bound])


def _named(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by the names that requests use."""
    named: dict[str, str] = {}
    for given in checkpoints:
        name, equals, path = given.partition("=")
        if not equals or "/" in name or Path(given).exists():
            name, path = Path(os.path.abspath(given)).name, given
        elif not name or not path:
            raise UserError(f"{given!r} is not a checkpoint: give DIRECTORY or NAME=DIRECTORY.")
        path = os.path.expanduser(path)
        if name in named:
            raise UserError(f"two checkpoints are called {name!r}: give one another name, as other={path}.")
        named[name] = path
    if not named:
        raise UserError("no checkpoint: simplear serve CHECKPOINT [CHECKPOINT …].")
    return named


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the host's address, the IPv4 one if it has several. Nobody can connect to it before it listens, but
    no other server gets the port.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: give a number from 0, which takes a free port, to 65535.")
    try:
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be a host's
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> UserError:
    remedy = "127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        remedy = "another server has this port; give another with --port, 0 takes a free one"
    number, reason = getattr(error, "errno", 0), getattr(error, "strerror", None) or error
    return SystemRefusedError(number, f"cannot listen on {host}, port {port}: {reason} ({remedy}).")


def _allowed_hosts(more: Sequence[str], host: str, bound: socket.socket) -> list[str]:
    """What the Host header may say: any name where others can connect, unless names are given."""
    if not more and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        return ["*"]
    return [name.lower().strip("[]") for name in (*LOCAL_NAMES, host, *more)]


class _Server(uvicorn.Server):
    """Goes down in order: no new requests, then an answer to those there are, then exit code 0."""

    def __init__(
        self, config: uvicorn.Config, models: list[ServedModel], service: Service, shutdown_timeout: float
    ) -> None:
        super().__init__(config)
        self.models, self.service, self.shutdown_timeout = models, service, shutdown_timeout
        self._going_down: asyncio.Task[None] | None = None
        self._idle_since: dict[tuple[Any, Any], float] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers that are started at the same moment
            raise _cannot_listen(self.config.host, self.config.port, error) from error
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            names = ", ".join(served.name for served in self.models)
            print(f"{names} at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    async def on_tick(self, counter: int) -> bool:
        """Drop connections that stay occupied while no request is answered on them, then as uvicorn."""
        now, connections = asyncio.get_running_loop().time(), cast(set[H11Protocol], self.server_state.connections)
        idle = [
            (connection, connection.cycle)
            for connection in connections
            if connection.cycle is None or connection.cycle.response_complete or connection.transport.is_closing()
        ]
        self._idle_since = {key: self._idle_since.get(key, now) for key in idle}
        for (connection, _), since in self._idle_since.items():
            if now - since > KEEP_ALIVE_SECONDS:
                connection.transport.abort()
        return await super().on_tick(counter)

    def _stop(self) -> None:
        if self._going_down is None:
            self._going_down = asyncio.get_running_loop().create_task(self._go_down())
            log.info("Stopping when all requests are answered; another Ctrl-C stops at once.")
        else:
            os._exit(STOPPED)

    async def _go_down(self) -> None:
        self.service.draining = True
        await self._answered(self.shutdown_timeout)
        if self.service.in_flight:
            log.warning("%d requests were not finished in %g s.", self.service.in_flight, self.shutdown_timeout)
            await asyncio.gather(*(asyncio.to_thread(served.batcher.close) for served in self.models))
            await self._answered(LAST_ANSWERS_SECONDS)
        self.should_exit = True

    async def _answered(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self.service.in_flight and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(POLL_SECONDS)
