"""Who waits for whom: admission of image requests so that the two rows of a pair always run together to the end.

A pair is admitted when both rows have arrived and, beside all that runs, there are two places in the batch, room for
both whole prompts in the next forward pass, and KV blocks for both whole sequences. An admitted pair keeps its
reservation until it leaves, so it is never preempted and its prompts are never fed in parts, which is what splits naive
pairs. First complete, first served: nothing overtakes, so a large pair waits no longer than what runs before it.

Pure book-keeping over request names and lengths; vLLM's scheduler does what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from simplear_vllm.request import ImageRequest


@dataclass(frozen=True)
class Capacity:
    """What the engine has, all requests together."""

    sequences: int
    """Requests that run at once (max_num_seqs)."""
    tokens: int
    """Tokens of one forward pass (max_num_batched_tokens)."""
    blocks: int
    """KV blocks that requests can have."""
    block_size: int
    """Tokens a block."""
    positions: int
    """Longest sequence (max_model_len)."""

    def blocks_of(self, prompts: Sequence[int], codes: int) -> int:
        """Blocks that sequences with prompts of these lengths fill."""
        return sum(-(-(prompt + codes) // self.block_size) for prompt in prompts)

    def refusal(self, prompts: Sequence[int], codes: int) -> str | None:
        """Why an image whose rows have prompts of these lengths can never run; None if it can."""
        needed = {
            "max_model_len": (max(prompts) + codes, self.positions),
            "max_num_seqs": (len(prompts), self.sequences),
            "max_num_batched_tokens": (sum(prompts), self.tokens),
            "the number of KV blocks (gpu_memory_utilization, VLLM_CPU_KVCACHE_SPACE)": (
                self.blocks_of(prompts, codes),
                self.blocks,
            ),
        }
        lacking = [f"{name} is {has} and must be {wanted}" for name, (wanted, has) in needed.items() if wanted > has]
        if not lacking:
            return None
        return f"an image of {codes} codes with prompts of {prompts} tokens can never run: {'; '.join(lacking)}."


@dataclass(eq=False)
class _Image:
    """The requests of one image: one, or the two of a pair."""

    size: int
    request_ids: list[str] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    blocks: int = 0


class Pairs:
    """The images that wait and those that run.

    Args:
        capacity: what the engine has.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._image_of: dict[str, _Image] = {}
        self._incomplete: dict[str, _Image] = {}
        self._ready: deque[_Image] = deque()
        self._running: list[_Image] = []

    def arrive(self, request_id: str, request: ImageRequest, prompt: int) -> str | None:
        """Take a request whose prompt has this many tokens.

        Returns:
            why its image can never be drawn; None if it can, or if the partner is missing yet.
        """
        image = self._incomplete.pop(request.pair or "", None) or _Image(size=1 if request.pair is None else 2)
        image.request_ids.append(request_id)
        image.prompts.append(prompt)
        self._image_of[request_id] = image
        if len(image.request_ids) < image.size:
            self._incomplete[str(request.pair)] = image
            return None
        image.blocks = self.capacity.blocks_of(image.prompts, request.codes)
        refusal = self.capacity.refusal(image.prompts, request.codes)
        if refusal is None:
            self._ready.append(image)
        return refusal

    def admit(self) -> list[str]:
        """Requests that run from the next forward pass on: whole images, as many as fit beside those that run."""
        admitted: list[str] = []
        rows = sum(len(image.request_ids) for image in self._running)
        # Each row that runs takes one token of the pass, each that begins its whole prompt.
        tokens, blocks = rows, sum(image.blocks for image in self._running)
        while self._ready:
            image = self._ready[0]
            rows, tokens, blocks = rows + image.size, tokens + sum(image.prompts), blocks + image.blocks
            if rows > self.capacity.sequences or tokens > self.capacity.tokens or blocks > self.capacity.blocks:
                break
            self._running.append(self._ready.popleft())
            admitted += image.request_ids
        return admitted

    def leave(self, request_id: str) -> None:
        """Forget a request that ended, and its image's reservation once both rows have left."""
        image = self._image_of.pop(request_id, None)
        if image is None:
            return
        image.request_ids.remove(request_id)
        if image in self._ready:
            self._ready.remove(image)
        if not image.request_ids and image in self._running:
            self._running.remove(image)
