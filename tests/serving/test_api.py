"""The API as OpenAI's own client speaks it, and every image held against the pipeline's."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from serving.conftest import GRID, SIZE, Live, wait_until
from simplear.generation import SimpleARPipeline
from simplear.serving import Service
from simplear.serving.command import LOCAL_NAMES
from simplear.serving.job import encode
from toys import DOWNSAMPLE

Pipelines = dict[str, SimpleARPipeline]


def picture(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def pixels(b64_json: str) -> NDArray[np.uint8]:
    return np.asarray(picture(b64_json))


def drawn_by(
    pipeline: SimpleARPipeline, prompt: str, seed: int, shape: int, rows: int | None = None, **options: Any
) -> NDArray[np.uint8]:
    """The image, or its upper rows of codes, as the pipeline draws it in a batch of copies of itself."""
    codes = pipeline([prompt] * shape, seed=[seed] * shape, output_type="codes", batch_size=shape, **options).codes
    decoded = pipeline.decode(codes[:1, :rows])[0]
    return (decoded * 255).round().byte().permute(1, 2, 0).numpy()


def test_images_are_the_pipelines(live: Live, pipelines: Pipelines) -> None:
    answer = live.client().images.generate(prompt="a red circle", n=3, size=SIZE, extra_body={"seed": 7})
    assert answer.created > 1.7e9 and answer.size == SIZE and answer.output_format == "png"
    assert [image.seed for image in answer.data] == [7, 8, 9] and answer.data[0].batch_size == 4
    for image in answer.data:
        expected = drawn_by(pipelines["first"], "a red circle", image.seed, image.batch_size)
        np.testing.assert_array_equal(pixels(image.b64_json), expected)
    assert len({image.b64_json for image in answer.data}) == 3
    assert answer.usage.output_tokens == 3 * GRID[0] * GRID[1]


def test_settings_reach_the_engine(live: Live, pipelines: Pipelines) -> None:
    settings = {
        "guidance_scale": 3.0,
        "negative_prompt": "two blue squares",
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
    }
    asked = live.client().images.generate(prompt="one star", model="second", extra_body={"seed": 3, **settings})
    image = asked.data[0]
    np.testing.assert_array_equal(pixels(image.b64_json), drawn_by(pipelines["second"], "one star", 3, 1, **settings))
    made = json.loads(picture(image.b64_json).text["simplear"])
    assert made == {
        **settings,
        "prompt": "one star",
        "seed": 3,
        "do_sample": True,
        "prompt_prefix": "a photo of ",
        "checkpoint": "second",
        "dtype": "float32",
        "batch_size": 1,
    }
    unguided = live.client().images.generate(prompt="one star", extra_body={"seed": 3, "guidance_scale": 1.0})
    expected = drawn_by(pipelines["first"], "one star", 3, 1, guidance_scale=1.0)
    np.testing.assert_array_equal(pixels(unguided.data[0].b64_json), expected)


def test_a_request_that_says_nothing_draws_with_a_seed_that_it_is_told(live: Live, pipelines: Pipelines) -> None:
    images = [live.client().images.generate(prompt="", size="auto").data[0] for _ in range(2)]
    assert images[0].seed != images[1].seed
    for image in images:
        np.testing.assert_array_equal(pixels(image.b64_json), drawn_by(pipelines["first"], "", image.seed, 1))


def test_typed_control_tokens_are_text(live: Live, pipelines: Pipelines) -> None:
    prompt = "a <|soi|> star <|t2i|>"
    answer = live.client().images.generate(prompt=prompt, extra_body={"seed": 1})
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), drawn_by(pipelines["first"], prompt, 1, 1))
    # As letters they are many tokens; beside them there are the two that stand at the ends.
    assert answer.usage.input_tokens == pipelines["first"].check_prompts([prompt])[0] > 12


def test_other_sizes(live: Live, pipelines: Pipelines) -> None:
    answer = live.client().images.generate(prompt="one star", size="32x8", extra_body={"seed": 1})
    assert picture(answer.data[0].b64_json).size == (32, 8)
    expected = drawn_by(pipelines["first"], "one star", 1, 1, width=32, height=8)
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected)


def test_a_stream_shows_rows_and_ends_with_the_image(live: Live, pipelines: Pipelines) -> None:
    events = list(
        live.client().images.generate(
            prompt="a red circle", stream=True, partial_images=3, n=2, extra_body={"seed": 5, "guidance_scale": 2.0}
        )
    )
    for index in (0, 1):
        *partial, whole = [event for event in events if event.index == index]
        assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
        assert [event.partial_image_index for event in partial] == [0, 1, 2]
        assert [event.rows for event in partial] == [1, 2, 3]
        assert whole.type == "image_generation.completed" and whole.size == SIZE
        assert whole.usage.output_tokens == GRID[0] * GRID[1]
        expected = drawn_by(pipelines["first"], "a red circle", 5 + index, whole.batch_size)
        np.testing.assert_array_equal(pixels(whole.b64_json), expected)
        for event in partial:
            shown, finished = pixels(event.b64_json), event.rows * DOWNSAMPLE
            assert shown.shape == (*expected.shape[:2], 4)
            assert (shown[:finished, :, 3] == 255).all() and (shown[finished:, :, 3] == 0).all()
            part = drawn_by(pipelines["first"], "a red circle", 5 + index, whole.batch_size, rows=event.rows)
            np.testing.assert_array_equal(shown[:finished, :, :3], part)


def test_partial_images_are_spread_over_the_rows(live: Live) -> None:
    events = list(live.client().images.generate(prompt="one star", stream=True, partial_images=1))
    assert [event.rows for event in events] == [2, 4]
    assert [event.rows for event in live.client().images.generate(prompt="one star", stream=True)] == [4]


def test_concurrent_requests_get_their_own_images(pipelines: Pipelines) -> None:
    """Distinct seeds and prompts from many clients at once: no image goes to another, whatever it was drawn beside."""
    prompts = ["a red circle", "two blue squares", "one star " * 6, ""]

    def ask(seed: int) -> Any:
        return live.client().images.generate(prompt=prompts[seed % 4], model="first", extra_body={"seed": seed}).data[0]

    with Live(pipelines).running() as live, ThreadPoolExecutor(33) as pool:
        live.engine.hold()
        first = pool.submit(ask, 0)
        wait_until(lambda: live.engine.rows == 1)
        others = pool.map(ask, range(1, 33))
        wait_until(lambda: live.metric("simplear_queue_images", model="first") == 32)
        live.engine.go()
        images = [first.result(), *others]
        # The first alone, then those of two widths of prompt, up to eight at once.
        assert live.metric("simplear_batch_images_count", model="first") <= 1 + 5
    assert [image.seed for image in images] == list(range(33))
    assert {image.batch_size for image in images[1:]} == {8}
    for image in images:
        expected = drawn_by(pipelines["first"], prompts[image.seed % 4], image.seed, image.batch_size)
        np.testing.assert_array_equal(pixels(image.b64_json), expected)


def test_models(live: Live) -> None:
    models = live.client().models.list().data
    assert [model.id for model in models] == ["first", "second"]
    assert models[0].size == SIZE and models[0].defaults["guidance_scale"] == 2.0
    assert live.client().models.retrieve("second") == models[1]
    for ask in (
        lambda: live.client().images.generate(prompt="x", model="third"),
        lambda: live.client().models.retrieve("third"),
    ):
        with pytest.raises(openai.NotFoundError, match="there are: first, second") as raised:
            ask()
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"size": "-8x8"}, "size", "pattern"),
        ({"size": "big"}, "size", "pattern"),
        ({"size": "12x8"}, "size", "width 12 must be a multiple of 8"),
        ({"size": "4x8"}, "size", "width 4 must be a multiple of 8"),
        ({"size": "80x80"}, "size", "100 codes; at most 12"),
        ({"size": "1024x1024"}, "size", f"16384 codes; at most 12 are drawn, {SIZE} by default"),
        ({"size": "99999x99999"}, "size", "at most 12"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": 1e300}, "n", "less than or equal to 10"),
        ({"n": "1"}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"prompt": "x" * 32_001}, "prompt", "at most 32000"),
        ({"prompt": "q z " * 8_000}, "prompt", r"has \d+ tokens; there is room for \d+"),
        ({"negative_prompt": "q z " * 8_000}, "negative_prompt", r"has \d+ tokens; there is room for \d+"),
        ({"response_format": "url"}, "response_format", "'b64_json'.*no URL"),
        ({"style": "vivd"}, "style", "'vivid' or 'natural'"),
        ({"quality": "best"}, "quality", "'standard' or 'hd'"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'.*without transparent areas"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "jpeg or webp"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "less than or equal to 100"),
        ({"guidance_scal": 2}, "guidance_scal", "no parameter guidance_scal here; did you mean guidance_scale"),
        ({"negativ_prompt": ""}, "negativ_prompt", "did you mean negative_prompt"),
        ({"output_compresion": 90}, "output_compresion", "did you mean output_compression"),
        ({"steps": 20}, "steps", "no parameter steps here"),
        ({"guidance_scale": "2"}, "guidance_scale", "valid number"),
        ({"temperature": 0}, "temperature", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**60}, "seed", "less than or equal"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"partial_images": 2}, "partial_images", "stream=true"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(live: Live, asked: dict[str, Any], param: str, message: str) -> None:
    body = {"prompt": "x", **asked}
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        live.client().images.generate(prompt=body.pop("prompt"), extra_body=body)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    "asked",
    [
        *({"quality": quality} for quality in ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
        *({"style": style} for style in ("vivid", "natural")),
        *({"complexity": complexity} for complexity in ("low", "high")),
        *({"background": background} for background in ("auto", "opaque")),
        *({"moderation": moderation} for moderation in ("auto", "low")),
        {"output_format": "png", "output_compression": 100},
        {"output_compression": 100.0},
        {"response_format": "b64_json"},
        {"user": "me", "safety_identifier": "me too"},
        {"n": 1.0, "seed": 1.0, "top_k": 1e3, "partial_images": 0.0, "guidance_scale": 2},
        {"size": "auto"},
        {"stream": False},
        {"no_such_key": None, "svg": None, "frame_count": None},
        dict.fromkeys(
            ("n", "size", "quality", "style", "user", "stream", "model", "response_format", "guidance_scale")
        ),
    ],
    ids=str,
)
def test_values_that_mean_nothing_here_change_nothing(live: Live, pipelines: Pipelines, asked: dict[str, Any]) -> None:
    image = live.client().images.generate(prompt="one star", extra_body={"seed": 1, **asked}).data[0]
    np.testing.assert_array_equal(pixels(image.b64_json), drawn_by(pipelines["first"], "one star", 1, 1))


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_file_formats(live: Live, pipelines: Pipelines, output_format: Any) -> None:
    """As small as was asked for, at the best quality close to the picture, and with what they were made of."""
    expected = drawn_by(pipelines["first"], "one star", 1, 1)
    sizes = []
    for compression in (None, 100, 60, 20, 0):
        asked = {"seed": 1} if compression is None else {"seed": 1, "output_compression": compression}
        answer = live.client().images.generate(prompt="one star", output_format=output_format, extra_body=asked)
        assert answer.output_format == output_format
        sizes.append(len(answer.data[0].b64_json))
        shown = picture(answer.data[0].b64_json)
        assert shown.format == output_format.upper() and shown.size == expected.shape[1::-1]
        assert json.loads(shown.getexif()[ExifTags.Base.ImageDescription])["seed"] == 1
        if compression in (None, 100):
            assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - expected).mean() < 12
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] >= sizes[4]
    events = list(
        live.client().images.generate(prompt="one star", output_format=output_format, stream=True, partial_images=1)
    )
    assert [event.output_format for event in events] == [output_format] * 2
    upper = np.asarray(picture(events[0].b64_json).convert("RGBA"))
    below = upper[-DOWNSAMPLE:]
    assert (below[..., :3] > 240).all() if output_format == "jpeg" else (below[..., 3] == 0).all()


def test_a_prompt_too_long_for_a_jpeg(live: Live) -> None:
    """Its metadata would not fit; WebP and PNG hold them."""
    made, image = {"prompt": "x" * 100_000}, Image.new("RGB", (8, 8))
    described = {
        output_format: picture(encode(image, 8, made, output_format, 100)) for output_format in ("png", "jpeg", "webp")
    }
    assert not described["jpeg"].getexif()
    assert json.loads(described["webp"].getexif()[ExifTags.Base.ImageDescription]) == made
    assert json.loads(described["png"].text["simplear"]) == made


def test_the_key_is_asked_for(pipelines: Pipelines) -> None:
    with Live(pipelines, Service(api_key="sésame")).running() as live:
        for wrong in ("none", "sesame", "s", "sesamesesame"):
            with pytest.raises(openai.AuthenticationError, match="asks for an API key") as raised:
                live.client(wrong).models.list()
            assert raised.value.code == "invalid_api_key"
        key = {"Authorization": "Bearer sésame".encode()}
        for method, path in (
            ("POST", "/v1/images/generations"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/first"),
            ("GET", "/v1/models/"),
            ("GET", "/v1/nothing"),
            ("GET", "/metrics"),
        ):
            answer = live.ask(method, path, content=b"{", headers={"Authorization": "Basic abc"})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert live.ask(method, path, headers=key).status_code != 401
        assert live.ask("GET", "/metrics", headers=key).status_code == 200
        assert live.ask("GET", "/healthz").status_code == live.ask("GET", "/").status_code == 200
        assert "HTTPBearer" in live.ask("GET", "/openapi.json").text


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:8000", True),
        ("LocalHost", True),
        ("images.localhost:80", True),
        ("[::1]:8000", True),
        ("images.example.com", True),
        ("a.example.org", True),
        ("example.org", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_known_names_are_answered(live_for_browsers: Live, host: str, answered: bool) -> None:
    """A page that points its own name at this machine would else use the server through its visitors' browsers."""
    for path in ("/", "/v1/models", "/healthz", "/metrics"):
        answer = live_for_browsers.ask("GET", path, headers={"Host": host})
        assert answer.status_code == (200 if answered else 403)
        assert answered or answer.json()["error"]["code"] == "host_not_allowed"


