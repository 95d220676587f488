"""The `vllm` engine: each guided image is a pair of requests to vLLM, which batches and schedules as it sees fit.

It knows token ids and a checkpoint directory. vLLM reads the weights itself; of the `LanguageModel` only the layout and
the number of positions are read, so one without weights will do.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from simplear.generation.engine import GenerationStats, RowCallback, check_request
from simplear.generation.sampling import SamplingSettings
from simplear.generation.vllm_plugin.image_request import ImageRequest, Role
from simplear.generation.vllm_plugin.requirements import (
    ARCHITECTURE,
    LOGITS_PROCESSOR,
    NO_V2_RUNNER,
    SCHEDULER,
    V2_RUNNER,
    VLLMError,
    check_configuration,
    check_version,
)
from simplear.language_model import LanguageModel

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would import the user's script again
    V2_RUNNER: "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
"""Variables of vLLM where the user has set none."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class VLLMEngine:
    """Draws through vLLM.

    Args:
        model: layout and positions; its weights are not read and may be on the meta device.
        directory: the checkpoint, from which vLLM reads the weights.
        dtype: of the weights; None takes that of ``model``.
        vllm_options: arguments of ``vllm.EngineArgs``, such as gpu_memory_utilization, max_num_seqs, enforce_eager.

    Raises:
        VLLMError: vLLM is missing or of an unknown version, the checkpoint has 2-D RoPE, or an option that would split
            pairs; the message names it.
    """

    def __init__(
        self,
        model: LanguageModel,
        directory: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **vllm_options: Any,
    ) -> None:
        check_version()
        if directory is None:
            raise VLLMError(
                "the vllm engine reads weights from a checkpoint directory, not from a model in memory: use "
                'SimpleARPipeline.from_pretrained(DIRECTORY, engine="vllm").'
            )
        if model.rope != "1d":
            raise VLLMError(
                f"{directory} has {model.rope} RoPE, and vLLM would read its positions as 1d and draw something else: "
                'use another engine, such as "fused".'
            )
        dtype = next(model.parameters()).dtype if dtype is None else dtype
        if dtype not in DTYPES:
            raise VLLMError(f"vLLM has no {dtype}: name one of {', '.join(map(str, DTYPES))} (dtype=…).")
        self._configuration = tempfile.TemporaryDirectory(prefix="simplear-vllm-")
        model.decoder.config.save_pretrained(self._configuration.name)
        own = {
            "model": str(directory),
            "dtype": str(dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            # Released directories name an architecture and perhaps a model type of their own, or none. The model was
            # read as Qwen2, so vLLM reads its configuration.
            "hf_config_path": self._configuration.name,
            "hf_overrides": {"architectures": [ARCHITECTURE]},
            "generation_config": "vllm",
            "scheduler_cls": SCHEDULER,
            "logits_processors": [LOGITS_PROCESSOR],
            "async_scheduling": False,
            "use_tqdm_on_load": False,
        }
        if taken := sorted(own.keys() & vllm_options.keys()):
            raise VLLMError(f"{', '.join(taken)}: the vllm engine sets this itself. Leave it out.")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ[V2_RUNNER] != "0":
            raise VLLMError(f"the vllm engine does not work with {NO_V2_RUNNER}.")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it speaks before it reads that
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        # What a compiler gains on a CPU, it costs again in minutes of compiling.
        defaults = {"max_model_len": model.max_positions, "enforce_eager": current_platform.is_cpu()}
        config = EngineArgs(**{**defaults, **own, **vllm_options}).create_engine_config()
        check_configuration(config)
        self.model = model
        self._sampling_params, self._delta = SamplingParams, RequestOutputKind.DELTA
        self._vllm = LLMEngine.from_vllm_config(config, disable_log_stats=True)

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
        """See `Engine.generate`. Kept codes take a step each, as drawn ones do.

        Raises:
            VLLMError: what vLLM refused, with its reason. The engine can be used again.
            RuntimeError: a pair was split, or vLLM's process has ended. It cannot.
        """
        check_request(self.model, prompt_ids, negative_ids, grid, seeds, given)
        begin = time.perf_counter()
        images, count = len(prompt_ids), grid[0] * grid[1]
        rows: dict[str, tuple[int, Role]] = {}
        drawn: dict[tuple[int, Role], list[int]] = {}
        steps, finished_rows = 0, 0
        try:
            for image, texts in enumerate(zip(prompt_ids, negative_ids, strict=True)):
                kept = None if given is None else given[image].flatten().tolist()
                for request, prompt in zip(self._requests(seeds[image], count, sampling, kept), texts, strict=False):
                    name = self._add(request, prompt)
                    rows[name] = image, request.role
                    drawn[image, request.role] = []
            while self._vllm.has_unfinished_requests():
                outputs = self._vllm.step()
                steps += bool(outputs)
                for output in outputs:
                    completion = output.outputs[0]
                    if completion.finish_reason not in (None, "length"):
                        reason = completion.stop_reason or completion.finish_reason
                        raise VLLMError(f"vLLM did not draw image {rows[output.request_id][0]}: {reason}")
                    drawn[rows[output.request_id]] += completion.token_ids
                reached = min(map(len, drawn.values())) // grid[1]
                for row in range(finished_rows + 1, reached + 1):
                    if on_row is not None:
                        on_row(row, self._codes(drawn, images, row * grid[1]))
                finished_rows = reached
        finally:
            self._vllm.abort_request(list(rows))
        codes = self._codes(drawn, images, count)
        stats = GenerationStats("vllm", images, images * count, steps, time.perf_counter() - begin)
        return codes.view(images, *grid), stats

    def _requests(
        self, seed: int, count: int, sampling: SamplingSettings, kept: list[int] | None
    ) -> Iterator[ImageRequest]:
        pair = None if sampling.guidance_scale == 1.0 else uuid.uuid4().hex
        for role in get_args(Role)[: 1 if pair is None else 2]:
            yield ImageRequest(
                codes=count,
                seed=int(seed) % 2**64,
                image_token_offset=self.model.layout.image_token_offset,
                codebook_size=self.model.layout.codebook_size,
                sampling=sampling,
                pair=pair,
                role=role,
                given=None if kept is None else tuple(kept),
            )

    def _add(self, request: ImageRequest, prompt: Tensor) -> str:
        name = uuid.uuid4().hex
        params = self._sampling_params(
            temperature=0.0,
            max_tokens=request.codes,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._delta,
            extra_args=request.extra_args(),
        )
        self._vllm.add_request(name, {"type": "token", "prompt_token_ids": prompt.tolist()}, params)
        return name

    def _codes(self, drawn: dict[tuple[int, Role], list[int]], images: int, count: int) -> Tensor:
        """The first codes (B, count) of all images; the rows of a pair must have the same."""
        for image in range(images):
            taken = {tuple(drawn[image, role][:count]) for role in get_args(Role) if (image, role) in drawn}
            if len(taken) != 1 or len(*taken) != count:
                raise RuntimeError(f"the two rows of image {image} took different codes: the pair was split.")
        conditional = torch.tensor([drawn[image, "conditional"][:count] for image in range(images)])
        return self.model.layout.codes_of_ids(conditional)
