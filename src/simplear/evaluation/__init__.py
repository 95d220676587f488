"""Measuring checkpoints: scene accuracy, intervals, and the report with its table, pictures and TensorBoard events."""

from simplear.evaluation.diversity import diversity
from simplear.evaluation.dpg import dpg_prompts, evaluate_dpg
from simplear.evaluation.dpg_rules import PromptAnswers, Question, dpg_result, image_score, prompt_score, read_questions
from simplear.evaluation.fid import FrechetDistance, InceptionFeatures
from simplear.evaluation.folder import picture_batches, picture_files
from simplear.evaluation.grid import Cell, image_grid
from simplear.evaluation.intervals import clustered_interval, ratio_interval, stratified_interval, wilson_interval
from simplear.evaluation.quality import evaluate_quality, quality_result
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
from simplear.evaluation.visual_questions import VisualJudge

__all__ = [
    "Cell",
    "FrechetDistance",
    "InceptionFeatures",
    "JudgedImage",
    "PromptAnswers",
    "Question",
    "Result",
    "VisualJudge",
    "accuracy_result",
    "blind_accuracy",
    "clustered_interval",
    "codebook_use",
    "diversity",
    "dpg_prompts",
    "dpg_result",
    "draw_and_judge",
    "evaluate_dpg",
    "evaluate_quality",
    "evaluate_scenes",
    "evaluate_tokenizer",
    "image_grid",
    "image_score",
    "markdown_table",
    "merge_run",
    "picture_batches",
    "picture_files",
    "picture_scores",
    "prompt_score",
    "quality_result",
    "ratio_interval",
    "read_questions",
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
