"""`simplear serve` says what is wrong before it loads anything, and takes the words that the documents use."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from simplear.cli import main
from simplear.serving import command


@pytest.fixture(scope="module")
def occupied() -> Iterator[int]:
    """A port at which another server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoints"),
        (["a/model", "b/model"], "two checkpoints are called 'model': give one another name, as other=b/model"),
        (["a", "--engine", "vllm"], "Expected a typing.Literal['fused', 'compiled', 'jacobi']"),
        (["a", "--batch-sizes", "[0, 2]"], "batch_sizes, max_queue and timeout must be above 0"),
        (["a", "--timeout", "0"], "above 0"),
        (["nowhere/at-all"], "nowhere/at-all"),
        (["states/epoch=0-step=2"], "no checkpoint at states/epoch=0-step=2"),
        (["a", "--port", "99999"], "port 99999: bind(): port must be 0-65535"),
        (["a", "--port", "-1"], "port -1: bind(): port must be 0-65535"),
        (["a", "--port", "PORT"], "Address already in use"),
        (["a", "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["a", "--host", "http://127.0.0.1"], "cannot listen on http://127.0.0.1"),
        (["a", "--host", "x" * 80], "cannot listen on xxx"),
        (["a", "--device", "gpu"], "device 'gpu' is unknown"),
        (["a", "--dtype", "float16"], "float16"),
        (["a", "--device", "mps"], "device 'mps' is not available"),
        (["a", "--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["a", "--cors-origins", "https://a.example/"], "'https://a.example/' is not an origin: give SCHEME://HOST"),
        (["a", "--cors-origins", "a.example"], "'a.example' is not an origin"),
        (["a", "--cors-origin", "*"], "Did you mean '--cors_origins'?"),
    ],
)
def test_mistakes_in_the_command_line(
    arguments: list[str], message: str, occupied: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        port = [] if "--port" in arguments else ["--port", "0"]
        main(["serve", *(word.replace("PORT", str(occupied)) for word in arguments), *port])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("states/epoch=0-step=2", ("epoch=0-step=2", "states/epoch=0-step=2")),
        ("states/epoch=0-step=2/", ("epoch=0-step=2", "states/epoch=0-step=2/")),
        ("sft=states/epoch=0-step=2", ("sft", "states/epoch=0-step=2")),
        ("a=b", ("a=b", "a=b")),  # there is such a directory
        ("c=b", ("c", "b")),
        ("c=org/model", ("c", "org/model")),
        ("org/model", ("model", "org/model")),
        (".", ("here", ".")),
        ("./", ("here", "./")),
        ("states/..", ("here", "states/..")),
        ("..", ("there", "..")),
        ("c=.", ("c", ".")),
        ("c=~/d", ("c", "HOME/d")),
    ],
)
def test_names_of_checkpoints(
    given: str, named: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "there" / "here"
    for directory in ("states/epoch=0-step=2", "a=b", "b"):
        (here / directory).mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "HOME")
    assert command._named([given]) == dict([named])


@pytest.mark.parametrize(
    ("host", "more", "allowed", "refused"),
    [
        ("127.0.0.1", [], ["127.0.0.1", "localhost", "a.localhost", "::1"], ["evil.example", "0.0.0.0"]),
        ("localhost", ["Images.Example.com"], ["localhost", "images.example.com"], ["evil.example"]),
        ("127.0.0.1", ["*"], ["anything.example"], []),
        ("0.0.0.0", [], ["anything.example", "10.0.0.1"], []),
        ("0.0.0.0", ["a.example", "[fe80::1]"], ["localhost", "a.example", "fe80::1"], ["evil.example"]),
    ],
)
def test_hosts_that_are_answered(host: str, more: list[str], allowed: list[str], refused: list[str]) -> None:
    """A server that only this machine reaches answers to its own names, one that others reach to all, unless told."""
    with command._listen(host, 0) as listening:
        patterns = command._allowed_hosts(more, host, listening.getsockname()[0])
    answered = {name for name in (*allowed, *refused) if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert answered == set(allowed)


def test_checkpoints_are_served_under_their_names(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the engine's fixed shapes, a key of the environment, and the limits that were asked for."""
    made: dict[str, Any] = {}

    class Server:
        def __init__(self, config: Any) -> None:
            made["shutdown_timeout"] = config.timeout_graceful_shutdown

        def run(self, sockets: Any) -> None:
            made["port"] = sockets[0].getsockname()[1]
            sockets[0].close()
            for served in made["models"]:
                served.batcher.close()

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(command, "create_app", lambda models, service: made.update(models=models, service=service))
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
        "--dtype",
        "bfloat16",
        "--allowed-hosts",
        "a.example",
        "--allowed-hosts",
        "*.b.example",
        "--cors-origins",
        "*",
    ]
    main(["serve", ".", f"after={checkpoints[1]}", *options])
    assert [served.name for served in made["models"]] == ["first", "after"]
    assert [served.description["engine"] for served in made["models"]] == ["fused", "fused"]
    assert {served.description["dtype"] for served in made["models"]} == {"bfloat16"}
    assert made["service"].api_key == "secret" and made["shutdown_timeout"] == 3 and made["port"] > 0
    assert made["service"].allowed_hosts[-2:] == ["a.example", "*.b.example"]
    assert made["service"].cors_origins == ["*"]
    batcher = made["models"][0].batcher
    assert batcher.shapes == [1, 4] and batcher.pipeline.engine.prompt_multiple == command.PROMPT_MULTIPLE
    assert made["models"][0].description["max_codes"] == 30
