"""DPG-Bench's rules: dependencies, means, categories, and what a question file must hold."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from simplear.evaluation import wilson_interval
from simplear.evaluation.dpg_rules import PromptAnswers, Question, dpg_result, image_score, prompt_score, read_questions

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
COLUMNS += ["tuple", "question_natural_language"]


def question(number: int, *parents: int, category: str = "entity - whole") -> Question:
    return Question(number, f"question {number}?", category, parents)


def row(item: str, number: object, dependency: str, category: str = "entity - whole") -> dict[str, object]:
    broad, _, detailed = category.partition(" - ")
    return {
        "item_id": item,
        "text": "a brown dog, happy",
        "keywords": "",
        "proposition_id": number,
        "dependency": dependency,
        "category_broad": broad,
        "category_detailed": detailed,
        "tuple": f"{category} (dog, brown)",
        "question_natural_language": f"question {number}?",
    }


def write(file: Path, rows: list[dict[str, object]], columns: list[str] = COLUMNS) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def official(questions: list[Question], answers: dict[int, bool]) -> float:
    """An image's score as the official program has it: one pass over the questions, scores set to 0 as it goes."""
    scores = {item.number: float(answers[item.number]) for item in questions}
    for item in questions:
        if any(scores[parent] == 0 for parent in item.parents):
            scores[item.number] = 0
    return sum(scores.values()) / len(scores)


CHAIN = [question(1), question(2, 1), question(3, 2), question(4, 1, 3), question(5)]


def test_with_parents_first_scores_are_the_official_ones() -> None:
    for values in itertools.product((True, False), repeat=5):
        answers = dict(zip(range(1, 6), values, strict=True))
        assert image_score(CHAIN, answers) == pytest.approx(official(CHAIN, answers))


def test_a_no_reaches_through_a_chain_in_whatever_order_it_is_listed() -> None:
    answers = {1: False, 2: True, 3: True, 4: True, 5: True}
    for order in itertools.permutations(CHAIN):
        assert image_score(order, answers) == pytest.approx(1 / 5)
    # One pass in the order of the file does not see it.
    assert official(CHAIN[::-1], answers) > 1 / 5


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ({1: True, 2: True, 3: True, 4: True, 5: True}, 1),
        ({1: True, 2: False, 3: True, 4: True, 5: True}, 2 / 5),
        ({1: True, 2: True, 3: False, 4: True, 5: True}, 3 / 5),
        ({1: True, 2: True, 3: True, 4: False, 5: True}, 4 / 5),
        ({1: True, 2: True, 3: True, 4: True, 5: False}, 4 / 5),
    ],
)
def test_one_no_takes_what_depends_on_it(answers: dict[int, bool], score: float) -> None:
    assert image_score(CHAIN, answers) == pytest.approx(score)


def test_scores_are_means_of_images_then_of_prompts() -> None:
    pair = [question(1), question(2, 1, category="attribute - color")]
    first = PromptAnswers(pair, [{1: True, 2: True}, {1: False, 2: True}])  # 1 and 0
    second = PromptAnswers([question(1, category="global")], [{1: True}, {1: False}])
    third = PromptAnswers(pair, [{1: True, 2: False}, {1: True, 2: False}])  # a half each
    assert [prompt_score(item) for item in (first, second, third)] == [0.5, 0.5, 0.5]
    fourth = PromptAnswers(pair, [{1: True, 2: True}] * 2)
    result = dpg_result([first, second, third, fourth])
    assert list(result) == ["overall", "attribute", "entity", "global", "attribute - color", "entity - whole"]
    assert result["overall"]["accuracy"] == pytest.approx(0.625) and result["overall"]["n"] == 8
    # Scores of 0.5, 0.5, 0.5 and 1 vary as shares of 15 trials would, and there are but 14 answers.
    assert pytest.approx(15) == 0.625 * 0.375 / (0.25**2 / 4)
    bounds = wilson_interval(0.625 * 14, 14)
    assert (result["overall"]["low"], result["overall"]["high"]) == pytest.approx(bounds)
    # Categories take plain answers about the last image: the colour counts where there is nothing that has it.
    assert result["attribute"]["accuracy"] == pytest.approx(2 / 3) and result["attribute"]["n"] == 3
    assert result["entity"]["accuracy"] == pytest.approx(2 / 3) and result["entity"]["n"] == 3
    assert result["global"]["accuracy"] == 0 and result["global"]["n"] == 1
    assert (result["global"]["low"], result["global"]["high"]) == pytest.approx(wilson_interval(0, 1))


