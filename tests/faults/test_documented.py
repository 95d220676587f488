"""Every kind of fault in CONTRIBUTING.md names tests, and every module of tests/faults has its place there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = "## Faults and their tests"


def test_every_fault_names_tests_that_exist() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split(HEADING)[1]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 18
    named = set()
    for row in rows:
        files = re.findall(r"`(tests/[^`]+\.py)`", row[3])
        assert files, row[1]
        for file in files:
            assert (ROOT / file).is_file(), f"{row[1]}: no {file}"
        named.update(files)
    faults = {f"tests/faults/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert faults - {"tests/faults/test_documented.py"} <= named
