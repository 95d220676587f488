"""The `jacobi` engine: speculative Jacobi decoding that draws, seed by seed, what `cached` draws.

Fixing the randomness makes drawing a fixed-point problem, which Jacobi's iteration solves (Song et al. 2021, arXiv
2002.03629; for sampling, Wiggers and Hoogeboom 2020, arXiv 2002.09928). Speculative Jacobi decoding (Teng et al. 2024,
arXiv 2410.01699) accepts a draft at random and replaces a rejected one by a draw from a residual: as often accepted,
but what a seed draws then depends on W. How drafts are proposed and verified: `drafts`.
"""

from __future__ import annotations

from collections.abc import Callable

from simplear.errors import UserError
from simplear.generation.drafts import Proposal
from simplear.generation.fused import FusedEngine
from simplear.language_model import LanguageModel

WINDOW = 7
"""Drafts in each pass where nothing else is asked for: the best for one image of the demo's, see docs/generation.md."""


class JacobiEngine(FusedEngine):
    """Draws several codes a pass where the model is sure of them; images advance at their own pace.

    Args:
        model: on the device where it is to run.
        window: W, drafts in each pass; 0 draws code by code.
        proposal: of places that no pass has drawn at yet: their left or upper neighbour's code.
        compiled: as for `FusedEngine`.
        on_pass: called after each pass with how many codes of each image are final, to see where drafts were right: of
            those that a pass makes final, all but the last were drafts.
    """

    name = "jacobi"

    def __init__(
        self,
        model: LanguageModel,
        window: int = WINDOW,
        proposal: Proposal = "left",
        compiled: bool = False,
        on_pass: Callable[[list[int]], None] | None = None,
    ) -> None:
        if window < 0:
            raise UserError(f"window {window} must be 0 or more.")
        super().__init__(model, compiled=compiled, window=window, proposal=proposal, on_pass=on_pass)