def test_categories_are_the_official_programs() -> None:
    """Its loop over images overwrites the answers that it later sorts by category."""
    random = np.random.default_rng(0)
    asked = [question(1), question(2, 1, category="attribute - color"), question(3, category="attribute - size")]
    prompts = [
        PromptAnswers(asked, [{number: bool(random.random() < 0.6) for number in (1, 2, 3)} for _ in range(4)])
        for _ in range(20)
    ]
    by_category: dict[str, list[float]] = {}
    for judged in prompts:
        scores: dict[int, float] = {}
        for answers in judged.answers:
            scores = {item.number: float(answers[item.number]) for item in judged.questions}
        for item in judged.questions:
            by_category.setdefault(item.category, []).append(scores[item.number])
    result = dpg_result(prompts)
    for category, scores_of in by_category.items():
        assert result[category]["accuracy"] == pytest.approx(np.mean(scores_of))
        assert result[category]["n"] == len(scores_of)
    assert result["attribute"]["accuracy"] == pytest.approx(
        np.mean(by_category["attribute - color"] + by_category["attribute - size"])
    )


def test_the_official_file_is_read(tmp_path: Path) -> None:
    rows = [row("7", 1, "0"), row("7", 2, "1, 3", "attribute - color"), row("7", 3, "1"), row("whoops1", 1, "0")]
    file = write(tmp_path / "dpg_bench.csv", rows)
    found = read_questions(file)
    assert list(found) == ["7", "whoops1"]
    assert found["7"][1] == Question(2, "question 2?", "attribute - color", (1, 3))
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_questions(tmp_path / "marked.csv") == found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("7", 1, "0"), row("7", "one", "0")], r"line 3, .* \(invalid literal"),
        ([row("7", 1, "")], "line 2, is not a row"),
        ([row("7", 1, "2")], "item '7': a question depends on a missing one"),
        ([row("7", 1, "1")], r"item '7': .*cycle"),
        ([row("6", 1, "0"), row("7", 1, "0"), row("7", 2, "1,3"), row("7", 3, "2")], r"item '7': .*cycle"),
    ],
)
def test_mistakes_in_the_file_name_the_item(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "questions.csv", rows))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    for column in ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language"):
        rest = [name for name in COLUMNS if name != column]
        with pytest.raises(ValueError, match=f"line 2, is not a row .*{column}"):
            read_questions(write(tmp_path / "questions.csv", [row("7", 1, "0")], rest))
    (tmp_path / "short.csv").write_text(",".join(COLUMNS) + "\n7,a dog\n")
    with pytest.raises(ValueError, match="line 2, is not a row"):
        read_questions(tmp_path / "short.csv")
    good = write(tmp_path / "questions.csv", [row("7", 1, "0")]).read_text()
    for encoding, message in (
        ("utf-16", r"latin\.csv is not UTF-8"),
        ("latin-1", r"latin\.csv is not UTF-8 \(line 2\)"),
    ):
        (tmp_path / "latin.csv").write_bytes(good.replace("dog", "caf\xe9").encode(encoding))
        with pytest.raises(ValueError, match=message):
            read_questions(tmp_path / "latin.csv")
    with pytest.raises(FileNotFoundError, match=r"download dpg_bench/dpg_bench\.csv"):
        read_questions(tmp_path / "missing.csv")
