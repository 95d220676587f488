"""The documents are true of the code: their commands parse, their paths and classes exist, their snippets run."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.pages import PAGES, ROOT, blocks, commands, simplear_arguments
from simplear import cli, command_line, plan
from simplear.lightning_cli import ConfigurationCLI

OWN_FILES = {"my-changes.yaml": "trainer: {max_steps: 3}\n"}
"""Files that the pages' readers would have written."""
EXTEND = ROOT / "docs" / "extend.md"
REWARD, TOKENIZER = "A reward", "A visual tokenizer"
"""Headings of the page, whose first snippets are modules that its readers write."""


class ParsedAlone(ConfigurationCLI):
    """Parses and instantiates nothing: weights and pictures of the pages are not here."""

    def instantiate_classes(self) -> None:
        return


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what a clone has at its root, with the files and modules that the pages have their readers write."""
    for name in ("configs", "Makefile", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in OWN_FILES.items():
        (tmp_path / name).write_text(text)
    write_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in ("my_rewards", "my_tokenizers"):
        sys.modules.pop(module, None)


def write_modules(directory: Path) -> None:
    for heading, module in ((REWARD, "my_rewards"), (TOKENIZER, "my_tokenizers")):
        (directory / f"{module}.py").write_text(blocks(EXTEND, "python", heading)[0])


pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
ALL_COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), ALL_COMMANDS, ids=[f"{page.stem}: {' '.join(words)[:60]}" for page, words in ALL_COMMANDS]
)
def test_every_command_parses(page: Path, words: list[str]) -> None:
    arguments = simplear_arguments(words)
    if arguments is not None:
        parse(arguments)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        for word in words[2:]:
            key, _, value = word.partition("=")
            assert key in ("ARGS", "CONFIG", "CKPT", "LOGDIR", "PYTHON", "SIZE", "MACHINE", "VARIANTS")
            assert key != "CONFIG" or all((ROOT / file).is_file() for file in value.split())
    elif words[1].startswith(("tests/", "benchmarks/")):  # others are scripts of other projects
        assert (ROOT / words[1]).is_file()


def parse(arguments: list[str]) -> None:
    if "--import" in arguments:
        number = arguments.index("--import")
        arguments = arguments[:number] + arguments[number + 2 :]
    length = 1 if arguments[0] in cli.VERBS else 2
    verb, rest = " ".join(arguments[:length]), arguments[length:]
    function, _ = cli.VERBS[verb]
    if function in cli.CONFIGURED:
        rest = [word for index, word in enumerate(rest) if "--ckpt_path" not in rest[max(0, index - 1) : index + 1]]
        configuration = plan._Configuration if verb == "plan" else ParsedAlone
        configuration(rest, save_config_callback=None, run=False)
        return
    module, _, name = function.partition(":")
    command_line.parse(getattr(importlib.import_module(module), name), rest, f"simplear {verb}")


def test_a_wrong_command_is_noticed() -> None:
    for arguments in (
        ["fit", "--config", "configs/paper/sft.yaml", "--trainer.max_stepz", "3"],
        ["fit", "--config", "configs/paper/no-such.yaml"],
        ["generate", "CKPT", "--outt", "drawn"],
        ["export", "CKPT", "--out", "out", "--dtype", "float8"],
    ):
        with pytest.raises(SystemExit):
            parse(arguments)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_files_and_classes_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for file in re.findall(r"`?((?:configs|docs|tests|benchmarks|notebooks|src)/[\w./-]+\.\w+)", text):
        assert (ROOT / file).exists() or (page.parent / file).exists(), file
    for module, name in re.findall(r"\b(simplear(?:\.[a-z_]+)+)\.([A-Z]\w+)", text):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_what_python_snippets_import_is_there(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("simplear"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_overlays_compose() -> None:
    """The YAML of a page, put after the configuration that it belongs to."""
    (overlay,) = blocks(EXTEND, "yaml", REWARD)
    Path("overlay.yaml").write_text(overlay)
    parse(["fit", "--config", "configs/demo/grpo-scene.yaml", "--config", "overlay.yaml"])
    (model,) = blocks(EXTEND, "yaml", TOKENIZER)
    Path("overlay.yaml").write_text(model)
    parse(["fit", "--config", "configs/demo/visual_tokenizer.yaml", "--config", "overlay.yaml"])


def test_batch_scripts_are_shell() -> None:
    for page in PAGES:
        for code in blocks(page, "sh"):
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def run_snippets(heading: str, start: int = 0, **names: Any) -> None:
    for code in blocks(EXTEND, "python", heading)[start:]:
        exec(compile(code, EXTEND, "exec"), names)


def test_the_snippets_of_a_reward_run(place: Path) -> None:
    run_snippets(REWARD, __name__="page")


def test_the_snippets_and_the_command_of_a_visual_tokenizer_run(place: Path) -> None:
    """Its class is imported from a module, as the page says; then its command is run."""
    module = importlib.import_module("my_tokenizers")
    run_snippets(TOKENIZER, 1, torch=module.torch, CodebookTokenizer=module.CodebookTokenizer)
    (command,) = [words for words in commands(EXTEND) if "tokenize" in words]
    cli.main(simplear_arguments(command))
    assert yaml.safe_load(Path("data/trial/tokens/manifest.json").read_text())["rows"] == 64
