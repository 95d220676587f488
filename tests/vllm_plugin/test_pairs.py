"""Admission: pairs run whole, what they take is never more than there is, and nobody waits for nothing."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from simplear.generation import SamplingSettings
from simplear_vllm.pairs import Capacity, Pairs
from simplear_vllm.request import ImageRequest

ROOM = Capacity(sequences=8, tokens=64, blocks=40, block_size=4, positions=64)
CODES = 16


def rows(pair: str, **fields) -> tuple[ImageRequest, ImageRequest]:
    conditional = ImageRequest(CODES, 0, 100, 50, SamplingSettings(guidance_scale=2.0), pair, **fields)
    return conditional, replace(conditional, role="negative")


def arrive(pairs: Pairs, name: str, prompts: tuple[int, int] = (4, 4)) -> list[str | None]:
    return [
        pairs.arrive(f"{name}-{request.role}", request, prompt)
        for request, prompt in zip(rows(name), prompts, strict=True)
    ]


def test_a_row_waits_for_its_partner():
    pairs = Pairs(ROOM)
    conditional, negative = rows("a")
    pairs.arrive("1", conditional, 4)
    pairs.arrive("2", rows("b")[1], 4)
    assert pairs.admit() == []
    pairs.arrive("3", negative, 4)
    assert pairs.admit() == ["1", "3"]


def test_an_image_without_guidance_is_one_request():
    pairs = Pairs(replace(ROOM, sequences=1))
    for name in ("a", "b"):
        pairs.arrive(name, ImageRequest(CODES, 0, 100, 50, SamplingSettings()), 4)
    assert pairs.admit() == ["a"]
    pairs.leave("a")
    assert pairs.admit() == ["b"]


@pytest.mark.parametrize(
    ("capacity", "fit"),
    [
        (replace(ROOM, sequences=7), 3),
        (replace(ROOM, tokens=17), 2),
        (replace(ROOM, blocks=39), 3),  # 4 + 16 tokens a row are 5 blocks
        (ROOM, 4),
    ],
)
def test_only_what_fits_whole_is_admitted(capacity, fit):
    pairs = Pairs(capacity)
    for name in "abcde":
        arrive(pairs, name)
    assert len(pairs.admit()) == 2 * fit


def test_rows_that_run_take_a_token_of_each_pass():
    pairs = Pairs(replace(ROOM, tokens=9))
    arrive(pairs, "a")
    arrive(pairs, "b", (4, 3))
    arrive(pairs, "c")
    assert len(pairs.admit()) == 2
    assert len(pairs.admit()) == 2  # 2 and 7 tokens
    assert pairs.admit() == []  # 4 and 8
    for request_id in ("a-conditional", "a-negative", "b-negative", "b-conditional"):
        pairs.leave(request_id)
    assert pairs.admit() == ["c-conditional", "c-negative"]


def test_nothing_overtakes_a_large_image():
    pairs = Pairs(ROOM)
    arrive(pairs, "a")
    pairs.admit()
    arrive(pairs, "large", (31, 33))
    arrive(pairs, "small")
    assert pairs.admit() == []
    for request_id in ("a-conditional", "a-negative"):
        pairs.leave(request_id)
    assert pairs.admit() == ["large-conditional", "large-negative"]


def test_blocks_stay_reserved_until_both_rows_have_left():
    pairs = Pairs(replace(ROOM, blocks=10))
    arrive(pairs, "a")
    arrive(pairs, "b")
    assert len(pairs.admit()) == 2
    pairs.leave("a-negative")
    assert pairs.admit() == []
    pairs.leave("a-conditional")
    assert len(pairs.admit()) == 2


@pytest.mark.parametrize(
    ("capacity", "prompts", "words"),
    [
        (ROOM, (4, 49), "max_model_len is 64 and must be 65"),
        (replace(ROOM, sequences=1), (4, 4), "max_num_seqs is 1 and must be 2"),
        (ROOM, (33, 32), r"prompts of \[33, 32\] tokens .*max_num_batched_tokens is 64 and must be 65"),
        (replace(ROOM, blocks=9), (4, 4), "KV blocks .* is 9 and must be 10"),
    ],
)
def test_what_never_fits_is_refused_with_numbers(capacity, prompts, words):
    pairs = Pairs(capacity)
    first, second = arrive(pairs, "a", prompts)
    assert first is None and re.search(words, second)
    assert pairs.admit() == []
    for request_id in ("a-conditional", "a-negative"):
        pairs.leave(request_id)
    if capacity is ROOM:
        arrive(pairs, "a", (2, 2))
        assert len(pairs.admit()) == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events_keeps_within_capacity_and_serves_all(seed):
    """Rows arrive at random, images finish or are given up at random; a second book is kept by the plain rules."""
    chance = random.Random(seed)
    capacity = Capacity(chance.randint(2, 9), chance.randint(24, 60), chance.randint(16, 50), 4, 64)
    pairs, prompts, left = Pairs(capacity), {}, []
    for name in map(str, range(30)):
        for request in rows(name):
            left.append((f"{name}-{request.role}", request))
            prompts[left[-1][0]] = chance.randint(1, 12)
    chance.shuffle(left)
    running, served = [], set()
    while len(served) < 60:
        for _ in range(min(chance.randint(0, 3), len(left))):
            request_id, request = left.pop()
            pairs.arrive(request_id, request, prompts[request_id])
        admitted = pairs.admit()
        assert len(running) + sum(prompts[request_id] for request_id in admitted) <= capacity.tokens
        running += admitted
        assert len(running) <= capacity.sequences
        assert sum(-(-(prompts[request_id] + CODES) // 4) for request_id in running) <= capacity.blocks
        assert all(
            (f"{r.split('-')[0]}-conditional" in running) == (f"{r.split('-')[0]}-negative" in running) for r in running
        )
        for image in {request_id.split("-")[0] for request_id in running if chance.random() < 0.2}:
            for request_id in (f"{image}-negative", f"{image}-conditional"):
                pairs.leave(request_id)
                running.remove(request_id)
                served.add(request_id)
