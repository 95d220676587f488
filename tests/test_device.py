"""How many threads a model gets on a CPU."""

from __future__ import annotations

import logging

import pytest
import torch

from simplear import device


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
def test_a_small_model_gets_few_threads(parameters: int, available: int, chosen: bool, threads: int) -> None:
    assert device.cpu_threads(parameters, available, chosen) == threads


@pytest.mark.parametrize("chosen", [True, False])
def test_the_number_is_set_and_said_unless_the_user_set_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chosen: bool
) -> None:
    caplog.set_level(logging.INFO)
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", "16")
    device.limit_threads(1_600_000)
    assert threads == ([] if chosen else [4]) and ("4 of 16 threads" in caplog.text) != chosen
