"""`simplear serve`: checkpoints behind HTTP, until a signal says to stop."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import uvicorn

from simplear.device import DType, default_dtype, resolve_device
from simplear.errors import SystemRefusedError, UserError
from simplear.generation import SimpleARPipeline
from simplear.serving.app import create_app
from simplear.serving.batcher import PROMPT_MULTIPLE, Batcher
from simplear.serving.gate import Service
from simplear.serving.served import ServedModel
from simplear.text_files import FreeText

API_KEY_VARIABLE = "SIMPLEAR_API_KEY"
CONNECTIONS = 500
"""At once; beyond, the server answers 503 before it reads anything."""
KEEP_ALIVE_SECONDS = 75
"""Longer than proxies keep idle connections, so that theirs are not closed under a request."""
LOCAL_NAMES = ("localhost", "*.localhost", "127.0.0.1", "::1")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", re.IGNORECASE)


def serve(
    checkpoints: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: list[FreeText] = [],  # noqa: B006  # never changed
    cors_origins: list[FreeText] = [],  # noqa: B006
    engine: Literal["fused", "compiled", "jacobi"] = "fused",
    visual_tokenizer: str | None = None,
    device: str | None = None,
    dtype: DType | None = None,
    batch_sizes: list[int] = [1, 2, 4, 8, 16],  # noqa: B006
    max_queue: int = 128,
    max_codes: int | None = None,
    timeout: float = 120.0,
    shutdown_timeout: int = 30,
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
        visual_tokenizer: directory to use in place of the checkpoints' own.
        device: where to draw; a GPU if there is one, if not given.
        dtype: of the language models; bfloat16 on a GPU and float32 elsewhere if not given.
        batch_sizes: numbers of images that batches are filled up to.
        max_queue: images that may wait for each checkpoint; beyond, clients are asked to come back later.
        max_codes: codes of the largest picture; as many as a checkpoint was trained on if not given.
        timeout: seconds without progress, a row of codes of any picture, after which a request fails.
        shutdown_timeout: seconds to finish requests after SIGTERM or Ctrl-C; a second Ctrl-C ends at once.

    Raises:
        UserError: batch sizes or limits out of range, two checkpoints of one name, a
            device that is missing, or an address or port that is not available.
    """
    named = _named(checkpoints)
    place = resolve_device(device)
    if not batch_sizes or min(*batch_sizes, max_queue, timeout) <= 0:
        raise UserError("batch_sizes, max_queue and timeout must be above 0.")
    for origin in cors_origins:
        if not ORIGIN.fullmatch(origin):
            raise UserError(f"cors_origins: {origin!r} is not an origin: give SCHEME://HOST[:PORT] alone, or *.")
    # Before the checkpoints are loaded; clients that connect meanwhile wait.
    with _listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        service = Service(
            api_key=api_key or os.environ.get(API_KEY_VARIABLE) or None,
            timeout=timeout,
            allowed_hosts=_allowed_hosts(allowed_hosts, host, address),
            cors_origins=cors_origins,
        )
        models = []
        for name, checkpoint in named.items():
            pipeline = SimpleARPipeline.from_pretrained(
                checkpoint,
                engine=engine,
                engine_options={} if engine == "jacobi" else {"prompt_multiple": PROMPT_MULTIPLE},
                device=place,
                dtype=getattr(torch, dtype or default_dtype(place)),
                visual_tokenizer=visual_tokenizer,
            )
            warm_up = batch_sizes if engine == "compiled" else [min(batch_sizes)]
            batcher = Batcher(name, pipeline, batch_sizes, max_queue, service.metrics, warm_up)
            batcher.start()
            models.append(ServedModel(name, batcher, max_codes, engine))
        print(f"{', '.join(named)} at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn raises a signal again after it has stopped
        config = uvicorn.Config(
            create_app(models, service),
            http="h11",  # of the choices the one that limits the size of headers
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=shutdown_timeout,
        )
        uvicorn.Server(config).run([listening])


def _named(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by the names that requests use."""
    named: dict[str, str] = {}
    for argument in checkpoints:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or Path(argument).exists():
            name, path = Path(os.path.abspath(argument)).name, argument
        if name in named:
            raise UserError(f"two checkpoints are called {name!r}: give one another name, as other={path}.")
        named[name] = os.path.expanduser(path)
    if not named:
        raise UserError("no checkpoint: simplear serve CHECKPOINT [CHECKPOINT …].")
    return named


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:  # OverflowError: the port; UnicodeError: the host
        raise SystemRefusedError(
            getattr(error, "errno", 0),
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}. --host 127.0.0.1 is "
            "this machine alone and 0.0.0.0 all of its addresses; --port 0 takes a free port.",
        ) from error


def _allowed_hosts(names: Sequence[str], host: str, address: str) -> list[str]:
    """What the Host header may say: any name where others can connect, unless names are given."""
    if not names and not ipaddress.ip_address(address).is_loopback:
        return ["*"]
    return [name.lower().strip("[]") for name in (*LOCAL_NAMES, host, *names)]
