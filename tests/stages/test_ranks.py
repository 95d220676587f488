"""A training is the same on any number of processes: the losses of 20 steps, the gradients' norms, the weights.

Global batches are the same by construction of the order; equal losses follow from means over samples, whatever micro-
batches they lie in. In float64 what is left is rounding, so a wrong mean cannot hide. Everything runs with clipping
below each gradient's norm, a schedule, dropped captions, and captions of 0 to 57 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.fit_ranks import CLIP, GLOBAL_BATCH, Training, command, train, write_inputs
from toys import run_ranks

EXACT = 1e-9
"""Of float64, over all steps."""
FLOAT32 = 1e-6
"""At the first step."""
STOP = 10
"""In the middle of the second epoch of 6 global batches."""
STRATEGIES = ("ddp", "fsdp2")
CASES = ("by_modality", "full", "lean", "texts", "float32", "means over tokens", "grpo")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(root: Path) -> Callable[[str], dict[str, Any]]:
    """What one process makes of a case."""
    made: dict[str, dict[str, Any]] = {}

    def run(case: str) -> dict[str, Any]:
        if case not in made:
            made[case] = train(root, Training(case), processes=1)
        return made[case]

    return run


def together(root: Path, out: Path, processes: int, trainings: list[Training]) -> list[Any]:
    """What so many processes make of each training."""
    run_ranks(command(root, out, processes, trainings), timeout=900)
    return [torch.load(out / f"{number}.pt") for number in range(len(trainings))]


def difference(one: dict[str, Any], other: dict[str, Any], what: str) -> float:
    """The largest, of losses, norms or weights."""
    if what != "weights":
        return float((one[what] - other[what]).abs().max())
    assert one[what].keys() == other[what].keys()
    return max(float((weight - other[what][name]).abs().max()) for name, weight in one[what].items())


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same rows at each step, and the same numbers."""
    assert one["keys"] == other["keys"]
    for what in ("losses", "norms", "weights"):
        assert difference(one, other, what) < EXACT, what


def assert_as_alone(one: dict[str, Any], alone: Callable[[str], dict[str, Any]], case: str) -> None:
    """What the number of processes may change of a case; without packing and recomputed layers on one process."""
    other = alone("by_modality" if case == "lean" else case)
    if case == "means over tokens":
        assert one["keys"] == other["keys"]
        assert difference(one, other, "losses") > 1e-2
    elif case == "float32":
        assert one["keys"] == other["keys"]
        assert abs(float(one["losses"][0] - other["losses"][0])) < FLOAT32
        assert difference(one, other, "weights") < 1e-4
    else:
        assert_equal(one, other)
    assert min(one["norms"]) > CLIP
    if case == "texts":
        assert one["metrics"]["validation/text_perplexity"] == pytest.approx(
            other["metrics"]["validation/text_perplexity"], rel=1e-6
        )


def test_two_processes_train_as_one(root: Path, alone: Any, tmp_path: Path) -> None:
    """Under DDP and FSDP2; Muon, which needs whole matrices, is refused under the latter."""
    trainings = [Training("by_modality", "ddp"), Training("lean", "fsdp2"), Training("float32", "fsdp2")]
    trainings += [Training("means over tokens", "ddp"), Training("muon", "fsdp2")]
    *made, refused = together(root, tmp_path, 2, trainings)
    for training, result in zip(trainings[:-1], made, strict=True):
        assert_as_alone(result, alone, training.case)
    assert len({len(step) for step in made[0]["keys"]} | {GLOBAL_BATCH}) == 1
    assert "MuonWithAdamW needs whole matrices" in refused


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_train_as_one(root: Path, alone: Any, tmp_path: Path, processes: int) -> None:
    """Either normaliser, packing, texts without images in between, reinforcement learning; under DDP an adapter."""
    trainings = [Training(case, strategy) for case in CASES for strategy in STRATEGIES]
    trainings.append(Training("adapter", "ddp"))
    for training, result in zip(trainings, together(root, tmp_path, processes, trainings), strict=True):
        assert_as_alone(result, alone, training.case)


@pytest.mark.long
def test_a_training_goes_on_with_another_number_of_processes(root: Path, alone: Any, tmp_path: Path) -> None:
    """Stopped after 10 steps of 2 processes, whose state under FSDP2 is sharded."""
    begun = []
    for case in ("by_modality", "texts"):
        for strategy in STRATEGIES:
            begun.append(Training(case, strategy, STOP, save=str(tmp_path / f"{case}-{strategy}.ckpt")))
    (tmp_path / "2").mkdir()
    (tmp_path / "4").mkdir()
    first = together(root, tmp_path / "2", 2, begun)
    resumed = [Training(training.case, training.strategy, resume=training.save) for training in begun]
    on_four = together(root, tmp_path / "4", 4, resumed)
    for training, start, four in zip(resumed, first, on_four, strict=True):
        assert (Path(str(training.resume)).is_dir()) == (training.strategy == "fsdp2")
        whole = alone(training.case)
        strategy = "auto" if training.strategy == "ddp" else "fsdp2"
        one = train(root, Training(training.case, strategy, resume=training.resume), processes=1)
        for rest in (one, four):
            joined = {**rest, "keys": start["keys"] + rest["keys"]}
            joined |= {what: torch.cat([start[what], rest[what]]) for what in ("losses", "norms")}
            assert_equal(joined, whole)
