"""Runs in vLLM's environment: draws what a JSON file asks for, in one of several ways, and answers in another.

    .venv-vllm/bin/python draw.py REQUEST.json ANSWER.json

Whatever is raised becomes the answer's "error".
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from simplear.generation import SamplingSettings
from simplear.generation.engine import DrawRequest
from simplear.language_model import load_checkpoint
from simplear_vllm import engine as engine_module
from simplear_vllm.engine import VLLMEngine


def at_once(engine: VLLMEngine, ask: dict[str, Any]) -> dict[str, Any]:
    """As a user draws."""
    rows: list[tuple[int, list[int]]] = []
    fixed = None if ask.get("fixed_codes") is None else torch.tensor(ask["fixed_codes"])
    codes, stats = engine.generate(
        *inputs(ask), on_row=lambda row, so_far: rows.append((row, list(so_far.shape))), fixed_codes=fixed
    )
    return {"codes": codes.tolist(), "rows": rows, "stats": vars(stats)}


def one_after_another(engine: VLLMEngine, ask: dict[str, Any]) -> dict[str, Any]:
    """An image a call, then all together: what was cached in the first round is there in the second."""
    prompts, negatives, grid, sampling, seeds = inputs(ask)
    alone = [
        engine.generate([prompt], [negative], grid, sampling, [seed])[0][0].tolist()
        for prompt, negative, seed in zip(prompts, negatives, seeds, strict=True)
    ]
    return {"codes": alone, "again": at_once(engine, ask)["codes"]}


def apart(engine: VLLMEngine, ask: dict[str, Any]) -> dict[str, Any]:
    """All conditional requests, then steps, then the negative ones in another order with steps between."""
    requests = both_rows(engine, ask)
    order = list(range(len(requests)))
    names = {image: [engine._add(*requests[image][0])] for image in order}
    drawn: dict[str, list[int]] = {}
    random.Random(0).shuffle(order)
    for image in order:
        step(engine, drawn, 3)
        names[image].append(engine._add(*requests[image][1]))
    while engine._vllm.has_unfinished_requests():
        step(engine, drawn, 1)
    assert all(drawn[a] == drawn[b] for a, b in names.values())
    return {"codes": as_codes(engine, ask, [drawn[names[image][0]] for image in range(len(requests))])}


def after_mistakes(engine: VLLMEngine, ask: dict[str, Any]) -> dict[str, Any]:
    """What cannot be drawn, one mistake after another, and then everything else."""
    prompts, negatives, grid, sampling, seeds = inputs(ask)
    told = []
    for request in (
        (prompts[1:2], prompts[1:2], grid, sampling, [0]),
        (prompts, negatives, (40, 40), sampling, seeds),
        ([*prompts[:1], *prompts[1:2]], [*negatives[:1], *prompts[1:2]], grid, sampling, [0, 1]),
    ):
        try:
            engine.generate(*request)
        except ValueError as error:
            told.append(str(error))
    return {"codes": engine.generate(prompts, negatives, grid, sampling, seeds)[0].tolist(), "told": told}


def refused(ask: dict[str, Any]) -> dict[str, Any]:
    """The message for each set of options."""
    told = []
    for options in ask["refused"]:
        try:
            load(ask, {**ask["options"], **options})
            told.append("accepted")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return {"told": told}


def naive(ask: dict[str, Any]) -> dict[str, Any]:
    """The same requests and the same logits processor over vLLM's own scheduler, all checks of both switched off."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from simplear_vllm import logits_processor

    logits_processor.check_configuration = engine_module.check_configuration = lambda config: None
    engine_module.SCHEDULER = f"{Scheduler.__module__}.{Scheduler.__qualname__}"
    return at_once(load(ask, ask["options"]), ask)


def overcommitted(ask: dict[str, Any]) -> dict[str, Any]:
    """Our scheduler, but admission does not look at what it has of one thing."""
    from simplear_vllm.scheduler import PairScheduler

    capacity = PairScheduler._capacity
    PairScheduler._capacity = lambda self: dataclasses.replace(capacity(self), **{ask["ignored"]: 10**6})
    return at_once(load(ask, ask["options"]), ask)


def careless(ask: dict[str, Any]) -> dict[str, Any]:
    """As `naive`, and a row without its partner is drawn without guidance, as a plugin without checks would."""
    from simplear_vllm.logits_processor import GuidedSampling

    images = GuidedSampling._images

    def whatever(self: GuidedSampling) -> Any:
        try:
            return images(self)
        except RuntimeError:
            rows = self._rows
            pairs: dict[str, list[int]] = {}
            for place in sorted(rows, key=lambda place: rows[place].request.role):
                pairs.setdefault(rows[place].request.pair, []).append(place)
            first = next(iter(rows.values())).request
            key = first.sampling, first.image_token_offset, first.codebook_size
            whole = [places for places in pairs.values() if len(places) == 2]
            return {(*key, "pairs"): whole, (*key, "halves"): [p for p in pairs.values() if len(p) == 1]}

    GuidedSampling._images = lambda self: {key: places for key, places in whatever(self).items() if places}
    return naive(ask)


def inputs(ask: dict[str, Any]) -> tuple[Any, ...]:
    prompts, negatives = ([torch.tensor(ids) for ids in ask[name]] for name in ("prompts", "negatives"))
    return prompts, negatives, tuple(ask["grid"]), SamplingSettings(**ask["sampling"]), ask["seeds"]


def both_rows(engine: VLLMEngine, ask: dict[str, Any]) -> list[list[Any]]:
    """Request and prompt of each row of each image."""
    prompts, negatives, grid, sampling, seeds = inputs(ask)
    request = DrawRequest(prompts, negatives, grid, sampling, seeds, None, None)
    made = [list(engine._rows(request, image)) for image in range(len(seeds))]
    return [list(zip(rows, texts, strict=True)) for rows, *texts in zip(made, prompts, negatives, strict=True)]


def step(engine: VLLMEngine, drawn: dict[str, list[int]], times: int) -> None:
    for _ in range(times):
        if not engine._vllm.has_unfinished_requests():
            return
        if engine._vllm.engine_core.__class__.__name__ != "InprocClient" and not drawn and times == 3:
            return  # another process would be waited for, and it has nothing to say while all wait for partners
        for output in engine._vllm.step():
            drawn.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)


def as_codes(engine: VLLMEngine, ask: dict[str, Any], ids: list[list[int]]) -> Any:
    return engine.model.layout.codes_of_ids(torch.tensor(ids)).view(-1, *ask["grid"]).tolist()


def load(ask: dict[str, Any], options: dict[str, Any]) -> VLLMEngine:
    model = load_checkpoint(ask["checkpoint"], with_weights=False).model
    return VLLMEngine(model, ask["checkpoint"], **options)


WITHOUT_ENGINE = (refused, naive, careless, overcommitted)


def main(request: str, answer: str) -> None:
    ask = json.loads(Path(request).read_text())
    way = globals()[ask["way"]]
    try:
        answered = way(ask) if way in WITHOUT_ENGINE else way(load(ask, ask["options"]), ask)
    except Exception as error:
        answered = {"error": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(answered))


if __name__ == "__main__":
    main(*sys.argv[1:])
