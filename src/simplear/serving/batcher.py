"""One model, one thread: images that ask for alike are drawn together, in batches of a few fixed shapes.

A batch is filled up to the next of these shapes and its prompts are padded to a multiple of tokens, so an image goes
through the same arithmetic whatever else is in its batch: its codes are, bit for bit, those that the pipeline draws in
a batch of that shape. Knows nothing of HTTP; what it has to say it says to `Drawing.notify`, in its own thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from simplear.generation import SamplingSettings, SimpleARPipeline, pil_images
from simplear.serving.metrics import Metrics

log = logging.getLogger(__name__)

PROMPT_MULTIPLE = 32
"""Tokens that prompts are padded to a multiple of: most captions fit into one or two such widths."""
SLOWEST_RETRY = 60
"""Seconds that a client is asked to wait at most before it tries again."""
FAILURES_IN_A_ROW = 3
"""Batches after which a model counts as broken: a device that is lost stays lost."""
LAST_ROW_SECONDS = 5.0
"""Given to a batch that is broken off to reach the end of its row of codes."""
GROW_AFTER = 100
"""Batches after which those that were made smaller for want of memory may be large again: it may be free by then."""


@dataclass(frozen=True)
class Shared:
    """What images must have in common to be drawn in one batch."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    sampling: SamplingSettings
    negative_prompt: str
    """One for all, so that it is read once and the rows of a batch are as many each time."""
    prompt_tokens: int
    """That prompts are padded to."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, on which memory depends most."""
        return self.height, self.width


@dataclass(frozen=True)
class Picture:
    """An image, or the upper rows of one that is being drawn."""

    image: Image.Image
    rows: int
    """Rows of codes that it shows."""
    batch_size: int
    """The shape of its batch, fillers included."""


@dataclass(eq=False)
class Drawing:
    """One image that is asked for."""

    prompt: str
    seed: int
    shared: Shared
    notify: Callable[[Picture | Exception], None]
    """Called with the rows that were asked for and the whole image, or with what went wrong."""
    rows: set[int] = field(default_factory=set)
    """Numbers of finished rows after which to show the image as it is, if nobody else waits then."""
    cancelled: bool = False
    """Set by whoever does not want it any more."""
    request: object = field(default_factory=object)
    """What it is a part of."""
    arrived: float = 0.0
    """When it was submitted, by the batcher's clock."""


