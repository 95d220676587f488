"""The draw itself: one code a pair, from guided log-weights over image ids, the same for both rows.

Randomness is the project's: the numbers that belong to (seed, place in the image), so an image is the one that the
other engines draw, whatever runs beside it. Every other id gets -inf, so that vLLM's greedy sampling takes the code.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from simplear.generation.sampling import Noise, draw
from simplear.generation.vllm_plugin.image_request import ImageRequest
from simplear.generation.vllm_plugin.requirements import check_configuration, check_version


@dataclass
class _Row:
    request: ImageRequest
    drawn: list[int]
    """Ids so far; vLLM's own list, which grows."""


class GuidedSampling(LogitsProcessor):
    """The logits processor of the `vllm` engine.

    Raises VLLMError for a version or a feature of vLLM that it was not made for, another scheduler among them.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        check_version()
        check_configuration(vllm_config)
        self.device = device
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a request that asks for no image; see `ImageRequest.of`."""
        ImageRequest.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: it decides what is taken."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their places in the batch."""
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row:
        return _Row(ImageRequest.of(params), output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with all but the code to take at -inf.

        Raises RuntimeError where a row has no partner in the batch, or one at another place in the image.
        """
        for places in self._images().values():
            first = self._rows[places[0][0]].request
            codes = slice(first.image_token_offset, first.image_token_offset + first.codebook_size)
            rows = torch.tensor(places, device=logits.device).T
            images = [self._rows[place[0]] for place in places]
            noise = Noise([row.request.seed for row in images], first.codebook_size, logits.device)
            reached = torch.tensor([[len(row.drawn)] for row in images], device=logits.device)
            drawn = draw(logits[rows.flatten(), None, codes], len(places), first.sampling, noise, reached)[:, 0]
            given = torch.tensor([self._given(place[0]) for place in places], device=logits.device)
            ids = torch.where(given < 0, drawn, given) + first.image_token_offset
            logits[rows] = float("-inf")
            logits[rows, ids] = 0.0
        return logits

    def _images(self) -> dict[Any, list[list[int]]]:
        """Places in the batch of each image's rows, the conditional first, by what is drawn alike."""
        pairs: dict[str, dict[str, int]] = defaultdict(dict)
        images = defaultdict(list)
        for place, row in self._rows.items():
            request = row.request
            if request.pair is None:
                images[request.sampling, request.image_token_offset, request.codebook_size].append([place])
            else:
                pairs[request.pair][request.role] = place
        for name, roles in pairs.items():
            drawn = {role: len(self._rows[place].drawn) for role, place in roles.items()}
            if len(drawn) != 2 or len(set(drawn.values())) != 1:
                raise RuntimeError(
                    f"of the pair {name!r} the batch has the rows {drawn} (codes so far), not both at one place: a "
                    "scheduler has split it, and what would be drawn is wrong."
                )
            request = self._rows[roles["conditional"]].request
            key = request.sampling, request.image_token_offset, request.codebook_size
            images[key].append([roles["conditional"], roles["negative"]])
        return images

    def _given(self, place: int) -> int:
        row = self._rows[place]
        return -1 if row.request.given is None else row.request.given[len(row.drawn)]
