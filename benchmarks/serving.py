"""The server under load on this machine: what batching gains, whether images stay what they are, and its memory.

    python benchmarks/serving.py               # after make demo; five minutes on two cores

`simplear serve` runs in a process of its own, and OpenAI's client asks it for one image a request, so many at a time.
In every round the same images are asked for at each concurrency, in turn. Afterwards the pipeline draws all of them
again in batches of the shapes that the answers name, with other companions.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
from PIL import Image

from measure import Run, Runs, claim, parser, publish, ratios
from simplear.generation import SimpleARPipeline, pil_images
from simplear.scenes import evaluation_prompts
from simplear.serving.batcher import PROMPT_MULTIPLE

CHECKPOINT = "checkpoints/demo/sft"
CONCURRENCIES = {1: 24, 4: 100, 16: 200, 32: 200}
"""Requests in a round by how many are on their way at once."""
QUICK = {1: 2, 4: 8, 16: 16}
MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """An image that came back."""

    number: int
    """Of the request; prompt and seed follow from it."""
    seconds: float
    """That the client waited."""
    batch_size: int
    pixels: bytes


class Load:
    """Requests by number: captions of the evaluation, mixed, each with its number as seed.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        asked = [row["prompt"] for row in evaluation_prompts(50)]
        order = np.random.default_rng(0).permutation(len(asked))
        self.prompts = [asked[number] for number in order]

    def prompt(self, number: int) -> str:
        """Of a request."""
        return self.prompts[number % len(self.prompts)]

    async def run(self, requests: int, concurrency: int) -> list[Answer]:
        """All answers, in the order of requests. Raises what a request raises: none may be lost."""
        left = iter(range(requests))
        answers: list[Answer] = []

        async def ask() -> None:
            for number in left:
                begin = time.perf_counter()
                answer = await client.images.generate(prompt=self.prompt(number), extra_body={"seed": number})
                (image,) = answer.data
                assert image.seed == number, f"request {number} got the image of {image.seed}"
                seconds = time.perf_counter() - begin
                picture = Image.open(io.BytesIO(base64.b64decode(image.b64_json)))
                answers.append(Answer(number, seconds, image.batch_size, picture.tobytes()))

        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as client:
            await asyncio.gather(*(ask() for _ in range(concurrency)))
        return sorted(answers, key=lambda answer: answer.number)


@contextmanager
def server(settings: argparse.Namespace) -> Iterator[str]:
    """A running server's address."""
    command = [sys.executable, "-m", "simplear.cli", "serve", settings.checkpoint, "--port", "0"]
    options = ["--engine", settings.engine, *(["--device", settings.device] if settings.device else [])]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not (found := re.search(r"http://\S+\d", line)):
            raise RuntimeError(f"the server did not start: {line or process.wait()}")
        yield found[0]
    finally:
        process.terminate()
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"the server ended with {code}.")


def memory(url: str) -> float:
    """MiB that are resident in the server's process."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = MEMORY.search(answer.read().decode())
    assert found
    return float(found[1]) / 2**20


def differing(answers: Sequence[Answer], load: Load, settings: argparse.Namespace) -> int:
    """How many images are not, pixel by pixel, what the pipeline draws in batches of the same shape."""
    options = {} if settings.engine == "jacobi" else {"prompt_multiple": PROMPT_MULTIPLE}
    pipeline = SimpleARPipeline.from_pretrained(
        settings.checkpoint, settings.engine, device=settings.device, engine_options=options
    )
    by_shape: defaultdict[int, dict[int, set[bytes]]] = defaultdict(lambda: defaultdict(set))
    for answer in answers:
        by_shape[answer.batch_size][answer.number].add(answer.pixels)
    wrong = 0
    for shape, images in by_shape.items():
        numbers = sorted(images)
        for start in range(0, len(numbers), shape):
            part = numbers[start : start + shape]
            part += [part[-1]] * (shape - len(part))
            prompts = [load.prompt(number) for number in part]
            codes = pipeline(prompts, seed=part, output_type="codes", batch_size=shape).codes
            for number, image in zip(part, codes, strict=True):
                expected = pil_images(pipeline.decode(image[None]))[0].tobytes()
                wrong += images.pop(number, {expected}) != {expected}
    return wrong


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "serving")
    made.add_argument("--checkpoint", default=CHECKPOINT)
    made.add_argument("--engine", default="fused")
    made.add_argument("--device")
    made.add_argument("--rounds", type=int, default=4)
    settings = made.parse_args(argv)
    sizes = QUICK if settings.quick else CONCURRENCIES
    if settings.quick:
        settings.rounds = 2
    runs: Runs = {str(concurrency): [] for concurrency in sizes}
    answers: dict[int, list[Answer]] = {concurrency: [] for concurrency in sizes}
    resident = []
    with server(settings) as url:
        load = Load(url)
        asyncio.run(load.run(max(sizes), max(sizes)))  # the allocator and the caches of the libraries fill up
        for number in range(settings.rounds):
            for concurrency in list(sizes)[:: -1 if number % 2 else 1]:
                begin = time.perf_counter()
                came = asyncio.run(load.run(sizes[concurrency], concurrency))
                runs[str(concurrency)].append(Run((time.perf_counter() - begin) / sizes[concurrency]))
                answers[concurrency] += came
            resident.append(memory(url))
            print(f"round {number + 1} of {settings.rounds}: {resident[-1]:.0f} MiB", flush=True)
    everything = [answer for came in answers.values() for answer in came]
    asked = settings.rounds * sum(sizes.values())
    different = len({(answer.number, answer.batch_size) for answer in everything})
    wrong = differing(everything, load, settings)
    claims: list[dict[str, Any]] = [
        claim(
            f"images a second, {concurrency} requests at once over one at a time",
            ratios(runs, "1", str(concurrency)),
            (">=", 3) if concurrency == 16 else None,
        )
        for concurrency in sizes
        if concurrency > 1
    ]
    claims += [
        claim("requests that got their image", [len(everything) / asked], (">=", 1), f"{len(everything)} of {asked}"),
        claim(
            "images that are the pipeline's, pixel by pixel, at the same batch shape",
            [1 - wrong / different],
            (">=", 1),
            f"{different - wrong} of {different} of different seed or shape",
        ),
        claim(
            "memory of the server after the last round over the first",
            [resident[-1] / resident[0]],
            ("<=", 1.05),
            f"{resident[-1]:.0f} and {resident[0]:.0f} MiB",
        ),
    ]
    details = {
        "images_a_second": {name: 1 / statistics.median(run.seconds for run in each) for name, each in runs.items()},
        "seconds_a_request": {
            concurrency: dict(
                zip(
                    ("median", "95 %"),
                    np.quantile([answer.seconds for answer in came], [0.5, 0.95]).tolist(),
                    strict=True,
                )
            )
            for concurrency, came in answers.items()
        },
        "batch_size": {
            concurrency: statistics.mean(answer.batch_size for answer in came) for concurrency, came in answers.items()
        },
        "resident_mib": resident,
    }
    publish("serving", settings, claims, details)


if __name__ == "__main__":
    main()
