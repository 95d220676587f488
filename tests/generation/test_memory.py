"""A batch too large for the memory: the error gives one that fits, and the process goes on with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generation.models import language_model
from simplear.errors import UserError
from simplear.generation import OutOfMemoryError, SimpleARPipeline
from simplear.generation.memory import image_bytes, is_out_of_memory, out_of_memory

SCRIPT = """
import resource, sys
import torch
from simplear import SimpleARPipeline
from simplear.generation import OutOfMemoryError
torch.set_num_threads(1)
pipeline = SimpleARPipeline.from_pretrained(sys.argv[1], engine=sys.argv[2])
def draw(images):
    return pipeline("a red circle", num_images_per_prompt=images, batch_size=images, seed=0, output_type="codes")
few = draw(3).codes
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20, resource.RLIM_INFINITY))
try:
    draw(200_000)
except OutOfMemoryError as error:
    print(error)
    fits = int(str(error).partition("batch_size=")[2].partition(")")[0])
    assert torch.equal(draw(fits).codes[:3], few)
    print("went on with", fits)
"""


@pytest.mark.parametrize("engine", ["cached", "jacobi"])
def test_the_batch_that_is_named_fits(tiny_checkpoint: Path, engine: str) -> None:
    """With the address space limited to what is there and 200 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_checkpoint), engine], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"drawing 200000 images at once ran out of memory on cpu: .* MiB are free. Draw \d+", done.stdout)
    assert int(done.stdout.rpartition(" ")[2]) > 100


def test_one_image_too_many_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simplear.generation.memory.free_bytes", lambda device: 1000)
    assert "Ask for a smaller picture" in str(out_of_memory(language_model(), 1, 8, 16, 2))
    monkeypatch.setattr("simplear.generation.memory.free_bytes", lambda device: None)
    assert "batch_size=4" in str(out_of_memory(language_model(), 8, 8, 16, 2))


def test_pictures_too_many_to_decode_at_once(
    tiny_checkpoint: Path, tiny_visual_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = SimpleARPipeline.from_pretrained(tiny_checkpoint, device="cpu", visual_tokenizer=tiny_visual_tokenizer)
    codes = pipeline("x", num_images_per_prompt=4, seed=0, output_type="codes").codes
    expected, whole = pipeline.decode(codes, 2), pipeline.visual_tokenizer.decode

    def decode(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(part)

    monkeypatch.setattr(pipeline.visual_tokenizer, "decode", decode)
    with pytest.raises(OutOfMemoryError, match=r"decoding 4 pictures of \d+ × \d+ pixels .*\(batch_size=2\)"):
        pipeline.decode(codes)
    assert torch.equal(pipeline.decode(codes, 2), expected)


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("a pair was split"))
    assert issubclass(OutOfMemoryError, MemoryError) and issubclass(OutOfMemoryError, UserError)


def test_an_image_takes_its_cache_at_least() -> None:
    model = language_model()
    config = model.decoder.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 8 * (5 + 12) * 2
    assert image_bytes(model, 5, 12, 2) > cache