@pytest.fixture(scope="module")
def live_for_browsers(pipelines: Pipelines) -> Iterator[Live]:
    service = Service(
        allowed_hosts=[*LOCAL_NAMES, "images.example.com", "*.example.org"], cors_origins=["https://app.example.com"]
    )
    with Live(pipelines, service).running() as live:
        yield live


def test_pages_of_allowed_origins_use_the_api(live_for_browsers: Live, live: Live) -> None:
    """What a browser asks before it lets a page do so, and what it looks for in the answer."""
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    origin = {"Origin": "https://app.example.com"}
    path, body = "/v1/images/generations", b'{"prompt": "x"}'
    answer = live_for_browsers.ask("OPTIONS", path, headers={**origin, **preflight})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")
    assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed)
    for content, status in ((body, 200), (b"{", 400)):
        headers = {**origin, "Content-Type": "application/json"}
        answer = live_for_browsers.ask("POST", path, headers=headers, content=content)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    for where, other in ((live_for_browsers, "https://evil.example"), (live, "https://app.example.com")):
        asked = where.ask("OPTIONS", path, headers={**preflight, "Origin": other})
        answered = where.ask("GET", "/v1/models", headers={"Origin": other})
        assert asked.status_code >= 400
        assert not any("access-control-allow-origin" in answer.headers for answer in (asked, answered))


def test_health_metrics_and_page(live: Live) -> None:
    live.client().images.generate(prompt="x", model="first")
    assert live.ask("GET", "/healthz").json() == {"status": "ok"}
    text = live.ask("GET", "/metrics").text
    for name in (
        'simplear_requests_total{path="/v1/images/generations",status="200"}',
        'simplear_request_seconds_bucket{le="0.05",path="/v1/images/generations"}',
        'simplear_queue_images{model="first"} 0.0',
        'simplear_batch_images_bucket{le="8.0",model="first"}',
        'simplear_images_total{model="first"}',
        "process_resident_memory_bytes",
    ):
        assert name in text
    page = live.ask("GET", "/")
    assert "<title>SimpleAR</title>" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/page.css", "/page.js"):
        file = live.ask("GET", path)
        assert file.status_code == 200 and "//" not in file.text.replace("// ", "").replace("http://www.w3.org", "")
