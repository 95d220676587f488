"""Lightning callbacks: images and accuracy during training, checkpoints with their export, the progress bar,
throughput, finite gradients and pre-emption.
"""

from simplear.callbacks.checkpointing import AtomicCheckpoint, HuggingFaceCheckpoint
from simplear.callbacks.drawing import DrawingCallback, RolloutImages, SampleImages, SceneAccuracy
from simplear.callbacks.finite import FiniteGradients
from simplear.callbacks.preemption import Preemption
from simplear.callbacks.progress import StageProgressBar
from simplear.callbacks.throughput import TrainingMonitor

__all__ = [
    "AtomicCheckpoint",
    "DrawingCallback",
    "FiniteGradients",
    "HuggingFaceCheckpoint",
    "Preemption",
    "RolloutImages",
    "SampleImages",
    "SceneAccuracy",
    "StageProgressBar",
    "TrainingMonitor",
]
