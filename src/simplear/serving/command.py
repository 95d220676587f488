"""`simplear serve`: checkpoints behind HTTP, until a signal says to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from simplear.errors import UserError
from simplear.generation import SimpleARPipeline
from simplear.serving.app import create_app
from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher
from simplear.serving.gate import Service
from simplear.serving.served import ServedModel

log = logging.getLogger(__name__)

API_KEY_VARIABLE = "SIMPLEAR_API_KEY"
ENGINES = {
    "cached": {"prompt_multiple": PROMPT_MULTIPLE},
    "compiled": {"prompt_multiple": PROMPT_MULTIPLE},
    "jacobi": {},
}
"""Those that can be served, and the options they are served with."""
CONNECTIONS = 500
"""At once; beyond, the server answers 503 before it reads anything."""
KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep idle connections, so that theirs are not closed under a request."""
LAST_ANSWERS_SECONDS = 2.0
POLL_SECONDS = 0.05


def serve(
    checkpoints: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    engine: str = "cached",
    engine_options: dict[str, Any] | None = None,
    engines: dict[str, str] | None = None,
    visual_tokenizer: str | None = None,
    device: str | None = None,
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
        engine: cached, compiled (compiles each batch size at start) or jacobi (fastest for one user).
        engine_options: of the engine, as '{window: 7}' for jacobi.
        engines: other engines for some of the checkpoints by name: with sft=DIR quick=DIR '{quick: jacobi}' serves one
            checkpoint on two, for requests and the page to choose from.
        visual_tokenizer: directory to use in place of the checkpoints' own.
        device: where to draw; a GPU where there is one if not given.
        batch_sizes: numbers of images that batches are filled up to.
        batch_wait: seconds to wait for companions before drawing a batch that is not full.
        max_queue: images that may wait for each checkpoint; beyond, clients are asked to come back later.
        max_codes: codes of the largest picture; as many as a checkpoint was trained on if not given.
        timeout: seconds that a request may take.
        shutdown_timeout: seconds to finish what runs after SIGTERM or Ctrl-C; a second signal ends at once.

    Raises:
        ValueError: an engine that cannot be served or is given to no checkpoint, batch sizes or limits that are none,
            or two checkpoints of one name.
    """
    named = _named(checkpoints)
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
    service = Service(api_key=api_key or os.environ.get(API_KEY_VARIABLE) or None, timeout=timeout)
    models: list[ServedModel] = []
    for name, checkpoint in named.items():
        chosen = drawing[name]
        pipeline = SimpleARPipeline.from_pretrained(
            checkpoint,
            engine=chosen,
            engine_options={**ENGINES[chosen], **((engine_options or {}) if chosen == engine else {})},
            device=device,
            visual_tokenizer=visual_tokenizer,
        )
        batcher = Batcher(name, pipeline, batch_sizes, max_queue, batch_wait, service.metrics)
        batcher.start(warm_up=batcher.shapes if chosen == "compiled" else batcher.shapes[:1])
        models.append(ServedModel(name, batcher, max_codes, chosen))
    config = uvicorn.Config(
        create_app(models, service),
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    _Server(config, models, service, shutdown_timeout).run()


def _named(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by the names that requests use."""
    named: dict[str, str] = {}
    for given in checkpoints:
        name, equals, path = given.rpartition("=")
        name = name if equals else Path(given).absolute().name
        if name in named:
            raise UserError(f"two checkpoints are called {name!r}: give one another name, as other={path}.")
        named[name] = path
    if not named:
        raise UserError("no checkpoint: simplear serve CHECKPOINT [CHECKPOINT …].")
    return named


class _Server(uvicorn.Server):
    """Goes down in order: no new requests, then an answer to those there are, then exit code 0."""

    def __init__(
        self, config: uvicorn.Config, models: list[ServedModel], service: Service, shutdown_timeout: float
    ) -> None:
        super().__init__(config)
        self.models, self.service, self.shutdown_timeout = models, service, shutdown_timeout
        self._going_down: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
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

    def _stop(self) -> None:
        if self._going_down is None:
            self._going_down = asyncio.get_running_loop().create_task(self._go_down())
        else:
            self.should_exit = self.force_exit = True

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
