"""Prompts and captions of any size and content: drawn, cut and counted, or refused by name before anything is drawn."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simplear.cli import main
from simplear.data import TokenDataModule, TokenRow
from simplear.data.shards import claim_directory, merge_manifest, write_shard
from simplear.generation import SimpleARPipeline
from simplear.language_model import CheckpointSettings, save_checkpoint
from simplear.sequence import SPECIAL_TOKENS
from toys import CODEBOOK, model_config, write_pretraining

HUGE = "a red circle " * 8000
"""More than 100 kB."""
CONTROL = "a <|soi|> star " + "".join(SPECIAL_TOKENS)
HALF = "\ud800"
"""Half of a surrogate pair, as a command line holds a byte that is no UTF-8."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> Path:
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    settings = CheckpointSettings(model.layout.image_token_offset, CODEBOOK, (2, 2), 8)
    directory = tmp_path_factory.mktemp("prompts") / "checkpoint"
    save_checkpoint(directory, model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["x", HUGE]}, r"prompt 1 \('a red circle .*has \d+ tokens; there is room for 90"),
        ({"prompt": "x", "negative_prompt": HUGE}, r"negative prompt 0 .*Shorten it"),
        ({"prompt": "x", "negative_prompt": HALF}, "negative prompt 0 is not valid text"),
        ({"prompt": "x", "prompt_prefix": HALF}, "prefix is not valid text"),
    ],
)
def test_the_pipeline_names_what_it_cannot_draw(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    pipe = SimpleARPipeline.from_pretrained(checkpoint, device="cpu")
    with pytest.raises(ValueError, match=message) as raised:
        pipe(**arguments, output_type="codes")
    assert len(str(raised.value)) < 500
    assert pipe("", seed=0, output_type="codes").codes.shape == (1, 2, 2)


def test_generate_draws_empty_prompts_and_typed_control_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """An empty one, given on the command line, is a prompt: any picture."""
    for number, prompt in enumerate(("", CONTROL, "größe \u202e ☃")):
        out = tmp_path / str(number)
        main(["generate", str(checkpoint), "--prompt", prompt, "--out", str(out)])
        (file,) = out.iterdir()
        assert json.loads(Image.open(file).text["simplear"])["prompt"] == prompt


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({"prompt": HUGE}).encode(), "prompt 1"),
        (json.dumps({"prompt": HALF}).encode(), "prompts.jsonl, line 2 holds half of a surrogate pair"),
    ],
    ids=["huge", "half"],
)
def test_generate_names_the_bad_prompt_of_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "one star"}\n' + line)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(checkpoint), "--prompts-file", str(file), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and "Traceback" not in printed and len(printed) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "message"), [(HALF, "--prompt is not text in utf-8"), (HUGE, "prompt 0")], ids=["half", "huge"]
)
def test_generate_names_a_bad_prompt_of_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(checkpoint), "--prompt", prompt, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and "Traceback" not in printed and len(printed) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_bytes_that_are_no_text_on_a_real_command_line(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simplear.cli", "generate", str(checkpoint), "--out", str(tmp_path / "out")]
    ended = subprocess.run([*map(os.fsencode, command), b"--prompt", b"caf\xe9"], capture_output=True)
    assert (
        ended.returncode == 2 and b"--prompt is not text in utf-8" in ended.stderr and b"Traceback" not in ended.stderr
    )


@pytest.fixture
def shards(tmp_path: Path, tiny_shards: str) -> str:
    """Four rows: an empty caption, a huge one, control tokens, and right-to-left marks."""
    fingerprint = json.loads((Path(tiny_shards) / "manifest.json").read_text())["visual_tokenizer"]
    directory = tmp_path / "shards"
    claim_directory(directory, {"visual_tokenizer": fingerprint, "codebook_size": CODEBOOK, "downsample": 8})
    captions = ["", HUGE, CONTROL, "größe \u202e ☃"]
    rows = [TokenRow(f"row{n}", np.full((2, 2), n, np.uint16), [caption]) for n, caption in enumerate(captions)]
    write_shard(directory, "unit", rows)
    merge_manifest(directory, ["unit"])
    return str(directory)


def test_captions_become_sequences_whatever_they_hold(shards: str, tiny_text_tokenizer: str) -> None:
    data = TokenDataModule(shards, 4, tiny_text_tokenizer, max_text_tokens=50, caption_dropout=0.0, shuffle=False)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    layout, ids = data.layout, batch["input_ids"]
    assert batch["truncated"].tolist() == [False, True, True, False]
    assert batch["attention_mask"].sum(1).tolist()[:3] == [2 + 4, 50 + 2 + 4, 50 + 2 + 4]
    control = torch.tensor(data.text_tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    written = batch["attention_mask"].bool()
    for row in range(4):
        found = ids[row][written[row]][torch.isin(ids[row][written[row]], control)]
        assert found.tolist() == [layout.text_to_image_id, layout.start_of_image_id]


def test_a_training_counts_the_captions_that_it_cuts(
    shards: str,
    tmp_path: Path,
    tiny_text_tokenizer: str,
    tiny_visual_tokenizer: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = write_pretraining(tmp_path, tiny_text_tokenizer, tiny_visual_tokenizer, shards)
    with caplog.at_level(logging.WARNING):
        main(["fit", "--config", str(config), "--data.caption_dropout", "0", "--trainer.max_steps", "3"])
    assert "6 captions were cut to 40 tokens in this run" in caplog.text
    with next(tmp_path.glob("run/logs/**/metrics.csv")).open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 3 and np.isfinite(losses).all()
