"""Rates and shares are those of what was trained, whatever the ranks' batches; time elsewhere is left out."""

from __future__ import annotations

import time
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from callbacks.conftest import ToyStage, batches
from simplear.callbacks import TrainingMonitor
from simplear.callbacks.throughput import rates, step_work
from simplear.data import TokenDataModule
from simplear.language_model import LanguageModelConfig
from simplear.stages import GRPOModule, PretrainModule
from toys import ARCHITECTURE, CODEBOOK, make_trainer

WAIT = 0.05


def test_rates_by_hand() -> None:
    counts = {"images": 20, "tokens": 1000, "flops": 600}
    values = rates(counts, seconds=10.0, peak=10.0, devices=2)
    assert values == pytest.approx(
        {
            "images_per_second": 2.0,
            "tokens_per_second": 100.0,
            "mfu": 3.0,  # 60 a second of 20
        }
    )
    assert "mfu" not in rates(counts, 10.0, None, 2), "where the peak is not known there is no share of it"


@pytest.fixture
def pretraining(tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> PretrainModule:
    config = LanguageModelConfig(tiny_text_tokenizer, CODEBOOK, architecture=ARCHITECTURE)
    return PretrainModule(config, visual_tokenizer=tiny_visual_tokenizer)


@pytest.fixture
def data(tiny_shards: str, tiny_text_tokenizer: str) -> TokenDataModule:
    return TokenDataModule([tiny_shards], 4, tiny_text_tokenizer, validation_paths=[tiny_shards], max_text_tokens=40)


def test_logged_over_all_steps_without_validation(
    tmp_path: Any, pretraining: PretrainModule, data: TokenDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates are those of all batches since the last ones, whatever their lengths."""
    windows: list[tuple[Any, float]] = []
    worked: list[tuple[int, int]] = []
    step, validate = pretraining.training_step, pretraining.validation_step

    def noted(batch: dict[str, Any], batch_idx: int) -> Any:
        work = step_work(pretraining, batch)
        worked.append((int(work.tokens), int(work.flops)))
        return step(batch, batch_idx)

    def measured(counts: Any, seconds: float, *rest: Any) -> dict[str, float]:
        windows.append((counts, seconds))
        return rates(counts, seconds, *rest)

    pretraining.training_step = noted  # type: ignore[method-assign]
    pretraining.validation_step = lambda batch, batch_idx: (time.sleep(WAIT), validate(batch, batch_idx))[1]  # type: ignore
    monkeypatch.setattr("simplear.callbacks.throughput.rates", measured)
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[TrainingMonitor(peak_flops=1e9)],
    )
    began = time.perf_counter()
    trainer.fit(pretraining, datamodule=data)
    elapsed = time.perf_counter() - began
    totals = {name: sum(counts[name] for counts, _ in windows) for name in ("images", "tokens", "flops")}
    assert len(windows) == 3 and totals["images"] == 6 * 4
    assert (totals["tokens"], totals["flops"]) == tuple(map(sum, zip(*worked, strict=True)))
    assert sum(seconds for _, seconds in windows) <= elapsed - 2 * 5 * WAIT, "validation does not count"
    logged = trainer.logged_metrics
    assert {f"throughput/{name}" for name in ("images_per_second", "tokens_per_second", "mfu")} <= set(logged)
    assert 0 < logged["throughput/data_wait"] < 1
    assert "throughput/memory_gib" not in logged


def test_waiting_for_data_is_seen(tmp_path: Any, stage: ToyStage) -> None:
    slow = batches()
    collate = slow.collate_fn
    slow.collate_fn = lambda rows: (time.sleep(WAIT), collate(rows))[1]
    monitor = TrainingMonitor()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(stage, slow)
    logged = trainer.logged_metrics
    seconds = 2 * 4 / logged["throughput/images_per_second"]  # of a stage that does not say what a step takes
    assert logged["throughput/data_wait"] * seconds >= 2 * WAIT
    assert monitor.peak_flops is None, "the peak of a CPU is not known"


def test_a_rollout_counts_each_pass(tiny_checkpoint: Any, tiny_visual_tokenizer: str, data: TokenDataModule) -> None:
    data.setup()
    batch = data.training.make_batch(next(iter(data.train_dataloader().sampler)))
    flops = {}
    for options in ({"beta": 0.0}, {"beta": 0.1}, {"beta": 0.1, "inner_updates": 2}):
        module = GRPOModule(str(tiny_checkpoint), None, group_size=3, **options)
        module.configure_model()
        work = module.step_work(batch)
        flops[tuple(options.values())] = int(work.flops)
        assert work.images == 12
    # Drawing and the update; the reference; the old policy and a second update.
    forward = flops[0.1,] - flops[0.0,]
    assert flops[0.0,] == 4 * forward and flops[0.1, 2] == 9 * forward


def test_a_peak_must_be_a_number_above_0() -> None:
    with pytest.raises(ValueError, match="FLOP/s of one device"):
        TrainingMonitor(peak_flops=0)
