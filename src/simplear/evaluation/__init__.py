"""Measuring checkpoints: scene accuracy, intervals, and the report with its table, picture and page."""

from simplear.evaluation.compare import compare, paired_differences
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.intervals import clustered_interval, clustered_proportion, stratified_interval, wilson_interval
from simplear.evaluation.publish import write_page
from simplear.evaluation.report import Result, accuracy_result, markdown_table, merge_run, read_report
from simplear.evaluation.scenes import (
    blind_accuracy,
    diversity,
    draw_and_judge,
    evaluate_scenes,
    reconstruction_accuracy,
    scene_result,
    strict_result,
)

__all__ = [
    "Cell",
    "Result",
    "accuracy_result",
    "blind_accuracy",
    "clustered_interval",
    "clustered_proportion",
    "compare",
    "diversity",
    "draw_and_judge",
    "evaluate_scenes",
    "image_grid",
    "markdown_table",
    "merge_run",
    "paired_differences",
    "read_report",
    "reconstruction_accuracy",
    "scene_result",
    "stratified_interval",
    "strict_result",
    "wilson_interval",
    "write_page",
]
