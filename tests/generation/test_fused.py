"""The fused engine under training: it draws what `cached` draws, follows the weights, and takes nothing anew."""

from __future__ import annotations

import pytest
import torch

from generation.models import language_model
from generation.test_cached import GRID, NEGATIVES, PROMPTS, SEEDS, SETTINGS, plainly
from simplear.generation import CachedEngine, CompiledEngine, FusedEngine, JacobiEngine, SamplingSettings
from simplear.generation.decoder_step import DecoderStep


@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_codes_are_those_of_a_plain_loop(rope, settings):
    model = language_model(rope)
    codes, stats = FusedEngine(model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
    assert torch.equal(codes, plainly(model, settings))
    assert (stats.engine, stats.images, stats.tokens, stats.steps) == ("fused", 4, 48, 12)


def train(model):
    """What an optimizer does: in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.usefixtures("traced_not_compiled")
@pytest.mark.parametrize("make", [FusedEngine, CompiledEngine, lambda model: JacobiEngine(model, 2, compiled=True)])
def test_rollouts_of_a_training_follow_the_weights_and_take_nothing_anew(make, monkeypatch):
    """Of six rollouts with changing prompts and an update between each two: copies, allocations, compilations."""
    model, copies, copy = language_model(), [], DecoderStep.copy
    monkeypatch.setattr(
        DecoderStep, "copy", lambda self, *args, **kwargs: (copies.append(1), copy(self, *args, **kwargs))
    )
    engine, drawn, counted = make(model), [], []
    for number in range(6):
        order = [(row + number) % 4 for row in range(4)]
        asked = [PROMPTS[row] for row in order], NEGATIVES, GRID, SamplingSettings(temperature=1 + number / 10), SEEDS
        codes, _ = engine.generate(*asked)
        assert torch.equal(codes, CachedEngine(model).generate(*asked)[0])
        addresses = [buffer.data_ptr() for buffer in engine.step.buffers()]
        caches = [flat.data_ptr() for memory in (engine.memory, engine.prefill_memory) for flat in memory.flat]
        counted.append((addresses, caches, list(engine.compiled_passes)))
        drawn.append(codes)
        assert len(copies) == number + 1
        engine.generate(*asked)
        assert len(copies) == number + 1  # the weights are the same
        train(model)
    assert all(each == counted[0] for each in counted)
    assert len(engine.compiled_passes) == int(engine.compiled)
    assert not all(torch.equal(codes, drawn[0]) for codes in drawn)


@pytest.mark.usefixtures("traced_not_compiled")
def test_another_request_of_a_shape_compiles_nothing():
    """Guidance, temperature, seeds, top-k and top-p are numbers that a compiled pass reads."""
    model = language_model()
    engine, counter = CompiledEngine(model), torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counter.clear()
    for number in range(4):
        for settings in (
            SamplingSettings(guidance_scale=2.0 + number, temperature=0.5 + number),
            SamplingSettings(guidance_scale=2.0 + number, top_k=3 + number, top_p=0.5 + number / 10),
        ):
            asked = PROMPTS, NEGATIVES, GRID, settings, [seed + number for seed in SEEDS]
            assert torch.equal(engine.generate(*asked)[0], CachedEngine(model).generate(*asked)[0])
    assert (len(engine.compiled_passes), counter["unique_graphs"]) == (2, 2)


@pytest.mark.usefixtures("traced_not_compiled")
def test_beyond_the_limit_of_shapes_a_pass_runs_uncompiled(monkeypatch, caplog):
    monkeypatch.setattr("simplear.generation.fused.SHAPES", 2)
    model = language_model()
    engine = CompiledEngine(model)
    for images in (1, 2, 3, 4, 1, 3):
        asked = PROMPTS[:images], NEGATIVES[:images], (1, 3), SETTINGS[-1], SEEDS[:images]
        assert torch.equal(engine.generate(*asked)[0], CachedEngine(model).generate(*asked)[0])
    assert len(engine.compiled_passes) == 2
    assert [record.getMessage() for record in caplog.records].count(
        "2 shapes are compiled already; this one runs uncompiled, which is slower"
    ) == 3


@pytest.mark.usefixtures("traced_not_compiled")
def test_what_a_recorded_pass_leaves_is_overwritten(monkeypatch):
    """CUDA graphs are recorded behind passes that warm up, on the tensors of the request."""

    def recorded(self, advance):
        for _ in range(3):
            advance()
        return advance

    monkeypatch.setattr(FusedEngine, "_recorded", recorded)
    model = language_model()
    for make in (CompiledEngine, lambda model: JacobiEngine(model, 2, compiled=True)):
        for settings in SETTINGS:
            codes, _ = make(model).generate(PROMPTS, NEGATIVES, GRID, settings, SEEDS)
            assert torch.equal(codes, plainly(model, settings))


@pytest.mark.parametrize("window", [0, 2])
def test_a_compiled_pass_takes_tensors_at_fixed_addresses_alone(window, monkeypatch):
    """CUDA graphs copy every other input before each pass."""
    taken = []

    def backend(graph, inputs):
        taken.append([each for each in inputs if isinstance(each, torch.Tensor)])
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    engine = JacobiEngine(language_model(), window, compiled=True)
    engine.generate(PROMPTS, NEGATIVES, GRID, SETTINGS[-1], SEEDS)
    ((state, _),) = engine.compiled_passes.values()
    fixed = {buffer.data_ptr() for buffer in state.buffers()}
    assert len(taken) == 1 and len(taken[0]) > 20
    assert [each.shape for each in taken[0] if each.data_ptr() not in fixed] == []
