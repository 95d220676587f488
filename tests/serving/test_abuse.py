"""What must not bring the server down, stay in its queue, or tell a stranger anything."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving.conftest import GRID, PATIENCE, Clock, Live, wait_until
from serving.test_api import Pipelines, drawn_by, pixels
from simplear.serving import Service, job

GENERATIONS = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


def post(live: Live, content: Any, headers: dict[str, str] = JSON) -> httpx2.Response:
    return live.ask("POST", GENERATIONS, content=content, headers=headers)


def send(live: Live, body: bytes, length: int | None = None) -> socket.socket:
    """A request on a socket of its own, of which nothing is read yet."""
    connection = socket.create_connection(live.address, timeout=PATIENCE)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return connection


def requests(live: Live, status: str) -> float:
    return live.metric("simplear_requests_total", path=GENERATIONS, status=status)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b'{"prompt": "x", }',
        b'{"prompt": null}',
        b'{"prompt": ["x"]}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"\\ud800": 1, "prompt": "x"}',
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "x", "guidance_scale": 1e400}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "x", "user": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "x", "a": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b'{"a":' * 20_000,
        b"\x00" * 100,
    ],
    ids=lambda content: content[:24].decode(errors="replace"),
)
def test_bodies_that_are_no_request(live: Live, content: bytes) -> None:
    answer = post(live, content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert not re.search(r"/\w+/|Traceback|\.py", answer.text) and len(answer.text) < 400


def test_bodies_that_are_too_large(live: Live) -> None:
    huge = json.dumps({"prompt": "a" * 16 * 2**20}).encode()
    pieces = (huge[start : start + 4096] for start in range(0, len(huge), 4096))
    for content in (huge, pieces):  # the second without a length
        answer = post(live, content)
        assert answer.status_code == 413 and "Content Too Large" in answer.text
    # The largest that is one: two prompts of the largest length outside the basic plane.
    prompt = json.dumps("\U0001f600" * 32_000)
    answer = post(live, f'{{"prompt": {prompt}, "negative_prompt": {prompt}}}'.encode())
    assert answer.status_code == 400 and "there is room for" in answer.json()["error"]["message"]


def test_a_form_of_another_site_is_no_request(live: Live) -> None:
    """Browsers send such content types to any address without asking; JSON they do not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert post(live, b'{"prompt": "x"}', {"Content-Type": kind}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/chat/completions", 404, "no GET /v1/chat/completions here"),
        ("POST", "/v1/chat/completions", 404, "no POST /v1/chat/completions here"),
        ("POST", "/v1/images/edits", 404, "no POST /v1/images/edits here. There are POST /v1/images/generations"),
        ("POST", "/v1/images/variations", 404, "There are POST /v1/images/generations"),
        ("POST", "/images/generations", 404, "There are POST /v1/images/generations"),
        ("POST", "/v1", 404, "There are POST /v1/images/generations"),
        ("GET", "/v1/", 404, ""),
        ("GET", "/v1/models/third", 404, "there are: first, second"),
        ("GET", "/../../etc/passwd", 404, ""),
        ("GET", "/page.py", 404, ""),
        ("GET", "/docs", 404, ""),
        ("GET", "/" + "x" * 10_000, 404, ""),
        ("GET", GENERATIONS, 405, "There are POST /v1/images/generations"),
        ("OPTIONS", GENERATIONS, 405, "There are POST /v1/images/generations"),
        ("DELETE", "/v1/models/first", 405, "There are POST /v1/images/generations"),
        ("POST", "/v1/models", 405, "There are POST /v1/images/generations"),
        ("POST", "/healthz", 405, "There are POST /v1/images/generations"),
    ],
)
def test_other_paths_and_methods(live: Live, method: str, path: str, status: int, message: str) -> None:
    answer = live.ask(method, path, content=b'{"prompt": "x"}', headers=JSON)
    assert answer.status_code == status and len(answer.text) < 500
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and message in error["message"]
    assert (status == 405) == ("allow" in answer.headers)


def test_a_picture_for_a_route_that_is_not_there(live: Live) -> None:
    """The client sends all of it before it looks at the answer."""
    with pytest.raises(openai.NotFoundError, match="no POST /v1/images/edits here"):
        live.client().images.edit(image=("a.png", b"x" * 10_000_000), prompt="x")


def test_what_clients_write_otherwise(live: Live) -> None:
    """A slash at the end, a byte order mark, a character set."""
    body = b'{"prompt": "x", "seed": 1}'
    image = post(live, body).json()["data"][0]["b64_json"]
    for path, content, kind in (
        (GENERATIONS + "/", body, "application/json"),
        (GENERATIONS, b"\xef\xbb\xbf" + body, "application/json"),
        (GENERATIONS, body, "application/json; charset=utf-8"),
        (GENERATIONS, body, "application/vnd.x+json"),
    ):
        answer = live.ask("POST", path, content=content, headers={"Content-Type": kind})
        assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"] == image
    assert live.ask("GET", "/v1/models/").json() == live.ask("GET", "/v1/models").json()


