"""The notebook runs from its first cell to its last: on tiny checkpoints always, on the demo's where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
DEMO = ROOT / "checkpoints" / "demo"
LARGEST = 2**20
"""Bytes of the notebook with its pictures."""


@pytest.mark.long
@pytest.mark.parametrize("which", ["tiny", *(["demo"] if (DEMO / "grpo").is_dir() else [])])
def test_it_runs(which: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = DEMO
    if which == "tiny":
        directory = tmp_path
        for name in ("sft", "grpo"):
            shutil.copytree(trained / "run" / "model", tmp_path / name)
    monkeypatch.setenv("SIMPLEAR_CHECKPOINTS", str(directory))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "codes an image" in printed and "passes an image" in printed and "PSNR" in printed and "after: " in printed
    kinds = [output.get("data", {}).keys() for cell in code_cells(notebook) for output in cell.outputs]
    assert sum("image/png" in kind for kind in kinds) == 6
    assert "error" not in {output.output_type for cell in code_cells(notebook) for output in cell.outputs}


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_small_and_says_nothing_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text.encode()) < LARGEST
    for place in ("home", "root", "work", "tmp"):
        assert f"/{place}/" not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)
        assert "execution" not in cell.metadata
