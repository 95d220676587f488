"""A reward as a filter of `simplear tokenize`, from its command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from simplear.cli import main
from simplear.data import TokenShards
from simplear.data.shards.drops import DROPS_FILE
from simplear.rewards import CLIPReward

from .toys import pictures

COUNT, SIDE = 12, 32


def test_pictures_under_a_clip_score_are_left_out(
    tmp_path: Path, tiny_visual_tokenizer: str, tiny_clip: tuple[str, Path]
) -> None:
    images, pixels = pictures(COUNT, SIDE, SIDE)
    (tmp_path / "pictures").mkdir()
    captions = [f"picture {number}" for number in range(COUNT)]
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(tmp_path / f"pictures/{number:02d}.png")
        (tmp_path / f"pictures/{number:02d}.txt").write_text(f"{caption}\nanother caption")
    model, weights = tiny_clip
    scores = CLIPReward(model, str(weights))(pixels, captions, [{}] * COUNT)
    minimum = float(scores.sort().values[COUNT // 2 - 1 : COUNT // 2 + 1].mean())
    config = tmp_path / "filters.yaml"
    config.write_text(
        "filters:\n"
        "  - class_path: simplear.data.MinimumScore\n"
        f"    init_args: {{scorer: {{class_path: simplear.rewards.CLIPReward, init_args: {{model: {model}, "
        f"pretrained: {weights}}}}}, minimum: {minimum}}}\n"
    )
    out = tmp_path / "out"
    arguments = ["tokenize", "--source", "ImageFolderSource", "--source.path", str(tmp_path / "pictures")]
    arguments += ["--visual-tokenizer", tiny_visual_tokenizer, "--height", str(SIDE), "--width", str(SIDE)]
    main([*arguments, "--config", str(config), "--out", str(out), "--accelerator", "cpu", "--batch-size", "5"])
    shards = TokenShards(out)
    kept = [f"{number:02d}.png" for number in torch.nonzero(scores >= minimum).flatten().tolist()]
    assert shards.read(np.arange(len(shards))).keys == kept and len(kept) == COUNT // 2
    reasons = pq.read_table(out / DROPS_FILE)["reason"].to_pylist()
    assert reasons == [f"CLIPReward under {minimum:g}"] * (COUNT // 2)
