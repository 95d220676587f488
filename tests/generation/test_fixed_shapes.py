"""`prompt_multiple`: in batches of one size a picture goes through one arithmetic, whatever it is drawn beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generation.models import language_model, prompts
from simplear.generation import (
    CachedEngine,
    CompiledEngine,
    Engine,
    FusedEngine,
    SamplingSettings,
    cached,
    fused,
    jacobi,
)

GRID = (2, 3)
SETTINGS = SamplingSettings(guidance_scale=2.0)
MINE, EMPTY, *OTHERS = prompts(5, 0, 1, 2, 3, 6, 7, 8)
BATCHES = [[MINE, *OTHERS[:3]], [MINE, *OTHERS[3:]], [*OTHERS[:3], MINE], [OTHERS[0], MINE, MINE, EMPTY], [MINE] * 4]


def place_of_mine(batch: list[Tensor]) -> int:
    return next(place for place, ids in enumerate(batch) if ids is MINE)


def drawn(engine: Engine, batch: list[Tensor], place: int, seen: list[Any]) -> Tensor:
    """Logits that the image's codes were drawn from; every shape of logits goes into `seen`."""
    logits: list[Tensor] = []

    def on_draw(given: Tensor, images: int) -> None:
        seen.append(tuple(given.shape))
        logits.append(given[[place, images + place]].clone())

    engine.on_draw = on_draw  # type: ignore[attr-defined]
    engine.generate(batch, [EMPTY] * len(batch), GRID, SETTINGS, [3 if ids is MINE else 8 for ids in batch])
    return torch.stack(logits)


@pytest.fixture(params=[CachedEngine, FusedEngine, CompiledEngine])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    owner, name = (cached, "draw") if request.param is CachedEngine else (jacobi, "draw")
    plain = getattr(owner, name)
    monkeypatch.setattr(fused, "compiled_pass", lambda state: state.advance)  # as it is traced, in its fixed shape

    def make(prompt_multiple: int) -> Engine:
        def draw(logits: Tensor, images: int, *others: Any) -> Tensor:
            made.on_draw(logits, images)  # type: ignore[attr-defined]
            return plain(logits, images, *others)

        monkeypatch.setattr(owner, name, draw)
        made = request.param(language_model(dtype=torch.float32), prompt_multiple=prompt_multiple)
        return made

    return make


def test_logits_are_bit_equal_in_any_company(engine: Any) -> None:
    made, seen = engine(16), []
    logits = [drawn(made, batch, place_of_mine(batch), seen) for batch in BATCHES]
    assert all(torch.equal(each, logits[0]) for each in logits[1:])
    assert len(set(seen)) == 1


def test_without_it_company_shows_in_the_last_bits(engine: Any) -> None:
    """What the promise is about: longer companions make longer rows, and sums over them round otherwise."""
    made = engine(1)
    companions = prompts(*range(6, 30, 3), seed=2)
    logits = [drawn(made, [MINE, other], 0, []) for other in companions]
    assert not all(torch.equal(each, logits[0]) for each in logits[1:])
    assert all(torch.allclose(each, logits[0], atol=1e-4) for each in logits[1:])


def test_padding_changes_no_code(engine: Any) -> None:
    """It is masked: the same image as without, code by code."""
    request = ([MINE, *OTHERS], [EMPTY] * 7, GRID, SETTINGS, range(7))
    padded = engine(16)
    padded.on_draw = lambda logits, images: None
    codes = padded.generate(*request)[0]
    plain = engine(1)
    plain.on_draw = lambda logits, images: None
    assert torch.equal(plain.generate(*request)[0], codes)
