"""Put the results of benchmarks/results/*.json as tables into the documents, between their markers:
``python benchmarks/tables.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ablations
import grpo
import inference
from measure import RESULTS, markdown_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "docs" / "grpo.md")
MARKED = re.compile(r"(<!-- benchmarks/(\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TABLES = {
    "ablations": ablations.table,
    "grpo": grpo.table,
    "grpo_ablations": grpo.ablation_table,
    "inference": inference.tables,
}
"""Of results that are not ratios."""


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with each marked place holding its result's table; a place without a result says so."""

    def place(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        table = "Not measured yet: `make bench`."
        if path.exists():
            table = TABLES.get(match[2], markdown_table)(json.loads(path.read_text()))
        return f"{match[1]}{table}\n{match[4]}"

    return MARKED.sub(place, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
