"""What tests of engines share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def traced_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces as ever, refusing what it cannot compile, and generates no code: that takes seconds."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend="eager"))
