"""What is exported: the training's weights, to stock transformers a Qwen2; and what is refused before it is written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from callbacks.conftest import CAPTIONS
from simplear.callbacks.checkpointing import StateIO
from simplear.cli import main
from simplear.evaluation import accuracy_result, markdown_table, merge_run
from simplear.export import export
from simplear.generation import SimpleARPipeline
from simplear.language_model import (
    CheckpointError,
    checkpoint_hash,
    load_checkpoint,
    train_text_tokenizer,
)
from simplear.states import damage
from toys import make_visual_tokenizer

PREFIX = "language_model."


def weights_of(state: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(state, weights_only=True)["state_dict"]
    return {name.removeprefix(PREFIX): weight for name, weight in saved.items()}


def hashes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_state_becomes_a_directory_that_stock_transformers_loads(
    trained: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out = trained / "run" / "states" / "last.ckpt", tmp_path / "out"
    monkeypatch.setattr("simplear.export.command.SHARD_SIZE", size)
    main(["export", str(state), "--out", str(out)])
    files = [file.name for file in out.glob("*.safetensors")]
    assert (len(files) > 3 and (out / "model.safetensors.index.json").exists()) == (size == "20KB")
    # The embeddings, 334 × 64 numbers, are the largest single weight.
    assert all((out / name).stat().st_size < 334 * 64 * 4 + 1000 for name in files) or size == "5GB"
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert type(stock) is Qwen2ForCausalLM and stock.dtype == torch.float32
    expected = weights_of(state)
    assert {f"decoder.{name}" for name in stock.state_dict()} == expected.keys()
    assert all(torch.equal(weight, expected[f"decoder.{name}"]) for name, weight in stock.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(out)) == load_checkpoint(out).settings.image_token_offset
    one, other = (SimpleARPipeline.from_pretrained(path, device="cpu") for path in (out, state.with_suffix("")))
    assert torch.equal(*(pipe("one star", seed=3, output_type="codes").codes for pipe in (one, other)))
    assert one("one star", seed=3).images[0].size == (24, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_of_another_precision(trained: Path, tmp_path: Path) -> None:
    source = trained / "run" / "model"
    export(str(source), out=str(tmp_path / "out"), dtype="bfloat16")
    stock, before = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_checkpoint(source).model.decoder
    assert stock.dtype == torch.bfloat16
    for name, weight in before.state_dict().items():
        assert torch.equal(stock.state_dict()[name], weight.bfloat16()), name
    export(str(tmp_path / "out"), out=str(tmp_path / "again"))
    assert load_checkpoint(tmp_path / "again").model.decoder.dtype == torch.bfloat16


@pytest.mark.long
def test_what_fsdp2_wrote_on_two_processes_is_exported(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "callbacks" / "fit_sharded.py"
    train_text_tokenizer(CAPTIONS * 20, 300, tmp_path / "text")
    visual = make_visual_tokenizer(tmp_path / "visual")
    subprocess.run([sys.executable, script, tmp_path / "text", visual, tmp_path, "2"], check=True, timeout=300)
    state = tmp_path / "states" / "last.ckpt"
    assert state.is_dir() and len(list(state.glob("*.distcp"))) == 2
    export(str(state), out=str(tmp_path / "out"))
    ours, trained = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("out", "model"))
    assert all(torch.equal(weight, trained[name]) for name, weight in ours.items())


class Evil:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (self.file, "w"))


@pytest.mark.parametrize("kind", ["file", "meta", "metadata"])
def test_nothing_in_a_state_is_run(trained: Path, tmp_path: Path, kind: str) -> None:
    """Neither when it is checked nor when training would go on from it."""
    from torch.distributed.checkpoint import save

    state, file = tmp_path / "evil.ckpt", tmp_path / "was-run"
    content = torch.load(trained / "run" / "states" / "last.ckpt", weights_only=True)
    if kind == "file":
        torch.save({**content, "hyper_parameters": Evil(str(file))}, state)
    else:
        save({"state_dict": content.pop("state_dict")}, checkpoint_id=state, no_dist=True)
        torch.save({"global_step": 1, **({"x": Evil(str(file))} if kind == "meta" else {})}, state / "meta.pt")
        if kind == "metadata":
            (state / ".metadata").write_bytes(pickle.dumps(Evil(str(file))))
    assert (damage(state) is not None) == (kind == "metadata")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        StateIO().load_checkpoint(state)
    assert not file.exists()
    assert kind != "metadata" or "describes no tensor" in str(damage(state))


def test_what_a_plain_unpickler_would_run_is_run_by_it(tmp_path: Path) -> None:
    """The wrong variant: so the test above tests something."""
    pickle.loads(pickle.dumps(Evil(str(tmp_path / "was-run")))).close()
    assert (tmp_path / "was-run").exists()


def test_sources_that_cannot_be_exported_are_refused_by_name(trained: Path, tmp_path: Path) -> None:
    states, model = trained / "run" / "states", str(trained / "run" / "model")
    merge_run(tmp_path / "report.json", "sft", accuracy_result({"colors": [True]}))
    alone = shutil.copy(states / "last.ckpt", tmp_path / "alone.ckpt")
    before = hashes(tmp_path)
    for source, words in (
        (alone, r"a training state: name .*alone, the checkpoint directory that training writes beside it"),
        (trained / "run" / "model" / "config.json", "a file: name the directory that it lies in"),
        (tmp_path / "nowhere.ckpt", "no checkpoint at"),
        (trained / "run" / "model" / "model.safetensors", "a file of weights: name the directory that it lies in"),
        (trained / "visual_tokenizer", "it is a visual tokenizer"),
        (states, "a directory of models: name one of .*last"),
    ):
        with pytest.raises(CheckpointError, match=words):
            export(str(source), out=str(tmp_path / "out"))
    for options, words in (
        ({"report": "nowhere.json"}, "no report at nowhere.json"),
        ({"report": str(tmp_path / "report.json"), "runs": ["grpo"]}, "has no run 'grpo'; it has: sft"),
        ({"visual_tokenizer": str(make_visual_tokenizer(tmp_path / "visual", seed=1))}, "has fingerprint"),
        ({"visual_tokenizer": str(tmp_path / "nowhere")}, r"nowhere is not a visual tokenizer"),
        ({"prompt": "a red circle " * 60}, "prompt 0 .*has .* tokens"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            export(model, out=str(tmp_path / "out"), **options)
    shutil.rmtree(tmp_path / "visual")
    with pytest.raises(FileExistsError, match="exists already"):
        export(model, out=str(tmp_path / "report.json"))
    assert hashes(tmp_path) == before


def test_odd_names_of_places_are_taken(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the directory that it stands in, into one whose name a snippet must quote, prompts as they are typed."""
    source = Path(shutil.copytree(trained / "run" / "model", tmp_path / "epoch=0-step=2"))
    merge_run(tmp_path / "results" / "report.json", "a|b", accuracy_result({"colors": [True]}))
    monkeypatch.chdir(source)
    out = '../größe "1": a=b'
    main(["export", ".", "--out", out, "--prompt", "#1: null", "--report", "../results"])
    card = (Path(out) / "README.md").read_text(encoding="utf-8")
    assert "Exported from `epoch=0-step=2`" in card and "| category | a\\|b |" in card and '"#1: null"' in card
    (quoted,) = re.findall(r"SimpleARPipeline\.from_pretrained\((.*)\)", card)
    assert json.loads(quoted) == Path(out).name
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        export(".", out="../link")


