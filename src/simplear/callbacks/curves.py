"""Curves of a training as one picture beside its TensorBoard events, such as reward and accuracy of Figure 3.

They are read from the events themselves, so that a training that was stopped and resumed has whole curves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplear.errors import UserError

logger = logging.getLogger(__name__)

SMOOTHING = 0.9
"""Of the exponential moving average that is drawn over a curve of many points."""
FEW_POINTS = 30
"""Curves of no more than these are drawn as they are, with their points."""
PANEL = (4.2, 3.0)
"""Inches of one panel."""


class TrainingCurves(Callback):
    """Writes ``FILE`` into the log directory at the end of training.

    Args:
        panels: logged values (their tags) by the title of the panel that shows them.
        file: name of the picture.
    """

    def __init__(self, panels: dict[str, list[str]], file: str = "curves.png") -> None:
        if not panels:
            raise UserError("TrainingCurves has no panels to draw.")
        self.panels, self.file = panels, file

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the events and draw; says so where there are none."""
        boards = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        if trainer.loggers and not boards:
            rank_zero_warn(f"TrainingCurves draws no {self.file}: it reads the events of a TensorBoardLogger.")
        for board in boards if trainer.is_global_zero else []:
            board.experiment.flush()
            curves = read_curves(board.log_dir, [tag for tags in self.panels.values() for tag in tags])
            if not curves:
                logger.warning("no values of %s in %s, so no %s", list(self.panels), board.log_dir, self.file)
                continue
            draw_curves(self.panels, curves, Path(board.log_dir) / self.file)


Curve = tuple[list[int], list[float]]
"""Steps and values."""


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


def draw_curves(panels: Mapping[str, Sequence[str]], curves: Mapping[str, Curve], file: str | Path) -> None:
    """One panel beside another; a noisy curve is drawn pale, under its moving average."""
    width, height = PANEL
    figure = Figure(figsize=(width * len(panels), height), dpi=120, layout="constrained")
    for axes, (title, tags) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for tag in tags:
            if tag not in curves:
                continue
            steps, values = curves[tag]
            if len(steps) <= FEW_POINTS:
                axes.plot(steps, values, marker="o", markersize=3, label=tag)
            else:
                line = axes.plot(steps, smooth(values), label=tag)[0]
                axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(str(file))


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, without the pull of its beginning towards 0."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed
