"""Measuring checkpoints: scene accuracy, intervals, and the report with its table, picture and page."""

from simplear.evaluation.compare import compare
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.intervals import clustered_interval, stratified_interval, wilson_interval
from simplear.evaluation.report import accuracy_result, markdown_table, merge_run, read_report
from simplear.evaluation.scenes import draw_and_judge, evaluate_scenes, scene_result

__all__ = [
    "Cell",
    "accuracy_result",
    "clustered_interval",
    "compare",
    "draw_and_judge",
    "evaluate_scenes",
    "image_grid",
    "markdown_table",
    "merge_run",
    "read_report",
    "scene_result",
    "stratified_interval",
    "wilson_interval",
]
