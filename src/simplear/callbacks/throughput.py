"""How fast a training runs and what it waits for, in its curves and in a few lines at its end.

Tokens and images a second, the share of the devices' arithmetic that the model needs (MFU: model FLOPs utilisation),
the time that training waits for data (on the first process), and device memory. Each is a mean since the values were
logged last, over all processes; validation is left out of the time. Lightning's ThroughputMonitor takes every batch to
be as large as the last one and synchronises with the device after each; here the counts stay on the device until
something is logged. The peaks of arithmetic are Lightning's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype, get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from simplear.errors import UserError
from simplear.language_model import StepWork

FETCH = ".train_dataloader_next"
"""End of the name under which Lightning profiles the wait for a batch."""
H200_FLOPS = 989.4e12
"""bfloat16, dense: the chip of the H100 SXM (NVIDIA H200 datasheet: 1,979 with sparsity). Lightning does not know it by
the name that PyTorch reports."""
COUNTS = ("images", "tokens", "flops", "recomputed_flops")
GIB = 2**30


class FetchTimer(Profiler):
    """The profiler that it wraps, and the seconds spent in waiting for batches."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.profiler = profiler
        self.seconds = 0.0
        self._began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._began = time.perf_counter()
        self.profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        self.profiler.stop(action_name)
        if action_name.endswith(FETCH):
            self.seconds += time.perf_counter() - self._began

    def summary(self) -> str:
        return self.profiler.summary()

    def describe(self) -> None:
        self.profiler.describe()

    def teardown(self, stage: str | None) -> None:
        self.profiler.teardown(stage)


@dataclass
class Tally:
    """What one process did in some time."""

    counts: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    seconds: float = 0.0
    """Of training; validation is left out."""
    waited: float = 0.0
    """For data, part of ``seconds``."""
    validated: float = 0.0

    def add(self, other: Tally) -> None:
        """Take up another tally."""
        for name in COUNTS:
            self.counts[name] += other.counts[name]
        self.seconds += other.seconds
        self.waited += other.waited
        self.validated += other.validated


class TrainingMonitor(Callback):
    """Logs ``throughput/…`` whenever the Trainer logs, and prints a summary at the end of training.

    ``images_per_second``; ``data_wait``, share of the time; ``memory_gib``, peak on a GPU; and for stages that say what
    a step takes (``step_work``): ``tokens_per_second``, padding left out, ``mfu``, and ``hfu``, which counts recomputed
    layers too. Where the peak of the device is not known, as on CPUs, MFU is left out.

    Args:
        peak_flops: FLOP/s of one device in the training's precision, dense; None looks the device up.
        summary: print some lines at the end.
    """

    def __init__(self, peak_flops: float | None = None, summary: bool = True) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise UserError(f"peak_flops {peak_flops} must be above 0: FLOP/s of one device.")
        self.given_peak, self.summary = peak_flops, summary
        self.peak_flops: float | None = None
        """Of one device; None where it is not known."""
        self._timer: FetchTimer | None = None
        self._window, self._whole = Tally(), Tally()
        self._mark = self._paused = 0.0
        self._first_step = 0
        self._peak_memory = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        self.peak_flops = self.given_peak or peak_flops(trainer)
        self._timer = FetchTimer(trainer.profiler)  # type: ignore[attr-defined]
        trainer.profiler = self._timer  # type: ignore[attr-defined]
        self._window, self._whole = Tally(), Tally()
        self._first_step = trainer.global_step
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        work = step_work(pl_module, batch)
        for name in COUNTS:
            self._window.counts[name] = self._window.counts[name] + getattr(work, name)
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            pl_module.log_dict(self._close_window(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        _synchronize(trainer)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _synchronize(trainer)
            validated = time.perf_counter() - self._paused
            self._window.validated += validated
            self._mark += validated

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary; what was done since the last logging counts too."""
        self._close_window(trainer)
        self._restore_profiler(trainer)
        if self.summary and trainer.is_global_zero and self._whole.counts["images"]:
            steps = trainer.global_step - self._first_step
            print(_summary(self._whole, steps, trainer, self.peak_flops, self._peak_memory), flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the profiler back."""
        self._restore_profiler(trainer)

    def _restore_profiler(self, trainer: Trainer) -> None:
        if self._timer is not None:
            trainer.profiler = self._timer.profiler  # type: ignore[attr-defined]
            self._timer = None

    def _close_window(self, trainer: Trainer) -> dict[str, float]:
        """The values since the last call. All ranks call together: they add up their counts."""
        assert self._timer is not None
        window, self._window = self._window, Tally()
        device = trainer.strategy.root_device
        counts = torch.stack([torch.as_tensor(window.counts[name], device=device).long() for name in COUNTS])
        total: Any = trainer.strategy.reduce(counts, reduce_op="sum")
        window.counts = dict(zip(COUNTS, total.tolist(), strict=True))
        _synchronize(trainer)
        now = time.perf_counter()
        window.seconds, self._mark = now - self._mark, now
        window.waited, self._timer.seconds = self._timer.seconds, 0.0
        self._whole.add(window)
        values = rates(window, self.peak_flops, trainer.world_size)
        if device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)
            self._peak_memory = max(self._peak_memory, values["memory_gib"])
        return {f"throughput/{name}": value for name, value in values.items()}


def step_work(module: Any, batch: Any) -> StepWork:
    """What the stage says a step takes, else the number of images in the batch."""
    if hasattr(module, "step_work"):
        return module.step_work(batch)
    tensors = batch.values() if isinstance(batch, dict) else [batch]
    return StepWork(next((len(value) for value in tensors if isinstance(value, Tensor)), 0), 0, 0)


def rates(tally: Tally, peak: float | None, devices: int) -> dict[str, float]:
    """What was done a second, by all devices together, and shares of time and arithmetic.

    Args:
        tally: counts of all processes.
        peak: FLOP/s of one device; None leaves the shares of arithmetic out.
        devices: number of processes, one device each.
    """
    counts, seconds = tally.counts, tally.seconds
    values = {"images_per_second": counts["images"] / seconds, "data_wait": tally.waited / seconds}
    if counts["tokens"]:
        values["tokens_per_second"] = counts["tokens"] / seconds
    if peak is not None and counts["flops"]:
        values["mfu"] = counts["flops"] / seconds / (peak * devices)
        if counts["recomputed_flops"]:
            values["hfu"] = values["mfu"] * (1 + counts["recomputed_flops"] / counts["flops"])
    return values


def peak_flops(trainer: Trainer) -> float | None:
    """Dense FLOP/s of one device in the training's precision, from Lightning's table; None where it is not known."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
    if "h200" in torch.cuda.get_device_name(device).lower():
        return H200_FLOPS if dtype in (torch.bfloat16, torch.float16) else None
    return get_available_flops(device, dtype)


def _synchronize(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def _summary(tally: Tally, steps: int, trainer: Trainer, peak: float | None, memory: float) -> str:
    values = rates(tally, peak, trainer.world_size)
    parts = [f"{steps} steps in {tally.seconds:.0f} s on {trainer.world_size} × {trainer.strategy.root_device.type}"]
    if tally.validated:
        parts[0] += f", and {tally.validated:.0f} s of validation"
    parts.append(f"{values['images_per_second']:.3g} images/s")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"waiting for data {values['data_wait']:.1%}")
    parts += [f"{name.upper()} {values[name]:.1%}" for name in ("mfu", "hfu") if name in values]
    if memory:
        parts.append(f"peak memory {memory:.1f} GiB")
    return "; ".join(parts)
