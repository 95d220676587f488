"""The API as OpenAI's own client speaks it, and every image held against the pipeline's."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.conftest import GRID, SIZE, Live
from simplear.generation import SimpleARPipeline
from simplear.serving import Service
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


def test_concurrent_requests_get_their_own_images(live: Live, pipelines: Pipelines) -> None:
    """Distinct seeds and prompts from many clients at once: no image goes to another, whatever it was drawn beside."""
    before = live.metric("simplear_batch_images_count", model="first")
    prompts = ["a red circle", "two blue squares", "one star " * 6, ""]

    def ask(seed: int) -> Any:
        client = live.client(timeout=60)
        return client.images.generate(prompt=prompts[seed % 4], model="first", extra_body={"seed": seed}).data[0]

    with ThreadPoolExecutor(16) as pool:
        images = list(pool.map(ask, range(64)))
    assert [image.seed for image in images] == list(range(64))
    batches = live.metric("simplear_batch_images_count", model="first") - before
    assert batches < 40 and max(image.batch_size for image in images) >= 4
    for image in images:
        expected = drawn_by(pipelines["first"], prompts[image.seed % 4], image.seed, image.batch_size)
        np.testing.assert_array_equal(pixels(image.b64_json), expected)


def test_models(live: Live) -> None:
    models = live.client().models.list().data
    assert [model.id for model in models] == ["first", "second"]
    assert models[0].size == SIZE and models[0].defaults["guidance_scale"] == 2.0
    with pytest.raises(openai.NotFoundError, match="there are: first, second") as raised:
        live.client().images.generate(prompt="x", model="third")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"size": "-8x8"}, "size", "pattern"),
        ({"size": "big"}, "size", "pattern"),
        ({"size": "12x8"}, "size", "width 12 is no multiple of 8"),
        ({"size": "4x8"}, "size", "width 4 is no multiple of 8"),
        ({"size": "80x80"}, "size", "100 codes; at most 12"),
        ({"size": "99999x99999"}, "size", "at most 12"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": 1.5}, "n", "integer"),
        ({"prompt": "x" * 4001}, "prompt", "at most 4000"),
        ({"prompt": "q z " * 900}, "prompt", "there is room for"),
        ({"negative_prompt": "q z " * 900}, "negative_prompt", "there is room for"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"style": "vivid"}, "style", "no parameter style"),
        ({"quality": "hd"}, "quality", "'auto' or 'standard'"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"output_format": "webp"}, "output_format", "'png'"),
        ({"guidance_scal": 2}, "guidance_scal", "no parameter guidance_scal"),
        ({"guidance_scale": "2"}, "guidance_scale", "valid number"),
        ({"temperature": 0}, "temperature", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**60}, "seed", "less than or equal"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"partial_images": 2}, "partial_images", "stream=true"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(live: Live, asked: dict[str, Any], param: str, message: str) -> None:
    body = {"prompt": "x", **asked}
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        live.client().images.generate(prompt=body.pop("prompt"), extra_body=body)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"
    assert len(raised.value.message) < 400


def test_harmless_parameters_change_nothing(live: Live) -> None:
    plain = live.client().images.generate(prompt="one star", extra_body={"seed": 1})
    asked = live.client().images.generate(
        prompt="one star",
        quality="standard",
        background="opaque",
        moderation="low",
        output_format="png",
        response_format="b64_json",
        user="me",
        extra_body={"seed": 1},
    )
    assert asked.data[0].b64_json == plain.data[0].b64_json


def test_the_key_is_asked_for(pipelines: Pipelines) -> None:
    with Live(pipelines, Service(api_key="sésame")).running() as live:
        for wrong in ("none", "sesame", "s", "sesamesesame"):
            with pytest.raises(openai.AuthenticationError, match="asks for an API key") as raised:
                live.client(wrong).models.list()
            assert raised.value.code == "invalid_api_key"
        answer = httpx2.post(f"{live.url}/v1/images/generations", content=b"{", headers={"Authorization": "Basic abc"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": "Bearer sésame".encode()}
        assert httpx2.get(f"{live.url}/v1/models", headers=key).status_code == 200
        assert httpx2.get(f"{live.url}/healthz").status_code == httpx2.get(live.url).status_code == 200
        assert "HTTPBearer" in httpx2.get(f"{live.url}/openapi.json").text


def test_health_metrics_and_page(live: Live) -> None:
    live.client().images.generate(prompt="x", model="first")
    assert httpx2.get(f"{live.url}/healthz").json() == {"status": "ok"}
    text = httpx2.get(f"{live.url}/metrics").text
    for name in (
        'simplear_requests_total{path="/v1/images/generations",status="200"}',
        'simplear_request_seconds_bucket{le="0.05",path="/v1/images/generations"}',
        'simplear_queue_images{model="first"} 0.0',
        'simplear_batch_images_bucket{le="8.0",model="first"}',
        'simplear_images_total{model="first"}',
        "process_resident_memory_bytes",
    ):
        assert name in text
    page = httpx2.get(live.url)
    assert "<title>SimpleAR</title>" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("page.css", "page.js"):
        file = httpx2.get(f"{live.url}/{path}")
        assert file.status_code == 200 and "//" not in file.text.replace("// ", "").replace("http://www.w3.org", "")
