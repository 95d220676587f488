"""One model, one thread: images that agree in their `BatchKey` are drawn together, in batches of a few fixed shapes.

A batch is filled up to the next of these shapes and its prompts are padded to a multiple of tokens, so an image goes
through the same arithmetic whatever else is in its batch: its codes are, bit for bit, those that the pipeline draws in
a batch of that shape. This module knows nothing of HTTP. It reports to `Drawing.notify`, from its own thread.
"""

from __future__ import annotations

import dataclasses
import logging
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
BATCH_WAIT_SECONDS = 0.01
"""Before a batch that is not full is drawn: clients whose images are ready send their next requests together."""
SLOWEST_RETRY = 60
"""Seconds that a client is asked to wait at most before it tries again."""
FAILURES_IN_A_ROW = 3
"""Batches after which a model counts as broken: a lost device stays lost."""
LAST_ROW_SECONDS = 5.0
"""For a batch that is stopped to reach the end of its row of codes."""


@dataclass(frozen=True)
class BatchKey:
    """What images must have in common to be drawn in one batch."""

    height: int
    width: int
    """Pixels, as the height."""
    sampling: SamplingSettings
    negative_prompt: str
    prompt_tokens: int
    """That prompts are padded to."""


@dataclass(frozen=True)
class Picture:
    """An image, or the upper rows of one that is being drawn."""

    image: Image.Image
    rows: int
    """Of codes."""
    batch_size: int
    """The shape of its batch, fillers included."""


@dataclass(eq=False)
class Drawing:
    """One requested image."""

    prompt: str
    seed: int
    key: BatchKey
    notify: Callable[[Picture | Exception], None]
    """Called with the requested rows and the whole image, or with the error."""
    rows: set[int] = field(default_factory=set)
    """Numbers of finished rows after which to show the image as it is, unless others wait then."""
    cancelled: bool = False
    """Set by the client's side when nobody waits for the image any more."""
    arrived: float = 0.0
    """When it was submitted, by the batcher's clock."""


