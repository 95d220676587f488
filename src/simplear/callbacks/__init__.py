"""Lightning callbacks: images and accuracy during training, checkpoints with their export, the progress bar, speed,
gradients that are finite, and what a job does when it is pre-empted.
"""

from simplear.callbacks.checkpointing import AtomicCheckpoint, HuggingFaceCheckpoint
from simplear.callbacks.drawing import DrawingCallback, SampleImages, SceneAccuracy
from simplear.callbacks.finite import FiniteGradients
from simplear.callbacks.preemption import Preemption
from simplear.callbacks.progress import StageProgressBar
from simplear.callbacks.rollouts import RolloutImages
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
