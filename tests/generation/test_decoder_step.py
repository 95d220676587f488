"""The fast engines' forward pass against transformers', row by row, at lengths that differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from generation.models import ARCHITECTURE, CODEBOOK, LAYOUT, language_model, prompts
from simplear.generation import FusedEngine, SamplingSettings
from simplear.generation.decoder_step import CacheMemory, DecoderStep
from simplear.language_model import LanguageModel, LanguageModelConfig

GRID = (3, 4)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the difference, relative to the logits. Norms compute in float32, so float64 does not agree to more."""


def by_length(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa, seqused_k):  # type: ignore[no-untyped-def]
    """What PyTorch's `varlen_attn` is documented to compute, sequence by sequence."""
    assert enable_gqa and {each.dtype for each in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
    assert {each.stride(-1) for each in (query, key, value)} == {1} and window_size in ((-1, -1), (-1, 0))
    attended = torch.empty(query.shape, dtype=query.dtype)
    for number, used in enumerate(seqused_k.tolist()):
        asks = slice(*cu_seq_q[number : number + 2].tolist())
        begin, end = cu_seq_k[number : number + 2].tolist()
        assert asks.stop - asks.start <= max_q and used <= end - begin <= max_k
        queries = query[asks].transpose(0, 1)
        keys, values = (each[begin : begin + used].transpose(0, 1) for each in (key, value))
        seen = torch.ones(queries.shape[1], used, dtype=torch.bool)
        if window_size == (-1, 0):  # aligned to the end
            seen = seen.tril(used - queries.shape[1])
        found = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, seen, enable_gqa=True)
        attended[asks] = found.transpose(0, 1)
    return attended


class Prefilled:
    """Rows that hold prompts, and what the step says behind codes."""

    def __init__(self, model: LanguageModel, asked: list[Tensor], attention: str = "masked") -> None:
        self.model, self.lengths = model, torch.tensor([len(prompt) for prompt in asked])
        dtype = next(model.parameters()).dtype
        self.step = DecoderStep(model, dtype)
        self.step.load(model)
        memory = CacheMemory(self.step)
        if attention == "by length":
            memory.by_token, self.step.by_length = True, by_length
        self.cache = memory.cache(len(asked), 48)
        ids = torch.nn.utils.rnn.pad_sequence(asked, batch_first=True)
        self.read(ids, torch.arange(ids.shape[1]).expand(len(asked), -1))

    def read(self, ids: Tensor, places: Tensor) -> Tensor:
        positions = self.model.positions_at(places, self.lengths, GRID)
        return self.step.logits(self.step.hidden(ids, positions, places, self.cache, int(places.max()) + 1))

    def logits(self, codes: Tensor, done: Tensor, window: int) -> Tensor:
        """At places ``done`` (B,), 1 or more, and the ``window`` behind them, given the codes (B, N) before each."""
        places = done[:, None] + torch.arange(-1, window)
        return self.read(codes.gather(1, places) + LAYOUT.image_token_offset, self.lengths[:, None] + places)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("attention", ["masked", "by length"])
def test_logits_are_those_of_transformers(rope: str, dtype: torch.dtype, key_heads: int, attention: str) -> None:
    torch.manual_seed(0)
    architecture = {**ARCHITECTURE, "num_key_value_heads": key_heads}
    config = LanguageModelConfig("", CODEBOOK, architecture=architecture, rope=rope)  # type: ignore[arg-type]
    decoder = config.random_decoder(LAYOUT.vocab_size).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # norms and biases too, which begin at 1 and 0
    model = LanguageModel(decoder.to(dtype), LAYOUT)
    asked, codes, done = prompts(2, 9, 0), torch.randint(CODEBOOK, (3, 12)), torch.tensor([5, 1, 7])
    rows = Prefilled(model, asked, attention)
    rows.logits(codes, torch.ones_like(done), 7)
    found = rows.logits(codes, done, 4)
    for row, prompt in enumerate(asked):
        ids = torch.cat([prompt, codes[row, : done[row] + 4] + LAYOUT.image_token_offset])[None]
        position = model.positions_at(torch.arange(ids.shape[1])[None], torch.tensor([len(prompt)]), GRID)
        expected = model.image_logits(model.hidden_states(ids, position, None))[0, -5:]
        assert (found[row] - expected).norm() < TOLERANCE[dtype] * expected.norm()


@torch.no_grad()
def test_rejected_tokens_leave_no_trace() -> None:
    """Drafts are read behind the final codes; read again with others, the first leave nothing behind."""
    model, done = language_model(), torch.tensor([3, 1])
    first, second = torch.randint(CODEBOOK, (2, 2, 12))
    second[0, :3], second[1, :1] = first[0, :3], first[1, :1]
    rows = Prefilled(model, prompts(4, 1))
    for before, behind in ((torch.ones_like(done), 3), (done, 8)):
        rows.logits(first, before, behind)
    again = rows.logits(second, done, 6)
    fresh = Prefilled(model, prompts(4, 1))
    fresh.logits(second, torch.ones_like(done), 3)
    torch.testing.assert_close(again, fresh.logits(second, done, 6))


@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_an_unconditional_prompt_of_all_images_is_read_once(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = language_model(rope), prompts(2, 9, 0)
    hidden, read = DecoderStep.hidden, []

    def counted(self, ids, *rest):
        read.append(tuple(ids.shape))
        return hidden(self, ids, *rest)

    monkeypatch.setattr(DecoderStep, "hidden", counted)
    for negatives in (prompts(4, seed=2) * 3, prompts(4, seed=2) * 2 + prompts(4, seed=3)):
        FusedEngine(model).generate(asked, negatives, (1, 1), SamplingSettings(guidance_scale=2.0), [0, 1, 2])
    assert read == [(4, 11), (6, 11)]


@torch.no_grad()
def test_matrices_may_be_stored_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """(in, out) is for CPUs, (out, in) for GPUs."""
    model, asked, codes, done = language_model(), prompts(3, 1), torch.randint(CODEBOOK, (2, 12)), torch.tensor([1, 1])
    on_cpu = Prefilled(model, asked)
    expected = on_cpu.logits(codes, done, 5)
    monkeypatch.setattr("simplear.generation.decoder_step.STORED_IN_OUT", ())
    as_on_gpu = Prefilled(model, asked)
    torch.testing.assert_close(as_on_gpu.logits(codes, done, 5), expected)
    strides = [rows.step.layers[0].mlp_in.stride() for rows in (on_cpu, as_on_gpu)]
    assert strides == [(128, 1), (1, 32)]
