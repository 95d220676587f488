"""Trainings that benchmarks repeat under other seeds: stages of ``configs/demo`` with an overlay, each resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplear.cli import main as simplear

CONFIGS = Path("configs/demo")
GRPO_PARTS = ("rollout", "decode", "reward", "update")
"""What GRPO logs seconds of."""
SMOOTHING = 0.9
"""Of the exponential moving average of a noisy curve."""
Curve = tuple[list[int], list[float]]
"""Steps and values."""


def configured_steps(stage: str) -> int:
    """``max_steps`` of a stage of the demo."""
    return int(yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text())["trainer"]["max_steps"])


def train(
    stage: str,
    run: Path,
    *,
    seed: int,
    steps: int,
    options: Mapping[str, Any],
    save_every: int,
    data: Mapping[str, Any] = {},
    callbacks: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """One stage of the demo under another seed, without validation; goes on where it was, and does nothing when it is
    complete.

    Args:
        stage: names ``configs/demo/STAGE.yaml`` and the checkpoint in `run`.
        run: directory of all that the run writes.
        seed: of weights, data and rollouts.
        steps: optimizer steps.
        options: arguments of the module that differ from the configuration.
        save_every: training steps between states.
        data: arguments of the data module that differ from the configuration.
        callbacks: beside the progress bar and the checkpoint; in place of the configuration's.

    Returns:
        the directory of the checkpoint.
    """
    checkpoint = run / stage
    if checkpoint.exists():
        return checkpoint
    saving = {"dirpath": str(run / "states" / stage), "export_dir": str(checkpoint), "every_n_train_steps": save_every}
    overlay = {
        "seed_everything": seed,
        "model": {"init_args": dict(options)},
        "data": {"init_args": {"seed": seed, "validation_paths": None, **data}},
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": steps,
            "limit_val_batches": 0,
            "callbacks": [
                {"class_path": "simplear.callbacks.StageProgressBar"},
                {"class_path": "simplear.callbacks.HuggingFaceCheckpoint", "init_args": saving},
                *callbacks,
            ],
        },
    }
    run.mkdir(parents=True, exist_ok=True)
    file = run / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(overlay))
    resume = ["--ckpt_path", "last"] if (run / "states" / stage / "last.ckpt").exists() else []
    simplear(["fit", "--config", str(CONFIGS / f"{stage}.yaml"), "--config", str(file), *resume])
    return checkpoint


def scene_accuracy(every: int, prompts_per_category: int) -> dict[str, Any]:
    """The callback that draws and judges held-out captions during training."""
    options = {"every_n_steps": every, "prompts_per_category": prompts_per_category, "seed": 1}
    return {"class_path": "simplear.callbacks.SceneAccuracy", "init_args": options}


def read_curves(directory: str | Path, tags: Sequence[str]) -> dict[str, Curve]:
    """Scalars of a directory of events; of a step that was logged twice, as after a resume, the later value."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in set(tags) & set(events.Tags()["scalars"]):
        values = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = sorted(values)
        curves[tag] = (steps, [values[step] for step in steps])
    return curves


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, without the pull of its beginning towards 0."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed
