"""A tiny model that was trained, as Lightning leaves it: states, each with its checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simplear.cli import main
from toys import make_shards, make_text_tokenizer, make_visual_tokenizer, write_pretraining


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run/states/last.ckpt`` after four steps and ``run/states/last``, ``run/model``, ``shards``; copy to change."""
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
