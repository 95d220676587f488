"""What the batcher puts together, and what becomes of images that fail, are cancelled or find no room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.conftest import PATIENCE, Clock, wait_until
from simplear.generation import OutOfMemoryError, SamplingSettings
from simplear.serving.batcher import Batcher, BatchKey, Drawing, Picture, QueueFullError, StoppedError
from simplear.serving.metrics import Metrics

KEY = BatchKey(16, 16, SamplingSettings(guidance_scale=2.0), "", 32)
ROWS = 2


class FakePipeline:
    """Draws codes that are the seeds, when it is let; keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.failing: Callable[[list[int]], Exception | None] = lambda seeds: None
        self.undecodable: Callable[[torch.Tensor], Exception | None] = lambda codes: None

    def __call__(
        self, prompts: list[str], *, seed: Any, batch_size: int, on_row: Any = lambda first, codes: None, **_: Any
    ) -> Any:
        seed = [seed] * len(prompts) if isinstance(seed, int) else seed
        self.calls.append(list(seed))
        assert len(prompts) == len(seed) == batch_size
        codes = torch.tensor(seed)[:, None, None].expand(-1, ROWS, 2)
        for row in range(1, ROWS + 1):
            assert self.free.wait(PATIENCE)
            on_row(0, codes[:, :row])
        if error := self.failing(seed):
            raise error
        return SimpleNamespace(codes=codes)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        if error := self.undecodable(codes):
            raise error
        return codes[:, None].expand(-1, 3, -1, -1) / 255


@dataclass
class Asker:
    """Asks for images and keeps what comes back."""

    batcher: Batcher
    clock: Clock
    came: list[tuple[int, Picture | Exception]] = field(default_factory=list)

    def drawing(self, seed: int, key: BatchKey = KEY, rows: tuple[int, ...] = ()) -> Drawing:
        return Drawing("x", seed, key, lambda event: self.came.append((seed, event)), set(rows))

    def ask(self, *seeds: int, key: BatchKey = KEY) -> list[Drawing]:
        drawings = [self.drawing(seed, key) for seed in seeds]
        self.batcher.submit(drawings)
        return drawings

    @property
    def order(self) -> list[tuple[int, int]]:
        """Seeds of the pictures that came, each with its rows."""
        return [(seed, event.rows) for seed, event in self.came if isinstance(event, Picture)]

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.came) >= count)


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def asker(pipeline: FakePipeline) -> Iterator[Asker]:
    """Of a batcher that waits for no companions; its clock stands still."""
    clock = Clock()
    batcher = Batcher("fake", pipeline, [4, 1, 2], 8, Metrics(), wait=0.0, clock=clock)  # type: ignore[arg-type]
    batcher.start()
    yield Asker(batcher, clock)
    pipeline.free.set()
    batcher.close()


def held(pipeline: FakePipeline, asker: Asker) -> None:
    """A first batch is being drawn and does not end."""
    pipeline.free.clear()
    asker.ask(0)
    wait_until(lambda: pipeline.calls == [[0]])


def test_what_is_alike_is_drawn_together_and_filled_up(pipeline: FakePipeline, asker: Asker) -> None:
    held(pipeline, asker)
    asker.ask(1, 2)
    asker.ask(3)
    pipeline.free.set()
    asker.wait_for(4)
    assert pipeline.calls == [[0], [1, 2, 3, 3]]
    assert [(seed, event.batch_size) for seed, event in asker.came] == [(0, 1), (1, 4), (2, 4), (3, 4)]
    assert [event.image.getpixel((0, 0)) for _, event in asker.came] == [(seed,) * 3 for seed in range(4)]


def test_no_more_than_the_largest_shape(pipeline: FakePipeline, asker: Asker) -> None:
    held(pipeline, asker)
    asker.ask(*range(1, 8))
    pipeline.free.set()
    asker.wait_for(8)
    assert pipeline.calls == [[0], [1, 2, 3, 4], [5, 6, 7, 7]]


