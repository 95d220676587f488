"""Every stage in every precision that a Trainer has: it learns what it learns in float32, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from simplear.data import TokenDataModule
from simplear.stages import GRPOModule, SFTModule
from stages import test_clip, test_visual_tokenizer
from stages.test_clip import text_tokenizer  # noqa: F401  # fixtures
from stages.test_grpo import Brightness, adamw, prompts, start  # noqa: F401
from stages.test_next_token import make_data, pretrain  # noqa: F401
from toys import CODEBOOK, make_trainer

Made = tuple[Any, dict[str, Any]]


@pytest.fixture
def stages(
    pretrain: Any,  # noqa: F811
    make_data: Any,  # noqa: F811
    start: str,  # noqa: F811
    prompts: str,  # noqa: F811
    text_tokenizer: str,  # noqa: F811
    tiny_visual_tokenizer: str,
) -> dict[str, Callable[[], Made]]:
    """Makes each stage, with the same random weights each time, and its data."""

    def rollouts() -> Made:
        data = TokenDataModule(
            prompts, 4, start, codebook_size=CODEBOOK, caption_dropout=0.0, max_text_tokens=40, shuffle=False
        )
        return GRPOModule(start, Brightness(), group_size=3, optimizer=adamw, inner_updates=2), {"datamodule": data}

    return {
        "pretraining": lambda: (pretrain(), {"datamodule": make_data()}),
        "pretraining, packed in chunks": lambda: (
            pretrain(packed=True, rope="2d", activation_checkpointing="full"),
            {"datamodule": make_data()},
        ),
        "fine-tuning": lambda: (
            SFTModule(start, visual_tokenizer=tiny_visual_tokenizer, optimizer=adamw),
            {"datamodule": make_data()},
        ),
        "GRPO": rollouts,
        "CLIP": lambda: (test_clip.module(text_tokenizer), {"datamodule": test_clip.data()}),
        "visual tokenizer": lambda: (
            test_visual_tokenizer.module(),
            {"train_dataloaders": test_visual_tokenizer.loader()},
        ),
    }


class SameStart(Callback):
    """All later stages begin with the weights of the first: PyTorch draws other numbers in bfloat16."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: Any, stage: Any) -> None:
        for name, weight in stage.named_parameters():
            weight.data.copy_(self.weights.setdefault(name, weight.detach().clone()))


STAGES = ("pretraining", "pretraining, packed in chunks", "fine-tuning", "GRPO", "CLIP", "visual tokenizer")
WEIGHTS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_in_reduced_precision(
    stages: dict[str, Callable[[], Made]], tmp_path: Path, name: str, precision: str
) -> None:
    found = {}
    options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "callbacks": [SameStart()]}
    for each in ("32-true", precision):
        seed_everything(0, verbose=False)
        stage, data = stages[name]()
        trainer = make_trainer(tmp_path / each, max_steps=2, max_epochs=-1, precision=each, **options)
        trainer.fit(stage, **data)
        logged = trainer.logged_metrics
        found[each] = float(logged["policy/entropy" if name == "GRPO" else "train/loss"])
        dtypes = {weight.dtype for weight in stage.parameters() if weight.requires_grad}
        assert dtypes == {WEIGHTS.get(each, torch.float32)}
        assert all(torch.isfinite(weight).all() for weight in stage.parameters())
    assert found[precision] == pytest.approx(found["32-true"], rel=0.05)
