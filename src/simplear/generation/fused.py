"""The fast engines: a fused copy of the decoder (`DecoderStep`), and one pass of it as a function over fixed tensors.

A pass reads the last final code of each image (and drafts behind it, see `drafts`), runs the decoder, applies guidance,
draws, and writes the codes back: all in place, on tensors whose addresses do not change, with guidance, temperature and
seeds among them. So nothing waits for the device, one compiled pass serves every request of its shape, and rollouts of
a model in training copy its weights and allocate nothing.
"""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from simplear.generation.decoder_step import CacheMemory, DecoderStep
from simplear.generation.drafts import Proposal, propose_drafts, verify_drafts
from simplear.generation.engine import (
    GenerationStats,
    RowCallback,
    check_request,
    kept_codes,
    leading,
    prompt_width,
    read_once,
    require_multiple,
)
from simplear.generation.sampling import Noise, SamplingSettings, SamplingTensors
from simplear.language_model import LanguageModel

logger = logging.getLogger(__name__)

ROOM = 64
"""Tokens by which a compiled pass's cache grows from one shape to the next."""
SHAPES = 64
"""Compiled at most: numbers of images, sizes of the cache, grids. Further shapes run uncompiled, which is said once."""
WARM_UP = 3
"""Passes before one is recorded: the first compiles, and libraries take their working memory in it."""


class Drawing(nn.Module):
    """A batch of B images while it is drawn: R = B rows, or 2 B with guidance, conditional ones first.

    Args:
        model: for its layout and positions.
        step: runs the decoder.
        memory: of the cache.
        rows: R.
        images: B.
        capacity: tokens that a row of the cache holds.
        grid: rows and columns of codes.
        sampling: which parts of it are used; the numbers come with each request.
        window: W, drafts in each pass.
        proposal: of drafts that no pass has drawn yet.
    """

    def __init__(
        self,
        model: LanguageModel,
        step: DecoderStep,
        memory: CacheMemory,
        rows: int,
        images: int,
        capacity: int,
        grid: tuple[int, int],
        sampling: SamplingSettings,
        window: int,
        proposal: Proposal,
    ) -> None:
        super().__init__()
        self.step, self.cache = step, memory.cache(rows, capacity)
        self.images, self.grid, self.count, self.window, self.proposal = (
            images,
            grid,
            grid[0] * grid[1],
            window,
            proposal,
        )
        self.offset, self.positions_at, self.visible = model.layout.image_token_offset, model.positions_at, capacity
        self.sampling = SamplingTensors(sampling, memory.device)
        self.noise = Noise([0] * images, model.layout.codebook_size, memory.device)
        options: dict[str, Any] = {"dtype": torch.long, "device": memory.device}
        for name, size in (("canvas", self.count + window + 1), ("kept", self.count + window + 1)):
            self.register_buffer(name, torch.zeros(images, size, **options), persistent=False)
        for name, size in (("done", images), ("drafted", images), ("lengths", rows)):
            self.register_buffer(name, torch.ones(size, **options), persistent=False)

    canvas: Tensor
    """(B, N + W + 1) codes that are final, and drafts."""
    kept: Tensor
    """(B, N + W + 1) codes that are given, or -1."""
    done: Tensor
    """(B,) codes that are final."""
    drafted: Tensor
    """(B,) where places begin that no pass has drawn at yet."""
    lengths: Tensor
    """(R,) tokens of the prompts."""

    def begin(self, first_logits: Tensor, lengths: Tensor, given: Tensor, first: int) -> None:
        """Draw the first code of each image.

        Args:
            first_logits: (R, codebook_size) behind what was prefilled.
            lengths: (R,) tokens of the prompts.
            given: (B, N) codes to keep, or -1.
            first: codes that were prefilled with the prompts.
        """
        self.kept.fill_(-1)[:, : self.count] = given
        self.canvas.copy_(self.kept.clamp(min=0))
        self.lengths.copy_(lengths)
        self.done.fill_(first)
        self.drafted.fill_(first)
        self._draw(first_logits[:, None])

    def advance(self) -> None:
        """One pass: 1 to W + 1 more codes of each image are final."""
        pairs = len(self.lengths) // self.images
        behind = torch.arange(-1, self.window, device=self.done.device)
        places = self.done[:, None] + behind
        ids = (self.canvas.gather(1, places) + self.offset).repeat(pairs, 1)
        stand = self.lengths[:, None] + places.repeat(pairs, 1)
        positions = self.positions_at(stand, self.lengths, self.grid)
        hidden = self.step.hidden(ids, positions, stand, self.cache, self.visible)
        self._draw(self.step.logits(hidden))

    def _draw(self, logits: Tensor) -> None:
        verify_drafts(
            logits, self.images, self.sampling, self.noise, self.canvas, self.kept, self.done, self.drafted, self.count
        )
        if self.window:
            propose_drafts(self.canvas, self.kept, self.done, self.drafted, self.window, self.grid[1], self.proposal)