class QueueFullError(Exception):
    """There is no room for more images."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(Exception):
    """The server is going down."""


class _AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class Batcher:
    """Draws what is submitted, first come, first served but for companions that ask for alike.

    Args:
        name: of the model, in logs and metrics.
        pipeline: its own; nothing else may use it from now on.
        shapes: numbers of images that batches have, ascending.
        capacity: images that may wait.
        wait: seconds to wait for companions before a batch that is not full is drawn.
        metrics: told what happens.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        name: str,
        pipeline: SimpleARPipeline,
        shapes: Sequence[int],
        capacity: int,
        wait: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.pipeline, self.shapes = name, pipeline, sorted(set(shapes))
        self.capacity, self.wait, self.metrics, self.clock = capacity, wait, metrics, clock
        self._waiting: list[Drawing] = []
        self._changed = threading.Condition()
        self._closed = self._abandoned = False
        self._thread: threading.Thread | None = None
        self._limits: dict[tuple[int, int], tuple[int, int]] = {}  # by size: a shape that fits, for how many batches
        self._batch_seconds, self._free_since, self._failures = 1.0, 0.0, 0
        self._progress = 0.0  # when a row of codes, or a picture, was last finished

    @property
    def healthy(self) -> bool:
        """Whether it can be expected to draw."""
        return self._thread is not None and self._thread.is_alive() and self._failures < FAILURES_IN_A_ROW

    def idle_seconds(self, drawing: Drawing) -> float:
        """Seconds since this image was submitted or a row of any was drawn, whichever was later."""
        return self.clock() - max(self._progress, drawing.arrived)

    def start(self, warm_up: Sequence[int] = ()) -> None:
        """Begin to draw, with a batch of each of these shapes: what fails fails before anybody asks, and what compiles
        does so in the thread whose CUDA graphs it will be. Raises what drawing them raises.
        """
        done: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(warm_up, done), name=f"drawing {self.name}", daemon=True
        )
        self._thread.start()
        done.result()

    def submit(self, drawings: Sequence[Drawing]) -> None:
        """Put images into the queue, all or none.

        Raises:
            QueueFullError: there is no room for them.
            StoppedError: after `close`.
        """
        with self._changed:
            self._drop_cancelled()
            if self._closed:
                raise StoppedError
            if len(self._waiting) + len(drawings) > self.capacity:
                batches = len(self._waiting) / self.shapes[-1] + 1
                raise QueueFullError(min(SLOWEST_RETRY, math.ceil(batches * self._batch_seconds)))
            for drawing in drawings:
                drawing.arrived = self.clock()
            self._waiting.extend(drawings)
            self._show_queue()
            self._changed.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Stop: nothing new is taken, and what is not drawn within so many seconds fails with `StoppedError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._changed:
            self._abandoned = True
            left, self._waiting = self._waiting, []
        for drawing in left:
            drawing.notify(StoppedError())
        if self._thread is not None:
            self._thread.join(LAST_ROW_SECONDS)

    def _work(self, warm_up: Sequence[int], done: Future[None]) -> None:
        try:
            for shape in warm_up:
                drawn = self.pipeline([""] * shape, seed=0, output_type="codes", batch_size=shape)
                self.pipeline.decode(drawn.codes[:1])
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
            return
        while batch := self._next():
            self._progress = began = self.clock()
            self._draw(batch)
            self._free_since = self.clock()
            self._batch_seconds += 0.2 * (self._free_since - began - self._batch_seconds)

    def _next(self) -> list[Drawing]:
        """The next batch, when there is one to draw; empty when there is nothing more to do."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                shared = self._waiting[0].shared
                largest, _ = self._limits.get(shared.size, (self.shapes[-1], 0))
                batch = [drawing for drawing in self._waiting if drawing.shared == shared][:largest]
                # Counted from the end of the batch before: whoever waited for that asks again just now.
                left = max(self._waiting[0].arrived, self._free_since) + self.wait - self.clock()
                if len(batch) == largest or left <= 0 or self._closed:
                    self._waiting = [drawing for drawing in self._waiting if drawing not in batch]
                    self._show_queue()
                    return batch
                self._changed.wait(left)

    def _draw(self, batch: list[Drawing]) -> None:
        shared = batch[0].shared
        shape = next(shape for shape in self.shapes if shape >= len(batch))
        filled = batch + [batch[-1]] * (shape - len(batch))
        left = list(batch)  # those that do not have their image yet
        self.metrics.batch_size.labels(self.name).observe(len(batch))

        def on_row(_: int, codes: Tensor) -> None:
            self._progress = self.clock()
            if self._abandoned or all(drawing.cancelled for drawing in batch):
                raise _AbandonedError
            row = codes.shape[1]
            for drawing, so_far in zip(batch, codes, strict=False):
                if row in drawing.rows and not drawing.cancelled:
                    drawing.rows.remove(row)  # a batch that is drawn again shows no row twice
                    self._show(drawing, so_far, shape)

        try:
            drawn = self.pipeline(
                [drawing.prompt for drawing in filled],
                negative_prompt=shared.negative_prompt,
                seed=[drawing.seed for drawing in filled],
                height=shared.height,
                width=shared.width,
                output_type="codes",
                batch_size=shape,
                on_row=on_row,
                **dataclasses.asdict(shared.sampling),
            )
            for drawing, codes in zip(batch, drawn.codes, strict=False):
                if not drawing.cancelled:
                    picture = self._picture(codes, shape)
                    self.metrics.images.labels(self.name).inc()
                    drawing.notify(picture)
                left.remove(drawing)
                self._progress = self.clock()
            self._failures = 0
            fitting, batches = self._limits.pop(shared.size, (0, 0))
            if batches > 1:
                self._limits[shared.size] = (fitting, batches - 1)
        except _AbandonedError:
            self._fail(left, StoppedError())
        except MemoryError as error:
            self._out_of_memory(left, shape, error)
        except Exception as error:
            log.exception("%s: a batch of %d images failed", self.name, len(batch))
            self._failures += 1
            self._fail(left, error)

    def _show(self, drawing: Drawing, codes: Tensor, shape: int) -> None:
        """Give the rows that are drawn, unless others would wait longer for it or there is no memory."""
        if all(other.cancelled or other.request is drawing.request for other in self._waiting):
            with contextlib.suppress(MemoryError):
                drawing.notify(self._picture(codes, shape))
                return
        self.metrics.dropped.labels(self.name).inc()

    def _out_of_memory(self, left: list[Drawing], shape: int, error: MemoryError) -> None:
        """Draw what is left of a batch again in parts; for a while, batches of such pictures are smaller."""
        smaller = [each for each in self.shapes if each < shape]
        if not smaller:
            log.error("%s: %s", self.name, error)
            self._fail(left, error)
            return
        size = left[0].shared.size
        text = "%s: %s Pictures of %d × %d are drawn %d at once for the next %d batches."
        log.warning(text, self.name, error, *size, smaller[-1], GROW_AFTER)
        self._limits[size] = (smaller[-1], GROW_AFTER)
        with self._changed:
            self._waiting[:0] = left

    def _picture(self, codes: Tensor, batch_size: int) -> Picture:
        """Decoded by itself, so that the visual tokenizer too has one shape."""
        return Picture(pil_images(self.pipeline.decode(codes[None]))[0], len(codes), batch_size)

    def _fail(self, batch: Sequence[Drawing], error: Exception) -> None:
        for drawing in batch:
            if not drawing.cancelled:
                drawing.notify(error)

    def _drop_cancelled(self) -> None:
        self._waiting = [drawing for drawing in self._waiting if not drawing.cancelled]
        self._show_queue()

    def _show_queue(self) -> None:
        self.metrics.queue.labels(self.name).set(len(self._waiting))
