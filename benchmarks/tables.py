"""Put the tables of benchmarks/results/*.json into README.md, between its markers: ``python benchmarks/tables.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from measure import RESULTS, markdown_table

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- benchmarks/(\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with each marked place holding its result's table; a place without a result says so."""

    def place(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        table = markdown_table(json.loads(path.read_text())) if path.exists() else "Not measured yet: `make bench`."
        return f"{match[1]}{table}\n{match[4]}"

    return MARKED.sub(place, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
