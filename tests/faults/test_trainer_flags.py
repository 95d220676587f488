"""The Trainer's flags, callbacks and words for ``--ckpt_path``, as people type them: each works, or one message says
why not and what to do. And Ctrl-C.
"""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simplear.cli import main
from simplear.stages import GRPOModule, PretrainModule
from toys import write_grpo, write_pretraining

Run = Callable[..., tuple[int, str]]
UNLIMITED = "--trainer.max_steps -1"
SCHEDULE = "--model.init_args.lr_scheduler"


@pytest.fixture
def run(
    tmp_path: Path,
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    tiny_shards: str,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """``run(OPTIONS, verb="fit", stage="pretrain")``: exit code and what was printed. 20 rows are 5 batches of 4."""

    def run(options: str, verb: str = "fit", stage: str = "pretrain") -> tuple[int, str]:
        if stage == "grpo":
            config = write_grpo(tmp_path, str(tiny_checkpoint), tiny_visual_tokenizer)
        else:
            config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards)
        words = options.replace("VALIDATE", f"--data.init_args.validation_paths [{tiny_shards}]").split()
        code: Any = 0
        try:
            main([verb, "--config", str(config), *words])
        except SystemExit as stopped:
            code = stopped.code
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return run


def weights(root: Path) -> dict[str, Any]:
    return torch.load(root / "run" / "states" / "last.ckpt", weights_only=False)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--trainer.fast_dev_run true --trainer.accumulate_grad_batches 2 VALIDATE", None),
        (f"--trainer.limit_train_batches 2 --trainer.max_epochs 2 {UNLIMITED}", 4),
        ("--trainer.overfit_batches 1 VALIDATE", 6),
        ("--trainer.num_sanity_val_steps -1 --trainer.val_check_interval 00:00:00:01 VALIDATE", 6),
        ("--trainer.profiler simple --trainer.detect_anomaly true --trainer.precision bf16-mixed", 6),
        (f"--trainer.max_time 00:01:00:00 --trainer.max_epochs 1 {UNLIMITED}", 5),
        ("--trainer.callbacks+=Timer --trainer.callbacks.duration 00:01:00:00", 6),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor validation/loss VALIDATE", 6),
        (
            "--trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.01 --trainer.max_epochs 2 "
            f"--trainer.callbacks.swa_epoch_start 1 {UNLIMITED}",
            10,
        ),
        (f"{SCHEDULE} lightning.pytorch.cli.ReduceLROnPlateau {SCHEDULE}.monitor validation/loss VALIDATE", 6),
        (f"{SCHEDULE} torch.optim.lr_scheduler.OneCycleLR {SCHEDULE}.max_lr 0.1 {SCHEDULE}.total_steps 6", 6),
        ("--trainer.callbacks+=simplear.callbacks.StageProgressBar", 6),
        ("--trainer.reload_dataloaders_every_n_epochs 1 --trainer.logger false", 6),
    ],
)
def test_flags_that_work(run: Run, tmp_path: Path, options: str, steps: int | None) -> None:
    code, printed = run(options)
    assert code == 0, printed
    if steps is None:
        assert not (tmp_path / "run" / "states").exists()
    else:
        assert weights(tmp_path)["global_step"] == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--trainer.logger lightning.pytorch.loggers.WandbLogger", "pip install -U 'wandb"),
        ("--trainer.enable_checkpointing false", "enable_checkpointing=False"),
        ("--trainer.accelerator gpu", "No supported gpu backend"),
        ("--trainer.accelerator nope", "--trainer: You selected an invalid accelerator name"),
        ("--trainer.strategy nope", "--trainer: You selected an invalid strategy name"),
        ("--trainer.strategy deepspeed", "must have DeepSpeed installed"),
        ("--trainer.devices x", "--trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
        ("--trainer.barebones true", "--trainer: `Trainer(barebones=True, logger="),
        (
            "--trainer.strategy fsdp2 --trainer.callbacks+=EMAWeightAveraging",
            "leave it out, or use --trainer.strategy ddp",
        ),
        ("--trainer.max_time 1h", "DD:HH:MM:SS"),
        ("--trainer.callbacks+=LearningRateFinder", "LearningRateFinder is not supported"),
        ("--trainer.accumulate_grad_batches 3", "take a multiple of 3"),
        ("--trainer.accumulate_grad_batches 0", "accumulate_grad_batches 0 must be at least 1"),
        ("--trainer.limit_train_batches 3 --trainer.accumulate_grad_batches 2", "no multiple of the 2"),
        ("--trainer.val_check_interval 6 VALIDATE", "val_check_interval 6 exceeds the 5 batches of an epoch"),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val_loss VALIDATE", "validation/image_loss"),
        ("--trainer.callbacks+=LearningRateMonitor --trainer.logger false", "has no logger"),
        (
            f"{SCHEDULE} torch.optim.lr_scheduler.PolynomialLR {SCHEDULE}.total_iters -1",
            "total_iters of PolynomialLR is -1",
        ),
        ("--model.init_args.optimizer.init_args.lr -1", "--model.init_args.optimizer: Invalid learning rate: -1"),
        ("--data.init_args.num_workers -1", "num_workers -1 must be at least 0"),
        ("--data.init_args.global_batch_size 0", "global_batch_size 0 must be at least 1"),
        (
            "--data.init_args.tokenizer ${trainer.nope}",
            "Interpolation key '.trainer.nope' not found",
        ),
    ],
)
def test_flags_that_are_refused_in_words(run: Run, tmp_path: Path, options: str, message: str) -> None:
    code, printed = run(options)
    assert code == 2 and message in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("own", ["", "--trainer.callbacks+=LearningRateMonitor --trainer.callbacks.log_momentum true"])
