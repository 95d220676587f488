"""The fast engines: a fused copy of the decoder (`DecoderStep`), and one pass of it as a function over fixed tensors.

A pass reads the last final code of each image (and drafts behind it, see `jacobi`), runs the decoder, applies guidance,
draws, and writes the codes back. Everything happens in place, on tensors whose addresses do not change, and guidance,
temperature and seeds are such tensors too. So nothing waits for the device, one compiled pass serves every request of
its shape, and rollouts of a model in training copy its weights and allocate nothing.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from simplear.errors import UserError
from simplear.generation.decoder_step import CacheMemory, DecoderStep, RowCache
from simplear.generation.engine import DrawRequest, Engine, round_up
from simplear.generation.jacobi import verify_drafts
from simplear.generation.sampling import Noise, SamplingSettings, SamplingTensors
from simplear.language_model import LanguageModel

logger = logging.getLogger(__name__)

ROOM = 64
"""Tokens by which a compiled pass's cache grows from one shape to the next."""
SHAPES = 64
"""Compiled at most: numbers of images, sizes of the cache, grids. Further shapes run uncompiled, with a warning."""
WARM_UP = 3
"""Passes before one is recorded: the first compiles, and libraries take their working memory in it."""
WINDOW = 7
"""Drafts in each pass of the `jacobi` engine by default: the best for one image of the demo, see docs/generation.md."""


