"""A server of two tiny checkpoints, on a real socket, in this process."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn

from simplear.generation import SimpleARPipeline
from simplear.language_model import CheckpointSettings, GenerationDefaults, save_checkpoint
from simplear.serving import Batcher, ServedModel, Service, create_app
from simplear.serving.batcher import PROMPT_MULTIPLE
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import CODEBOOK, DOWNSAMPLE, model_config

GRID = (4, 3)
SIZE = f"{GRID[1] * DOWNSAMPLE}x{GRID[0] * DOWNSAMPLE}"
SHAPES = (1, 2, 4, 8)
DEFAULTS = GenerationDefaults(prompt_prefix="a photo of ", guidance_scale=2.0)
PATIENCE = 300.0
"""Seconds for what must happen, on the slowest and busiest machine; nothing is expected to happen sooner."""


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str
) -> list[Path]:
    """Directories called "first" and "second"."""
    fingerprint = load_visual_tokenizer(tiny_visual_tokenizer).fingerprint
    root, made = tmp_path_factory.mktemp("served"), []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        # Far above the usual 0.02: the codes then depend on the prompt.
        model, tokenizer = model_config(tiny_text_tokenizer, initializer_range=0.3).build()
        settings = CheckpointSettings(
            model.layout.image_token_offset,
            CODEBOOK,
            GRID,
            DOWNSAMPLE,
            generation=DEFAULTS,
            visual_tokenizer_fingerprint=fingerprint,
        )
        save_checkpoint(root / name, model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
        made.append(root / name)
    return made


@pytest.fixture(scope="session")
def pipelines(checkpoints: list[Path]) -> dict[str, SimpleARPipeline]:
    """What a user loads to draw the server's images again."""
    options = {"prompt_multiple": PROMPT_MULTIPLE}
    return {
        path.name: SimpleARPipeline.from_pretrained(path, engine_options=options, device="cpu") for path in checkpoints
    }


class PacedEngine:
    """Counts rows of codes, and hands them on when the test lets it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.rows = engine, 0
        self._allowed = math.inf
        self._changed = threading.Condition()

    def hold(self) -> None:
        """Hand on what was drawn; the next row is drawn, counted and held."""
        with self._changed:
            self._allowed = self.rows
            self._changed.notify_all()

    def go(self) -> None:
        """Hand on all rows."""
        with self._changed:
            self._allowed = math.inf
            self._changed.notify_all()

    def generate(self, *request: Any) -> Any:
        *others, on_row, given = request

        def paced(row: int, codes: torch.Tensor) -> None:
            with self._changed:
                self.rows += 1
                assert self._changed.wait_for(lambda: self.rows <= self._allowed, PATIENCE)
            on_row(row, codes)

        return self.engine.generate(*others, paced, given)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Live:
    """A running server.

    Args:
        pipelines: by name of the model.
        service: key and limits.
        capacity: images that may wait.
        shapes: of batches.
        clock: of the batchers.
    """

    def __init__(
        self,
        pipelines: dict[str, SimpleARPipeline],
        service: Service | None = None,
        capacity: int = 64,
        shapes: Sequence[int] = SHAPES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service or Service()
        self.models = []
        for name, pipeline in pipelines.items():
            own = copy.copy(pipeline)
            own.tokenizer = copy.deepcopy(pipeline.tokenizer)
            own.engine = PacedEngine(pipeline.engine)
            batcher = Batcher(name, own, shapes, capacity, self.service.metrics, wait=0.02, clock=clock)
            batcher.start()
            self.models.append(ServedModel(name, batcher))
        self.engine = self.models[0].batcher.pipeline.engine
        config = uvicorn.Config(
            create_app(self.models, self.service),
            port=0,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self.client = functools.cache(self._client)
        """OpenAI's own client, which does not try again; one for each key, since making one takes long."""
        self._requests = httpx2.Client(timeout=PATIENCE)

    @contextlib.contextmanager
    def running(self) -> Iterator[Live]:
        thread = threading.Thread(target=self.server.run, daemon=True)
        thread.start()
        while not self.server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        self.address = self.server.servers[0].sockets[0].getsockname()[:2]
        self.url = "http://{}:{}".format(*self.address)
        try:
            yield self
        finally:
            for served in self.models:
                served.batcher.pipeline.engine.go()
            self.server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **{"max_retries": 0, **options})

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """An answer of any status."""
        return self._requests.request(method, self.url + path, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="session")
def live(pipelines: dict[str, SimpleARPipeline]) -> Iterator[Live]:
    with Live(pipelines).running() as running:
        yield running


def wait_until(true: Callable[[], bool]) -> None:
    """Raises where it does not become true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)
