"""From log-weights to one code, with randomness that belongs to an image and not to its batch.

Each (seed, place, code) has one exponential number, and the code with the most probability over its number is drawn:
the Gumbel-max trick, written as a race. So an image does not change with its companions or its engine, engines can be
compared code by code, and two distributions that differ little draw the same code: by rounding, by the shape of a
batch, or by a draft in the context (one number for a place would not do, for the inverse of a cumulative distribution
moves with every code before). With weights p and q the codes are the same with a probability of at least
(1 − d) / (1 + d), where d is the total variation distance (Daliri et al. 2024, arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simplear.errors import UserError
from simplear.generation.guidance import guided_log_weights
from simplear.hashing import INCREMENT, mix_tensor, shifted, signed


@dataclass(frozen=True)
class SamplingSettings:
    """How a code is drawn from the model's distribution: guidance, then temperature, then top-k, then top-p."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none and costs half."""
    do_sample: bool = True
    """False takes the most probable code."""
    temperature: float = 1.0
    """Divides log-weights; above 0."""
    top_k: int | None = None
    """Keep the k most probable codes (and ties with the last of them); None keeps all."""
    top_p: float | None = None
    """Keep the fewest most probable codes that together have at least this probability; None keeps all."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < float("inf"):
            raise UserError(f"guidance_scale {self.guidance_scale} must be 0 or more; 1 is no guidance.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} must be above 0; for the most probable code set do_sample to false."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be 1 or more; leave it out to keep all codes.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie in (0, 1].")

    @property
    def numbers(self) -> dict[str, float | None]:
        """What a compiled function reads as tensors; None for parts that are not used."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": None if self.top_p == 1 else self.top_p,
        }

    @property
    def parts(self) -> tuple[bool, ...]:
        """Whether codes are sampled, and which numbers are used: other parts need another compiled function."""
        return self.do_sample, *(number is not None for number in self.numbers.values())


class SamplingTensors(nn.Module):
    """`SamplingSettings` whose numbers are tensors, so that a compiled function takes others without compiling again.

    Args:
        settings: which parts are used; `set` changes the numbers later.
        device: of the numbers.
    """

    guidance_scale: Tensor
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None

    def __init__(self, settings: SamplingSettings, device: torch.device) -> None:
        super().__init__()
        self.do_sample = settings.do_sample
        for name, number in settings.numbers.items():
            dtype = torch.long if name == "top_k" else torch.float64
            # One dimension, because compilers read numbers without dimensions back to look at them.
            self.register_buffer(name, None if number is None else torch.ones(1, dtype=dtype, device=device))
        self.set(settings)

    def set(self, settings: SamplingSettings) -> None:
        """Take the numbers of settings with the same parts."""
        for name, buffer in self.named_buffers():
            buffer.fill_(getattr(settings, name))


class Noise(nn.Module):
    """The exponential numbers of B images, computed by a hash when they are needed.

    Code c's number comes from the c-th output of a SplitMix64 generator that starts from a hash of seed and place, so
    it is the same on every machine and in any order.

    Args:
        seeds: B integers.
        codebook_size: C.
        device: of the numbers.
    """

    def __init__(self, seeds: Sequence[int], codebook_size: int, device: torch.device | str) -> None:
        super().__init__()
        self.seeds = nn.Buffer(torch.empty(len(seeds), 1, dtype=torch.long, device=device))
        self.codes = nn.Buffer(torch.arange(codebook_size, device=device) * signed(INCREMENT))
        self.set(seeds)

    def set(self, seeds: Sequence[int]) -> None:
        """Take as many other seeds."""
        self.seeds.copy_(mix_tensor(torch.tensor([[signed(int(seed))] for seed in seeds])))

    def at(self, places: Tensor) -> Tensor:
        """(B, T, C) float64 above 0, exponential with mean 1, at places (B, T) of the images' raster order."""
        bits = mix_tensor(mix_tensor(self.seeds ^ places)[..., None] + self.codes)
        # The middle of one of 2**52 intervals: neither 0, which no code could win with, nor 1, which all would.
        return ((shifted(bits, 12).double() + 0.5) * 2.0**-52).log_().neg_()


def draw(
    logits: Tensor, images: int, settings: SamplingSettings | SamplingTensors, noise: Noise, places: Tensor
) -> Tensor:
    """Codes (B, T) int64 from a decoder's logits: guidance, then `choose`.

    Args:
        logits: (R, T, C) over the codebook, rows as in `guided_log_weights`.
        images: B.
        settings: all of them.
        noise: of the B images.
        places: (B, T) in raster order.
    """
    return choose(guided_log_weights(logits, images, settings.guidance_scale), settings, noise, places)


def choose(log_weights: Tensor, settings: SamplingSettings | SamplingTensors, noise: Noise, places: Tensor) -> Tensor:
    """Codes (B, T) int64.

    Args:
        log_weights: (B, T, C) guided log-weights over the codebook, in any floating dtype.
        settings: temperature, top-k and top-p; guidance is done.
        noise: of the B images; not read when greedy.
        places: (B, T) in raster order.
    """
    if not settings.do_sample:
        return log_weights.argmax(dim=-1)
    return (probabilities(log_weights, settings) / noise.at(places)).argmax(dim=-1)


def probabilities(log_weights: Tensor, settings: SamplingSettings | SamplingTensors) -> Tensor:
    """The distribution that is drawn from, (…, C) float64: tempered, truncated and normalised."""
    scaled, top_k, top_p = log_weights.double() / settings.temperature, settings.top_k, settings.top_p
    if top_k is not None:
        descending = scaled.sort(dim=-1, descending=True).values
        last = torch.as_tensor(top_k, device=scaled.device).view(1).clamp(max=scaled.shape[-1]) - 1
        scaled = scaled.masked_fill(scaled < descending.index_select(-1, last), float("-inf"))
    probability = scaled.softmax(dim=-1)
    if isinstance(top_p, Tensor) or (top_p is not None and top_p < 1):
        descending, order = probability.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        inside = torch.zeros_like(probability, dtype=torch.bool).scatter(-1, order, before < top_p)
        probability = probability.masked_fill(~inside, 0.0)
        probability = probability / probability.sum(dim=-1, keepdim=True)
    return probability