class DecodeState(nn.Module):
    """A batch of B images while it is drawn, in R rows: R = B, or 2 B with guidance, conditional ones first.

    Args:
        model: for its layout and positions.
        step: runs the decoder.
        cache: R rows.
        images: B.
        grid: rows and columns of codes; N in all.
        sampling: which parts of it are used; the numbers come with each request.
        window: W, drafts in each pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        step: DecoderStep,
        cache: RowCache,
        images: int,
        grid: tuple[int, int],
        sampling: SamplingSettings,
        window: int,
    ) -> None:
        super().__init__()
        self.step, self.cache, self.images, self.grid, self.window = step, cache, images, grid, window
        self.count, self.offset, self.positions_at = (
            grid[0] * grid[1],
            model.layout.image_token_offset,
            model.positions_at,
        )
        self.visible = cache.capacity
        """Tokens of each row that attention under a mask reads."""
        options: dict[str, Any] = {"dtype": torch.long, "device": cache.layers[0].device}
        self.sampling = SamplingTensors(sampling, options["device"])
        self.noise = Noise([0] * images, model.layout.codebook_size, options["device"])
        width = self.count + 2 * window + 1
        self.canvas = nn.Buffer(torch.zeros(images, width, **options))
        """(B, N + 2 W + 1) final codes, then drafts."""
        self.fixed_codes = nn.Buffer(torch.zeros(images, width, **options))
        """(B, N + 2 W + 1) codes to keep, or -1."""
        self.final_counts = nn.Buffer(torch.ones(images, **options))
        """(B,) number of final codes of each image."""
        self.prompt_lengths = nn.Buffer(torch.ones(cache.rows, **options))
        """(R,) in tokens."""

    def begin(self, first_logits: Tensor, prompt_lengths: Tensor, fixed_codes: Tensor) -> None:
        """Draw the first code of each image.

        Args:
            first_logits: (R, codebook_size) behind the prompts.
            prompt_lengths: (R,) in tokens.
            fixed_codes: (B, N) codes to keep, or -1.
        """
        self.fixed_codes.fill_(-1)[:, : self.count] = fixed_codes
        self.canvas.copy_(self.fixed_codes.clamp(min=0))
        self.prompt_lengths.copy_(prompt_lengths)
        self.final_counts.zero_()
        self._verify(first_logits[:, None])

    def advance(self) -> None:
        """One pass: 1 to W + 1 more codes of each image are final."""
        rows_per_image = len(self.prompt_lengths) // self.images
        places = self.final_counts[:, None] + torch.arange(-1, self.window, device=self.canvas.device)
        ids = (self.canvas.gather(1, places) + self.offset).repeat(rows_per_image, 1)
        in_row = self.prompt_lengths[:, None] + places.repeat(rows_per_image, 1)
        positions = self.positions_at(in_row, self.prompt_lengths, self.grid)
        self._verify(self.step.logits(self.step.hidden(ids, positions, in_row, self.cache, self.visible)))

    def _verify(self, logits: Tensor) -> None:
        state = (self.canvas, self.fixed_codes, self.final_counts)
        verify_drafts(logits, self.images, self.sampling, self.noise, *state, self.count, self.window)


class FusedEngine(Engine):
    """Draws with a fused copy of the decoder.

    Args:
        model: on the device where it is to run. Under autocast its copy has autocast's dtype, else the model's own.
        compiled: run a pass under `torch.compile`, and on a GPU as one CUDA graph. The first request of a shape
            compiles, which takes seconds to a minute; later ones, whatever their prompts, seeds, guidance and
            temperature, do not.
        prompt_multiple: prompts are padded to a multiple of this many tokens. Batches of equally many images then
            mostly have one shape, at which a picture is the same, bit for bit, whatever else is in the batch.
        window: W, drafts in each pass.
        on_pass: called after each pass with the number of final codes of each image.
    """

    name = "fused"

    def __init__(
        self,
        model: LanguageModel,
        *,
        compiled: bool = False,
        prompt_multiple: int = 1,
        window: int = 0,
        on_pass: Callable[[list[int]], None] | None = None,
    ) -> None:
        super().__init__(model)
        if window < 0:
            raise UserError(f"window {window} must be 0 or more.")
        self.compiled, self.prompt_multiple, self.window, self.on_pass = compiled, prompt_multiple, window, on_pass
        self.step: DecoderStep | None = None
        self.memory: CacheMemory | None = None
        self.prefill_memory: CacheMemory | None = None
        self.compiled_passes: dict[Any, tuple[DecodeState, Callable[[], None]]] = {}
        """By shape: a state and its compiled pass."""
        self.graph_pool: Any = None
        """Memory that CUDA graphs share."""

    def _draw(self, request: DrawRequest) -> tuple[Tensor, int]:
        device = next(self.model.parameters()).device
        self.refresh()
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            state, advance, prompt_width = self.prefill(request)
            passes, finished = 1, 0
            while True:
                # Without drafts the counts are known, and nothing is read back from the device.
                reads = self.window > 0 or self.on_pass is not None
                final_counts = state.final_counts.tolist() if reads else [passes]
                if self.on_pass is not None:
                    self.on_pass(final_counts)
                for place in range(finished, min(final_counts)):
                    request.show(state.canvas, place + 1)
                finished = min(final_counts)
                if finished == request.count:
                    return state.canvas[:, : request.count].clone(), passes
                if not self.compiled:
                    state.visible = prompt_width + max(final_counts) + self.window
                advance()
                passes += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's present weights into the step; outside inference mode, whose tensors training cannot use."""
        weight = next(self.model.parameters())
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        if self.step is None or (self.step.dtype, self.step.device) != (dtype, device):
            self.step = DecoderStep(self.model, dtype)
            self.memory, self.prefill_memory = (CacheMemory(self.step) for _ in range(2))
            self.compiled_passes.clear()
            self.graph_pool = None
        self.step.load(self.model)

    def prefill(self, request: DrawRequest) -> tuple[DecodeState, Callable[[], None], int]:
        """A state whose first codes are drawn, its pass, and the number of tokens that prompts are padded to."""
        assert self.step is not None and self.prefill_memory is not None
        device = self.step.device
        prompts, prompt_of_row = unique_prompts(request.prompt_ids, request.negative_ids)
        width = round_up(max(map(len, prompts)), self.prompt_multiple)
        state, advance = self._state(len(prompt_of_row), width, request)
        ids = pad_sequence([ids.to(device) for ids in prompts], batch_first=True)
        ids = F.pad(ids, (0, width - ids.shape[1]), value=self.model.layout.padding_id)
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        places = torch.arange(width, device=device).expand(len(prompts), -1)
        # Prefilled in memory of its own, since several rows may begin with the same prompt.
        cache = self.prefill_memory.cache(len(prompts), width)
        hidden = self.step.hidden(ids, self.model.positions_at(places, lengths, request.grid), places, cache, width)
        last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
        rows = torch.tensor(prompt_of_row, device=device)
        state.cache.take(cache, rows)  # padding stands behind a row's length, where later tokens replace it
        state.sampling.set(request.sampling)
        state.noise.set(request.seeds)
        state.begin(self.step.logits(last)[rows], lengths[rows], request.initial_codes(device))
        return state, advance, width

    def _state(self, rows: int, prompt_width: int, request: DrawRequest) -> tuple[DecodeState, Callable[[], None]]:
        assert self.step is not None and self.memory is not None
        capacity = prompt_width + request.count + self.window + 1
        if self.compiled:
            capacity = round_up(capacity, ROOM)
        shape = (rows, request.images, capacity, request.grid, request.sampling.parts)
        if shape in self.compiled_passes:
            return self.compiled_passes[shape]
        cache = self.memory.cache(rows, capacity)
        state = DecodeState(self.model, self.step, cache, request.images, request.grid, request.sampling, self.window)
        if self.compiled and len(self.compiled_passes) < SHAPES:
            self.compiled_passes[shape] = state, self._recorded(compiled_pass(state))
            return self.compiled_passes[shape]
        if self.compiled:
            logger.warning("%d shapes are compiled already; this one runs uncompiled, which is slower", SHAPES)
        return state, state.advance

    def _recorded(self, advance: Callable[[], None]) -> Callable[[], None]:
        """The same pass as one CUDA graph. It runs before `DecodeState.begin`, which overwrites what it leaves."""
        assert self.step is not None
        device = self.step.device
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
            with torch.cuda.graph(graph, pool=self.graph_pool, capture_error_mode="thread_local"):
                advance()
        self.graph_pool = graph.pool()
        return graph.replay