def test_a_difference_in_the_key_keeps_images_apart(pipeline: FakePipeline, asker: Asker) -> None:
    others = [
        replace(KEY, height=8),
        replace(KEY, sampling=SamplingSettings(guidance_scale=2.5)),
        replace(KEY, negative_prompt="y"),
        replace(KEY, prompt_tokens=64),
    ]
    held(pipeline, asker)
    asker.ask(1)
    for seed, key in enumerate(others, start=2):
        asker.ask(seed, key=key)
    asker.ask(9)
    pipeline.free.set()
    asker.wait_for(7)
    # The oldest first; a companion that came later goes with it.
    assert pipeline.calls == [[0], [1, 9], [2], [3], [4], [5]]


def test_an_idle_batcher_waits_a_moment_for_companions(pipeline: FakePipeline, asker: Asker) -> None:
    asker.batcher.wait = 0.01
    asker.ask(1)
    asker.ask(2)
    assert pipeline.calls == []
    asker.clock.now += 0.02
    asker.wait_for(2)
    assert pipeline.calls == [[1, 2]]
    asker.ask(3, 4, 5, 6)  # a full batch waits for nobody
    asker.wait_for(6)
    assert pipeline.calls == [[1, 2], [3, 4, 5, 6]]


def test_rows_are_shown_when_asked_for(pipeline: FakePipeline, asker: Asker) -> None:
    asker.batcher.submit([asker.drawing(1, rows=(1,)), asker.drawing(2)])
    asker.wait_for(3)
    assert asker.order == [(1, 1), (1, 2), (2, 2)]


def test_no_rows_are_shown_while_others_wait(pipeline: FakePipeline, asker: Asker) -> None:
    """Decoding them would hold up the others."""
    other = replace(KEY, negative_prompt="y")
    asker.batcher.submit([asker.drawing(1, rows=(1,)), asker.drawing(2, other)])
    asker.wait_for(2)
    assert asker.order == [(1, 2), (2, 2)]
    dropped = asker.batcher.metrics.registry.get_sample_value(
        "simplear_partial_images_dropped_total", {"model": "fake"}
    )
    assert dropped == 1


def test_progress_is_a_row_of_any_picture(pipeline: FakePipeline, asker: Asker) -> None:
    held(pipeline, asker)
    (waiting,) = asker.ask(1)
    asker.clock.now += 60
    assert asker.batcher.idle_seconds(waiting) == 60
    pipeline.free.set()
    asker.wait_for(2)
    assert asker.batcher.idle_seconds(waiting) == 0
    asker.clock.now += 60
    assert asker.batcher.idle_seconds(waiting) == 60
    (later,) = asker.ask(2)
    assert asker.batcher.idle_seconds(later) == 0


def test_a_full_queue_takes_all_or_nothing(pipeline: FakePipeline, asker: Asker) -> None:
    held(pipeline, asker)
    asker.ask(*range(1, 7))
    with pytest.raises(QueueFullError) as raised:
        asker.ask(7, 8, 9)
    assert 1 <= raised.value.retry_after <= 60
    waiting = asker.ask(7, 8)
    with pytest.raises(QueueFullError):
        asker.ask(9)
    waiting[0].cancelled = True  # makes room at once
    asker.ask(9)
    pipeline.free.set()
    asker.wait_for(9)
    assert sorted(seed for seed, _ in asker.came) == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_a_batch_that_nobody_waits_for_is_broken_off(pipeline: FakePipeline, asker: Asker) -> None:
    pipeline.free.clear()
    first, second = asker.ask(1, 2)
    wait_until(lambda: len(pipeline.calls) == 1)
    first.cancelled = second.cancelled = True
    asker.ask(3)
    pipeline.free.set()
    asker.wait_for(1)
    assert [seed for seed, _ in asker.came] == [3]
    assert asker.batcher.healthy


def test_of_a_running_batch_only_those_who_wait_get_an_image(pipeline: FakePipeline, asker: Asker) -> None:
    pipeline.free.clear()
    first, _ = asker.ask(1, 2)
    wait_until(lambda: len(pipeline.calls) == 1)
    first.cancelled = True
    pipeline.free.set()
    asker.wait_for(1)
    asker.ask(3)
    asker.wait_for(2)
    assert [seed for seed, _ in asker.came] == [2, 3]


