"""The command line: overrides, resuming, and what it says to mistakes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from simplear.atomic import is_running
from simplear.cli import main
from toys import write_pretraining

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
SOURCE = ("--source", "ScenesSource", "--source.count", "3", "--source.resolution", "16")


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue()
    return 0, out.getvalue()


@pytest.fixture
def config(tmp_path: Path, tiny_text_tokenizer: str, tiny_shards: str, tiny_visual_tokenizer: str) -> list[str]:
    """A pretraining of a tiny model on tiny shards, under ``tmp_path/run``."""
    return [
        "fit",
        "--config",
        str(write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards)),
    ]


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "states" / "last.ckpt", weights_only=True)["state_dict"]


def test_resuming_by_last_is_bit_identical(config: list[str], tmp_path: Path) -> None:
    assert run(*config)[0] == 0
    split = ["--trainer.default_root_dir", str(tmp_path / "split"), "--ckpt_path", "last"]
    assert run(*config, *split, "--trainer.max_steps", "4")[0] == 0
    assert run(*config, *split)[0] == 0
    whole, resumed = weights(tmp_path / "run"), weights(tmp_path / "split")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_lightning_says_of_a_training_is_shown_once_and_its_noise_is_not(config: list[str]) -> None:
    """In a process of its own, where the command line sets up logging before Lightning does."""
    words = [*config, "--trainer.profiler", "simple"]
    finished = subprocess.run([sys.executable, "-m", "simplear.cli", *words], capture_output=True, text=True)
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed
    for shown in ("FIT Profiler Report", "|  run_training_epoch", "max_steps=6` reached"):
        assert printed.count(shown) == 1, shown
    for noise in ("available", "Seed set", "defaulting", "Restor", "Tip"):
        assert noise not in printed


def test_resuming_keeps_the_command_line(config: list[str], tmp_path: Path) -> None:
    assert run(*config, "--trainer.max_steps", "2")[0] == 0
    before = weights(tmp_path / "run")
    changed = ["--ckpt_path", "last", "--trainer.max_steps", "4", "--model.init_args.optimizer.init_args.lr", "0.0"]
    changed += ["--model.init_args.objective.text_loss_weight", "1.0"]
    code, printed = run(*config, *changed)
    assert code == 0, printed
    after = weights(tmp_path / "run")
    # A learning rate of 0 moves nothing, weight decay included: were the saved one used, weights would differ.
    assert all(torch.equal(before[name], after[name]) for name in before)
    (metrics,) = (tmp_path / "run" / "logs" / "lightning_logs" / "version_1").glob("metrics.csv")
    assert "train/text_loss" in metrics.read_text()


def test_resuming_under_another_schedule_is_refused(config: list[str], tmp_path: Path) -> None:
    """A schedule's state holds its configuration: a longer training would go on at a rate of zero."""
    schedule = ["--model.init_args.lr_scheduler", "torch.optim.lr_scheduler.PolynomialLR"]
    total = "--model.init_args.lr_scheduler.init_args.total_iters"
    assert run(*config, "--trainer.max_steps", "2", *schedule, total, "2")[0] == 0
    code, printed = run(*config, "--ckpt_path", "last", *schedule, total, "6")
    assert code == 2 and "total_iters = 2, now 6" in printed
    assert run(*config, "--ckpt_path", "last", *schedule, total, "2")[0] == 0


def test_a_run_that_is_refused_leaves_the_configuration_of_the_one_before(
    config: list[str], tmp_path: Path, tiny_shards: str
) -> None:
    """Whenever it is refused, and so does a validation: what lies beside the curves is what was trained."""
    log = ["--trainer.logger.init_args.name", "x", "--trainer.logger.init_args.version", "y"]
    code, printed = run(*config, *log, "--trainer.max_steps", "2")
    assert code == 0, printed
    (saved,) = (tmp_path / "run" / "logs").rglob("config.yaml")
    before = saved.read_text()
    refused = [*config, *log, "--ckpt_path", "last", "--data.init_args.seed", "1"]
    code, printed = run(*refused, "--trainer.max_steps", "4")
    assert code == 2 and "seed = 0, now it is 1" in printed
    code, printed = run("validate", *config[1:], *log, "--data.init_args.validation_paths", tiny_shards)
    assert code == 0, printed
    assert saved.read_text() == before


