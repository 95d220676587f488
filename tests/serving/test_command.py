"""`simplear serve` says what is wrong before it loads anything, and takes the words that the documents use."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from simplear.cli import main
from simplear.errors import UserError
from simplear.serving import Service, command


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
        (["a", "--engine", "vllm"], "engine 'vllm' cannot be served; one of fused, compiled, jacobi can"),
        (["a", "--engines", "{a: vllm}"], "engine 'vllm' cannot be served"),
        (["a", "--engines", "{b: jacobi}"], "engines: no checkpoint is called 'b'; there are: a"),
        (["a", "--batch-sizes", "[0, 2]"], "batch_sizes [0, 2]: give numbers of 1 or more"),
        (["a", "--timeout", "0"], "above 0"),
        (["nowhere/at-all"], "nowhere/at-all"),
        (["states/epoch=0-step=2"], "no checkpoint at states/epoch=0-step=2"),
        (["=a"], "'=a' is not a checkpoint: give DIRECTORY or NAME=DIRECTORY"),
        (["a="], "'a=' is not a checkpoint"),
        (["a", "--port", "99999"], "port 99999: give a number from 0"),
        (["a", "--port", "-1"], "port -1: give a number from 0"),
        (["a", "--port", "PORT"], "another server has this port; give another with --port"),
        (["a", "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["a", "--host", "http://127.0.0.1"], "cannot listen on http://127.0.0.1"),
        (["a", "--host", "x" * 80], "cannot listen on xxx"),
        (["a", "--device", "gpu"], "device 'gpu' is unknown"),
        (["a", "--dtype", "float16"], "float16"),
        (["a", "--device", "mps"], "device 'mps' is not available"),
        (["a", "--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["a", "--cors-origins", "https://a.example/"], "'https://a.example/' is not an origin: give SCHEME://HOST"),
        (["a", "--allowed-hosts", "https://a.example"], "'https://a.example' is not a name or address"),
        (["a", "--allowed-hosts", "a.example:8000"], "without scheme and port"),
        (["a", "--allowed-hosts", "a.example,b.example"], "give one"),
        (["a", "--cors-origins", "a.example"], "'a.example' is not an origin"),
        (["a", "--cors-origin", "*"], "Did you mean '--cors_origins'?"),
    ],
)
def test_mistakes_in_the_command_line(
    arguments: list[str], message: str, occupied: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *(str(occupied) if word == "PORT" else word for word in arguments)])
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
    with command._bound(host, 0) as bound:
        patterns = command._allowed_hosts(more, host, bound)
    answered = {name for name in (*allowed, *refused) if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert answered == set(allowed)


def test_of_two_servers_that_bind_one_port_the_second_to_listen_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with command._bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with command._bound("127.0.0.1", port) as second:
            first.listen()
            server = command._Server(uvicorn.Config(lambda scope: None, port=port), [], Service(), 0)
            monkeypatch.setattr(command._Server, "capture_signals", contextlib.nullcontext)
            with pytest.raises(UserError, match=f"port {port}: .*in use"):
                server.run([second])


def test_checkpoints_are_served_under_their_names(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the engine's fixed shapes, a key of the environment, and the limits that were asked for."""
    made: dict[str, Any] = {}

    class Server:
        def __init__(self, config: Any, models: Any, service: Any, shutdown_timeout: float) -> None:
            made.update(config=config, models=models, service=service, shutdown_timeout=shutdown_timeout)

        def run(self, sockets: Any) -> None:
            made["port"] = sockets[0].getsockname()[1]
            sockets[0].close()
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
        "--dtype",
        "bfloat16",
        "--engines",
        "{after: jacobi}",
        "--allowed-hosts",
        "a.example",
        "--allowed-hosts",
        "*.b.example",
        "--cors-origins",
        "*",
    ]
    main(["serve", ".", f"after={checkpoints[1]}", *options])
    assert [served.name for served in made["models"]] == ["first", "after"]
    assert [served.description.engine for served in made["models"]] == ["fused", "jacobi"]
    assert {served.description.dtype for served in made["models"]} == {"bfloat16"}
    assert made["service"].api_key == "secret" and made["shutdown_timeout"] == 3 and made["port"] > 0
    assert made["service"].allowed_hosts[-2:] == ["a.example", "*.b.example"]
    assert made["service"].cors_origins == ["*"]
    batcher = made["models"][0].batcher
    assert batcher.shapes == [1, 4] and batcher.pipeline.engine.prompt_multiple == command.PROMPT_MULTIPLE
    assert made["models"][0].max_codes == 30 and made["models"][0].description.max_codes == 30
