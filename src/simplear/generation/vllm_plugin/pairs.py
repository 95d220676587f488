"""Who waits for whom: admission of image requests so that the two rows of a pair always run together to the end.

A pair is admitted when both rows have arrived and, beside all that runs, there are two places in the batch, room for
both whole prompts in the next forward pass, and KV blocks for both whole sequences. What is admitted keeps its
reservation until it leaves, so nothing is ever preempted and no prompt is fed in parts; those are what splits naive
pairs. First complete, first served: nothing overtakes, so a large pair waits no longer than what runs before it.

Pure book-keeping over request names and lengths; vLLM's scheduler does what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from simplear.generation.vllm_plugin.image_request import ImageRequest


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

    def blocks_of(self, length: int) -> int:
        """Blocks that a sequence of this many tokens fills."""
        return -(-length // self.block_size)

    def refusal(self, prompts: Sequence[int], codes: int) -> str | None:
        """Why an image whose rows have prompts of these lengths can never run; None if it can."""
        longest, blocks = max(prompts) + codes, sum(self.blocks_of(prompt + codes) for prompt in prompts)
        if longest > self.positions:
            return (
                f"a prompt of {max(prompts)} tokens and {codes} codes take {longest} positions, and max_model_len is "
                f"{self.positions}: shorten the prompt or ask for a smaller picture."
            )
        if len(prompts) > self.sequences:
            return f"an image with guidance takes 2 places in a batch, and max_num_seqs is {self.sequences}: raise it."
        if sum(prompts) > self.tokens:
            return (
                f"prompts of {' and '.join(map(str, prompts))} tokens are fed in one forward pass, and "
                f"max_num_batched_tokens is {self.tokens}: raise it."
            )
        if blocks > self.blocks:
            return (
                f"the image takes {blocks} KV blocks of {self.block_size} tokens, and there are {self.blocks}: give "
                "vLLM more memory for its KV cache (gpu_memory_utilization, VLLM_CPU_KVCACHE_SPACE)."
            )
        return None


class Refused(ValueError):
    """Requests that will not be drawn.

    Args:
        request_ids: all that belong to the image.
        reason: for the reader.
    """

    def __init__(self, request_ids: Iterable[str], reason: str) -> None:
        super().__init__(reason)
        self.request_ids = list(request_ids)


@dataclass(eq=False)
class _Image:
    """The requests of one image: one, or the two of a pair."""

    size: int
    begun: float
    requests: dict[str, ImageRequest] = field(default_factory=dict)
    prompts: list[int] = field(default_factory=list)
    blocks: int = 0

    @property
    def complete(self) -> bool:
        return len(self.requests) == self.size


class Pairs:
    """The images that wait and those that run.

    Args:
        capacity: what the engine has.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._of: dict[str, _Image] = {}
        self._named: dict[str, _Image] = {}
        self._ready: deque[_Image] = deque()
        self._running: list[_Image] = []

    def arrive(self, request_id: str, request: ImageRequest, prompt: int, now: float) -> None:
        """Take a request in.

        Args:
            prompt: its length in tokens.
            now: seconds on any clock that only goes forward.

        Raises Refused when it, or its pair, will never be drawn.
        """
        image = self._named.get(request.pair) if request.pair is not None else None
        if image is not None and image.complete:
            raise Refused([request_id], f"pair {request.pair!r} has both its requests already: name another.")
        image = image or _Image(size=1 if request.pair is None else 2, begun=now)
        partner = next(iter(image.requests.values()), request)
        image.requests[request_id] = request
        image.prompts.append(prompt)
        self._of[request_id] = image
        if request.pair is not None:
            self._named[request.pair] = image
        if partner is not request and not request.matches(partner):
            raise Refused(
                image.requests,
                f"the two requests of pair {request.pair!r} differ in more than their roles: {partner} and {request}.",
            )
        if image.complete:
            if reason := self.capacity.refusal(image.prompts, request.codes):
                raise Refused(image.requests, reason)
            image.blocks = sum(self.capacity.blocks_of(length + request.codes) for length in image.prompts)
            self._ready.append(image)

    def admit(self) -> list[str]:
        """Requests that run from the next forward pass on: whole images, as many as fit beside those that run."""
        admitted: list[str] = []
        rows = sum(len(image.requests) for image in self._running)
        # Each row that runs takes one token of the pass, each that begins its whole prompt.
        tokens, blocks = rows, sum(image.blocks for image in self._running)
        while self._ready:
            image = self._ready[0]
            rows, tokens, blocks = rows + image.size, tokens + sum(image.prompts), blocks + image.blocks
            if rows > self.capacity.sequences or tokens > self.capacity.tokens or blocks > self.capacity.blocks:
                break
            self._running.append(self._ready.popleft())
            admitted += image.requests
        return admitted

    def companions(self, request_id: str) -> list[str]:
        """The requests of the same image, itself among them; none of an unknown request."""
        image = self._of.get(request_id)
        return [] if image is None else list(image.requests)

    def leave(self, request_id: str) -> None:
        """Forget a request that finished or was given up, and what it has reserved once its image is gone."""
        image = self._of.pop(request_id, None)
        if image is None:
            return
        pair = image.requests.pop(request_id).pair
        if image in self._ready:
            self._ready.remove(image)
        if not image.requests:
            if image in self._running:
                self._running.remove(image)
            if pair is not None:
                del self._named[pair]

    def overdue(self, since: float) -> list[str]:
        """Requests that came before then and still wait for a partner."""
        late = [image for image in self._named.values() if not image.blocks and image.begun < since]
        return [request_id for image in late for request_id in image.requests]

    def running(self) -> list[list[str]]:
        """The requests of each pair that runs; one alone where its partner has left."""
        return [list(image.requests) for image in self._running if image.size == 2]
