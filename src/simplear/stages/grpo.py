"""Group relative policy optimisation: the paper's third stage (section 3.3).

One training step is one rollout with all its inner updates:

    captions ──policy──▶ G images each ──reward──▶ scores ──group──▶ advantages ──inner updates──▶ policy

Rollouts sample the policy itself, at a temperature and without guidance or truncation, for the log-probs below are
that distribution's and no other's. Randomness belongs to an image's number in the whole training, so neither ranks nor
restarts change what is drawn. The objective is in `grpo_objective`, the rewards in `simplear.rewards`; weights of the
reference and of the reward are in no training state.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from simplear.data import TokenDataModule
from simplear.errors import UserError
from simplear.generation import Engine, SamplingSettings, make_engine
from simplear.language_model import Architecture, Checkpoint, LanguageModel, StepWork
from simplear.rewards import Reward, move, score
from simplear.sequence import text_lengths, training_batch
from simplear.stages.grpo_objective import group_advantages, grpo_loss
from simplear.stages.language_model_module import LanguageModelModule
from simplear.stages.reference import Reference, ReferenceSettings

ROLLOUT_SEEDS = 2**48
"""Rollouts count their seeds from here, far from those that people choose for evaluations."""


@dataclass(frozen=True)
class Rollout:
    """What one training step drew on this rank: P captions with G images each, the images of a caption together."""

    captions: list[str]
    """P·G, each repeated G times; as the reward reads them."""
    codes: Tensor
    """(P·G, h, w) int64."""
    images: Tensor
    """(P·G, 3, H, W) float in [0, 1]."""
    scores: Tensor
    """(P·G,) float32."""
    parts: dict[str, Tensor]
    """(P·G,) each; of a reward made of parts."""


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
        _require_plain_sampling(sampling)
        for name, value, least in (
            ("group_size", group_size, 2),
            ("inner_updates", inner_updates, 1),
            ("micro_batch_size", micro_batch_size or 1, 1),
            ("rollout_batch_size", rollout_batch_size or 1, 1),
            ("beta", beta, 0),
        ):
            if value < least:
                raise UserError(f"{name} {value} must be at least {least}.")
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

    def load_checkpoint(self, checkpoint: str, with_weights: bool = True) -> Checkpoint:
        """As every stage; the grid to draw is the checkpoint's where none is given."""
        loaded = super().load_checkpoint(checkpoint, with_weights)
        self.grid = self.grid or loaded.settings.grid
        return loaded

    def copy_model(self, model: LanguageModel) -> None:
        """Copy the reference before the policy is trained; with an adapter it is the policy without."""
        if self.beta > 0:
            strategy = None if self._trainer is None else self.trainer.strategy
            sharded = isinstance(strategy, ModelParallelStrategy) and self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"] if sharded and self.device_mesh is not None else None
            precision = "32-true" if mesh is None else self.trainer.precision
            shared = self.adapter is not None
            self._reference = Reference(model, self.reference_settings, mesh, precision, shared)

    def configure_callbacks(self) -> list[Callback]:
        """As every stage; the first place where the Trainer's flags can be refused with a remedy."""
        if self._finder is not None:
            raise UserError(
                "LearningRateFinder follows a loss down, and that of GRPO says nothing about the reward: leave it out, "
                "and begin with the configuration's rate."
            )
        if self.trainer.gradient_clip_val is not None:
            raise UserError(
                f"--trainer.gradient_clip_val {self.trainer.gradient_clip_val} has no effect on the inner updates of "
                "GRPO: set --model.init_args.gradient_clip_val instead."
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"--trainer.accumulate_grad_batches {self.trainer.accumulate_grad_batches}: a training step of GRPO is "
                "a whole rollout; divide its gradient by --model.init_args.micro_batch_size instead."
            )
        return super().configure_callbacks()

    def grids(self, data: TokenDataModule) -> list[tuple[int, int]]:
        """The grid that is drawn; what the data's rows hold besides captions does not matter."""
        assert self.grid is not None
        return [self.grid]

    def on_fit_start(self) -> None:
        """Check the data, and give reward, reference and visual tokenizer their places."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TokenDataModule) and data.caption_dropout > 0:
            raise UserError(
                f"--data.init_args.caption_dropout {data.caption_dropout}: the reward of an image drawn from an empty "
                "caption says nothing about the caption; set it to 0."
            )
        if isinstance(data, TokenDataModule) and data.holds_texts:
            raise UserError(
                "the paths of the data hold texts without images, which are no prompts: give token shards of images, "
                "or a file of prompts (.txt, .jsonl or .json)."
            )
        if self.visual_tokenizer_path is None:
            raise UserError(
                "the reward reads pictures, which takes a visual tokenizer, and the checkpoint carries none: name its "
                "directory (--model.init_args.visual_tokenizer)."
            )
        if self.start_fingerprint not in (None, self.visual_tokenizer.fingerprint):
            raise UserError(
                f"the visual tokenizer at {self.visual_tokenizer_path} is {self.visual_tokenizer.fingerprint[:12]}…, "
                f"but the checkpoint draws the codes of {str(self.start_fingerprint)[:12]}…: name the one that belongs "
                "to it (--model.init_args.visual_tokenizer)."
            )
        self.visual_tokenizer.to(self.device)  # type: ignore[attr-defined]
        move(self.reward, self.device)
        # Lightning would rather save what was there before the update: here a state is what a training step leaves.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization.*")
        if self._reference is not None:
            self._reference.prepare(self.device, next(self.language_model.parameters()).dtype)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and its inner updates."""
        seconds: dict[str, float] = {}
        images = len(batch["captions"]) * self.group_size
        first = (self.rollouts_done * self.trainer.world_size + self.trainer.global_rank) * images
        rollout, prompts = self._roll_out(batch, self.group_size, first, seconds)
        self._log_rollout(rollout)
        with _timed(seconds, "update", self.device):
            self._optimize(rollout, prompts)
        self.log_dict({f"seconds/{name}": value for name, value in seconds.items()})
        self.last_rollout = rollout
        self.rollouts_done += 1

    def step_work(self, batch: dict[str, Any]) -> StepWork:
        """What a rollout and its updates take: a forward pass to draw, those of reference and old policy, the updates.

        With full activation checkpointing the layers once more for each update. Reward and visual tokenizer are not
        counted.
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
        again = self.inner_updates if self.activation_checkpointing == "full" else 0
        recomputed = again * architecture.recomputed_flops(*sums, self.adapter)
        return StepWork(images, sums[0], passes * forward + updates, recomputed)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Mean reward of one image for each held-out caption, drawn from the same seeds each time."""
        captions = len(batch["captions"])
        first = (batch_idx * self.trainer.world_size + self.trainer.global_rank) * captions
        rollout, _ = self._roll_out(batch, 1, first, {})
        self.log("validation/reward", rollout.scores.mean(), batch_size=captions, sync_dist=True)

    def _roll_out(
        self, batch: dict[str, Any], group_size: int, first: int, seconds: dict[str, float]
    ) -> tuple[Rollout, list[Tensor]]:
        """Draw, decode and score a group of images for each caption; also the prompts (1-D ids) of all of them."""
        assert self.grid is not None
        prompts = [prompt for prompt in self._prompts(batch) for _ in range(group_size)]
        captions = [caption for caption in batch["captions"] for _ in range(group_size)]
        metadata = [row for row in batch["metadata"] for _ in range(group_size)]
        images = len(prompts)
        seeds = [ROLLOUT_SEEDS * (self.seed + 1) + first + number for number in range(images)]
        if self._engine is None:
            name = self.engine_name or ("compiled" if self.device.type == "cuda" else "fused")
            self._engine = make_engine(name, self.language_model)
        # The engine copies weights whose version has changed; fused optimizers and averaging change them uncounted.
        increment_version(self.language_model.parameters())
        training = self.language_model.training
        self.language_model.eval()
        parts = _parts(images, self.rollout_batch_size)
        with _timed(seconds, "rollout", self.device):
            drawn = [
                self._engine.generate(prompts[part], prompts[part], self.grid, self.sampling, seeds[part])[0].clone()
                for part in parts
            ]
        self.language_model.train(training)
        codes = torch.cat(drawn)
        with _timed(seconds, "decode", self.device):
            pixels = torch.cat([self.visual_tokenizer.decode(codes[part]) for part in parts])
            pictures = (pixels.float() + 1) / 2
        failure: Exception | None = None
        with _timed(seconds, "reward", self.device):
            try:
                scores, scored_parts = score(self.reward, pictures, captions, metadata)
            except Exception as error:
                failure = error
        self._fail_together(failure)
        return Rollout(captions, codes, pictures, scores.to(self.device), scored_parts), prompts

    def _prompts(self, batch: dict[str, Any]) -> list[Tensor]:
        """``<|t2i|> caption <|soi|>`` of each row, as the data prefixed and cut it."""
        lengths = text_lengths(batch["input_ids"], self.language_model.layout).tolist()
        return [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]

    def _fail_together(self, failure: Exception | None) -> None:
        """Raise on every rank when one failed, so that none waits for it in vain."""
        failed = torch.tensor(float(failure is not None), device=self.device)
        total: Any = self.trainer.strategy.reduce(failed, reduce_op="sum")
        if failure is not None:
            raise failure
        if float(total) > 0:
            raise RuntimeError("the reward failed on another rank, whose message says why.")

    def _optimize(self, rollout: Rollout, prompts: list[Tensor]) -> None:
        assert self.grid is not None
        images = len(prompts)
        parts = _parts(images, self.micro_batch_size)
        sequences = [self._sequences(prompts[part], rollout.codes[part]) for part in parts]
        advantages = group_advantages(rollout.scores, self.group_size, scale=self.scale_advantages)
        references: Sequence[Tensor | None] = [None] * len(parts)
        olds = references
        if self._reference is not None:
            temperature = self.sampling.temperature
            references = self._reference.log_probs(sequences, self.grid, temperature, self.chunk_rows, self.packed)
        if self.inner_updates > 1:
            with torch.no_grad():
                olds = [self._log_probs(ids, with_entropies=False)[0] for ids in sequences]
        optimizer: Any = self.optimizers()
        statistics: list[dict[str, Tensor]] = []
        norms = []
        for _ in range(self.inner_updates):
            for part, ids, old, reference in zip(parts, sequences, olds, references, strict=True):
                log_probs, entropies = self._log_probs(ids)
                assert entropies is not None
                loss, found = grpo_loss(
                    log_probs,
                    old,
                    reference,
                    advantages[part],
                    epsilon_low=self.epsilon_low,
                    epsilon_high=self.epsilon_high,
                    beta=self.beta,
                )
                share = len(ids) / images
                # Ranks add up their gradients once an update, with its last micro-batch.
                with self._reducing(part is parts[-1]):
                    self.manual_backward(loss * share)
                weight = torch.tensor(
                    share / self.inner_updates, dtype=torch.float32
                )  # in bf16-true the default is bfloat16
                statistics.append({"loss": loss.detach(), "entropy": entropies.mean(), **found, "share": weight})
            norm = torch.nn.utils.clip_grad_norm_(
                self.language_model.parameters(), self.gradient_clip_val or float("inf")
            )
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not torch.isfinite(norm):
                raise UserError(
                    f"the gradient is not finite in training step {self.rollouts_done}; captions: "
                    f"{sorted(set(rollout.captions))[:3]}. Lower the learning rate, or resume from an earlier state."
                )
            norms.append(norm)
            optimizer.step()
            optimizer.zero_grad()
            if self.lr_scheduler is not None:
                self.lr_scheduler_step(self._schedule, None)
        self._log_updates(statistics, torch.stack(norms).mean())

    def _reducing(self, last: bool) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not last else nullcontext()

    def _sequences(self, prompts: list[Tensor], codes: Tensor) -> Tensor:
        """Right-padded sequences (B, L) of prompts and the codes (B, h, w) that they were continued with."""
        layout = self.language_model.layout
        captions = [prompt[1:-1].tolist() for prompt in prompts]
        return training_batch(captions, codes.cpu(), layout)["input_ids"].to(self.device)

    def _log_probs(self, ids: Tensor, with_entropies: bool = True) -> tuple[Tensor, Tensor | None]:
        assert self.grid is not None
        return self.language_model.image_log_probs(
            ids,
            self.grid,
            temperature=self.sampling.temperature,
            chunk_rows=self.chunk_rows,
            with_entropies=with_entropies,
            packed=self.packed,
        )

    def _log_rollout(self, rollout: Rollout) -> None:
        groups = rollout.scores.view(-1, self.group_size)
        values = {
            "reward/mean": rollout.scores.mean(),
            "reward/std_within_groups": groups.std(dim=1).mean(),
            "reward/groups_without_spread": (groups.max(dim=1).values == groups.min(dim=1).values).float().mean(),
            **{f"reward/{name}": part.mean() for name, part in rollout.parts.items()},
        }
        self.log_dict(values, sync_dist=True)

    def _log_updates(self, statistics: list[dict[str, Tensor]], norm: Tensor) -> None:
        """Means over all inner updates and micro-batches, and the range of the ratio."""
        columns = {name: torch.stack([entry[name] for entry in statistics]) for name in statistics[0]}
        shares = columns.pop("share").to(self.device)
        for name, reduce in (("ratio_min", torch.min), ("ratio_max", torch.max)):
            value = reduce(columns.pop(name))
            self.log(f"policy/{name}", value, sync_dist=True, reduce_fx=name.removeprefix("ratio_"))
        self.log_dict({f"policy/{name}": (shares * column).sum() for name, column in columns.items()}, sync_dist=True)
        self.log("policy/gradient_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep the number of rollouts, from which their seeds follow."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollouts_done"] = self.rollouts_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of rollouts back."""
        super().on_load_checkpoint(checkpoint)
        self.rollouts_done = checkpoint["rollouts_done"]


def _require_plain_sampling(sampling: SamplingSettings) -> None:
    """Raises ValueError where drawing is not sampling the policy at a temperature."""
    plain = SamplingSettings(temperature=sampling.temperature)
    for name in ("guidance_scale", "do_sample", "top_k", "top_p"):
        value, wanted = getattr(sampling, name), getattr(plain, name)
        if value != wanted:
            raise UserError(
                f"sampling.{name} {value}: rollouts must sample the policy itself, at a temperature alone. With "
                "guidance or truncation the images come from another distribution than the one whose log-probs the "
                f"objective takes, and its gradient is wrong. Leave it at {wanted}."
            )


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
