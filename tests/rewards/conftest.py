from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewards.toys import random_weights, register


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a tiny model and a file of weights for it."""
    directory = tmp_path_factory.mktemp("clip")
    name = register(directory)
    torch.save(random_weights(), directory / "weights.pt")
    return name, directory / "weights.pt"