def unique_prompts(prompt_ids: Sequence[Tensor], negative_ids: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The sequences to prefill, and the index of each row's sequence.

    A negative prompt that all images share is prefilled once.

    Args:
        prompt_ids: B.
        negative_ids: B more, or none.
    """
    images = len(prompt_ids)
    if len(negative_ids) > 1 and all(torch.equal(ids, negative_ids[0]) for ids in negative_ids[1:]):
        return [*prompt_ids, negative_ids[0]], [*range(images), *[images] * images]
    return [*prompt_ids, *negative_ids], list(range(images + len(negative_ids)))


def compiled_pass(state: DecodeState) -> Callable[[], None]:
    """`DecodeState.advance` of one state, compiled for its shape alone.

    The function has its own code object, so that shapes do not count against each other's limit of compilations.
    """
    original = DecodeState.advance
    own = types.FunctionType(
        original.__code__.replace(), original.__globals__, original.__name__, None, original.__closure__
    )
    compiled = torch.compile(own, fullgraph=True, dynamic=False)
    return lambda: compiled(state)


class CompiledEngine(FusedEngine):
    """`FusedEngine` with a compiled pass: for serving and many prompts, not for a single picture.

    Args:
        model: on the device where it is to run.
        prompt_multiple: as for `FusedEngine`.
    """

    name = "compiled"

    def __init__(self, model: LanguageModel, prompt_multiple: int = 1) -> None:
        super().__init__(model, compiled=True, prompt_multiple=prompt_multiple)


class JacobiEngine(FusedEngine):
    """Draws several codes a pass where the model is sure of them (see `jacobi`); images advance at their own pace.

    Args:
        model: on the device where it is to run.
        window: W, drafts in each pass; 0 draws code by code.
        compiled: as for `FusedEngine`.
        on_pass: as for `FusedEngine`; of the codes that a pass makes final, all but the last were drafts.
    """

    name = "jacobi"

    def __init__(
        self,
        model: LanguageModel,
        window: int = WINDOW,
        compiled: bool = False,
        on_pass: Callable[[list[int]], None] | None = None,
    ) -> None:
        super().__init__(model, compiled=compiled, window=window, on_pass=on_pass)
