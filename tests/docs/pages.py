"""What the tests read out of the pages: blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)")
PROGRAMS = ("simplear", "make", "python", "torchrun", "srun", "tensorboard", "vllm", "jupyter")


def section(page: Path, heading: str | None = None) -> str:
    """What stands below a heading of the second level, up to the next one; without a heading the whole page."""
    text = page.read_text()
    if heading is None:
        return text
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def blocks(page: Path, language: str, heading: str | None = None) -> list[str]:
    """Fenced code of a language, in order."""
    return [code for name, code in FENCED.findall(section(page, heading)) if name == language]


def commands(page: Path, heading: str | None = None) -> list[list[str]]:
    """Words of each command in fenced ``sh`` and in indented code, without comments and variables before it."""
    text = section(page, heading)
    indented = [re.sub(r"^ {4}", "", code, flags=re.MULTILINE) for code in INDENTED.findall(FENCED.sub("", text))]
    lines = "\n".join([*blocks(page, "sh", heading), *indented]).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if "…" in line or "VERB" in line or not line.strip() or "─" in line:
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a drawing, not a command
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        for part in _split(words, "&&"):
            if part and Path(part[0]).name in PROGRAMS:
                found.append(part)
    return found


def simplear_arguments(words: list[str]) -> list[str] | None:
    """What follows ``simplear``, also where torchrun or srun starts it; None for another program."""
    names = [Path(word).name for word in words]
    return words[names.index("simplear") + 1 :] if "simplear" in names else None


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
