"""Every fault that docs/data.md lists has the test that it names."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
HEADING = "## What goes wrong"


def test_every_named_test_exists() -> None:
    """`module.test_name`, `module.TestClass`, `module`, or `test_name` of the module before; … ends a short form."""
    section = (TESTS.parent / "docs/data.md").read_text().split(HEADING)[1]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 22
    for row in rows:
        module = None
        named = re.findall(r"`([^`]+)`", row[3])
        assert named, row[1]
        for name in named:
            first, _, rest = name.partition(".")
            at = TESTS.parent / f"{first}.py" if first.startswith("tests/") else TESTS / "faults" / f"{first}.py"
            if at.exists():
                module, name = at, rest
            assert module is not None, f"{row[1]}: no module of {name}"
            wanted = rf"(def|class) {re.escape(name.rstrip('…'))}" + ("" if name.endswith("…") else r"\b")
            assert not name or re.search(wanted, module.read_text()), f"{row[1]}: no {name} in {module}"