def test_overlay_resolves_references_over_all_files(
    config: list[str], tmp_path: Path, tiny_text_tokenizer: str
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {language_model: {tokenizer: nowhere/at/all}}}")
    code, printed = run(*config, "--config", str(overlay), "--print_config")
    assert code == 0
    data = printed[printed.index("simplear.data.TokenDataModule") :]
    assert "tokenizer: nowhere/at/all" in data and tiny_text_tokenizer not in data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_stps", "3"], "Did you mean '--trainer.max_steps'?"),
        (["--trainer.max_step", "3"], "Did you mean '--trainer.max_steps'?"),
        (["--model.init_args.optimiser", "torch.optim.SGD"], "Did you mean '--model.init_args.optimizer'?"),
        (["--data.init_args.global_batchsize", "8"], "Did you mean '--data.init_args.global_batch_size'?"),
    ],
)
def test_unknown_keys_name_the_nearest(config: list[str], arguments: list[str], message: str) -> None:
    code, printed = run(*config, *arguments)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_what_a_constructor_refuses_is_said_without_a_trace(config: list[str], tmp_path: Path) -> None:
    """jsonargparse makes an error of its own of it, with all arguments."""
    out = ["--visual-tokenizer", "nowhere", "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([*config, "--data.init_args.caption_dropout", "2"], "caption_dropout 2.0 is not a probability"),
        (["tokenize", "--source", "ImageFolderSource", "--source.path", "nowhere", *out], "nowhere is not a folder"),
    ):
        code, printed = run(*arguments)
        assert code == 2 and message in printed and "Traceback" not in printed and "Given value" not in printed


SOURCES = "HuggingFaceSource, ImageFolderSource, RecaptionedSource, ScenesSource, WebDatasetSource"
CLASSES = {
    "source": (("tokenize", "--source", "FolderSource"), f"--source takes one of {SOURCES}, or the import path"),
    "source by its path": (
        ("recaption", "--source", "simplear.data.Folder"),
        "module 'simplear.data' has no attribute 'Folder'",
    ),
    "source in a source": (
        ("tokenize", "--source", "RecaptionedSource", "--source.captions", "x", "--source.source", "FolderSource"),
        f"--source takes one of {SOURCES}",
    ),
    "package": (("train-text-tokenizer", "--source", "mine.Source"), "No module named 'mine'"),
    "another kind": (("tokenize", "--source", "simplear.data.ShortEdge"), "not correspond to a subclass of Source"),
    "crop": (("tokenize", *SOURCE, "--crop", "Centre"), "--crop takes one of AspectBuckets, CentreCrop, "),
    "filter": (
        ("tokenize", *SOURCE, "--filters+=ShortEdges", "--filters.minimum", "3"),
        "--filters takes one of AspectRatio, CaptionLength, Column, Listed, ",
    ),
    "scorer": (
        ("tokenize", *SOURCE, "--filters+=MinimumScore", "--filters.minimum", "3", "--filters.scorer", "ClipReward"),
        "Expected a dot import path string: ClipReward",
    ),
    "captioner": (
        ("recaption", *SOURCE, "--captioner", "Qwen"),
        "--captioner takes one of ServerCaptioner, TransformersCaptioner, or the import path of your own class",
    ),
    "reward": (
        ("fit", "--config", str(CONFIGS / "grpo-scene.yaml"), "--model.init_args.reward", "ClipReward"),
        "Expected a dot import path string: ClipReward",
    ),
    "list of a filter": (("tokenize", *SOURCE, "--filters+=Listed", "--filters.path", "no.txt"), "leave out at no.txt"),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path, kind: str) -> None:
    arguments, message = CLASSES[kind]
    out = ("--out", str(tmp_path)) if arguments[0] != "fit" else ()
    code, printed = run(*arguments, *out, *(("--visual-tokenizer", "x") if arguments[0] == "tokenize" else ()))
    assert code == 2 and message in printed and "Traceback" not in printed


