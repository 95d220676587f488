from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from simplear.data import TokenDataModule
from simplear.errors import UserError
from simplear.sequence import IGNORE_INDEX

from .conftest import CODEBOOK_SIZE, make_rows, write_rows

GLOBAL_BATCH_SIZE = 8
EPOCH = 5 + 2
"""Global batches of 8 in the 41 square and 20 wide rows."""


# Resumed runs write into another directory here, and runs begin anew in one.
pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed.*", "ignore:.*exists and is not empty.*")


class Recorder(lightning.LightningModule):
    """Learns nothing and notes what each training step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[str], list[str], list[bool]]] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        assert "number" not in batch
        self.seen.append((batch["keys"], batch["captions"], batch["dropped"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any]) -> None:
        assert not batch["dropped"].any()
        self.validated += batch["keys"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    data: TokenDataModule,
    root: Path,
    steps: int,
    accumulate: int = 1,
    resume: Path | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    **options: Any,
) -> Recorder:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


@pytest.fixture
def make_data(shard_directory: Path, text_tokenizer_directory: Path) -> Any:
    def make(**options: Any) -> TokenDataModule:
        paths = options.pop("paths", str(shard_directory))
        return TokenDataModule(paths, GLOBAL_BATCH_SIZE, str(text_tokenizer_directory), **options)

    return make


def test_a_batch_holds_what_the_shards_hold(make_data: Any) -> None:
    data = make_data(caption_dropout=0.5, caption_prefixes=["see: ", "draw "], seed=4)
    data.setup("fit")
    layout = data.layout
    grids, prefixes, dropped = set(), set(), 0
    batches = list(data.train_dataloader())
    assert len(batches) == EPOCH
    for batch in batches:
        numbers = [metadata["number"] for metadata in batch["metadata"]]
        height, width = batch["codes"].shape[1:]
        grids.add((height, width))
        expected = (np.array(numbers)[:, None] * 7 + np.arange(height * width)) % CODEBOOK_SIZE
        np.testing.assert_array_equal(batch["codes"].flatten(1).numpy(), expected)
        for row, number in enumerate(numbers):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            text = data.text_tokenizer.decode(ids[1 : -height * width - 1])
            assert ids[0] == layout.text_to_image_id and ids[-height * width - 1] == layout.start_of_image_id
            assert (ids[-height * width :] - layout.image_token_offset).tolist() == expected[row].tolist()
            assert batch["captions"][row] in (f"short {number}", f"a long caption of {number}")
            dropped += int(batch["dropped"][row])
            if batch["dropped"][row]:
                assert text == ""
            else:
                prefix = text.strip()[: -len(batch["captions"][row])]
                assert text.strip() == prefix + batch["captions"][row]
                prefixes.add(prefix)
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert grids == {(2, 2), (2, 3)} and prefixes == {"see: ", "draw "}
    assert 0.25 < dropped / (EPOCH * GLOBAL_BATCH_SIZE) < 0.75


def test_both_captions_occur_and_change_between_epochs(make_data: Any) -> None:
    data = make_data(caption_dropout=0.0)
    data.setup("fit")
    captions: list[dict[str, str]] = []
    for epoch in range(2):
        data._next_micro_batch = epoch * EPOCH
        captions.append({k: c for b in data.train_dataloader() for k, c in zip(b["keys"], b["captions"], strict=True)})
    both = captions[0].keys() & captions[1].keys()
    assert {caption.split()[0] for caption in captions[0].values()} == {"short", "a"}
    assert 0.2 < np.mean([captions[0][key] == captions[1][key] for key in both]) < 0.8


def test_captions_that_are_cut_are_counted(make_data: Any, tmp_path: Path) -> None:
    data = make_data(max_text_tokens=2, caption_dropout=0.0)
    module = fit(data, tmp_path, 1)
    assert data.truncated_captions == GLOBAL_BATCH_SIZE and len(module.seen) == 1


@pytest.mark.parametrize("accumulate, num_workers", [(1, 0), (2, 0), (2, 2)])
def test_a_resumed_run_sees_what_one_never_stopped_sees(
    make_data: Any, tmp_path: Path, accumulate: int, num_workers: int
) -> None:
    steps = 2 * EPOCH + 2
    whole = fit(make_data(num_workers=num_workers), tmp_path / "whole", steps, accumulate).seen
    assert len(whole) == steps * accumulate
    for stop in (3, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH) if num_workers == 0 else (EPOCH + 1,):
        checkpoint = tmp_path / f"whole/step={stop}.ckpt"
        rest = fit(make_data(num_workers=num_workers), tmp_path / f"from{stop}", steps, accumulate, checkpoint).seen
        assert rest == whole[stop * accumulate :]


def test_resuming_with_validation_between(make_data: Any, shard_directory: Path, tmp_path: Path) -> None:
    options = {"val_check_interval": 3}
    whole = fit(make_data(validation_paths=str(shard_directory)), tmp_path / "whole", 12, **options)
    plain = fit(make_data(), tmp_path / "plain", 12)
    assert whole.seen == plain.seen
    sanity, per_run = 2 * GLOBAL_BATCH_SIZE, EPOCH * GLOBAL_BATCH_SIZE
    assert (len(whole.validated) - sanity) % per_run == 0
    assert len(set(whole.validated)) == per_run
    for stop in (2, 3, 7):
        checkpoint = tmp_path / f"whole/step={stop}.ckpt"
        data = make_data(validation_paths=str(shard_directory))
        assert fit(data, tmp_path / f"from{stop}", 12, resume=checkpoint, **options).seen == whole.seen[stop:]


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2)])
def test_resuming_with_another_accumulation(make_data: Any, tmp_path: Path, before: int, after: int) -> None:
    fit(make_data(), tmp_path / "whole", EPOCH + 3, before)
    unsplit = fit(make_data(), tmp_path / "plain", 2 * EPOCH + 2, 1).seen
    for stop in (3, EPOCH, EPOCH + 2):
        data = make_data()
        rest = fit(data, tmp_path / f"r{stop}", 2 * EPOCH + 2, after, tmp_path / f"whole/step={stop}.ckpt").seen
        joined = [[key for keys, *_ in rest[i : i + after] for key in keys] for i in range(0, len(rest), after)]
        assert joined == [keys for keys, *_ in unsplit[stop:]]
        assert data.global_batches_consumed == 2 * EPOCH + 2


def test_a_run_stopped_within_an_accumulation_repeats_the_whole_step(make_data: Any, tmp_path: Path) -> None:
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 2 * 3:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    whole = fit(make_data(), tmp_path, EPOCH, 2, callbacks=[Stop()]).seen
    rest = fit(make_data(), tmp_path / "rest", EPOCH, 2, tmp_path / "within.ckpt").seen
    assert rest == whole[2 * 3 :]


def test_an_exception_within_a_step_repeats_that_step(make_data: Any, tmp_path: Path) -> None:
    class Break(lightning.Callback):
        def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise InterruptedError

    whole = fit(make_data(), tmp_path / "whole", EPOCH).seen
    with pytest.raises(InterruptedError):
        fit(make_data(), tmp_path / "broken", EPOCH, callbacks=[Break()])
    assert fit(make_data(), tmp_path / "rest", EPOCH, resume=tmp_path / "broken.ckpt").seen == whole[4:]


@pytest.mark.parametrize(
    ("limit", "accumulate", "steps_per_epoch"),
    [
        ({"limit_train_batches": 2}, 1, 2),
        ({"limit_train_batches": 0.5}, 1, 3),
        ({"limit_train_batches": 4}, 2, 2),
        ({"limit_train_batches": 1000}, 1, EPOCH),
        ({"overfit_batches": 2}, 1, 2),
        ({"overfit_batches": 0.5}, 1, 3),
        ({"overfit_batches": 4}, 2, 2),
    ],
    ids=str,
)
def test_limited_epochs(
    make_data: Any, tmp_path: Path, limit: dict[str, Any], accumulate: int, steps_per_epoch: int
) -> None:
    """Epochs that are cut short go on through the data, those to overfit repeat their batches; resumed ones too."""
    plain = fit(make_data(), tmp_path / "plain", 3 * steps_per_epoch, accumulate).seen
    if "overfit_batches" in limit:
        plain = plain[: steps_per_epoch * accumulate] * 3
    limited = fit(make_data(), tmp_path / "limited", -1, accumulate, max_epochs=3, **limit)
    assert limited.seen == plain
    for stop in (1, steps_per_epoch, steps_per_epoch + 1):
        state = tmp_path / f"limited/step={stop}.ckpt"
        rest = fit(make_data(), tmp_path / f"from{stop}", -1, accumulate, state, max_epochs=3, **limit)
        assert rest.seen == plain[stop * accumulate :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"accumulate": 2, "limit_train_batches": 3},
            "limit_train_batches 3 leaves 3 batches in an epoch, no multiple",
        ),
        ({"accumulate": 2, "overfit_batches": 3}, "overfit_batches 3 leaves 3 batches in an epoch, no multiple"),
        ({"val_check_interval": 9}, "val_check_interval 9 exceeds the 7 batches of an epoch: .*every_n_epoch null"),
        ({"val_check_interval": 3, "limit_train_batches": 2}, "val_check_interval 3 exceeds the 2 batches"),
        ({"accumulate": 0}, "accumulate_grad_batches 0 must be at least 1"),
    ],
)
def test_limits_that_cut_a_step_or_skip_validation_are_refused(
    make_data: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(make_data(), tmp_path, 4, **options)


def test_one_batch_to_try_things_out_need_not_fill_a_step(make_data: Any, tmp_path: Path) -> None:
    assert len(fit(make_data(), tmp_path, 4, accumulate=2, fast_dev_run=True).seen) == 1


def test_a_new_trainer_begins_at_the_first_batch(make_data: Any, tmp_path: Path) -> None:
    data = make_data()
    assert fit(data, tmp_path / "a", 3).seen == fit(data, tmp_path / "b", 3).seen


def test_resuming_with_another_order_is_refused(make_data: Any, tmp_path: Path) -> None:
    fit(make_data(seed=0), tmp_path, 2)
    with pytest.raises(ValueError, match=r"seed = 0, now it is 1"):
        fit(make_data(seed=1), tmp_path, 4, resume=tmp_path / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"overfit_batches = None, now it is 2"):
        fit(make_data(seed=0), tmp_path, 4, resume=tmp_path / "step=2.ckpt", overfit_batches=2)


def test_a_global_batch_that_does_not_divide_is_refused(make_data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 8 does not divide over 1 ranks x .* 3"):
        fit(make_data(), tmp_path, 1, accumulate=3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.jsonl", "".join(f'{{"prompt": "short {n}", "tag": "t{n}"}}\n' for n in range(9))),
        ("prompts.json", json.dumps([{"prompt": f"short {n}", "tag": f"t{n}"} for n in range(9)])),
        ("prompts.txt", "\ufeff" + "\r\n".join(f"short {n}" for n in range(9))),
        ("prompts", "\n".join(f"short {n}" for n in range(9))),
    ],
)
def test_prompts_alone(make_data: Any, tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode())
    with pytest.raises(ValueError, match=r"give codebook_size"):
        make_data(paths=str(file)).setup("fit")
    data = make_data(paths=str(file), codebook_size=CODEBOOK_SIZE, caption_dropout=0.0)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert batch["codes"].shape == (8, 0, 0)
    assert len({caption for caption in batch["captions"] if caption.startswith("short ")}) == 8
    tags = [{"tag": f"t{caption.split()[1]}"} if "json" in name else {} for caption in batch["captions"]]
    assert batch["metadata"] == tags
    assert (batch["input_ids"][batch["attention_mask"].bool()] < data.layout.image_token_offset).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompts.csv", r"prompts\.csv: prompts are read from .*not from \.csv"),
        ("gone.txt", r"no file of prompts at .*gone\.txt"),
        ("unit.arrow", r"unit\.arrow is one shard: name its directory"),
        ("gone", "no token shards at .*gone: make them with `simplear tokenize`"),
    ],
)
def test_paths_that_hold_no_prompts(make_data: Any, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\none\n")
    with pytest.raises(UserError, match=message):
        make_data(paths=str(tmp_path / name)).setup("fit")


def test_shards_of_another_tokenizer_are_refused(make_data: Any, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other", {"a": make_rows(9, (2, 2))}, fingerprint="1" * 64)
    with pytest.raises(ValueError, match=r"validation shards were made with the visual tokenizer 1111"):
        make_data(validation_paths=str(other)).setup("fit")
    with pytest.raises(ValueError, match=r"256 codes, not 100"):
        make_data(codebook_size=100).setup("fit")


TWO_RANKS = """
import json, sys, lightning, torch
from pathlib import Path
from lightning.pytorch.strategies import DDPStrategy
sys.path.insert(0, sys.argv[4])
from data.test_token_data import Recorder
from simplear.data import TokenDataModule

