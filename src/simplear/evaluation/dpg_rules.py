"""DPG-Bench's questions and how answers become scores: pure, without images and without a judge.

Each prompt comes with yes/no questions about what its image must show. A question can depend on others ("Is the dog
brown?" on "Is there a dog?"): where one of those is answered "no", it counts as 0 whatever its own answer is. An
image's score is the mean over its questions, a prompt's the mean over its images, the benchmark's the mean over
prompts. Scores of categories are means of plain answers about the last of a prompt's images, dependencies left aside.

As the official program computes (``dpg_bench/compute_dpg_bench.py`` of https://github.com/TencentQQGYLab/ELLA, of Hu et
al. 2024, "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment"), but for two things. There a "no"
two questions up counts only if the file lists each question after those it depends on; here it always counts. And
there the file's first question is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import variance

from simplear.errors import MissingFileError, UserError
from simplear.evaluation.intervals import effective_interval, ratio_proportion
from simplear.evaluation.report import OVERALL, Result
from simplear.text_files import decode

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Of the question file that are read; ``text``, ``keywords`` and the ``category_…`` are not."""
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

    @property
    def broad_category(self) -> str:
        """Such as "entity"."""
        return self.category.partition("-")[0].strip()


@dataclass(frozen=True)
class PromptAnswers:
    """What the judge said of a prompt's images."""

    questions: Sequence[Question]
    answers: Sequence[Mapping[int, bool]]
    """Of each image, whether each question was answered "yes", by the questions' numbers."""


def read_questions(file: str | Path) -> dict[str, list[Question]]:
    """The questions of each item, in the file's order.

    Args:
        file: ``dpg_bench.csv`` of the official repository.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, or a row cannot be read; the message names row or item: numbers that are none,
            a question that occurs twice, a parent that is not there, questions that depend on each other in a circle.
    """
    if not Path(file).is_file():
        raise MissingFileError(
            f"{file} is no file: download dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA, and name "
            "it (--questions)."
        )
    items: dict[str, dict[int, Question]] = {}
    rows = csv.DictReader(io.StringIO(decode(Path(file).read_bytes(), str(file)), newline=""))
    try:
        table = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.reader.line_num} is not CSV ({error}).") from error
    if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
        raise UserError(f"{file} has no column {missing[0]!r}: it is not DPG-Bench's question file.")
    for line, row in table:
        try:
            question = _question(row)
        except (ValueError, AttributeError) as error:  # the latter: a row that is too short
            raise UserError(f"{file}, line {line}, item {row['item_id']!r}: {error}.") from error
        questions = items.setdefault(row["item_id"].strip(), {})
        if question.number in questions:
            raise UserError(f"{file}, line {line}: item {row['item_id']!r} has two questions {question.number}.")
        questions[question.number] = question
    for item, questions in items.items():
        try:
            ancestry(list(questions.values()))
        except ValueError as error:
            raise UserError(f"{file}, item {item!r}: {error}") from error
    return {item: list(questions.values()) for item, questions in items.items()}


def _question(row: Mapping[str, str]) -> Question:
    parents = [int(number) for number in row["dependency"].split(",")]
    if not row["tuple"].partition("(")[0].strip():
        raise UserError("its tuple names no category")
    return Question(
        int(row["proposition_id"]),
        row["question_natural_language"].strip(),
        row["tuple"].partition("(")[0].strip(),
        tuple(number for number in parents if number != NO_PARENT),
    )


def ancestry(questions: Sequence[Question]) -> dict[int, frozenset[int]]:
    """All questions that each one depends on, directly or through others.

    Raises ValueError for a parent that is not among the questions, and for a circle.
    """
    parents = {question.number: question.parents for question in questions}
    for number, above in parents.items():
        if unknown := [parent for parent in above if parent not in parents]:
            raise UserError(f"question {number} depends on {unknown[0]}, which there is not.")
    found: dict[int, frozenset[int]] = {}
    while len(found) < len(parents):
        ready = [number for number, above in parents.items() if number not in found and all(p in found for p in above)]
        if not ready:
            circle = sorted(number for number in parents if number not in found)
            raise UserError(f"questions {circle} depend on each other in a circle.")
        for number in ready:
            found[number] = frozenset(parents[number]).union(*(found[parent] for parent in parents[number]))
    return found


def image_score(questions: Sequence[Question], answers: Mapping[int, bool]) -> float:
    """Share of an image's questions that count, in [0, 1]: answered "yes", and so all that they depend on.

    Args:
        questions: of the prompt, one at least.
        answers: by the questions' numbers.
    """
    above = ancestry(questions)
    counting = [answers[number] and all(answers[parent] for parent in parents) for number, parents in above.items()]
    return sum(counting) / len(counting)


def prompt_score(judged: PromptAnswers) -> float:
    """Mean over the prompt's images, in [0, 1]."""
    return sum(image_score(judged.questions, answers) for answers in judged.answers) / len(judged.answers)


def dpg_result(prompts: Sequence[PromptAnswers]) -> Result:
    """Accuracies in [0, 1]: overall, of broad categories ("entity") and of detailed ones ("entity - whole").

    Categories count the answers about each prompt's last image, as the official program does, so that its published
    figures can stand beside them. Intervals are of 95 %, with the prompt as the unit; see
    `simplear.evaluation.intervals.ratio_proportion`. ``n`` counts images in the overall and answers in the categories.
    """
    scores = [prompt_score(judged) for judged in prompts]
    overall = sum(scores) / len(scores)
    spread = variance(scores) / len(scores) if len(scores) > 1 else 0.0
    answered = sum(len(judged.questions) * len(judged.answers) for judged in prompts)
    bounds = effective_interval(overall, spread, len(scores), answered)
    result: Result = {OVERALL: _entry(overall, *bounds, sum(len(judged.answers) for judged in prompts))}
    totals: dict[str, list[tuple[float, int]]] = {}
    for judged in prompts:
        of_prompt: dict[str, list[bool]] = {}
        for question in judged.questions:
            for name in dict.fromkeys((question.broad_category, question.category)):
                of_prompt.setdefault(name, []).append(judged.answers[-1][question.number])
        for name, values in of_prompt.items():
            totals.setdefault(name, []).append((sum(values), len(values)))
    for name in sorted(totals, key=lambda name: ("-" in name, name)):
        result[name] = _entry(*ratio_proportion(totals[name]), sum(size for _, size in totals[name]))
    return result


def _entry(accuracy: float, low: float, high: float, n: int) -> dict[str, float]:
    return {"accuracy": accuracy, "low": low, "high": high, "n": n}