class QueueFullError(Exception):
    """The queue has no room for the images."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(Exception):
    """The server is stopping, or nobody waits for the batch any more."""


class Batcher:
    """Draws submitted images in order of arrival, together with later ones of the same key.

    Args:
        name: of the model, in logs and metrics.
        pipeline: for this batcher alone.
        shapes: numbers of images that batches have.
        capacity: images that may wait.
        metrics: counts images, batches and the queue.
        warm_up: shapes to draw once at the start.
        wait: seconds before a batch that is not full is drawn.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        name: str,
        pipeline: SimpleARPipeline,
        shapes: Sequence[int],
        capacity: int,
        metrics: Metrics,
        warm_up: Sequence[int] = (),
        wait: float = BATCH_WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.pipeline, self.shapes, self.capacity = name, pipeline, sorted(set(shapes)), capacity
        self.metrics, self.warm_up, self.wait, self.clock = metrics, warm_up, wait, clock
        self._waiting: list[Drawing] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"drawing {name}", daemon=True)
        self._ready: Future[None] = Future()
        self._largest: dict[tuple[int, int], int] = {}  # shape that fits into memory, by height and width
        self._batch_seconds, self._free_since, self._failures = 1.0, 0.0, 0
        self._progress = 0.0  # when a row of codes, or an image, was last finished

    @property
    def healthy(self) -> bool:
        """Whether it can be expected to draw."""
        return self._thread.is_alive() and self._failures < FAILURES_IN_A_ROW

    def idle_seconds(self, drawing: Drawing) -> float:
        """Seconds since this image was submitted or a row of any image was finished, whichever was later."""
        return self.clock() - max(self._progress, drawing.arrived)

    def start(self) -> None:
        """Warm up and begin to draw. Raises what the warm-up raises.

        Errors show before the first request, and what compiles does so in the thread that uses its CUDA graphs.
        """
        self._thread.start()
        self._ready.result()

    def submit(self, drawings: Sequence[Drawing]) -> None:
        """Put images into the queue, all or none.

        Raises:
            QueueFullError: the queue has no room for them.
            StoppedError: after `close`.
        """
        with self._changed:
            self._keep(self._waiting)
            if self._closed:
                raise StoppedError
            if len(self._waiting) + len(drawings) > self.capacity:
                batches = len(self._waiting) / self.shapes[-1] + 1
                raise QueueFullError(min(SLOWEST_RETRY, 1 + int(batches * self._batch_seconds)))
            for drawing in drawings:
                drawing.arrived = self.clock()
            self._keep([*self._waiting, *drawings])
            self._changed.notify()

    def close(self) -> None:
        """Stop; images that are not drawn yet fail with `StoppedError`."""
        with self._changed:
            self._closed, left = True, self._waiting
            self._keep([])
            self._changed.notify()
        for drawing in left:
            _notify(drawing, StoppedError())
        self._thread.join(LAST_ROW_SECONDS)

    def _keep(self, drawings: Sequence[Drawing]) -> None:
        """Let these wait, but for cancelled ones."""
        self._waiting = [drawing for drawing in drawings if not drawing.cancelled]
        self.metrics.queue.labels(self.name).set(len(self._waiting))

    def _work(self) -> None:
        try:
            for shape in self.warm_up:
                drawn = self.pipeline([""] * shape, seed=0, output_type="codes", batch_size=shape)
                self.pipeline.decode(drawn.codes[:1])
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while batch := self._next():
            self._progress = began = self.clock()
            self._draw(batch)
            self._free_since = self.clock()
            self._batch_seconds = self._free_since - began

    def _next(self) -> list[Drawing]:
        """Wait for the next batch; empty after `close`."""
        with self._changed:
            while not self._closed:
                self._keep(self._waiting)
                if not self._waiting:
                    self._changed.wait()
                    continue
                key = self._waiting[0].key
                largest = self._largest.get((key.height, key.width), self.shapes[-1])
                batch = [drawing for drawing in self._waiting if drawing.key == key][:largest]
                # Counted from the end of the batch before, whose clients ask for the next image just then.
                left = max(self._waiting[0].arrived, self._free_since) + self.wait - self.clock()
                if len(batch) == largest or left <= 0:
                    self._keep([drawing for drawing in self._waiting if drawing not in batch])
                    return batch
                self._changed.wait(left)
            return []

    def _draw(self, batch: list[Drawing]) -> None:
        key = batch[0].key
        shape = next(shape for shape in self.shapes if shape >= len(batch))
        filled = batch + [batch[-1]] * (shape - len(batch))
        left = list(batch)  # those that do not have their image yet
        self.metrics.batch_size.labels(self.name).observe(len(batch))

        def on_row(_: int, codes: Tensor) -> None:
            self._progress = self.clock()
            if self._closed or all(drawing.cancelled for drawing in batch):
                raise StoppedError
            row = codes.shape[1]
            for drawing, so_far in zip(batch, codes, strict=False):
                if row not in drawing.rows or drawing.cancelled:
                    continue
                drawing.rows.remove(row)  # a batch that is drawn again shows no row twice
                if any(not other.cancelled for other in self._waiting):
                    self.metrics.dropped.labels(self.name).inc()
                else:
                    _notify(drawing, self._picture(so_far, shape))

        try:
            drawn = self.pipeline(
                [drawing.prompt for drawing in filled],
                negative_prompt=key.negative_prompt,
                seed=[drawing.seed for drawing in filled],
                height=key.height,
                width=key.width,
                output_type="codes",
                batch_size=shape,
                on_row=on_row,
                **dataclasses.asdict(key.sampling),
            )
            for drawing, codes in zip(batch, drawn.codes, strict=False):
                if not drawing.cancelled:
                    picture = self._picture(codes, shape)
                    self.metrics.images.labels(self.name).inc()
                    _notify(drawing, picture)
                left.remove(drawing)
                self._progress = self.clock()
            self._failures = 0
        except Exception as error:
            smaller = [each for each in self.shapes if each < shape]
            if isinstance(error, MemoryError) and smaller:
                message = "%s: %s Images of %d × %d pixels are drawn %d at once from now on."
                log.warning(message, self.name, error, key.width, key.height, smaller[-1])
                self._largest[key.height, key.width] = smaller[-1]
                with self._changed:
                    self._keep([*left, *self._waiting])
                return
            if not isinstance(error, StoppedError):
                log.exception("%s: a batch of %d images failed", self.name, len(batch))
                self._failures += not isinstance(error, MemoryError)
            for drawing in left:
                _notify(drawing, error)

    def _picture(self, codes: Tensor, batch_size: int) -> Picture:
        """Decoded alone, so that the visual tokenizer has one shape too."""
        return Picture(pil_images(self.pipeline.decode(codes[None]))[0], len(codes), batch_size)


def _notify(drawing: Drawing, event: Picture | Exception) -> None:
    if not drawing.cancelled:
        drawing.notify(event)
