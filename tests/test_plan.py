"""`simplear plan` reads what `simplear fit` reads, builds nothing, and warns before a run that cannot fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from simplear.cli import main
from toys import write_grpo, write_pretraining

PAPER = Path(__file__).parents[1] / "configs" / "paper"


def plan(capsys: pytest.CaptureFixture[str], *names: str, options: tuple[str, ...] = ()) -> str:
    files = [part for name in names for part in ("--config", str(PAPER / f"{name}.yaml"))]
    main(["plan", *files, *options])
    return capsys.readouterr().out


def needed(text: str) -> float:
    found = re.search(r"^  all +([\d.]+)  of", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def seconds(text: str) -> float:
    found = re.search(r"A100 80 GB: ([\d.]+) s a step", text)
    assert found is not None, text
    return float(found[1])


def test_pretraining_on_the_papers_machine(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "pretrain", "1.5b", "a100x32")
    assert text.startswith("1,642 million parameters; 32 GPUs, FSDP2; bf16-mixed; 8 images of 1,024 codes a pass")
    assert "warning" not in text and needed(text) < 30
    assert "168,000 steps" in text and "A100" in text and "H100" in text


@pytest.mark.parametrize("machine", ["one-gpu", "gpu8", "a100x32"])
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_what_is_shipped_fits(capsys: pytest.CaptureFixture[str], machine: str, size: str) -> None:
    """Pretraining at 512 px and fine-tuning at 1024 px; no matrix product is computed again for it."""
    strict = ("--plan.strict", "true")
    pretraining, fine_tuning = (plan(capsys, stage, size, machine, options=strict) for stage in ("pretrain", "sft"))
    assert needed(pretraining) < needed(fine_tuning) and "4,096 codes" in fine_tuning
    assert ("FSDP2" in fine_tuning) == (size == "1.5b" and machine != "one-gpu")
    full = plan(capsys, "sft", size, machine, options=("--model.init_args.activation_checkpointing", "full"))
    assert needed(full) < needed(fine_tuning) and seconds(full) > 1.2 * seconds(fine_tuning)


def test_what_does_not_fit_is_said_and_strictly_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(mode: str, *more: str) -> str:
        options = ("--trainer.accumulate_grad_batches", "32", "--model.init_args.activation_checkpointing", mode)
        return plan(capsys, "sft", "1.5b", "one-gpu", options=(*options, *more))

    text = planned("none")
    assert "warning: this does not fit into 79.1 GiB. Set --model.init_args.activation_checkpointing selective." in text
    more = planned("selective")
    assert needed(more) < needed(text) and "Set --model.init_args.activation_checkpointing full." in more
    with pytest.raises(SystemExit) as ended:
        planned("none", "--plan.strict", "true")
    assert ended.value.code == 1


@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_grpo_of_the_paper_and_on_24_gb(capsys: pytest.CaptureFixture[str], size: str) -> None:
    usual = plan(capsys, "grpo", size)
    small = plan(capsys, "grpo", size, "grpo-24gb", options=("--plan.gpu_memory_gib", "23.5"))
    assert "at 50% of the bandwidth" in usual and "warning" not in usual + small
    assert ("4.9" if size == "0.5b" else "12.3") + " s of a step draw" in usual
    assert needed(small) < needed(usual)


@pytest.mark.parametrize(
    ("names", "checkpointing"),
    [
        (("sft", "1.5b", "sft-24gb"), "full"),
        (("grpo", "1.5b", "grpo-24gb"), "full"),
        (("grpo", "1.5b", "hps", "grpo-24gb"), "selective"),
    ],
)
def test_an_adapter_of_the_larger_model_at_1024_px_fits_into_24_gb(
    capsys: pytest.CaptureFixture[str], names: tuple[str, ...], checkpointing: str
) -> None:
    """All weights do not, in the same precision."""
    options = ("--plan.gpu_memory_gib", "23.5", "--trainer.precision", "bf16-mixed")
    options += ("--model.init_args.activation_checkpointing", checkpointing)
    text = plan(capsys, *names, "lora", options=(*options, "--plan.strict", "true"))
    assert text.startswith("1,642 million parameters, 18.5 million of them trained; 1 GPU; bf16-mixed")
    assert "reference                     0.00" in text or "sft" in names
    assert needed(plan(capsys, *names, options=options)) > 23.5


def test_an_adapter_takes_ddp_for_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    for order in (("1.5b", "a100x32", "lora"), ("1.5b", "lora", "a100x32")):
        assert "; 32 GPUs; bf16-mixed" in plan(capsys, "sft", *order)
    with pytest.raises(SystemExit):
        plan(capsys, "sft", "1.5b", "a100x32", "lora", options=("--trainer.strategy", "fsdp2"))
    assert "an adapter does not go with FSDP2" in capsys.readouterr().err


def test_sizes_from_what_is_there(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    tiny_shards: str,
    tiny_checkpoint: Path,
) -> None:
    """Shards say the grid, checkpoints their size, tokenizers their ids."""
    main(
        ["plan", "--config", str(write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, tiny_shards))]
    )
    assert "4 images of 4 codes a pass" in capsys.readouterr().out
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    main(["plan", "--config", str(write_grpo(tmp_path, str(checkpoint), tiny_visual_tokenizer))])
    text = capsys.readouterr().out
    assert "8 images of 4 codes a pass, 8 a step" in text and "3 steps" in text, "of two updates each"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("pretrain", "0.5b", "one-gpu"), ("--run.pixels", "null"), "--plan.pixels 512"),
        (("sft", "one-gpu"), (), "--config configs/paper/1.5b.yaml"),
        (("pretrain", "0.5b", "one-gpu"), ("--trainer.devices", "auto", "--plan.pixels", "512"), "number of GPUs"),
        (("pretrain", "one-gpu"), ("--plan.pixels", "512"), "names no size"),
        (("pretrain", "0.5b", "one-gpu"), ("--trainer.devices", "7", "--plan.pixels", "512"), "does not divide"),
        (("visual_tokenizer",), (), "stages that train a language model"),
    ],
)
def test_what_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], names: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan(capsys, *names, options=options)
    assert ended.value.code == 2 and message in capsys.readouterr().err
