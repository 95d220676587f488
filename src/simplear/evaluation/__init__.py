"""Measuring checkpoints: scene accuracy, intervals, and the report with its table, pictures and TensorBoard events."""

from simplear.evaluation.diversity import diversity
from simplear.evaluation.fid import FrechetDistance, InceptionFeatures
from simplear.evaluation.folder import picture_batches, picture_files
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.intervals import clustered_interval, stratified_interval, wilson_interval
from simplear.evaluation.reconstruction import (
    codebook_use,
    evaluate_tokenizer,
    picture_scores,
    reconstruction_result,
    reconstructions,
)
from simplear.evaluation.report import (
    Result,
    accuracy_result,
    markdown_table,
    merge_run,
    read_report,
    write_tensorboard,
)
from simplear.evaluation.scenes import (
    JudgedImage,
    blind_accuracy,
    draw_and_judge,
    evaluate_scenes,
    reconstruction_accuracy,
    scene_result,
    strict_result,
)

__all__ = [
    "Cell",
    "FrechetDistance",
    "InceptionFeatures",
    "JudgedImage",
    "Result",
    "accuracy_result",
    "blind_accuracy",
    "clustered_interval",
    "codebook_use",
    "diversity",
    "draw_and_judge",
    "evaluate_scenes",
    "evaluate_tokenizer",
    "image_grid",
    "markdown_table",
    "merge_run",
    "picture_batches",
    "picture_files",
    "picture_scores",
    "read_report",
    "reconstruction_accuracy",
    "reconstruction_result",
    "reconstructions",
    "scene_result",
    "stratified_interval",
    "strict_result",
    "wilson_interval",
    "write_tensorboard",
]
