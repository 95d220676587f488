"""The `vllm` engine: each guided image is a pair of requests to vLLM, which batches and schedules as it sees fit.

It knows token ids and a checkpoint directory. vLLM reads the weights itself; of the `LanguageModel` only the layout and
the number of positions are read, so its weights may be missing.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from simplear.generation.engine import DrawRequest, Engine
from simplear.language_model import LanguageModel
from simplear_vllm.request import ImageRequest, Role
from simplear_vllm.requirements import (
    ARCHITECTURE,
    LOGITS_PROCESSOR,
    SCHEDULER,
    V2_RUNNER,
    VLLMError,
    check_configuration,
    check_version,
)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a second process would import the user's script again
    V2_RUNNER: "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
"""Variables of vLLM where the user has set none."""


class VLLMEngine(Engine):
    """Draws through vLLM. Fixed codes take a step each, as drawn ones do.

    Args:
        model: layout and positions; its weights are not read and may be on the meta device.
        directory: the checkpoint, from which vLLM reads the weights.
        vllm_options: arguments of ``vllm.EngineArgs``, such as gpu_memory_utilization, max_num_seqs, enforce_eager.

    Raises:
        VLLMError: vLLM is missing or of an unknown version, the checkpoint has 2-D RoPE, or an option that would split
            pairs; the message names it. `generate` raises it with the reason when vLLM refuses an image, and can be
            called again; after the RuntimeError of a split pair it cannot.
    """

    name = "vllm"

    def __init__(self, model: LanguageModel, directory: str | Path | None = None, **vllm_options: Any) -> None:
        check_version()
        super().__init__(model)
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
        self._configuration = tempfile.TemporaryDirectory(prefix="simplear-vllm-")
        model.decoder.config.save_pretrained(self._configuration.name)
        own = {
            "model": str(directory),
            "dtype": next(model.parameters()).dtype,
            "skip_tokenizer_init": True,
            # Released directories name another architecture, and perhaps another model type or none. The model was
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
            raise VLLMError(f"the vllm engine does not work with the V2 model runner of GPU builds: set {V2_RUNNER}=0.")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it logs before it reads that
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        # Compiling on a CPU takes minutes, more than it gains.
        defaults = {"max_model_len": model.max_positions, "enforce_eager": current_platform.is_cpu()}
        config = EngineArgs(**{**defaults, **own, **vllm_options}).create_engine_config()
        check_configuration(config)
        self._sampling_params, self._delta = SamplingParams, RequestOutputKind.DELTA
        self._vllm = LLMEngine.from_vllm_config(config, disable_log_stats=True)

    def _draw(self, request: DrawRequest) -> tuple[Tensor, int]:
        image_of: dict[str, int] = {}
        drawn: dict[str, list[int]] = {}
        conditional, steps, width, finished_rows = [], 0, request.grid[1], 0
        try:
            for image in range(request.images):
                for row in self._rows(request, image):
                    prompts = request.prompt_ids if row.role == "conditional" else request.negative_ids
                    name = self._add(row, prompts[image])
                    image_of[name], drawn[name] = image, []
                    conditional += [name] if row.role == "conditional" else []
            while self._vllm.has_unfinished_requests():
                outputs = self._vllm.step()
                steps += bool(outputs)
                for output in outputs:
                    completion = output.outputs[0]
                    if completion.finish_reason not in (None, "length"):
                        reason = completion.stop_reason or completion.finish_reason
                        raise VLLMError(f"vLLM did not draw image {image_of[output.request_id]}: {reason}")
                    drawn[output.request_id] += completion.token_ids
                reached = min(map(len, drawn.values())) // width
                for row_number in range(finished_rows + 1, reached + 1):
                    codes = self._codes([drawn[name][: row_number * width] for name in conditional])
                    request.show(codes, row_number * width)
                finished_rows = reached
        finally:
            self._vllm.abort_request(list(drawn))
        return self._codes([drawn[name] for name in conditional]), steps

    def _rows(self, request: DrawRequest, image: int) -> Iterator[ImageRequest]:
        """One request, or two with guidance."""
        pair = uuid.uuid4().hex if request.negative_ids else None
        fixed_codes = None if request.fixed_codes is None else request.fixed_codes[image].flatten().tolist()
        for role in get_args(Role)[: 1 if pair is None else 2]:
            yield ImageRequest(
                codes=request.count,
                seed=int(request.seeds[image]) % 2**64,
                image_token_offset=self.model.layout.image_token_offset,
                codebook_size=self.model.layout.codebook_size,
                sampling=request.sampling,
                pair=pair,
                role=role,
                fixed_codes=fixed_codes,
            )

    def _add(self, row: ImageRequest, prompt: Tensor) -> str:
        name = uuid.uuid4().hex
        params = self._sampling_params(
            temperature=0.0,
            max_tokens=row.codes,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._delta,
            extra_args=row.extra_args(),
        )
        self._vllm.add_request(name, {"type": "token", "prompt_token_ids": prompt.tolist()}, params)
        return name

    def _codes(self, ids: list[list[int]]) -> Tensor:
        return self.model.layout.codes_of_ids(torch.tensor(ids))