def test_slow_clients_hold_up_nobody(pipelines: Pipelines) -> None:
    with Live(pipelines).running() as live:
        slow = [send(live, b'{"prompt": ', length=100) for _ in range(50)]
        wait_until(lambda: len(live.server.server_state.tasks) == 50)
        assert live.client().images.generate(prompt="x").data
        for connection in slow:
            connection.close()
        wait_until(lambda: len(live.server.server_state.tasks) == 0)


def test_long_prompts_are_tokenized_beside_the_event_loop(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    checking, go_on = threading.Event(), threading.Event()
    served = live.models[0]
    whole = served.check

    def check(request: Any) -> Any:
        checking.set()
        assert go_on.wait(PATIENCE)
        return whole(request)

    monkeypatch.setattr(served, "check", check)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, live, b'{"prompt": "x"}')
        assert checking.wait(PATIENCE)
        assert live.ask("GET", "/healthz").status_code == 200
        go_on.set()
        assert asked.result().status_code == 200


def test_who_hangs_up_leaves_the_queue(pipelines: Pipelines) -> None:
    with Live(pipelines, shapes=[1]).running() as live, ThreadPoolExecutor(1) as pool:
        live.engine.hold()
        running = pool.submit(live.client().images.generate, prompt="x", model="first")
        wait_until(lambda: live.engine.rows == 1)
        left = [send(live, b'{"prompt": "x", "n": 5}') for _ in range(4)]
        wait_until(lambda: live.metric("simplear_queue_images", model="first") == 20)
        for connection in left:
            connection.close()
        wait_until(lambda: requests(live, "499") == 4)
        live.engine.go()
        assert running.result().data
        assert live.client().images.generate(prompt="x", model="first").data
        assert live.metric("simplear_images_total", model="first") == 2


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_running_batch_ends_with_its_client(pipelines: Pipelines, stream: str) -> None:
    with Live(pipelines).running() as live:
        live.engine.hold()
        connection = send(live, f'{{"prompt": "x", "stream": {stream}}}'.encode())
        wait_until(lambda: live.engine.rows == 1)
        connection.close()
        wait_until(lambda: requests(live, "499") == 1)
        live.engine.go()
        assert live.client().images.generate(prompt="y").data
        assert live.engine.rows == 1 + GRID[0] and live.metric("simplear_images_total", model="first") == 1


def test_a_full_queue_says_when_to_come_back(pipelines: Pipelines) -> None:
    with Live(pipelines, capacity=4, shapes=[4]).running() as live, ThreadPoolExecutor(1) as pool:
        live.engine.hold()
        waiting = [send(live, b'{"prompt": "x", "n": 4}')]
        wait_until(lambda: live.engine.rows == 1)
        waiting.append(send(live, b'{"prompt": "x", "n": 4}'))
        wait_until(lambda: live.metric("simplear_queue_images", model="first") == 4)
        with pytest.raises(openai.RateLimitError, match="Too many images are waiting") as raised:
            live.client().images.generate(prompt="x")
        assert raised.value.code == "queue_full" and int(raised.value.response.headers["retry-after"]) >= 1
        # The other checkpoint has a queue of its own, and the client comes back by itself.
        assert live.client().images.generate(prompt="x", model="second").data
        patient = pool.submit(live.client(max_retries=1000).images.generate, prompt="x")
        wait_until(lambda: requests(live, "429") == 2)
        live.engine.go()
        assert patient.result().data
        assert b"200 OK" in waiting[1].recv(1000)


