"""How fast a training runs and what it waits for, in its curves.

Tokens and images a second, the share of the devices' arithmetic that the model needs (MFU: model FLOPs utilisation),
the time that training waits for data (on the first process), and device memory. Each is a mean since the values were
last logged, over all processes; validation is left out of the time. Lightning's ThroughputMonitor takes every batch to
be as large as the last one and synchronises with the device after each; here the counts stay on the device until
something is logged. The peaks of arithmetic are Lightning's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype, get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from simplear.errors import UserError
from simplear.language_model import StepWork

FETCH = ".train_dataloader_next"
"""End of the name under which Lightning profiles the wait for a batch."""
H200_FLOPS = 989.4e12
"""bfloat16, dense: the chip of the H100 SXM (NVIDIA H200 datasheet: 1,979 with sparsity). Lightning does not know it by
the name that PyTorch reports."""
COUNTS = ("images", "tokens", "flops")
GIB = 2**30


class FetchTimer(PassThroughProfiler):
    """Lightning's empty profiler, which also adds up the seconds of waiting for batches."""

    seconds = 0.0
    _began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self.seconds += time.perf_counter() - self._began


class TrainingMonitor(Callback):
    """Logs ``throughput/…`` whenever the Trainer logs.

    ``images_per_second``; ``data_wait``, share of the time, unless the Trainer has another profiler, which shows it;
    ``memory_gib``, peak on a GPU; and for stages that say what a step takes (``step_work``): ``tokens_per_second``,
    without padding, and ``mfu``. If the peak of the device is unknown, as on CPUs, MFU is left out.

    Args:
        peak_flops: FLOP/s of one device in the training's precision, dense; None looks the device up.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise UserError(f"peak_flops {peak_flops} must be above 0: FLOP/s of one device.")
        self.peak_flops = peak_flops
        self._timer = FetchTimer()
        self._counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        """Since the values were last logged, as is the time."""
        self._began = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        self.peak_flops = self.peak_flops or peak_flops(trainer)
        if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            trainer.profiler = self._timer  # type: ignore[attr-defined]
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        work = step_work(pl_module, batch)
        self._counts = {name: count + getattr(work, name) for name, count in self._counts.items()}
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            values = self._measure(trainer)
            pl_module.log_dict({f"throughput/{name}": value for name, value in values.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        _synchronize(trainer)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the clock."""
        _synchronize(trainer)
        self._began += time.perf_counter() - self._paused

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        """The values since the last call. All ranks call together: they add up their counts."""
        device = trainer.strategy.root_device
        counts = torch.stack([torch.as_tensor(count, device=device).long() for count in self._counts.values()])
        total: Any = trainer.strategy.reduce(counts, reduce_op="sum")
        _synchronize(trainer)
        now = time.perf_counter()
        seconds = now - self._began
        values = rates(dict(zip(COUNTS, total.tolist(), strict=True)), seconds, self.peak_flops, trainer.world_size)
        if trainer.profiler is self._timer:  # type: ignore[attr-defined]
            values["data_wait"] = self._timer.seconds / seconds
        if device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)
        self._counts, self._began, self._timer.seconds = dict.fromkeys(COUNTS, 0), now, 0.0
        return values


def step_work(module: Any, batch: Any) -> StepWork:
    """What the stage says a step takes, else the number of images in the batch."""
    if hasattr(module, "step_work"):
        return module.step_work(batch)
    tensors = batch.values() if isinstance(batch, dict) else [batch]
    return StepWork(next((len(value) for value in tensors if isinstance(value, Tensor)), 0), 0, 0)


def rates(counts: Mapping[str, int], seconds: float, peak: float | None, devices: int) -> dict[str, float]:
    """What all devices together did a second, and their share of the arithmetic.

    Args:
        counts: `COUNTS` of all processes.
        seconds: that they took.
        peak: FLOP/s of one device; None leaves the shares of arithmetic out.
        devices: number of processes, one device each.
    """
    values = {"images_per_second": counts["images"] / seconds}
    if counts["tokens"]:
        values["tokens_per_second"] = counts["tokens"] / seconds
    if peak is not None and counts["flops"]:
        values["mfu"] = counts["flops"] / seconds / (peak * devices)
    return values


def peak_flops(trainer: Trainer) -> float | None:
    """Dense FLOP/s of one device in the training's precision, from Lightning's table; None if it is unknown."""
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
