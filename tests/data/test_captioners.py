"""Captioners: the real classes with random weights against a plain loop, and a server that fails in every way."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from transformers import AutoModelForImageTextToText, AutoProcessor

from simplear.data import Sample, ServerCaptioner, TransformersCaptioner
from simplear.data.jobs.captioners import Answer
from simplear.data.jobs.recaption import CaptionRequest, caption_of, shrunk

from .caption_server import MODEL, CaptionServer, caption_server
from .vision_language import write_vision_language_model

CPU = torch.device("cpu")
PICTURES = [
    Image.effect_noise(size, 90).convert("RGB").point(lambda value, number=number: (value * (number + 1)) % 256)
    for number, size in enumerate([(64, 48), (32, 60), (48, 48)])
]


@pytest.fixture(scope="module", params=["qwen2-vl", "qwen2.5-vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vision_language_model(tmp_path_factory.mktemp("vlm") / "model", family=request.param)


@pytest.fixture(scope="module")
def captioner(model: str) -> TransformersCaptioner:
    captioner = TransformersCaptioner(model)
    captioner.prepare(CPU)
    return captioner


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    with caption_server() as running:
        yield running


def ask(server: CaptionServer, **options: Any) -> ServerCaptioner:
    return ServerCaptioner(server.url, MODEL, **{"timeout": 5.0, **options})


@torch.no_grad()
def test_answers_are_those_of_a_plain_greedy_loop(model: str, captioner: TransformersCaptioner) -> None:
    """One picture at a time, without cache, with pictures of several sizes beside each other in the batch."""
    answers = captioner.answer(PICTURES, "what is it?", max_tokens=12)
    assert {answer.finished for answer in answers} == {True, False} or len({answer.text for answer in answers}) > 1
    processor, plain = AutoProcessor.from_pretrained(model), AutoModelForImageTextToText.from_pretrained(model)
    ends = set(plain.generation_config.eos_token_id)
    for picture, answer in zip(PICTURES, answers, strict=True):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
        text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        inputs = dict(processor(text=[text], images=[picture], return_tensors="pt"))
        made: list[int] = []
        while len(made) < 12 and not (made and made[-1] in ends):
            logits = plain(**inputs, use_cache=False).logits[0, -1]
            logits[plain.generation_config.suppress_tokens] = -torch.inf
            made.append(int(logits.argmax()))
            for name, value in (("input_ids", made[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
        finished = made[-1] in ends
        words = processor.tokenizer.decode(made[:-1] if finished else made, skip_special_tokens=True)
        assert answer == Answer(words, finished)


def test_a_model_is_known_by_its_files(model: str, tmp_path: Path) -> None:
    described = TransformersCaptioner(model).describe()
    assert described == TransformersCaptioner(model).describe()
    other = write_vision_language_model(tmp_path / "other", seed=1)
    assert TransformersCaptioner(other).describe()["revision"] != described["revision"]
    with pytest.raises(FileNotFoundError, match=r"no vision-language model at .*nowhere"):
        TransformersCaptioner(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"dtype 'float17' is unknown"):
        TransformersCaptioner(model, dtype="float17")


def test_a_server_sees_the_picture_and_the_prompt(server: CaptionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    captioner = ask(server)
    captioner.prepare(CPU)
    answers = captioner.answer(PICTURES, "describe it", 40)
    assert [answer.text.rpartition(", ")[2] for answer in answers] == ["64 x 48", "32 x 60", "48 x 48"]
    assert len({answer.text for answer in answers}) == 3 and all(answer.finished for answer in answers)
    body = server.requests[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == (MODEL, 40, 0)
    assert server.authorizations == ["Bearer a key"] * 4
    assert captioner.describe() == {"class": "ServerCaptioner", "model": MODEL}


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_what_is_sent_is_nearly_the_picture(server: CaptionServer, mode: str) -> None:
    smooth = Image.radial_gradient("L").resize((64, 64)).convert("RGB").convert(mode)
    seen: list[Image.Image] = []
    answer = server.answer
    server.answer = lambda picture, body: seen.append(picture.convert("RGB")) or answer(picture, body)
    ask(server).answer([smooth], "?", 9)
    difference = ImageChops.difference(seen[0], smooth.convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 20


def test_the_key_does_not_follow_a_redirect(server: CaptionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with caption_server() as other:
        server.redirect = 307, other.url + "/models"
        ask(server).prepare(CPU)
        assert server.authorizations == ["Bearer a key"] and other.authorizations == [None]


@pytest.mark.parametrize("failure", [503, 429])
def test_what_may_pass_is_tried_again(server: CaptionServer, failure: int) -> None:
    left = [failure]
    answer = server.answer
    server.answer = lambda picture, body: left.pop() if left else answer(picture, body)
    assert ask(server).answer(PICTURES[:1], "describe it", 40)[0].text.startswith("a long caption")
    assert len(server.requests) == 2


def test_a_timeout_is_tried_again_and_ends_with_what_is_kept(server: CaptionServer) -> None:
    server.slow = 60
    with pytest.raises(ConnectionError, match=r"no answer in 2 tries, the last time: .*timed out.* finished are kept"):
        ask(server, timeout=0.1, tries=2).answer(PICTURES[:1], "describe it", 40)
    assert len(server.requests) == 2


def test_no_server_is_found_before_any_picture() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="in 1 tries, the last time: Connection error"):
        ServerCaptioner(f"http://127.0.0.1:{port}/v1", MODEL, tries=1).prepare(CPU)


def test_without_the_client_the_message_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"needs the package openai: pip install 'simplear\[recaption\]'"):
        ServerCaptioner("http://localhost/v1", MODEL).prepare(CPU)


def test_a_refused_picture_is_a_reason_and_the_others_are_described(server: CaptionServer) -> None:
    answer = server.answer
    server.answer = lambda picture, body: 413 if picture.width == 32 else answer(picture, body)
    answers = ask(server).answer(PICTURES, "describe it", 40)
    assert [bool(answer.text) for answer in answers] == [True, False, True]
    assert answers[1].refusal == "refused by the server (413)"


def test_what_will_not_pass_stops_the_work(server: CaptionServer) -> None:
    with pytest.raises(ValueError, match=r"has no model 'other', but \['tiny'\]"):
        ServerCaptioner(server.url, "other").prepare(CPU)
    server.answer = lambda picture, body: 401
    with pytest.raises(ValueError, match=r"answered: .*401 .*as told.*OPENAI_API_KEY"):
        ask(server).answer(PICTURES, "describe it", 40)
    listed = b'{"choices": [{"message": {"content": ["a list"]}, "finish_reason": "stop"}]}'
    for foreign in (b'{"error": "none"}', listed, b"<html>", b""):
        server.answer = lambda picture, body, foreign=foreign: foreign
        with pytest.raises(ValueError, match="does not speak OpenAI's chat protocol"):
            ask(server).answer(PICTURES, "describe it", 40)
    with pytest.raises(ValueError, match="not the address of a server"):
        ServerCaptioner("localhost:8000", MODEL)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(" a  red\ncircle\t"), None),
        (Answer("été, 图"), None),
        (Answer("👩\u200d🎨"), None),
        (Answer("a \ud800"), "characters that are no text"),
        (Answer(" \n "), "empty"),
        (Answer("a red", finished=False), "cut off after 9 tokens"),
        (Answer("a red circle and a blue square"), "longer than 12 characters"),
        (Answer("a \ufffd"), "characters that are no text"),
        (Answer("a \x00"), "characters that are no text"),
        (Answer("", refusal="refused by the server (400)"), "refused by the server (400)"),
    ],
)
def test_what_is_no_caption_has_a_reason(answer: Answer, problem: str | None) -> None:
    caption, found = caption_of(answer, CaptionRequest("?", tokens=9, characters=12))
    assert found == problem and (caption is None) == (problem is not None)
    if caption:
        assert caption in ("a red circle", "été, 图", "👩\u200d🎨")


def test_large_pictures_are_shrunk_and_small_ones_are_not_touched() -> None:
    picture = Image.new("RGB", (400, 100))
    small = shrunk(Sample("k", picture, ["x"]), 10_000)
    assert small.size == (200, 50)
    assert shrunk(Sample("k", small, ["x"]), 10_000) is small
    assert shrunk(Sample("k", Image.new("RGB", (10_000, 1)), ["x"]), 100).size == (1000, 1)