def test_an_export_that_is_stopped_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("simplear.export.command.model_card", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(str(trained / "run" / "model"), out=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_missing_or_cut_shard_is_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simplear.export.command.SHARD_SIZE", "20KB")
    export(str(trained / "run" / "model"), out=str(tmp_path / "out"))
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_checkpoint(tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(tmp_path / "out")


@pytest.fixture
def carded(trained: Path, tmp_path: Path) -> Path:
    """An export with all that a card can say."""
    merge_run(tmp_path / "report.json", "another", accuracy_result({"colors": [True]}))
    merge_run(tmp_path / "report.json", "sft", accuracy_result({"colors": [True] * 30 + [False] * 10}))
    export(
        str(trained / "run" / "states" / "last.ckpt"),
        out=str(tmp_path / "shapes-small"),
        prompt=["one star", 'a "red" circle'],
        report=str(tmp_path / "report.json"),
        runs=["sft"],
        license="apache-2.0",
        base_model="Qwen/Qwen2.5-0.5B",
    )
    return tmp_path / "shapes-small"


def test_the_card_says_what_is_known(carded: Path) -> None:
    card = (carded / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert front["pipeline_tag"] == "text-to-image" and front["library_name"] == "simplear"
    parameters = sum(weight.numel() for weight in load_checkpoint(carded).model.parameters())
    for words in (
        "Exported from `last`",
        "2 × 3 codes of 8 × 8 pixels",
        f"| parameters | {parameters:,} |",
        f"`{checkpoint_hash(carded)}`",
        "| **overall** | 75.0% (59.8–85.8) |",
        "![Images drawn by this checkpoint](samples.png)",
    ):
        assert words in card, words
    report = json.loads((carded.parent / "report.json").read_text())
    assert markdown_table({"runs": {"sft": report["runs"]["sft"]}}) in card and "another" not in card
    assert min(Image.open(carded / "samples.png").size) > 100


def test_the_snippets_of_the_card_run(carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(carded.parent)
    snippets = re.findall(r"```python\n(.*?)```", (carded / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert Image.open("drawn.png").size == (24, 16)


def test_a_card_makes_nothing_up(trained: Path, tmp_path: Path) -> None:
    export(str(trained / "run" / "model"), out=str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in front and "base_model" not in front
    assert "None is stated" in card and "samples.png" not in card
    assert "## Evaluation" not in card


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64)
asked = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
out = model.generate(asked, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False))
print("drawn", json.dumps([list(each.outputs[0].token_ids) for each in out]))
"""


@pytest.mark.long
def test_stock_vllm_loads_it_as_qwen2_and_continues_as_transformers_does(trained: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    python = Path(os.environ.get("SIMPLEAR_VLLM_PYTHON", root / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        pytest.fail(f"no vLLM environment: {python} is missing. make vllm-env sets it up.")
    out = tmp_path / "out"
    export(str(trained / "run" / "states" / "last.ckpt"), out=str(out))
    prompts = [[5, 9, 11, 40, 7], [100, 2, 3]]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [python, "-c", VLLM, out, json.dumps(prompts)]
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    drawn = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("drawn")).removeprefix("drawn"))
    stock = AutoModelForCausalLM.from_pretrained(out)
    for prompt, continued in zip(prompts, drawn, strict=True):
        expected = stock.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert continued == expected[0, len(prompt) :].tolist()
