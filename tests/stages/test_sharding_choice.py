"""FSDP2 is one word for any number of processes; Lightning's FSDP1 is refused with that word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from simplear.cli import main
from simplear.stages import FSDP2
from simplear.stages.sharding import refuse_fsdp1


@pytest.mark.parametrize(
    "strategy", ["fsdp", "fsdp_cpu_offload", SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy")]
)
def test_fsdp1_is_refused_with_the_remedy(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"--trainer\.strategy fsdp2"):
        refuse_fsdp1(strategy)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", FSDP2(), DDPStrategy(), ModelParallelStrategy()])
def test_others_are_not(strategy: Any) -> None:
    refuse_fsdp1(strategy)


def test_the_command_line_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "configs/paper/sft.yaml", "--trainer.strategy", "fsdp"])
    assert ended.value.code == 2 and "--trainer.strategy fsdp2" in capsys.readouterr().err
