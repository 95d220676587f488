"""Drawn by stock vLLM, images are those of the `cached` engine, under all that parts naive pairs.

Each test starts a Python of vLLM's environment (`make vllm-env`; SIMPLEAR_VLLM_PYTHON names another).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from generation.near_ties import margins, right
from simplear.generation import CachedEngine, SamplingSettings, SimpleARPipeline
from simplear.language_model import (
    CheckpointSettings,
    GenerationDefaults,
    LanguageModel,
    load_checkpoint,
    save_checkpoint,
)
from simplear.sequence import prompt_sequence
from toys import model_config

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "draw.py"
GRID = (8, 8)
LENGTHS = [3, 28, 0, 17, 9, 1, 22, 12]
NEGATIVE_LENGTHS = [5, 5, 5, 14, 14, 0, 2, 20]
SEEDS = [11, 3, 5_000_000_000, 3, 2**64 - 1, 0, 8, 9]
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.1, "top_k": 20, "top_p": 0.95}
GREEDY = {"guidance_scale": 1.5, "do_sample": False}
# Blocks of 32 tokens: a row comes to have 3 of them and begins with 1.
OPTIONS = {"block_size": 32, "max_num_seqs": 16, "max_num_batched_tokens": 512}
FEW_BLOCKS = {**OPTIONS, "num_gpu_blocks_override": 20}
FEW_TOKENS = {**OPTIONS, "max_num_batched_tokens": 40, "enable_chunked_prefill": True}
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
TIMEOUT = 300

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str) -> Path:
    """A random model whose codes depend visibly on prompt and codes before them, with heads as large as vLLM wants."""
    torch.manual_seed(0)
    model, tokenizer = model_config(
        tiny_text_tokenizer, hidden_size=64, intermediate_size=128, initializer_range=0.2
    ).build()
    directory = tmp_path_factory.mktemp("vllm") / "checkpoint"
    settings = CheckpointSettings(model.layout.image_token_offset, model.layout.codebook_size, GRID, 8)
    save_checkpoint(directory, model, tokenizer, settings)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LanguageModel:
    return load_checkpoint(checkpoint).model


def texts(model: LanguageModel, lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    captions = [torch.randint(7, 200, (length,), generator=generator).tolist() for length in lengths]
    return [prompt_sequence(caption, model.layout) for caption in captions]


def prompts(model: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    return texts(model, LENGTHS, 1), texts(model, NEGATIVE_LENGTHS, 2)


def run(arguments: list[Any], environment: dict[str, str] | None = None) -> str:
    """What vLLM's Python prints."""
    python = Path(os.environ.get("SIMPLEAR_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        pytest.fail(f"no vLLM environment: {python} is missing. make vllm-env sets it up.")
    ran = subprocess.run(
        [python, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def vllm(
    model: LanguageModel,
    checkpoint: Path,
    directory: Path,
    way: str = "at_once",
    sampling: dict[str, Any] = SAMPLING,
    options: dict[str, Any] = OPTIONS,
    environment: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What `draw.py` answers."""
    asked, negatives = prompts(model)
    request = {
        "way": way,
        "checkpoint": str(checkpoint),
        "prompts": [ids.tolist() for ids in asked],
        "negatives": [ids.tolist() for ids in negatives],
        "grid": GRID,
        "sampling": sampling,
        "seeds": SEEDS,
        "options": options,
        **more,
    }
    (directory / "request.json").write_text(json.dumps(request))
    run([SCRIPT, directory / "request.json", directory / "answer.json"], environment)
    return json.loads((directory / "answer.json").read_text())


def count_right(model: LanguageModel, answer: dict[str, Any], sampling: dict[str, Any], name: str = "codes") -> int:
    """Images that are the `cached` engine's, but for near ties."""
    assert "error" not in answer, answer["error"]
    settings = SamplingSettings(**sampling)
    asked = (*prompts(model), GRID, settings, SEEDS)
    expected, _ = CachedEngine(model).generate(*asked)
    assert len(expected.unique(dim=0)) == 8 and len(expected.unique()) > 20
    return right(margins(model, *asked, expected, torch.tensor(answer[name])), settings)


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY, {"temperature": 1.1}])
def test_all_at_once(model, checkpoint, tmp_path, sampling):
    answer = vllm(model, checkpoint, tmp_path, sampling=sampling)
    assert count_right(model, answer, sampling) == 8
    assert answer["rows"] == [[row, [8, row * 8]] for row in range(1, 9)]
    stats = answer["stats"]
    assert (stats["engine"], stats["images"], stats["tokens"], stats["steps"]) == ("vllm", 8, 512, 64)


@pytest.mark.parametrize(
    "options",
    [
        FEW_BLOCKS,
        FEW_TOKENS,
        {**FEW_TOKENS, "enable_chunked_prefill": False, "max_num_batched_tokens": 96},
        {**OPTIONS, "max_num_seqs": 5},
        {**OPTIONS, "max_num_seqs": 2},
        {**FEW_BLOCKS, **FEW_TOKENS, "num_gpu_blocks_override": 30, "max_num_seqs": 7, "watermark": 0.1},
    ],
    ids=["few-blocks", "few-tokens", "no-chunks", "odd-batch", "one-pair-a-time", "few-of-everything"],
)
def test_under_pressure(model, checkpoint, tmp_path, options):
    answer = vllm(model, checkpoint, tmp_path, options=options)
    assert count_right(model, answer, SAMPLING) == 8
    assert answer["stats"]["steps"] > 64  # they did not all run at once


@pytest.mark.parametrize("options", [FEW_BLOCKS, FEW_TOKENS], ids=["few-blocks", "few-tokens"])
def test_stock_scheduling_is_noticed(model, checkpoint, tmp_path, options):
    """The same pressure without our scheduler: the logits processor raises; without its check, images are wrong."""
    answer = vllm(model, checkpoint, tmp_path, "naive", options=options)
    assert "a scheduler has split it" in answer["error"]
    assert count_right(model, vllm(model, checkpoint, tmp_path, "careless", options=options), SAMPLING) < 8


@pytest.mark.parametrize(("ignored", "options"), [("blocks", FEW_BLOCKS), ("tokens", FEW_TOKENS)])
def test_admission_that_reserves_too_little_is_noticed(model, checkpoint, tmp_path, ignored, options):
    """The logits processor raises before anything wrong is returned."""
    answer = vllm(model, checkpoint, tmp_path, "overcommitted", options=options, ignored=ignored)
    assert "a scheduler has split it" in answer["error"]


@pytest.mark.parametrize("options", [OPTIONS, FEW_BLOCKS, FEW_TOKENS], ids=["room", "few-blocks", "few-tokens"])
@pytest.mark.parametrize("environment", [{}, PROCESSES], ids=["one-process", "processes"])
def test_rows_of_a_pair_that_come_apart(model, checkpoint, tmp_path, options, environment):
    answer = vllm(model, checkpoint, tmp_path, "apart", options=options, environment=environment)
    assert count_right(model, answer, SAMPLING) == 8


def test_several_processes(model, checkpoint, tmp_path):
    answer = vllm(model, checkpoint, tmp_path, options={**FEW_BLOCKS, **FEW_TOKENS}, environment=PROCESSES)
    assert count_right(model, answer, SAMPLING) == 8


def test_tensor_parallel_processes(model, checkpoint, tmp_path):
    answer = vllm(model, checkpoint, tmp_path, options={**FEW_BLOCKS, "tensor_parallel_size": 2})
    assert count_right(model, answer, SAMPLING) == 8


@pytest.mark.parametrize("cached", [True, False])
def test_cached_prefixes(model, checkpoint, tmp_path, cached):
    """Blocks of the negative prompts, and in the second round of whole prompts, are taken from the cache."""
    options = {**FEW_BLOCKS, "num_gpu_blocks_override": 60, "enable_prefix_caching": cached}
    answer = vllm(model, checkpoint, tmp_path, "one_after_another", options=options)
    assert count_right(model, answer, SAMPLING) == count_right(model, answer, SAMPLING, "again") == 8


@pytest.mark.parametrize("environment", [{}, PROCESSES], ids=["one-process", "processes"])
def test_mistakes_are_named_and_the_next_request_is_drawn(model, checkpoint, tmp_path, environment):
    options = {**OPTIONS, "max_num_batched_tokens": 50}
    answer = vllm(model, checkpoint, tmp_path, "after_mistakes", options=options, environment=environment)
    assert count_right(model, answer, SAMPLING) == 8
    first, second, third = answer["told"]
    assert "max_num_batched_tokens is 50 and must be" in first and "image 1:" in third
    assert "a grid of 40 × 40 codes take" in second


def test_what_splits_pairs_is_refused_by_name(model, checkpoint, tmp_path):
    refusals = {
        "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "scheduling policy priority": {"scheduling_policy": "priority"},
        "long_prefill_token_threshold": {"long_prefill_token_threshold": 8},
        "data, pipeline or context parallelism": {"pipeline_parallel_size": 2},
        "LoRA": {"enable_lora": True},
        "scheduler_cls: the vllm engine sets this itself": {"scheduler_cls": "x.Y"},
    }
    answer = vllm(model, checkpoint, tmp_path, "refused", refused=[*refusals.values()])
    for words, told in zip(refusals, answer["told"], strict=True):
        assert told.startswith("VLLMError") and words in told


def test_the_newer_model_runner_is_refused_by_name(model, checkpoint, tmp_path):
    answer = vllm(model, checkpoint, tmp_path, environment={"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in answer["error"]


def test_a_released_directory(model, checkpoint, tmp_path):
    """Architecture and model type of their own, no simplear.json."""
    released = tmp_path / "released"
    released.mkdir()
    for file in checkpoint.iterdir():
        (released / file.name).write_bytes(file.read_bytes())
    (released / "simplear.json").unlink()
    config = json.loads((released / "config.json").read_text())
    config.update(architectures=["SimpARForCausalLM"], model_type="simpar_qwen")
    (released / "config.json").write_text(json.dumps(config))
    assert count_right(model, vllm(model, released, tmp_path), SAMPLING) == 8


def test_the_command_line_draws_the_same_pictures(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer):
    """Tokenizers, defaults and pictures too, where there is no Lightning."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer, hidden_size=64, initializer_range=0.2).build()
    generation = GenerationDefaults(prompt_prefix="a photo of ", guidance_scale=2.0)
    settings = CheckpointSettings(model.layout.image_token_offset, 27, (4, 4), 8, generation=generation)
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    asked = ["--prompt", "a red circle", "--num-images-per-prompt", "2", "--seed", "5", "--out", tmp_path / "drawn"]
    run(["-m", "simplear.cli", "generate", checkpoint, *asked, "--engine", "vllm"])
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    expected = pipe("a red circle", num_images_per_prompt=2, seed=5).images
    drawn = [Image.open(file) for file in sorted((tmp_path / "drawn").iterdir())]
    for one, other in zip(expected, drawn, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_fixed_codes_are_kept(model, checkpoint, tmp_path):
    settings = SamplingSettings(**SAMPLING)
    fixed = torch.full((8, *GRID), -1)
    fixed[:, :2], fixed[3, 4, 2:5] = 5, torch.tensor([7, 8, 9])
    answer = vllm(model, checkpoint, tmp_path, fixed_codes=fixed.tolist())
    expected, _ = CachedEngine(model).generate(*prompts(model), GRID, settings, SEEDS, fixed_codes=fixed)
    assert torch.equal(torch.tensor(answer["codes"]), expected)
