"""The draw itself: one code a pair, from guided log-weights over image ids, the same for both rows.

Randomness is the project's: the numbers that belong to (seed, place in the image), so an image is the one that the
other engines draw, whatever runs beside it. Every other id gets -inf, so that vLLM's greedy sampling takes the code.

This is also where a split pair is noticed, whatever split it: nothing is drawn for a row without its partner.
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
from simplear_vllm.request import ImageRequest
from simplear_vllm.requirements import check_configuration


@dataclass
class _Row:
    request: ImageRequest
    drawn_ids: list[int]
    """vLLM's own list, which grows."""


class GuidedSampling(LogitsProcessor):
    """The logits processor of the `vllm` engine.

    Raises VLLMError for a version of vLLM that it was not made for, and for features or schedulers that split pairs.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        check_configuration(vllm_config)
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: it decides what is taken."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their places in the batch."""
        process_dict_updates(
            self._rows, batch_update, lambda params, _, output_ids: _Row(ImageRequest.of(params), output_ids)
        )

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with all but the code to take at -inf.

        Raises RuntimeError where a row has no partner in the batch, or one at another place in the image.
        """
        for images in self._images().values():
            first = self._rows[images[0][0]].request
            codes = slice(first.image_token_offset, first.image_token_offset + first.codebook_size)
            batch_rows = torch.tensor(images, device=logits.device).T
            conditional = [self._rows[rows[0]] for rows in images]
            noise = Noise([row.request.seed for row in conditional], first.codebook_size, logits.device)
            places = torch.tensor([[len(row.drawn_ids)] for row in conditional], device=logits.device)
            fixed = torch.tensor([_fixed_code(row) for row in conditional], device=logits.device)
            drawn = draw(logits[batch_rows.flatten(), None, codes], len(images), first.sampling, noise, places)[:, 0]
            ids = torch.where(fixed < 0, drawn, fixed) + first.image_token_offset
            logits[batch_rows] = float("-inf")
            logits[batch_rows, ids] = 0.0
        return logits

    def _images(self) -> dict[Any, list[list[int]]]:
        """Rows of the batch of each image, the conditional first, by the settings that they are drawn with."""
        rows_of: dict[Any, dict[str, int]] = defaultdict(dict)
        for row, state in self._rows.items():
            rows_of[state.request.pair or row][state.request.role] = row
        images = defaultdict(list)
        for name, by_role in rows_of.items():
            request = self._rows[next(iter(by_role.values()))].request
            drawn = {role: len(self._rows[row].drawn_ids) for role, row in by_role.items()}
            if request.pair is not None and (len(drawn) != 2 or len(set(drawn.values())) != 1):
                raise RuntimeError(
                    f"of the pair {name!r} the batch has the rows {drawn} (codes so far), not both at one place: a "
                    "scheduler has split it, and what would be drawn is wrong."
                )
            key = request.sampling, request.image_token_offset, request.codebook_size
            images[key].append([by_role[role] for role in sorted(by_role)])  # "conditional" sorts first
        return images


def _fixed_code(row: _Row) -> int:
    fixed_codes = row.request.fixed_codes
    return -1 if fixed_codes is None else fixed_codes[len(row.drawn_ids)]