@pytest.mark.parametrize(("stage", "norm"), [("pretrain", "train/gradient_norm"), ("grpo", "policy/gradient_norm")])
def test_rate_and_gradient_norm_are_curves_of_every_training(
    run: Run, tmp_path: Path, stage: str, norm: str, own: str
) -> None:
    """The rate by parameter group, without a callback in the configuration; one that is there is the only one."""
    assert run(own, stage=stage)[0] == 0
    (file,) = (tmp_path / "run" / "logs").rglob("metrics.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    for group in ("matrices", "embeddings", "vectors"):
        rates = [float(row[f"lr-AdamW/{group}"]) for row in rows if row[f"lr-AdamW/{group}"]]
        assert rates and set(rates) == {0.01}
        assert (f"lr-AdamW/{group}-momentum" in rows[0]) == bool(own)
    norms = [float(row[norm]) for row in rows if row[norm]]
    assert norms and min(norms) > 0


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_a_schedule_over_epochs_is_refused(run: Run, tmp_path: Path, stage: str) -> None:
    overlay = tmp_path / "schedule.yaml"
    schedule = '{class_path: torch.optim.lr_scheduler.PolynomialLR, init_args: {total_iters: "${trainer.max_steps}"}}'
    overlay.write_text(f"model: {{init_args: {{lr_scheduler: {schedule}}}}}")
    code, printed = run(f"--config {overlay} --trainer.max_epochs 2 {UNLIMITED}", stage=stage)
    assert code == 2 and "PolynomialLR is -1. It counts optimizer steps: give their number" in printed


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_what_names_no_state_is_refused_and_states_are_named(run: Run, tmp_path: Path, verb: str) -> None:
    """Before anything is built: a path, Lightning's words, the directories beside a state, and other files."""
    assert run("--trainer.max_steps 2")[0] == 0
    states, model = tmp_path / "run" / "states", tmp_path / "run" / "model"
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    for name, found in {
        "nowhere.ckpt": "--ckpt_path: nowhere.ckpt does not exist",
        "best": "--ckpt_path: best does not exist",
        "hpc": "--ckpt_path: hpc does not exist",
        f"{model}": "is a checkpoint of a model, which a new training starts from",
        f"{states / 'last'}": "is a checkpoint of a model, which a new training starts from",
        f"{states}": "is not a training state",
        f"{model / 'model.safetensors'}": "is not a training state",
    }.items():
        if verb == "validate" and name not in ("best", f"{model}"):
            continue
        code, printed = run(f"--ckpt_path {name} VALIDATE", verb)
        assert code == 2 and found in printed and "Traceback" not in printed and "damaged" not in printed
        assert f"give {states / 'last.ckpt'}, or last" in printed
    code, printed = run(f"--ckpt_path {tmp_path / 'other.pt'} VALIDATE", verb)
    assert code == 2 and "was not written by a training" in printed
    state = weights(tmp_path)
    del state["optimizer_states"], state["lr_schedulers"]
    torch.save(state, tmp_path / "weights.ckpt")
    code, printed = run(f"--ckpt_path {tmp_path / 'weights.ckpt'} VALIDATE", verb)
    assert (code == 0) == (verb == "validate") and ("holds weights alone" in printed) == (verb == "fit")


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize(("stage", "module"), [("pretrain", PretrainModule), ("grpo", GRPOModule)])
def test_ctrl_c_ends_with_a_word_and_a_state(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presses: int, stage: str, module: Any
) -> None:
    """Pressed once in a training step, that step is the last one; twice, the state is the one before."""
    step, before = module.training_step, signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell's background jobs have it ignored

    def pressed(self: Any, batch: Any, batch_idx: int) -> Any:
        output = step(self, batch, batch_idx)
        for _ in range(presses if batch_idx == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return output

    with monkeypatch.context() as patched:
        patched.setattr(module, "training_step", pressed)
        code, printed = run("--trainer.callbacks.every_n_train_steps 1", stage=stage)
    if presses == 2:
        signal.signal(signal.SIGINT, before)  # Lightning ignores a third one while it shuts down
    assert signal.getsignal(signal.SIGINT) is before
    assert code == 130 and "Traceback" not in printed and "once more stops at once" in printed
    assert ("stopped; --ckpt_path last resumes from" in printed) == (presses == 2)
    updates = 2 if stage == "grpo" else 1
    assert weights(tmp_path)["global_step"] == (3 - presses) * updates
    assert run("--ckpt_path last", stage=stage)[0] == 0
    assert weights(tmp_path)["global_step"] == 6


@pytest.mark.parametrize(
    "error", [TypeError("shapes"), ValueError("shapes"), KeyError("shapes"), RuntimeError("shapes")]
)
@pytest.mark.parametrize(("stage", "module"), [("pretrain", PretrainModule), ("grpo", GRPOModule)])
def test_a_bug_in_a_stage_is_no_mistake_of_the_user(
    run: Run, monkeypatch: pytest.MonkeyPatch, stage: str, module: Any, error: Exception
) -> None:
    def broken(self: Any, batch: Any, batch_idx: int) -> Any:
        raise error

    monkeypatch.setattr(module, "training_step", broken)
    with pytest.raises(type(error), match="shapes"):
        run("", stage=stage)
