"""Group relative policy optimisation: the paper's third stage (section 3.3).

One training step is one rollout with all its inner updates:

    captions ──policy──▶ G images each ──reward──▶ scores ──group──▶ advantages ──inner updates──▶ policy

Rollouts sample the policy itself, at a temperature and without guidance or truncation, since the log-probs below are
those of that distribution alone. Randomness belongs to an image's number in the whole training, so neither ranks nor
restarts change what is drawn. The objective is in `grpo_objective`, the rewards in `simplear.rewards`; weights of the
reference and of the reward are in no training state.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from simplear.data import TokenDataModule
from simplear.errors import UserError
from simplear.generation import Engine, SamplingSettings, make_engine
from simplear.language_model import Architecture, LanguageModel, StepWork
from simplear.rewards import Reward, move, score
from simplear.sequence import text_lengths, training_batch
from simplear.stages.grpo_objective import group_advantages, grpo_loss
from simplear.stages.language_model_module import LanguageModelModule
from simplear.stages.reference import Reference, ReferenceSettings

ROLLOUT_SEEDS = 2**48
"""Rollouts count their seeds from here, far from those that people choose for evaluations."""


@dataclass(frozen=True)
class Rollout:
    """What one training step drew on this rank: P captions with G images each, the images of a caption together.

    Args:
        captions: P·G, each repeated G times; as the reward reads them.
        prompts: P·G times ``<|t2i|> caption <|soi|>``, 1-D ids as the data prefixed and cut them.
        codes: (P·G, h, w) int64.
        images: (P·G, 3, H, W) float in [0, 1].
        scores: (P·G,) float32.
        parts: (P·G,) each; of a reward made of parts.
    """

    captions: list[str]
    prompts: list[Tensor]
    codes: Tensor
    images: Tensor
    scores: Tensor
    parts: dict[str, Tensor]


class GRPOModule(LanguageModelModule):
    """Reinforcement learning from a checkpoint, with the captions of the data as prompts.

    The data's global batch is the number of captions in one rollout over all ranks; its caption_dropout must be 0.
    The Trainer's ``max_steps`` counts optimizer steps, ``inner_updates`` of them a training step.

    Args:
        checkpoint: directory or hub id of a checkpoint of this project or one released with the paper.
        reward: scores images; any class of `simplear.rewards`, or of one's own, by class_path.
        group_size: G, images drawn for each caption, 2 or more.
        sampling: of rollouts; only its temperature may be set.
        inner_updates: optimizer steps on each rollout; with 1 the ratio is exactly 1.
        beta: weight of the KL term; 0 needs no reference and makes none.
        epsilon_low: the ratio is clipped below 1 − this.
        epsilon_high: the ratio is clipped above 1 + this.
        scale_advantages: divide by the group's standard deviation, as the paper does.
        gradient_clip_val: largest norm of the gradient; None does not clip. In place of the Trainer's own flag.
        micro_batch_size: images in one forward and backward pass; None takes a rank's whole rollout.
        rollout_batch_size: images drawn at once; None takes a rank's whole rollout.
        engine: one of `simplear.generation.ENGINES` that runs in this process; None takes `compiled` on a GPU, else
            `fused`, whose copy of the weights is refreshed once a rollout.
        reference: where the reference lives.
        grid: rows and columns of codes to draw; None takes the checkpoint's.
        chunk_rows: rows of logits held in memory at once; None holds them all.
        seed: of the rollouts.
        kwargs: the arguments of `LanguageModelModule`.

    Raises:
        ValueError: numbers outside their range, or rollouts that would not sample the policy itself.
    """

    def __init__(
        self,
        checkpoint: str,
        reward: Reward,
        *,
        group_size: int = 4,
        sampling: SamplingSettings = SamplingSettings(),
        inner_updates: int = 1,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        scale_advantages: bool = True,
        gradient_clip_val: float | None = 1.0,
        micro_batch_size: int | None = None,
        rollout_batch_size: int | None = None,
        engine: str | None = None,
        reference: ReferenceSettings = ReferenceSettings(),
        grid: tuple[int, int] | None = None,
        chunk_rows: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        if group_size < 2 or inner_updates < 1 or beta < 0:
            raise UserError(
                f"group_size {group_size}, inner_updates {inner_updates} and beta {beta} must be at least 2, 1 and 0."
            )
        if sampling != SamplingSettings(temperature=sampling.temperature):
            raise UserError(
                f"{sampling}: rollouts must sample the policy itself, so only sampling.temperature may be set. With "
                "guidance or truncation the images come from another distribution than the one whose log-probs the "
                "objective takes, and its gradient is wrong."
            )
        self.checkpoint, self.reward, self.group_size, self.sampling = checkpoint, reward, group_size, sampling
        self.inner_updates, self.beta = inner_updates, beta
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.scale_advantages = scale_advantages
        self.gradient_clip_val, self.micro_batch_size = gradient_clip_val, micro_batch_size
        self.rollout_batch_size, self.engine_name = rollout_batch_size, engine
        self.reference_settings, self.chunk_rows, self.seed = reference, chunk_rows, seed
        self.grid = grid
        self.rollouts_done = 0
        """Training steps that have ended, over all runs of this training."""
        self.last_rollout: Rollout | None = None
        """Of the training step that ended last, for callbacks to show."""
        self._reference: Reference | None = None
        self._engine: Engine | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and its inner updates."""
        seconds: dict[str, float] = {}
        rollout = self._roll_out(batch, self.group_size, self.rollouts_done, seconds)
        advantages = group_advantages(rollout.scores, self.group_size, scale=self.scale_advantages)
        with _timed(seconds, "update", self.device):
            self._update(rollout, advantages)
        self._log_rewards(rollout)
        self.log_dict({f"seconds/{name}": value for name, value in seconds.items()})
        self.last_rollout = rollout
        self.rollouts_done += 1

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Mean reward of one image for each held-out caption, drawn from the same seeds each time."""
        rollout = self._roll_out(batch, 1, batch_idx, {})
        self.log("validation/reward", rollout.scores.mean(), batch_size=len(rollout.captions), sync_dist=True)

    def _roll_out(self, batch: dict[str, Any], group_size: int, number: int, seconds: dict[str, float]) -> Rollout:
        """Draw, decode and score a group of images for each caption of the rollout of this number."""
        assert self.grid is not None
        lengths = text_lengths(batch["input_ids"], self.language_model.layout).tolist()
        rows = [row for row in range(len(lengths)) for _ in range(group_size)]
        prompts = [batch["input_ids"][row, : lengths[row]] for row in rows]
        captions, metadata = ([batch[key][row] for row in rows] for key in ("captions", "metadata"))
        first_image = (number * self.trainer.world_size + self.trainer.global_rank) * len(rows)
        seeds = [ROLLOUT_SEEDS * (self.seed + 1) + first_image + place for place in range(len(rows))]
        parts = _parts(len(rows), self.rollout_batch_size)
        with _timed(seconds, "rollout", self.device):
            codes = self._draw(prompts, seeds, parts)
        with _timed(seconds, "decode", self.device):
            pixels = torch.cat([self.visual_tokenizer.decode(codes[part]) for part in parts])
            images = (pixels.float() + 1) / 2
        failure: Exception | None = None
        with _timed(seconds, "reward", self.device):
            try:
                scores, scored_parts = score(self.reward, images, captions, metadata)
            except Exception as error:
                failure = error
        self._fail_together(failure)
        return Rollout(captions, prompts, codes, images, scores.to(self.device), scored_parts)

    def _draw(self, prompts: list[Tensor], seeds: list[int], parts: list[slice]) -> Tensor:
        """Codes (P·G, h, w) that the policy continues prompts with."""
        assert self.grid is not None
        if self._engine is None:
            name = self.engine_name or ("compiled" if self.device.type == "cuda" else "fused")
            self._engine = make_engine(name, self.language_model)
        # The engine copies weights whose version has changed; fused optimizers and averaging change them uncounted.
        increment_version(self.language_model.parameters())
        training = self.language_model.training
        self.language_model.eval()
        drawn = [
            self._engine.generate(prompts[part], prompts[part], self.grid, self.sampling, seeds[part])[0].clone()
            for part in parts
        ]
        self.language_model.train(training)
        return torch.cat(drawn)

    def _fail_together(self, failure: Exception | None) -> None:
        """Raise on every rank when one failed, so that none waits for it in vain."""
        failed = torch.tensor(float(failure is not None), device=self.device)
        total: Any = self.trainer.strategy.reduce(failed, reduce_op="sum")
        if failure is not None:
            raise failure
        if float(total) > 0:
            raise RuntimeError("the reward failed on another rank, whose message says why.")

    def _update(self, rollout: Rollout, advantages: Tensor) -> None:
        """The inner updates: each goes through all micro-batches, adds up their gradients and makes one step."""
        assert self.grid is not None
        images = len(rollout.prompts)
        parts = _parts(images, self.micro_batch_size)
        sequences = [self._sequences(rollout.prompts[part], rollout.codes[part]) for part in parts]
        options: dict[str, Any] = {
            "temperature": self.sampling.temperature,
            "chunk_rows": self.chunk_rows,
            "packed": self.packed,
        }
        references: list[Any] = [None] * len(parts)
        olds = references
        if self._reference is not None:
            references = self._reference.log_probs(sequences, self.grid, **options)
        if self.inner_updates > 1:
            without_entropies = {**options, "with_entropies": False}
            with torch.no_grad():
                olds = [
                    self.language_model.image_log_probs(ids, self.grid, **without_entropies)[0] for ids in sequences
                ]
        optimizer: Any = self.optimizers()
        statistics: list[tuple[float, dict[str, Tensor]]] = []
        norms: list[Tensor] = []
        for _ in range(self.inner_updates):
            for part, ids, old, reference in zip(parts, sequences, olds, references, strict=True):
                log_probs, entropies = self.language_model.image_log_probs(ids, self.grid, **options)
                assert entropies is not None
                loss, of_loss = grpo_loss(
                    log_probs,
                    old,
                    reference,
                    advantages[part],
                    epsilon_low=self.epsilon_low,
                    epsilon_high=self.epsilon_high,
                    beta=self.beta,
                )
                share = len(ids) / images
                strategy: Any = self.trainer.strategy
                # Ranks add up their gradients once an update, with its last micro-batch.
                wait = isinstance(strategy, ParallelStrategy) and part is not parts[-1]
                with strategy.block_backward_sync() if wait else nullcontext():
                    self.manual_backward(loss * share)
                values = {"loss": loss.detach(), "entropy": entropies.mean(), **of_loss}
                statistics.append((share / self.inner_updates, values))
            norms.append(self._step(optimizer, rollout))
        self._log_updates(statistics, torch.stack(norms).mean())

    def _step(self, optimizer: Any, rollout: Rollout) -> Tensor:
        """Clip the gradient, and step optimizer and schedule; returns the gradient's norm before clipping."""
        weights = self.language_model.parameters()
        norm: Any = torch.nn.utils.clip_grad_norm_(weights, self.gradient_clip_val or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient is not finite in training step {self.rollouts_done}; captions: "
                f"{sorted(set(rollout.captions))[:3]}. Lower the learning rate, or resume from an earlier state."
            )
        optimizer.step()
        optimizer.zero_grad()
        if self._schedule is not None:
            self.lr_scheduler_step(self._schedule, None)
        return norm

    def _sequences(self, prompts: list[Tensor], codes: Tensor) -> Tensor:
        """Right-padded sequences (B, L) of prompts and the codes (B, h, w) that they were continued with."""
        captions = [prompt[1:-1].tolist() for prompt in prompts]
        return training_batch(captions, codes.cpu(), self.language_model.layout)["input_ids"].to(self.device)

    def _log_rewards(self, rollout: Rollout) -> None:
        groups = rollout.scores.view(-1, self.group_size)
        values = {
            "reward/mean": rollout.scores.mean(),
            "reward/std_within_groups": groups.std(dim=1).mean(),
            "reward/groups_without_spread": (groups.max(dim=1).values == groups.min(dim=1).values).float().mean(),
            **{f"reward/{name}": part.mean() for name, part in rollout.parts.items()},
        }
        self.log_dict(values, sync_dist=True)

    def _log_updates(self, statistics: list[tuple[float, dict[str, Tensor]]], norm: Tensor) -> None:
        """Means over all inner updates and micro-batches, each with its weight, and the range of the ratio."""
        columns = {name: [values[name] for _, values in statistics] for name in statistics[0][1]}
        for name, reduce in (("ratio_min", torch.min), ("ratio_max", torch.max)):
            value = reduce(torch.stack(columns.pop(name)))
            self.log(f"policy/{name}", value, sync_dist=True, reduce_fx=name.removeprefix("ratio_"))
        for name, column in columns.items():
            mean: Any = sum(weight * value for (weight, _), value in zip(statistics, column, strict=True))
            self.log(f"policy/{name}", mean, sync_dist=True)
        self.log("policy/gradient_norm", norm)

    def on_model_built(self, model: LanguageModel) -> None:
        """Copy the reference before the policy is trained; with an adapter it is the policy without.

        The grid to draw is the checkpoint's where none is given.
        """
        if self.grid is None and self.start_settings is not None:
            self.grid = self.start_settings.grid
        if self.beta > 0:
            mesh, shared = self.sharding_mesh, self.adapter is not None
            precision = "32-true" if mesh is None else self.trainer.precision
            self._reference = Reference(model, self.reference_settings, shared, mesh, precision)

    def grids(self, data: TokenDataModule) -> list[tuple[int, int]]:
        """The grid that is drawn; what the data's rows hold besides captions does not matter."""
        assert self.grid is not None
        return [self.grid]

    def on_fit_start(self) -> None:
        """Check the data, and give reward, reference and visual tokenizer their places."""
        super().on_fit_start()
        if self._data is not None and self._data.caption_dropout > 0:
            raise UserError(
                f"--data.init_args.caption_dropout {self._data.caption_dropout}: the reward of an image drawn from an "
                "empty caption says nothing about the caption; set it to 0."
            )
        if self._data is not None and self._data.holds_texts:
            raise UserError(
                "the paths of the data hold texts without images, which are not prompts: give token shards of images, "
                "or a file of prompts (.txt, .jsonl or .json)."
            )
        if self.visual_tokenizer_path is None:
            raise UserError(
                "the reward reads pictures, which takes a visual tokenizer, and the checkpoint carries none: name its "
                "directory (--model.init_args.visual_tokenizer)."
            )
        self.visual_tokenizer.to(self.device)  # type: ignore[attr-defined]
        move(self.reward, self.device)
        # Lightning would rather save what was there before the update: here a state is what a training step leaves.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization.*")
        if self._reference is not None:
            self._reference.prepare(self.device, next(self.language_model.parameters()).dtype)

    def step_work(self, batch: dict[str, Any]) -> StepWork:
        """What a rollout and its updates take: a forward pass to draw, those of reference and old policy, the updates.

        Reward and visual tokenizer are not counted.
        """
        assert self.grid is not None
        architecture, layout = Architecture.of(self.language_model.decoder.config), self.language_model.layout
        codes = self.grid[0] * self.grid[1]
        images = len(batch["captions"]) * self.group_size
        lengths = text_lengths(batch["input_ids"], layout) + codes
        sums = lengths.sum() * self.group_size, lengths.square().sum() * self.group_size
        choices = images * codes * layout.codebook_size
        forward = architecture.layer_flops(*sums) + architecture.head_flops(choices)
        passes = 1 + (self.beta > 0) + (self.inner_updates > 1)
        updates = self.inner_updates * architecture.training_flops(*sums, choices, self.adapter)
        return StepWork(images, sums[0], passes * forward + updates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep the number of rollouts, from which their seeds follow."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts_done"] = self.rollouts_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of rollouts back."""
        super().on_load_checkpoint(checkpoint)
        self.rollouts_done = checkpoint["rollouts_done"]


def _parts(count: int, size: int | None) -> list[slice]:
    """Slices of ``size`` that cover ``range(count)``."""
    size = size or count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Note how long the inside took, pending work of a GPU included."""
    begin = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - begin
