"""GRPO under a real Trainer: what is drawn and scored, the update, restarts, ranks, and what must be refused."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from simplear.data import TokenDataModule
from simplear.generation import SamplingSettings
from simplear.generation.sampling import Noise
from simplear.language_model import CheckpointSettings, LanguageModel, load_checkpoint, save_checkpoint
from simplear.sequence import SPECIAL_TOKENS, encode_captions, prompt_sequence, training_batch
from simplear.stages import CosineWithWarmup, GRPOModule
from simplear.stages.grpo_objective import grpo_loss
from simplear.visual_tokenizer import load_visual_tokenizer
from toys import CODEBOOK, DOWNSAMPLE, make_trainer, make_visual_tokenizer, model_config

GRID = (2, 3)
STEPS = 4
WAIT = 600
"""Seconds after which processes that wait for each other are taken to hang; they need about a quarter."""


class Brightness:
    """Mean of the red channel; an image's own, so the group has spread."""

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images[:, 0].mean(dim=(1, 2))


class Noted(Brightness):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[dict[str, Any]], tuple[int, ...], float, float]] = []

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.seen.append((captions, metadata, tuple(images.shape), float(images.min()), float(images.max())))
        return super().__call__(images, captions, metadata)


class Constant:
    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return torch.full((len(images),), 0.7)


class Faulty(Brightness):
    """Raises, or gives a NaN, in its n-th call."""

    def __init__(self, call: int, nan: bool = False) -> None:
        self.call, self.nan, self.calls = call, nan, 0

    def __call__(self, images: Tensor, captions: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.calls += 1
        scores = super().__call__(images, captions, metadata)
        if self.calls == self.call:
            if not self.nan:
                raise OSError("the reward's server is gone")
            scores[1] = math.nan
        return scores


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: str, tiny_visual_tokenizer: str) -> str:
    """A checkpoint with a visual tokenizer, whose distributions are far from uniform."""
    torch.manual_seed(0)
    model, tokenizer = model_config(tiny_text_tokenizer).build()
    with torch.no_grad():
        model.decoder.lm_head.weight.mul_(40)
    directory = tmp_path_factory.mktemp("grpo") / "sft"
    fingerprint = load_visual_tokenizer(tiny_visual_tokenizer).fingerprint
    settings = CheckpointSettings(
        model.layout.image_token_offset, CODEBOOK, GRID, DOWNSAMPLE, visual_tokenizer_fingerprint=fingerprint
    )
    save_checkpoint(directory, model, tokenizer, settings, visual_tokenizer=tiny_visual_tokenizer)
    return str(directory)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captions of different lengths; one spells a control token."""
    file = tmp_path_factory.mktemp("grpo") / "prompts.jsonl"
    captions = ["a red circle", f"two blue squares {SPECIAL_TOKENS[2]} and more", "one", "a green cross left of a star"]
    rows = [{"prompt": text, "metadata": {"number": n}} for n, text in enumerate(captions * 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


def fused_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, fused=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


@pytest.fixture
def module(start: str) -> Callable[..., GRPOModule]:
    def make(**options: Any) -> GRPOModule:
        defaults = {"reward": Brightness(), "group_size": 3, "optimizer": adamw}
        return GRPOModule(start, **{**defaults, **options})

    return make


@pytest.fixture
def data(start: str, prompts: str) -> Callable[..., TokenDataModule]:
    def make(**options: Any) -> TokenDataModule:
        defaults = {
            "paths": prompts,
            "global_batch_size": 4,
            "codebook_size": CODEBOOK,
            "caption_dropout": 0.0,
            "max_text_tokens": 40,
        }
        return TokenDataModule(tokenizer=start, **{**defaults, **options})

    return make


def fit(stage: GRPOModule, batches: TokenDataModule, directory: Path, **options: Any) -> Trainer:
    resume = options.pop("ckpt_path", None)
    defaults: dict[str, Any] = {
        "logger": CSVLogger(directory / "values", name="", version="", flush_logs_every_n_steps=1),
        "log_every_n_steps": 1,
        "max_epochs": -1,
        "max_steps": STEPS,
    }
    trainer = make_trainer(directory, **{**defaults, **options})
    trainer.fit(stage, datamodule=batches, ckpt_path=resume, weights_only=False)
    return trainer


def values(directory: Path, name: str) -> list[float]:
    with open(directory / "values" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(stage: GRPOModule) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.language_model.state_dict().items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((weight - other[name]).abs().max()) for name, weight in one.items())


# What is drawn


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_log_probs_are_those_of_the_distribution_that_was_sampled(
    tiny_text_tokenizer: str, temperature: float, rope: Any
) -> None:
    """In the trainer's eyes each code wins the race of the numbers that were drawn with."""
    from simplear.generation import make_engine

    torch.manual_seed(3)
    model, tokenizer = model_config(tiny_text_tokenizer, rope=rope).build()
    model.double().eval()
    captions = ["a red circle", "one", "a green cross left of a star"]
    encoded = encode_captions(tokenizer, captions)
    prompts = [prompt_sequence(ids, model.layout) for ids in encoded]
    sampling = SamplingSettings(temperature=temperature)
    codes, _ = make_engine("cached", model).generate(prompts, prompts, GRID, sampling, [5, 6, 7])
    codes = codes.clone()
    ids = training_batch(encoded, codes, model.layout)["input_ids"]
    every = torch.stack(
        [log_probs_of(model, ids, encoded, torch.full_like(codes, c).flatten(1), temperature) for c in range(CODEBOOK)],
        dim=-1,
    )
    noise = Noise([5, 6, 7], CODEBOOK, "cpu")
    places = torch.arange(math.prod(GRID)).expand(3, -1)
    assert torch.equal((every.exp() / noise.at(places)).argmax(dim=-1), codes.flatten(1))
    found, entropies = model.image_log_probs(ids, GRID, temperature=temperature)
    chunked, chunked_entropies = model.image_log_probs(ids, GRID, temperature=temperature, chunk_rows=4)
    expected = log_probs_of(model, ids, encoded, codes.flatten(1), temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(chunked, expected)
    torch.testing.assert_close(chunked_entropies, entropies)
    torch.testing.assert_close(entropies, -(every.exp() * every).sum(dim=-1))


def log_probs_of(
    model: LanguageModel, ids: Tensor, encoded: list[list[int]], targets: Tensor, temperature: float
) -> Tensor:
    """The plain way: image by image, all logits, then the columns of the codes."""
    rows = []
    layout = model.layout
    for row, caption, wanted in zip(ids, encoded, targets, strict=True):
        length = len(caption) + 2
        row = row[: length + math.prod(GRID)][None]
        hidden = model.hidden_states(row, model.training_positions(row, GRID), None)
        logits = model.decoder.lm_head(hidden)[0, length - 1 : -1, layout.image_token_offset :] / temperature
        rows.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0])
    return torch.stack(rows)


