"""DPG-Bench's questions and how answers become scores: pure functions, without images and without a judge.

Each prompt comes with yes/no questions about what its image must show. A question can depend on others ("Is the dog
brown?" on "Is there a dog?"): if one of those is answered "no", it counts as 0 whatever its own answer is. An image's
score is the mean over its questions, a prompt's the mean over its images, the benchmark's the mean over prompts. Scores
of categories are means of plain answers about the last of a prompt's images, dependencies left aside.

As the official program computes (``dpg_bench/compute_dpg_bench.py`` of https://github.com/TencentQQGYLab/ELLA, of Hu et
al. 2024, "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment"), with two exceptions. There a "no"
two questions up counts only if the file lists each question after those it depends on; here it always counts. And
there the file's first question is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import fmean, variance

from simplear.errors import MissingFileError, UserError
from simplear.evaluation.intervals import clustered_proportion, effective_interval
from simplear.evaluation.report import OVERALL, Result, accuracy_entry
from simplear.text_files import decode

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Columns of the question file that are read."""
NO_PARENT = 0


@dataclass(frozen=True)
class Question:
    """One yes/no question about the image of a prompt."""

    number: int
    """Within its prompt, 1 or more: the file's ``proposition_id``."""
    text: str
    category: str
    """Such as "entity - whole": what stands before the bracket in the file's ``tuple``."""
    parents: tuple[int, ...] = ()
    """Questions of the same prompt that must be answered "yes" for this one to count."""


@dataclass(frozen=True)
class PromptAnswers:
    """What the judge said about a prompt's images."""

    questions: Sequence[Question]
    answers: Sequence[Mapping[int, bool]]
    """For each image, whether each question was answered "yes", by the questions' numbers."""


def read_questions(file: str | Path) -> dict[str, list[Question]]:
    """The questions of each item, in the file's order.

    Args:
        file: ``dpg_bench.csv`` of the official repository.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a row cannot be read; the message names line and item. Or an item's
            questions depend on missing ones or on each other in a circle.
    """
    if not Path(file).is_file():
        raise MissingFileError(
            f"there is no file {file}: download dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA, and "
            "name it (--questions)."
        )
    items: dict[str, list[Question]] = {}
    rows = csv.DictReader(io.StringIO(decode(Path(file).read_bytes(), str(file)), newline=""))
    for row in rows:
        try:
            parents = tuple(int(number) for number in row["dependency"].split(","))
            question = Question(
                int(row["proposition_id"]),
                row["question_natural_language"].strip(),
                row["tuple"].partition("(")[0].strip(),
                tuple(number for number in parents if number != NO_PARENT),
            )
            items.setdefault(row["item_id"].strip(), []).append(question)
        except (KeyError, ValueError, AttributeError) as error:  # the last: a row that is too short
            raise UserError(
                f"{file}, line {rows.line_num}, is not a row of DPG-Bench's question file ({error}): it needs the "
                f"columns {', '.join(COLUMNS)}, with numbers as proposition_id and dependency."
            ) from error
    for item, questions in items.items():
        try:
            if {parent for question in questions for parent in question.parents} - {q.number for q in questions}:
                raise ValueError("a question depends on a missing one")
            _in_order(questions)
        except (ValueError, CycleError) as error:
            raise UserError(f"{file}, item {item!r}: {error}.") from error
    return items


def _in_order(questions: Sequence[Question]) -> list[Question]:
    """The questions, each after those that it depends on."""
    by_number = {question.number: question for question in questions}
    order = TopologicalSorter({question.number: question.parents for question in questions}).static_order()
    return [by_number[number] for number in order]


def image_score(questions: Sequence[Question], answers: Mapping[int, bool]) -> float:
    """Share of an image's questions, in [0, 1], that are answered "yes", as are all that they depend on.

    Args:
        questions: of the prompt, one at least.
        answers: by the questions' numbers.
    """
    counts: dict[int, bool] = {}
    for question in _in_order(questions):
        counts[question.number] = answers[question.number] and all(counts[parent] for parent in question.parents)
    return sum(counts.values()) / len(counts)


def prompt_score(judged: PromptAnswers) -> float:
    """Mean over the prompt's images, in [0, 1]."""
    return fmean(image_score(judged.questions, answers) for answers in judged.answers)


def dpg_result(prompts: Sequence[PromptAnswers]) -> Result:
    """Accuracies in [0, 1]: overall, of broad categories ("entity") and of detailed ones ("entity - whole").

    Categories count the answers about each prompt's last image, as the official program does. Intervals are at 95 %,
    with the prompt as the unit, see `simplear.evaluation.intervals.clustered_proportion`. ``n`` counts images in the
    overall and answers in the categories.
    """
    scores = [prompt_score(judged) for judged in prompts]
    spread = variance(scores) / len(scores) if len(scores) > 1 else 0.0
    answered = sum(len(judged.questions) * len(judged.answers) for judged in prompts)
    bounds = effective_interval(fmean(scores), spread, len(scores), answered)
    result: Result = {OVERALL: accuracy_entry(fmean(scores), *bounds, sum(len(judged.answers) for judged in prompts))}
    clusters: dict[str, list[tuple[float, int]]] = {}
    for judged in prompts:
        of_prompt: dict[str, list[bool]] = {}
        for question in judged.questions:
            broad = question.category.partition("-")[0].strip()
            for name in {broad, question.category}:
                of_prompt.setdefault(name, []).append(judged.answers[-1][question.number])
        for name, values in of_prompt.items():
            clusters.setdefault(name, []).append((sum(values), len(values)))
    for name in sorted(clusters, key=lambda name: ("-" in name, name)):
        result[name] = accuracy_entry(*clustered_proportion(clusters[name]), sum(size for _, size in clusters[name]))
    return result
