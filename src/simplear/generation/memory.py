"""How many images fit into memory at once: an estimate for the error that says so."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from simplear.errors import UserError
from simplear.generation.decoder_step import head_size
from simplear.language_model import LanguageModel

NUMBERS_A_CODE = 10
"""float64 numbers a code of the codebook while one is drawn: log-weights of both rows, probabilities, hashes."""
USABLE = 0.7
"""Share of the free memory to fill: what was held a moment ago leaves holes."""


class OutOfMemoryError(MemoryError, UserError):
    """There is no room for so many images at once; the message gives the number that would fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate, on a GPU or, by another class, on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def image_bytes(model: LanguageModel, prompt: int, codes: int, rows: int, tokens_a_pass: int = 1) -> int:
    """Bytes that one image takes while it is drawn, rather too many than too few.

    Args:
        model: the decoder.
        prompt: tokens of the longest one.
        codes: of the image.
        rows: 2 with guidance, else 1.
        tokens_a_pass: more than 1 where drafts are verified.
    """
    config = model.decoder.config
    heads, size = config.num_key_value_heads or config.num_attention_heads, next(model.parameters()).element_size()
    cache = 2 * config.num_hidden_layers * heads * head_size(config) * (prompt + codes)
    prefill = prompt * (3 * config.intermediate_size + 8 * config.hidden_size)
    # A cache that grows is copied as it does.
    return rows * size * (2 * cache + prefill) + 8 * NUMBERS_A_CODE * tokens_a_pass * model.layout.codebook_size


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = [*Path("/proc/meminfo").read_text().splitlines(), *Path("/proc/self/status").read_text().splitlines()]
    except OSError:
        return None
    kilobytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    free = int(kilobytes["MemAvailable"]) * 1024
    return free if limit == resource.RLIM_INFINITY else min(free, limit - int(kilobytes["VmSize"]) * 1024)


def out_of_memory(
    model: LanguageModel, images: int, prompt: int, codes: int, rows: int, tokens_a_pass: int = 1
) -> OutOfMemoryError:
    """The error for so many images at once. To be called when what they held is free again."""
    device, needed = next(model.parameters()).device, image_bytes(model, prompt, codes, rows, tokens_a_pass)
    free = free_bytes(device)
    fits = images // 2 if free is None else min(int(USABLE * free / needed), images - 1)
    room = "" if free is None else f", and {free / 2**20:,.0f} MiB are free"
    remedy = (
        f"Draw {fits} at once (batch_size={fits})." if fits > 0 else "Ask for a smaller picture or a smaller dtype."
    )
    return OutOfMemoryError(
        f"drawing {images} images at once ran out of memory on {device}: an image of {codes} codes takes about "
        f"{needed / 2**20:,.1f} MiB{room}. {remedy}"
    )