def test_captions_reach_the_reward_whole_and_pixels_in_their_range(module: Any, data: Any, tmp_path: Path) -> None:
    reward = Noted()
    fit(module(reward=reward), data(caption_prefixes=["A photo of "], shuffle=False), tmp_path, max_steps=1)
    [(captions, metadata, shape, least, most)] = reward.seen
    assert captions[3:6] == [f"two blue squares {SPECIAL_TOKENS[2]} and more"] * 3
    assert [row["number"] for row in metadata] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert shape == (12, 3, GRID[0] * DOWNSAMPLE, GRID[1] * DOWNSAMPLE)
    assert least >= 0 and most <= 1


def test_the_policy_is_drawn_from_in_evaluation_mode_and_trained_in_training_mode(
    module: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: dict[str, set[bool]] = {"image_log_probs": set(), "image_logits": set()}
    for name in modes:
        original = getattr(LanguageModel, name)

        def noted(self: Any, *args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            if any(weight.requires_grad for weight in self.parameters()):
                modes[name].add(self.training)
            return original(self, *args, **options)

        monkeypatch.setattr(LanguageModel, name, noted)
    fit(module(engine="cached"), data(), tmp_path, max_steps=2)
    assert modes == {"image_log_probs": {True}, "image_logits": {False}}


# The update


@pytest.mark.parametrize(
    ("inner_updates", "packed", "chunk_rows", "precision"),
    [
        (1, False, None, "32-true"),
        (1, True, 4, "bf16-mixed"),
        (1, False, 4, "bf16-true"),
        (2, True, 4, "32-true"),
        (2, False, None, "bf16-mixed"),
        (2, False, 4, "bf16-mixed"),
        (2, True, 4, "bf16-true"),
    ],
)
def test_the_first_update_has_ratio_one_and_no_distance(
    module: Any,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inner_updates: int,
    packed: bool,
    chunk_rows: int | None,
    precision: str,
) -> None:
    """Exactly, in every precision: log-probs are float32 in each."""
    found: list[dict[str, float]] = []

    def noted(*args: Any, **options: Any) -> Any:
        assert all(part.dtype == torch.float32 for part in args[:3] if part is not None)
        loss, statistics = grpo_loss(*args, **options)
        found.append({name: float(value) for name, value in statistics.items()})
        return loss, statistics

    monkeypatch.setattr("simplear.stages.grpo.grpo_loss", noted)
    stage = module(inner_updates=inner_updates, beta=0.1, micro_batch_size=5, packed=packed, chunk_rows=chunk_rows)
    fit(stage, data(), tmp_path, max_steps=2 * inner_updates, precision=precision)
    micro_batches = 3
    for first in found[:micro_batches]:
        assert first["kl"] == 0.0 and first["ratio_min"] == first["ratio_max"] == 1.0
    # Afterwards the policy has moved: away from the reference, and within a rollout from where it was drawn.
    assert all(later["kl"] > 0.0 for later in found[micro_batches:])
    if inner_updates == 2:
        assert all(
            second["ratio_min"] < 1.0 < second["ratio_max"] for second in found[micro_batches : 2 * micro_batches]
        )
    assert len(found) == 2 * inner_updates * micro_batches
    assert values(tmp_path, "policy/kl")[0] == pytest.approx(
        sum(found[n]["kl"] * size for n, size in enumerate([5, 5, 2] * inner_updates)) / (12 * inner_updates), rel=1e-5
    )


def test_an_update_equals_one_written_out(module: Any, data: Any, start: str, tmp_path: Path) -> None:
    """Image by image, logits of all ids, and the objective spelled out."""
    reward = Noted()
    stage = module(
        reward=reward, optimizer=sgd, beta=0.0, gradient_clip_val=None, sampling=SamplingSettings(temperature=0.8)
    )
    fit(stage, data(shuffle=False), tmp_path, max_steps=1, precision="64-true")
    loaded = load_checkpoint(start, dtype=torch.float64)
    model, codes = loaded.model, stage.last_rollout.codes
    captions = reward.seen[0][0]
    encoded = encode_captions(loaded.tokenizer, captions)
    ids = training_batch(encoded, codes, model.layout)["input_ids"]
    log_probs = log_probs_of(model, ids, encoded, codes.flatten(1), 0.8)
    groups = stage.last_rollout.scores.double().view(-1, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    loss = -(advantages[:, None] * (log_probs - log_probs.detach()).exp()).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    moved = weights(stage)
    expected = {name: weight.detach() for name, weight in model.state_dict().items()}
    untouched = dict(load_checkpoint(start, dtype=torch.float64).model.state_dict())
    assert largest_difference(moved, untouched) > 0.1
    assert largest_difference(moved, expected) < 1e-6


def test_micro_batches_change_nothing(module: Any, data: Any, tmp_path: Path) -> None:
    made = []
    for number, size in enumerate((None, 5, 1)):
        stage = module(optimizer=sgd, micro_batch_size=size, rollout_batch_size=6, inner_updates=2)
        fit(stage, data(), tmp_path / str(number), max_steps=2)
        made.append(weights(stage))
    assert largest_difference(made[0], made[1]) < 1e-5
    assert largest_difference(made[0], made[2]) < 1e-5


def test_packing_changes_nothing(module: Any, data: Any, tmp_path: Path) -> None:
    """With a reference and old log-probs."""
    made = []
    for packed in (False, True):
        stage = module(optimizer=sgd, micro_batch_size=5, inner_updates=2, beta=0.1, packed=packed)
        fit(stage, data(), tmp_path / str(packed), max_steps=4, precision="64-true")
        made.append(weights(stage))
        assert values(tmp_path / str(packed), "policy/kl")[0] > 0.0
    assert 0.0 < largest_difference(made[0], made[1]) < 1e-9


def test_no_reference_at_beta_zero_and_none_in_the_state(module: Any, data: Any, tmp_path: Path) -> None:
    stage = module(beta=0.0)
    fit(stage, data(), tmp_path, max_steps=1)
    assert stage._reference is None
    stage = module(beta=0.1)
    trainer = fit(stage, data(), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    state = torch.load(tmp_path / "state.ckpt", weights_only=False)
    assert set(state["state_dict"]) == {f"language_model.{name}" for name in stage.language_model.state_dict()}


def test_a_reference_in_bfloat16_is_near_the_policy(module: Any, data: Any, tmp_path: Path) -> None:
    from simplear.stages.reference import ReferenceSettings

    for offload in (False, True):
        directory = tmp_path / str(offload)
        fit(module(reference=ReferenceSettings("bfloat16", offload=offload)), data(), directory, max_steps=1)
        assert 0 < values(directory, "policy/kl")[0] < 0.05


def test_a_group_without_spread_moves_nothing(module: Any, data: Any, start: str, tmp_path: Path) -> None:
    stage = module(reward=Constant())
    fit(stage, data(), tmp_path, max_steps=2)
    assert values(tmp_path, "reward/groups_without_spread") == [1.0, 1.0]
    before = load_checkpoint(start, dtype=torch.float32).model.state_dict()
    assert largest_difference(weights(stage), dict(before)) == 0.0


def test_the_reward_rises(module: Any, data: Any, tmp_path: Path) -> None:
    stage = module(group_size=8, beta=0.01)
    fit(stage, data(), tmp_path, max_steps=40)
    rewards = values(tmp_path, "reward/mean")
    spread = values(tmp_path, "reward/std_within_groups")[0]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + spread
    assert all(math.isfinite(value) for value in values(tmp_path, "policy/kl"))


def test_rows_of_shards_are_prompts_too(module: Any, data: Any, tiny_shards: str, tmp_path: Path) -> None:
    """Their codes and grid do not matter: the checkpoint's grid is drawn."""
    stage = module()
    fit(stage, data(paths=tiny_shards, codebook_size=None), tmp_path, max_steps=1)
    assert stage.last_rollout.codes.shape == (12, *GRID)
    assert stage.checkpoint_settings().grid == GRID


def test_validation_draws_the_same_images_each_time(module: Any, data: Any, prompts: str, tmp_path: Path) -> None:
    batches = data(validation_paths=prompts)
    stage = module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    fit(
        stage,
        batches,
        tmp_path,
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    first, second = values(tmp_path, "validation/reward")
    assert first == second


# Restarts and ranks


@pytest.mark.parametrize(("inner_updates", "optimizer"), [(1, adamw), (2, adamw), (1, fused_adamw)])
def test_a_resumed_run_is_bit_identical(
    module: Any, data: Any, tmp_path: Path, inner_updates: int, optimizer: Any
) -> None:
    """A fused optimizer changes weights without PyTorch's counters; the engine must draw with the new ones."""

    def make() -> GRPOModule:
        return module(
            optimizer=optimizer,
            inner_updates=inner_updates,
            micro_batch_size=5,
            lr_scheduler=lambda optimizer: CosineWithWarmup(optimizer, 4 * inner_updates),
        )

    whole = make()
    trainer = fit(whole, data(), tmp_path / "whole", max_steps=4 * inner_updates)
    assert trainer.global_step == 4 * inner_updates
    stopped = make()
    trainer = fit(stopped, data(), tmp_path / "stopped", max_steps=2 * inner_updates)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    torch.manual_seed(99)
    resumed = make()
    batches = data()
    fit(resumed, batches, tmp_path / "resumed", max_steps=4 * inner_updates, ckpt_path=tmp_path / "state.ckpt")
    assert batches.global_batches_consumed == resumed.rollouts_done == 4
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    assert largest_difference(weights(whole), weights(stopped)) > 0.0


def test_a_run_that_died_within_a_training_step_repeats_it(module: Any, data: Any, tmp_path: Path) -> None:
    from simplear.callbacks import HuggingFaceCheckpoint

    def saving(directory: Path) -> Any:
        return {
            "enable_checkpointing": True,
            "callbacks": [HuggingFaceCheckpoint(dirpath=directory, every_n_train_steps=1, save_top_k=1)],
        }

    whole = module()
    fit(whole, data(), tmp_path / "whole", **saving(tmp_path / "whole" / "states"))
    with pytest.raises(OSError, match="server is gone"):
        fit(module(reward=Faulty(3)), data(), tmp_path / "died", **saving(tmp_path / "died" / "states"))
    resumed = module()
    state = tmp_path / "died" / "states" / "last.ckpt"
    fit(resumed, data(), tmp_path / "died", ckpt_path=state, **saving(tmp_path / "died" / "states"))
    assert largest_difference(weights(whole), weights(resumed)) == 0.0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_update_as_one(
    module: Any, data: Any, start: str, prompts: str, tmp_path: Path, strategy: str
) -> None:
    """Gradients of an update's two micro-batches are reduced once; a rollout gathers each of two layers and the rest
    once.
    """
    script = Path(__file__).with_name("fit_grpo.py")
    command = [sys.executable, str(script), start, prompts, str(tmp_path / "out.pt"), strategy]
    subprocess.run(command, check=True, timeout=WAIT, capture_output=True)
    stage = module(optimizer=sgd, rollout_batch_size=6, micro_batch_size=6)
    fit(stage, data(), tmp_path, max_steps=3)
    found = torch.load(tmp_path / "out.pt")
    assert largest_difference(found["weights"], weights(stage)) < 1e-5
    assert found["reductions"] == ([0] * 3 if strategy == "ddp" else [])
    assert found["gathers"] == [0 if strategy == "ddp" else 3] * 3
    assert found["mixed"]["policy/kl"] == 0 and found["mixed"]["policy/ratio_max"] == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_reward_that_fails_on_one_rank_ends_all(start: str, prompts: str, tmp_path: Path, strategy: str) -> None:
    script = Path(__file__).with_name("fit_grpo.py")
    command = [sys.executable, str(script), start, prompts, str(tmp_path / "out.pt"), strategy, "--fail-on-rank", "1"]
    ended = subprocess.run(command, timeout=WAIT, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "the reward's server is gone" in ended.stderr
    assert not (tmp_path / "out.pt").exists()


# What must be refused


@pytest.mark.parametrize(
    "sampling",
    [{"guidance_scale": 1.5}, {"top_k": 10}, {"top_p": 0.9}, {"do_sample": False}],
)
def test_rollouts_sample_the_policy_itself(module: Any, sampling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(sampling))}=.*another distribution"):
        module(sampling=SamplingSettings(**sampling))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient_clip_val": 1.0}, r"clipping is not supported for manual optimization"),
        ({"accumulate_grad_batches": 2}, r"accumulation is not supported for manual optimization"),
    ],
)
def test_the_trainers_own_flags_are_refused(
    module: Any, data: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), data(), tmp_path, **options)


def test_dropped_captions_are_refused(module: Any, data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caption_dropout 0\.1"):
        fit(module(), data(caption_dropout=0.1), tmp_path)


def test_a_grid_beyond_the_positions_is_refused(module: Any, data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 × 9 grid"):
        fit(module(grid=(9, 9)), data(), tmp_path)


def test_a_visual_tokenizer_of_another_model_is_refused(
    module: Any, data: Any, tmp_path: Path, tiny_shards: str
) -> None:
    other = make_visual_tokenizer(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="visual tokenizer"):
        fit(module(visual_tokenizer=other), data(), tmp_path)


def test_a_reward_that_is_no_number_stops_with_prompt_and_reward(module: Any, data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Faulty.*a red circle|a red circle.*Faulty"):
        fit(module(reward=Faulty(1, nan=True)), data(shuffle=False), tmp_path)


@pytest.mark.parametrize("option, value", [("group_size", 1), ("inner_updates", 0), ("beta", -0.1)])
def test_numbers_outside_their_range_are_named(module: Any, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        module(**{option: value})


def test_schedule_of_the_release() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    scheduler = CosineWithWarmup(optimizer, 100, warmup=0.1, end=0.1)
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[:11]))
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[100] == rates[119] == pytest.approx(0.2)