def test_unknown_key_in_a_file(config: list[str], tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_stps: 3}")
    code, printed = run(*config, "--config", str(overlay))
    assert code == 2 and "Did you mean '--trainer.max_steps'?" in printed


@pytest.mark.parametrize(
    ("chosen", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "1000"}, None)],
)
def test_threads_wait_without_spinning_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], policy: str | None
) -> None:
    """OpenMP reads this once, when PyTorch is imported, which the command line itself must not do before."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    main(["--version"])
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    look = "import simplear.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0


def test_verbs() -> None:
    assert run("tokenise") == (2, "simplear: no verb 'tokenise'; did you mean 'tokenize'?\n")
    code, printed = run("--help")
    assert code == 0 and all(verb in printed for verb in ("fit", "tokenize", "generate", "evaluate", "demo"))
    assert run("evaluate", "geneva")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "checkpoints/nowhere", "--prompt", "x", "--out", "out"], "make train-sft"),
        (["evaluate", "scenes", "checkpoints/nowhere", "--out", "out"], "make train-sft"),
        (
            ["tokenize", *SOURCE, "--visual-tokenizer", "checkpoints/nowhere", "--out", "out"],
            "make train-tokenizer",
        ),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_missing_artefacts_say_what_makes_them(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    code, printed = run(*arguments)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_fine_tuning_without_a_checkpoint_says_what_makes_it(tiny_shards: str, tmp_path: Path) -> None:
    paths = ["--data.init_args.paths", tiny_shards, "--data.init_args.validation_paths", "null"]
    start = ["--model.init_args.checkpoint", str(tmp_path / "nowhere"), "--trainer.default_root_dir", str(tmp_path)]
    code, printed = run("fit", "--config", str(CONFIGS / "sft.yaml"), *paths, *start)
    assert code == 2 and "make pretrain" in printed and "Traceback" not in printed


def test_missing_shards_say_what_makes_them(config: list[str], tmp_path: Path) -> None:
    code, printed = run(*config, "--data.init_args.paths", str(tmp_path / "nowhere"))
    assert code == 2 and "make tokenize" in printed and "Traceback" not in printed


def test_flags_are_spelled_with_dashes_or_underscores(tmp_path: Path, tiny_visual_tokenizer: str) -> None:
    for number, flag in enumerate(("--visual-tokenizer", "--visual_tokenizer")):
        code, printed = run("tokenize", *SOURCE, flag, tiny_visual_tokenizer, "--out", str(tmp_path / str(number)))
        assert code == 0, printed
        assert (tmp_path / str(number) / "manifest.json").exists()


FIRST_RANK = """
import os, subprocess, sys, time
import simplear.cli
simplear.cli.main(["--version"])
if sys.argv[1] == "by another":
    del os.environ[simplear.cli.STARTED_BY]
subprocess.Popen([sys.executable, "-c", sys.argv[2]], env={**os.environ, "LOCAL_RANK": "1"})
time.sleep(600)
"""
NEXT_RANK = """
import os, time
import simplear.cli
simplear.cli.LAST_WORDS = 0.5
simplear.cli.main(["--version"])
print("pid", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("started", ["by Lightning", "by another"])
def test_a_rank_that_lightning_started_ends_with_the_first_one(started: str) -> None:
    """Wherever it waits. One that something else started is left to that."""

    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    command = [sys.executable, "-c", FIRST_RANK, started, NEXT_RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None
        next_rank = int(next(line for line in first.stdout if line.startswith("pid")).split()[1])
        first.kill()
        end = time.monotonic() + (300 if started == "by Lightning" else 3)
        while is_running(next_rank) and time.monotonic() < end:
            time.sleep(0.05)
        left = is_running(next_rank)
        if left:
            os.kill(next_rank, signal.SIGKILL)
    assert left == (started == "by another")