def test_what_comes_to_a_standstill_is_given_up(pipelines: Pipelines) -> None:
    with Live(pipelines, Service(timeout=0.1)).running() as live:
        live.engine.hold()
        with pytest.raises(openai.InternalServerError, match="come to a standstill") as raised:
            live.client().images.generate(prompt="x", model="first")
        assert raised.value.status_code == 504
        with pytest.raises(openai.APIError, match="come to a standstill"):
            list(live.client().images.generate(prompt="x", model="first", stream=True))
        wait_until(lambda: len(live.server.server_state.tasks) == 0)
        assert live.metric("simplear_images_total", model="first") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_drawn_row_by_row_may_take_long(
    pipelines: Pipelines, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row within the limit, all of them together far beyond; the request behind waits for that too."""
    monkeypatch.setattr(job, "HEARTBEAT_SECONDS", 0.01)
    clock = Clock()
    with (
        Live(pipelines, Service(timeout=100), shapes=[1], clock=clock).running() as live,
        ThreadPoolExecutor(2) as pool,
    ):
        live.engine.hold()
        first = pool.submit(live.client().images.generate, prompt="x", stream=stream)
        wait_until(lambda: live.engine.rows == 1)
        second = pool.submit(live.client().images.generate, prompt="y")
        wait_until(lambda: live.metric("simplear_queue_images", model="first") == 1)
        for row in range(1, 2 * GRID[0]):
            wait_until(lambda row=row: live.engine.rows == row)
            clock.now += 60
            live.engine.hold()
        live.engine.go()
        assert list(first.result()) if stream else first.result().data
        assert second.result().data
        assert clock.now - 1000 > 400


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(RuntimeError("at /home/someone/weights"), 500, "internal_error"), (MemoryError(), 503, "out_of_memory")],
)
def test_a_failure_ends_one_request_and_says_nothing(
    pipelines: Pipelines, error: Exception, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Live(pipelines).running() as live:
        whole = live.engine.generate

        def generate(*request: Any) -> Any:
            if request[4][0] == 13:
                raise error
            return whole(*request)

        live.engine.generate = generate
        for stream in (False, True):
            with pytest.raises(openai.APIError) as raised:
                list(live.client().images.generate(prompt="x", stream=stream, extra_body={"seed": 13}))
            assert raised.value.code == code and "/home" not in str(raised.value.body)
            assert stream or raised.value.status_code == status  # type: ignore[attr-defined]
        image = live.client().images.generate(prompt="x", extra_body={"seed": 1}).data[0]
        assert (pixels(image.b64_json) == drawn_by(pipelines["first"], "x", 1, 1)).all()


def test_a_server_that_stops_sends_new_requests_away(pipelines: Pipelines) -> None:
    with Live(pipelines).running() as live:
        live.models[0].batcher.close()
        answer = post(live, b'{"prompt": "x"}')
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "shutting_down"
        assert live.ask("GET", "/healthz").status_code == 503


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=pytest.mark.long)])
def test_requests_that_the_openapi_page_allows_and_others(live: Live, mode: GenerationMode, examples: int) -> None:
    """Each is answered as the page says, and none with a failure of the server."""
    torch.set_flush_denormal(False)  # verbs turn it on in this process, and Hypothesis wants all floating-point numbers
    # What no schema says, such as sizes that the checkpoint cannot draw, is refused too.
    left_out = [positive_data_acceptance]
    operations = [
        found.ok() for found in schemathesis.openapi.from_url(f"{live.url}/openapi.json").get_all_operations()
    ]
    assert [operation.path for operation in operations] == [
        GENERATIONS,
        "/v1/models",
        "/v1/models/{model}",
        "/healthz",
    ]
    for operation in operations[: 1 if mode is GenerationMode.NEGATIVE else None]:  # the others take nothing

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            case.call_and_validate(excluded_checks=left_out, timeout=PATIENCE)

        answered()


@pytest.fixture
def served(checkpoints: list[Path]) -> Iterator[Any]:
    """Starts `simplear serve` with these options; gives the process and its address."""
    started = []

    def start(*options: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "simplear.cli", "serve", str(checkpoints[0]), "--port", "0", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"first at (http://127\.0\.0\.1:\d+); Ctrl-C stops\n", line)
        assert found, line
        return process, found[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def load(url: str, key: str, results: list[Any], stop: threading.Event) -> None:
    """Ask until the server is gone."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
    while not stop.is_set():
        try:
            results.append(client.images.generate(prompt="a red circle", n=4))
        except openai.APIStatusError as error:
            results.append(error)
        except openai.APIConnectionError:
            return


def test_sigterm_under_load(served: Any) -> None:
    """Every request gets its images or a 503, and the process ends by itself with 0."""
    process, url = served(SIMPLEAR_API_KEY="secret")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    results: list[Any] = []
    stop = threading.Event()
    threads = [threading.Thread(target=load, args=(url, "secret", results, stop)) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(results) > 8)
    process.stdout.close()  # whoever read the address may be gone: that keeps nothing from ending
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    errors = [result for result in results if isinstance(result, Exception)]
    assert all(error.status_code == 503 and error.code == "shutting_down" for error in errors)
    assert all(len(result.data) == 4 for result in results if result not in errors)
    assert process.stderr is not None
    printed = process.stderr.read()
    assert "Shutting down" in printed and "Traceback" not in printed


@pytest.mark.long
def test_sigterm_does_not_wait_for_ever(served: Any) -> None:
    process, url = served("--shutdown_timeout", "0", "--batch_sizes", "[1]")
    bodies = [b'{"prompt": "x", "n": 10}'] * 12
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [
            pool.submit(httpx2.post, url + GENERATIONS, content=body, headers=JSON, timeout=PATIENCE) for body in bodies
        ]
        wait_until(lambda: "simplear_images_total" in httpx2.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        statuses = [answer.result().status_code for answer in answers]
    assert set(statuses) <= {200, 503} and 503 in statuses
