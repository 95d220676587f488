"""What arithmetic allows: the bytes and operations of one drawn code, and the machines that do them.

Drawing reads all weights that a step needs, and the cache, once a step: no engine that draws code by code can be faster
than memory delivers these bytes, and none at all faster than the processor multiplies.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen2Config

from simplear.stages.memory import A100, H100

MACHINES = {
    "A100": (A100.bandwidth, A100.flops),
    "H100": (H100.bandwidth, H100.flops),
    "H200": (4.8e12, H100.flops),  # NVIDIA H200 datasheet: the chip of the H100 with more memory
}
"""Bytes a second of memory and bf16 operations a second of the matrix units."""

LAYER_KERNELS, OTHER_KERNELS = 11, 18
"""Kernels of a compiled pass over one code: of a layer, and beside the layers (traced, see tests/benchmarks)."""
KERNEL_SECONDS, REACHED = 2e-6, 0.8
"""Assumed of a kernel in a CUDA graph, until memory delivers and after it does; and of memory's bytes a second."""


@dataclass(frozen=True)
class Shape:
    """What of a decoder takes time."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    codebook: int

    @classmethod
    def of(cls, config: Qwen2Config, codebook: int) -> Shape:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        widths = (config.hidden_size, heads, keys, size, config.intermediate_size, config.vocab_size)
        return cls(config.num_hidden_layers, *widths, codebook)

    @property
    def layer_weights(self) -> int:
        """Numbers in all layers' matrices."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)

    def weights(self, whole_head: bool) -> int:
        """Numbers that a step reads; the embedding is looked up."""
        return self.layer_weights + self.width * (self.vocabulary if whole_head else self.codebook)

    @property
    def cache_a_token(self) -> int:
        """Numbers of keys and values that a token leaves in a row's cache."""
        return 2 * self.layers * self.key_heads * self.head_size


def paper_architecture(size: str) -> dict[str, Any]:
    """Fields of a size of configs/paper: 0.5b or 1.5b."""
    stated = yaml.safe_load((Path(__file__).parents[1] / "configs" / "paper" / f"{size}.yaml").read_text())
    architecture: dict[str, Any] = stated["run"]["architecture"]
    return architecture


def image_bytes(shape: Shape, codes: int, batch: int, number_bytes: int, prompt: int = 0) -> float:
    """Bytes that memory delivers for one image of a batch, drawn code by code with guidance in one pass."""
    mean_length = prompt + (codes + 1) / 2
    step = shape.weights(whole_head=False) + 2 * batch * mean_length * shape.cache_a_token
    return codes * step * number_bytes / batch


def plain_image_bytes(shape: Shape, codes: int, number_bytes: int) -> float:
    """The same of `kv-cache`: two passes a code, with the whole vocabulary's head."""
    step = shape.weights(whole_head=True) + (codes + 1) / 2 * shape.cache_a_token
    return codes * 2 * step * number_bytes


def image_seconds(
    shape: Shape, codes: int, batch: int, number_bytes: int, machine: tuple[float, float], width: int = 1
) -> float:
    """Lower bound for one image of a batch on a machine (bytes a second, operations a second), drawn code by code.

    Args:
        width: tokens a row in each pass; above 1, divide by the codes that a pass makes final.
    """
    bandwidth, operations = machine
    read = image_bytes(shape, codes, batch, number_bytes) / bandwidth
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_size * (codes + 1) / 2
    multiplied = 2 * width * codes * (2 * shape.weights(whole_head=False) + attention) / operations
    return max(read, multiplied)


def measured_machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second read and operations a second of large products, the best of a few tries."""
    numbers = torch.ones(2**26 if device.type == "cpu" else 2**30, device=device)
    side = 2048 if device.type == "cpu" else 8192
    square = torch.randn(side, side, device=device, dtype=dtype)
    seconds = [_fastest(lambda: numbers.sum(), device), _fastest(lambda: square @ square, device)]
    return numbers.numel() * numbers.element_size() / seconds[0], 2 * side**3 / seconds[1]


def _fastest(work, device: torch.device, tries: int = 5) -> float:
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def predicted_seconds(shape: Shape, codes: int, batch: int, machine: tuple[float, float]) -> float:
    """Seconds an image of the compiled engine in bf16 with guidance: the bound at what is assumed to be reached of it,
    and in each pass a start for each kernel.
    """
    kernels = shape.layers * LAYER_KERNELS + OTHER_KERNELS
    return codes * kernels * KERNEL_SECONDS / batch + image_seconds(shape, codes, batch, 2, machine) / REACHED


def main() -> None:
    """Print bounds and predictions at 1024 px, as Markdown."""
    columns = [(machine, batch) for machine in MACHINES for batch in (1, 32)]
    print(f"| | {' | '.join(f'{machine}, batch {batch}' for machine, batch in columns)} |")
    print("|---|" + "---:|" * len(columns))
    for name in ("0.5b", "1.5b"):
        shape = Shape.of(Qwen2Config(**paper_architecture(name), vocab_size=215_672), 64_000)
        bound = [image_seconds(shape, 4096, batch, 2, MACHINES[machine]) for machine, batch in columns]
        predicted = [predicted_seconds(shape, 4096, batch, MACHINES[machine]) for machine, batch in columns]
        for what, seconds in (("bound", bound), ("predicted", predicted)):
            print(f"| {name.upper()}, {what} | {' | '.join(f'{each:.3g}' for each in seconds)} |")


if __name__ == "__main__":
    main()
