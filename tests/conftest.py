"""Tiny artefacts, made once for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from simplear.cli import main
from simplear.language_model import CheckpointSettings, LanguageModel, save_checkpoint
from toys import make_shards, make_text_tokenizer, make_visual_tokenizer, model_config, write_pretraining


@pytest.fixture(autouse=True)
def no_ranks_left() -> Iterator[None]:
    """What Lightning leaves of ranks, FSDP2 on one process too: others would inherit a port that is taken."""
    with mock.patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a byte-level text tokenizer with the seven special tokens."""
    return make_text_tokenizer(tmp_path_factory.mktemp("tiny") / "text_tokenizer")


@pytest.fixture(scope="session")
def tiny_visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a visual tokenizer of 27 codes, 8 pixels each."""
    return make_visual_tokenizer(tmp_path_factory.mktemp("tiny") / "visual_tokenizer")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_visual_tokenizer: str) -> str:
    """Directory of 20 rows of 2 × 2 codes."""
    return make_shards(tmp_path_factory.mktemp("tiny") / "shards", tiny_visual_tokenizer, (2, 2))


@pytest.fixture(scope="session")
def tiny_large_shards(tmp_path_factory: pytest.TempPathFactory, tiny_visual_tokenizer: str) -> str:
    """Directory of 20 rows of 3 × 4 codes."""
    return make_shards(tmp_path_factory.mktemp("tiny") / "shards", tiny_visual_tokenizer, (3, 4))


@pytest.fixture(params=["1d", "2d"])
def tiny_model(request: pytest.FixtureRequest, tiny_text_tokenizer: str) -> tuple[LanguageModel, Any]:
    """A language model and its text tokenizer, of either RoPE kind."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer, rope=request.param).build()
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str) -> Path:
    """Checkpoint directory of a 1-D model; copy it before changing it."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    settings = CheckpointSettings(model.layout.image_token_offset, model.layout.codebook_size, (2, 2), 8)
    save_checkpoint(directory, model, tokenizer, settings)
    return directory


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was trained, as Lightning leaves it: ``run/states/last.ckpt`` after four steps with
    ``run/states/last``, ``run/model``, ``shards``; copy to change.
    """
    directory = tmp_path_factory.mktemp("trained")
    text = make_text_tokenizer(directory / "text_tokenizer")
    visual = make_visual_tokenizer(directory / "visual_tokenizer")
    shards = make_shards(directory / "shards", visual, (2, 3))
    config = write_pretraining(directory, text, visual, shards, save_every=2)
    # vLLM has no smaller heads than 32.
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 96}
    overlay = {"model": {"init_args": {"language_model": {"architecture": sizes}}}}
    (directory / "sizes.yaml").write_text(json.dumps(overlay))
    main(
        [
            "fit",
            *("--config", str(config)),
            *("--config", str(directory / "sizes.yaml")),
            *("--trainer.max_steps", "4"),
        ]
    )
    return directory
