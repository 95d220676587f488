"""docs/serving.md and README.md say what works: their snippets, with another address and checkpoint."""

from __future__ import annotations

import io
import json
import re
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import simplear
from serving.conftest import Live
from simplear.serving.command import serve

ROOT = Path(simplear.__file__).parents[2]
GUIDE = (ROOT / "docs" / "serving.md").read_text()


def snippets(text: str, language: str, live: Live, checkpoint: Path) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [
        code.replace("http://127.0.0.1:8000", live.url).replace("checkpoints/demo/sft", str(checkpoint))
        for code in found
    ]


def test_the_guides_python(
    live: Live, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client, pipeline = snippets(GUIDE, "python", live, checkpoints[0])
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(client, names)
    assert printed.getvalue().count("image_generation.partial_image") == 3
    assert "image_generation.completed 4" in printed.getvalue()
    exec(pipeline, names)
    with Image.open("circle.png") as picture:
        expected = names["pipe"].decode(names["codes"][:1])[0]
        assert picture.tobytes() == (expected * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()


def test_the_guides_shell(live: Live, checkpoints: list[Path]) -> None:
    (command,) = snippets(GUIDE, "sh", live, checkpoints[0])
    answer = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout)
    assert [image["seed"] for image in answer["data"]] == [7, 8]


def test_the_readme(live: Live, checkpoints: list[Path]) -> None:
    (code,) = [
        code for code in snippets((ROOT / "README.md").read_text(), "python", live, checkpoints[0]) if "openai" in code
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["answer"].data) == 2


def test_options_that_the_guide_names_exist() -> None:
    options = set(re.findall(r"`(--[a-z-]+)", GUIDE)) - {"--help"}
    parameters = {"--" + name.replace("_", "-") for name in serve.__kwdefaults__}
    assert options and options <= parameters
