"""`simplear serve` says what is wrong before it loads anything, and takes the words that the documents use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simplear.cli import main
from simplear.serving import command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoints"),
        (["a/model", "b/model"], "two checkpoints are called 'model': give one another name, as other=b/model"),
        (["a", "--engine", "vllm"], "engine 'vllm' cannot be served; one of cached, compiled, jacobi can"),
        (["a", "--engines", "{a: vllm}"], "engine 'vllm' cannot be served"),
        (["a", "--engines", "{b: jacobi}"], "engines: no checkpoint is called 'b'; there are: a"),
        (["a", "--batch-sizes", "[0, 2]"], "batch_sizes [0, 2]: give numbers of 1 or more"),
        (["a", "--timeout", "0"], "above 0"),
        (["nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes_in_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and "Traceback" not in printed


def test_checkpoints_are_served_under_their_names(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the engine's fixed shapes, a key of the environment, and the limits that were asked for."""
    made: dict[str, Any] = {}

    class Server:
        def __init__(self, config: Any, models: Any, service: Any, shutdown_timeout: float) -> None:
            made.update(config=config, models=models, service=service, shutdown_timeout=shutdown_timeout)

        def run(self) -> None:
            for served in made["models"]:
                served.batcher.close()

    monkeypatch.setattr(command, "_Server", Server)
    monkeypatch.setenv("SIMPLEAR_API_KEY", "secret")
    monkeypatch.chdir(checkpoints[0])
    options = [
        "--port",
        "0",
        "--max-codes",
        "30",
        "--shutdown-timeout",
        "3",
        "--batch-sizes",
        "[4, 1]",
        "--device",
        "cpu",
        "--engines",
        "{after: jacobi}",
    ]
    main(["serve", ".", f"after={checkpoints[1]}", *options])
    assert [served.name for served in made["models"]] == ["first", "after"]
    assert [served.description.engine for served in made["models"]] == ["cached", "jacobi"]
    assert made["service"].api_key == "secret" and made["shutdown_timeout"] == 3
    batcher = made["models"][0].batcher
    assert batcher.shapes == [1, 4] and batcher.pipeline.engine.prompt_multiple == command.PROMPT_MULTIPLE
    assert made["models"][0].max_codes == 30 and made["models"][0].description.max_codes == 30
