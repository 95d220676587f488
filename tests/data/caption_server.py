"""A small server with OpenAI's chat protocol, which fails as it is told to."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "tiny"


def describe(picture: Image.Image, body: dict[str, Any]) -> dict[str, Any]:
    """An answer that depends on the picture and the prompt alone."""
    prompt = body["messages"][0]["content"][1]["text"]
    kind = "short" if "short" in prompt else "long"
    text = f"a {kind} caption, mean {np.asarray(picture).mean():.3f}, {picture.width} x {picture.height}"
    return {"message": {"content": text}, "finish_reason": "stop"}


class CaptionServer:
    """What was asked of it, and what it is to answer."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.answer: Callable[[Image.Image, dict[str, Any]], dict[str, Any] | int | bytes] = describe
        """Number of a state, bytes as they are, or the choice of a chat completion."""
        self.slow = 0.0
        """Seconds before an answer."""
        self.redirect: tuple[int, str] | None = None
        """State and address that are answered to everything."""
        self.url = ""


@contextmanager
def caption_server() -> Iterator[CaptionServer]:
    """A server on a free port of this machine, while the block lasts."""
    told = CaptionServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self, state: int, content: bytes) -> None:
            told.authorizations.append(self.headers.get("Authorization"))
            if told.redirect is not None:
                state, content = told.redirect[0], b""
            self.send_response(state)
            if told.redirect is not None:
                self.send_header("Location", told.redirect[1])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # the client has stopped and closed
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": MODEL}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.requests.append(body)
            time.sleep(told.slow)
            address = body["messages"][0]["content"][0]["image_url"]["url"]
            picture = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))
            answer = told.answer(picture, body)
            if isinstance(answer, int):
                self.reply(answer, b'{"error": {"message": "as told"}}')
            elif isinstance(answer, bytes):
                self.reply(200, answer)
            else:
                self.reply(200, json.dumps({"choices": [answer]}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