if __name__ == "__main__":
    shards, tokenizer, out = sys.argv[1:4]
    world_size, accumulate = int(sys.argv[5]), int(sys.argv[6])
    data = TokenDataModule(shards, 24, tokenizer, validation_paths=shards)
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size, max_steps=4, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=accumulate,
        strategy=DDPStrategy(process_group_backend="gloo"), num_sanity_val_steps=0, val_check_interval=accumulate,
    )
    trainer.fit(module, datamodule=data)
    Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps([module.seen, module.validated]))
"""


@pytest.mark.long
@pytest.mark.parametrize("world_size, accumulate", [(2, 2), (3, 1)])
def test_ranks_see_the_global_batches_of_one_process(
    shard_directory: Path, text_tokenizer_directory: Path, tmp_path: Path, world_size: int, accumulate: int
) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    tests = Path(__file__).parent.parent
    arguments = [shard_directory, text_tokenizer_directory, tmp_path, tests, world_size, accumulate]
    subprocess.run([sys.executable, script, *map(str, arguments)], check=True, timeout=600)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    data = TokenDataModule(str(shard_directory), 24, str(text_tokenizer_directory))
    data.setup("fit")
    batches = list(data.train_dataloader())  # an epoch of one global batch of 24
    for step in range(4):
        data._next_micro_batch = step
        (batch,) = list(data.train_dataloader())
        keys = [
            key
            for micro in range(step * accumulate, (step + 1) * accumulate)
            for seen, _ in ranks
            for key in seen[micro][0]
        ]
        assert keys == batch["keys"]
    assert len(batches) == 1
    validated = [key for _, validated in ranks for key in validated[: 24 // world_size]]
    assert len(set(validated)) == 24
