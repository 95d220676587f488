"""A batch too large for the memory: the error suggests a smaller one, and the process goes on with it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from simplear.errors import UserError
from simplear.generation import OutOfMemoryError, SimpleARPipeline
from simplear.generation.memory import with_memory_error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_what_was_allocated_is_free_when_the_error_arrives(error: Exception) -> None:
    held: list[Any] = []

    def allocate() -> None:
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise type(error)(*error.args)

    with pytest.raises(OutOfMemoryError, match=r"drawing 8 images at once .*\(batch_size=4\)"):
        try:
            with_memory_error(allocate, "drawing", 8)
        except OutOfMemoryError:
            gc.collect()
            assert held[0]() is None
            raise


def test_one_image_too_many_is_said_so() -> None:
    def allocate() -> None:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match="try a smaller picture or a smaller dtype"):
        with_memory_error(allocate, "drawing", 1)
    assert issubclass(OutOfMemoryError, MemoryError) and issubclass(OutOfMemoryError, UserError)


def test_other_errors_are_not_taken_for_it() -> None:
    def split() -> None:
        raise RuntimeError("a pair was split")

    with pytest.raises(RuntimeError, match="a pair was split"):
        with_memory_error(split, "drawing", 8)


@pytest.mark.parametrize("task", ["drawing", "decoding"])
def test_the_pipeline_goes_on_with_fewer(
    task: str, tiny_checkpoint: Path, tiny_visual_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = SimpleARPipeline.from_pretrained(tiny_checkpoint, device="cpu", visual_tokenizer=tiny_visual_tokenizer)
    request: dict[str, Any] = {"prompt": "x", "num_images_per_prompt": 4, "seed": 0, "output_type": "pt"}
    expected = pipeline(**request, batch_size=2).images
    owner, name = (pipeline.engine, "generate") if task == "drawing" else (pipeline.visual_tokenizer, "decode")
    whole = getattr(owner, name)

    def limited(images: Any, *others: Any) -> Any:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(images, *others)

    monkeypatch.setattr(owner, name, limited)
    with pytest.raises(OutOfMemoryError, match=rf"{task} 4 images at once ran out of memory: .*\(batch_size=2\)"):
        pipeline(**request)
    assert torch.equal(pipeline(**request, batch_size=2).images, expected)
