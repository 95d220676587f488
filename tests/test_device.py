"""How many threads a model gets on a CPU."""

from __future__ import annotations

import logging

import pytest
import torch

from simplear import device
from simplear.errors import UserError


@pytest.mark.parametrize(
    ("parameters", "available", "chosen", "threads"),
    [
        (1_600_000, 1, False, 1),
        (1_600_000, 2, False, 2),
        (1_600_000, 16, False, 4),
        (1_600_000, 64, False, 4),
        (1_600_000, 64, True, 64),
        (494_000_000, 64, False, 64),
    ],
)
def test_a_small_model_gets_few_threads_unless_the_user_set_their_number(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    parameters: int,
    available: int,
    chosen: bool,
    threads: int,
) -> None:
    """And it is said."""
    caplog.set_level(logging.INFO)
    number = [available]
    monkeypatch.setattr(torch, "get_num_threads", lambda: available)
    monkeypatch.setattr(torch, "set_num_threads", number.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", "16")
    device.limit_threads(parameters)
    assert number[-1] == threads and (f"{threads} of {available} threads" in caplog.text) == (len(number) > 1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("gpu", "unknown"), ("cpu:x", "unknown"), ("cuda:99", "not available"), ("mps", "not available")],
)
def test_a_device_that_is_not_there_is_refused(name: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device '{name}' is {problem}"):
        device.resolve_device(name)
    assert device.resolve_device() == device.resolve_device("cpu") == torch.device("cpu")
