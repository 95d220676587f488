"""The corpora of the paper as files of ``configs/paper/data``: each with each resolution."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from simplear.command_line import PARSER_MODE
from simplear.data import tokenize

DIRECTORY = Path(__file__).parents[2] / "configs/paper/data"
SIZES = ("512", "1024")
CORPORA = sorted({file.stem for file in DIRECTORY.glob("*.yaml")} - {*SIZES, "validation"})


def test_every_corpus_of_the_paper_has_one() -> None:
    """But its ten million internal pictures."""
    assert CORPORA == ["cc12m", "cc3m", "journeydb", "megalith", "openimages", "sa-1b", "synthetic-1m"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corpus", CORPORA)
def test_presets_parse(corpus: str, size: str) -> None:
    parser = ArgumentParser(parser_mode=PARSER_MODE)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(tokenize)
    files = [str(DIRECTORY / f"{name}.yaml") for name in (size, corpus)]
    parsed = parser.parse_args(["--config", files[0], "--config", files[1]])
    assert parsed.out == f"data/paper/tokens-{size}/train/{corpus}"
    assert parsed.source.class_path.startswith("simplear.data.")
    edges = [entry.init_args.minimum for entry in parsed.filters if entry.class_path.endswith("ShortEdge")]
    assert edges == ([1024] if size == "1024" else [])