class FusedEngine:
    """Draws with a fused copy of the decoder.

    Args:
        model: on the device where it is to run. Under autocast its copy has autocast's dtype, else the model's own.
        compiled: run a pass under `torch.compile`, and on a GPU as one CUDA graph. The first request of a shape
            compiles, which takes seconds to a minute; later ones, whatever their prompts, seeds, guidance and
            temperature, do not.
        prompt_multiple: prompts are padded to a multiple of so many tokens. Then batches of as many images mostly have
            one shape, at which a picture is the same, bit for bit, whatever else is in the batch.
        window: W, drafts in each pass.
        proposal: of drafts that no pass has drawn yet.
        on_pass: called after each pass with how many codes of each image are final.
    """

    name = "fused"

    def __init__(
        self,
        model: LanguageModel,
        *,
        compiled: bool = False,
        prompt_multiple: int = 1,
        window: int = 0,
        proposal: Proposal = "left",
        on_pass: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.model, self.compiled, self.prompt_multiple = model, compiled, require_multiple(prompt_multiple)
        self.window, self.proposal, self.on_pass = window, proposal, on_pass
        self.step: DecoderStep | None = None
        self.memory: CacheMemory | None = None
        self.prefilled: CacheMemory | None = None
        self.passes: dict[Any, tuple[Drawing, Callable[[], None]]] = {}
        """By shape: a drawing and its compiled pass."""
        self.compilations = 0
        self.pool: Any = None
        """Memory that CUDA graphs share."""

    @property
    def tokens_a_pass(self) -> int:
        """Of a row, at most."""
        return 1 + self.window

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        negative_ids: Sequence[Tensor],
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
        on_row: RowCallback | None = None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, GenerationStats]:
        """See `Engine.generate`."""
        check_request(self.model, prompt_ids, negative_ids, grid, seeds, given)
        begin = time.perf_counter()
        images, (height, width), first = len(prompt_ids), grid, leading(given)
        device = next(self.model.parameters()).device
        self.refresh()
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            negatives = list(negative_ids) if sampling.guidance_scale != 1.0 else []
            kept = kept_codes(given, images, height * width, device)
            drawing, advance, read = self.prefill(prompt_ids, negatives, kept, first, grid, sampling, seeds)
            passes = self._draw(drawing, advance, first, read, on_row)
            codes = drawing.canvas[:, : drawing.count].clone().view(images, height, width)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once, for the seconds
        tokens = images * (drawing.count - first)
        return codes, GenerationStats(self.name, images, tokens, passes, time.perf_counter() - begin)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Have the model's present weights in the step; not in inference mode, of which training could use nothing."""
        weight = next(self.model.parameters())
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        if self.step is None or self.step.dtype != dtype or self.step.norm.device != device:
            self.step = DecoderStep(self.model, dtype)
            self.memory, self.prefilled = (CacheMemory(self.model.decoder.config, dtype, device) for _ in range(2))
            self.passes.clear()
            self.pool = None
        self.step.load(self.model)

    def prefill(
        self,
        prompts: Sequence[Tensor],
        negatives: Sequence[Tensor],
        kept: Tensor,
        first: int,
        grid: tuple[int, int],
        sampling: SamplingSettings,
        seeds: Sequence[int],
    ) -> tuple[Drawing, Callable[[], None], int]:
        """A drawing whose first codes are drawn, its pass, and the tokens that were read with the longest prompt.

        An unconditional prompt that all images share is read once.
        """
        assert self.step is not None and self.prefilled is not None
        images, device, layout = len(prompts), kept.device, self.model.layout
        unique, order = read_once(prompts, negatives, first)
        codes = kept[:, :first] + layout.image_token_offset
        ids = pad_sequence(
            [torch.cat([text.to(device), codes[row % images]]) for row, text in enumerate(unique)], batch_first=True
        )
        lengths = torch.tensor([len(text) for text in unique], device=device)
        longest = prompt_width(unique, self.prompt_multiple)
        ids = F.pad(ids, (0, longest + first - ids.shape[1]), value=layout.padding_id)
        places = torch.arange(longest + first, device=device).expand(len(unique), -1)
        rows = torch.tensor(order, device=device)
        drawing, advance = self._drawing(len(order), images, longest, grid, sampling)
        # Read in memory of its own, since rows may be taken several times from it.
        cache = self.prefilled.cache(len(unique), longest + first)
        positions = self.model.positions_at(places, lengths, grid)
        hidden = self.step.hidden(ids, positions, places, cache, longest + first)
        last = hidden[torch.arange(len(unique), device=device), lengths + first - 1]
        drawing.cache.take(cache, rows)  # padding stands behind a row's length, where later tokens replace it
        drawing.sampling.set(sampling)
        drawing.noise.set(seeds)
        drawing.begin(self.step.logits(last)[rows], lengths[rows], kept, first)
        return drawing, advance, longest

    def _drawing(
        self, rows: int, images: int, longest: int, grid: tuple[int, int], sampling: SamplingSettings
    ) -> tuple[Drawing, Callable[[], None]]:
        assert self.step is not None and self.memory is not None
        capacity = longest + grid[0] * grid[1] + self.window + 1
        if self.compiled:
            capacity = -(-capacity // ROOM) * ROOM
        shape = (rows, images, capacity, grid, sampling.parts)
        if shape in self.passes:
            return self.passes[shape]
        drawing = Drawing(
            self.model,
            self.step,
            self.memory,
            rows,
            images,
            capacity,
            grid,
            sampling,
            self.window,
            self.proposal,
        )
        if not self.compiled:
            return drawing, drawing.advance
        if len(self.passes) >= SHAPES:
            if len(self.passes) == SHAPES:
                logger.warning("%d shapes are compiled; further ones run uncompiled, which is slower", SHAPES)
                self.passes[None] = (drawing, drawing.advance)
            return drawing, drawing.advance
        self.passes[shape] = drawing, self._recorded(compiled_pass(drawing))
        self.compilations += 1
        return self.passes[shape]

    def _recorded(self, advance: Callable[[], None]) -> Callable[[], None]:
        """The same pass as one CUDA graph. It runs before `Drawing.begin`, which overwrites what it leaves."""
        assert self.memory is not None
        device = self.memory.device
        if device.type != "cuda":
            return advance
        with torch.cuda.device(device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    advance()
            torch.cuda.current_stream().wait_stream(stream)
            # Passes run one after another and leave nothing in what they allocate, so graphs share it. A server's other
            # threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                advance()
        self.pool = graph.pool()
        return graph.replay

    def _draw(
        self, drawing: Drawing, advance: Callable[[], None], first: int, longest: int, on_row: RowCallback | None
    ) -> int:
        """Advance until all images are whole; the number of passes."""
        count, width, passes, shown = drawing.count, drawing.grid[1], 1, 0
        done = first + 1  # without drafts it is known, and nothing is read back
        while True:
            if drawing.window or self.on_pass is not None:
                progress = drawing.done.tolist()
                done = min(progress)
                if self.on_pass is not None:
                    self.on_pass(progress)
            if on_row is not None:
                for row in range(shown + 1, done // width + 1):
                    on_row(row, drawing.canvas[:, : row * width])
                shown = max(shown, done // width)
            if done == count:
                return passes
            if not self.compiled:
                farthest = max(progress) if drawing.window else done
                drawing.visible = longest + farthest + drawing.window
            advance()
            done, passes = done + 1, passes + 1


def compiled_pass(drawing: Drawing) -> Callable[[], None]:
    """`Drawing.advance` of one drawing, compiled for its shape alone.

    The function has a code object of its own, so that shapes do not count against each other's limit of compilations.
    """
    original = Drawing.advance
    own = types.FunctionType(
        original.__code__.replace(), original.__globals__, original.__name__, None, original.__closure__
    )
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    return lambda: compiled(drawing)


class CompiledEngine(FusedEngine):
    """`FusedEngine` with a compiled pass: for serving and many prompts, not for a single picture.

    Args:
        model: on the device where it is to run.
        prompt_multiple: as for `FusedEngine`.
    """

    name = "compiled"

    def __init__(self, model: LanguageModel, prompt_multiple: int = 1) -> None:
        super().__init__(model, compiled=True, prompt_multiple=prompt_multiple)