def test_an_error_ends_its_batch_and_not_the_batcher(pipeline: FakePipeline, asker: Asker) -> None:
    pipeline.failing = lambda seeds: RuntimeError("no") if 1 in seeds else None
    asker.ask(1, 2)
    asker.wait_for(2)
    assert all(isinstance(event, RuntimeError) for _, event in asker.came)
    asker.ask(3)
    asker.wait_for(3)
    assert isinstance(asker.came[-1][1], Picture) and asker.batcher.healthy
    for count in (4, 5, 6):
        assert asker.batcher.healthy
        asker.ask(1)
        asker.wait_for(count)
    wait_until(lambda: not asker.batcher.healthy)
    asker.ask(3)
    wait_until(lambda: asker.batcher.healthy)


def test_out_of_memory_makes_batches_of_that_size_smaller(pipeline: FakePipeline, asker: Asker) -> None:
    pipeline.failing = lambda seeds: OutOfMemoryError("full") if len(seeds) > 1 else None
    asker.ask(1, 2, 3)
    asker.wait_for(3)
    assert pipeline.calls == [[1, 2, 3, 3], [1, 2], [1], [2], [3]]
    assert [seed for seed, event in asker.came if isinstance(event, Picture)] == [1, 2, 3]
    pipeline.failing = lambda seeds: OutOfMemoryError("full") if max(seeds) == 9 else None
    asker.ask(4, 5, key=replace(KEY, height=8))  # other pictures still fit
    asker.ask(9)
    asker.wait_for(6)
    assert pipeline.calls[5:] == [[4, 5], [9]]
    assert isinstance(asker.came[-1][1], OutOfMemoryError) and asker.batcher.healthy


@pytest.mark.parametrize("error", [OutOfMemoryError("full"), RuntimeError("no")])
def test_an_image_that_was_delivered_does_not_fail(pipeline: FakePipeline, asker: Asker, error: Exception) -> None:
    """Decoding fails at the third of a batch, always: those before it keep their image and get nothing more."""
    pipeline.undecodable = lambda codes: error if codes.flatten()[0] == 3 else None
    for count in (4, 8, 12):
        asker.ask(1, 2, 3, 4)
        asker.wait_for(count)
    answers = [(seed, type(event)) for seed, event in asker.came]
    if isinstance(error, OutOfMemoryError):  # drawn again in smaller batches, so 4 gets its image too
        assert sorted(answers[:4], key=str) == [(1, Picture), (2, Picture), (3, OutOfMemoryError), (4, Picture)]
    else:
        assert answers[:4] == [(1, Picture), (2, Picture), (3, RuntimeError), (4, RuntimeError)]
    assert len(answers) == 12
    wait_until(lambda: asker.batcher.healthy == isinstance(error, OutOfMemoryError))


def test_memory_that_is_free_again_when_a_batch_is_smaller(pipeline: FakePipeline, asker: Asker) -> None:
    pipeline.undecodable = lambda codes: OutOfMemoryError("full") if len(pipeline.calls[-1]) > 2 else None
    asker.batcher.submit([asker.drawing(1, rows=(1,)), asker.drawing(2), asker.drawing(3)])
    asker.wait_for(3)
    assert pipeline.calls == [[1, 2, 3, 3], [1, 2], [3]]
    assert asker.order == [(1, 2), (2, 2), (3, 2)]  # the rows that found no memory are not shown later


def test_what_fails_in_warming_up_fails_at_the_start(pipeline: FakePipeline) -> None:
    pipeline.failing = lambda seeds: RuntimeError("no weights") if len(seeds) > 2 else None
    batcher = Batcher("fake", pipeline, [1, 2, 4], 8, Metrics(), [1, 2, 4])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no weights"):
        batcher.start()
    assert not batcher.healthy
    batcher.close()


def test_closing_fails_what_is_not_drawn(pipeline: FakePipeline, asker: Asker) -> None:
    held(pipeline, asker)
    asker.ask(1)
    closing = threading.Thread(target=asker.batcher.close)
    closing.start()
    asker.wait_for(1)
    pipeline.free.set()
    asker.wait_for(2)
    closing.join()
    with pytest.raises(StoppedError):
        asker.ask(3)
    assert sorted(seed for seed, event in asker.came if isinstance(event, StoppedError)) == [0, 1]
