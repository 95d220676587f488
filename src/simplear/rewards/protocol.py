"""What a reward is: pictures, their captions and what is known about them in, one score for each picture out.

A reward of your own is a class with that ``__call__``, named in YAML by its class path; there is nothing to derive
from or to register. (In a `simplear.data.MinimumScore` its public attributes are settings of what is made with it; of a
class that derives from `simplear.described.Described`, its arguments.) One that is made of parts derives from
`RewardOfParts`, and the parts are logged. If it has a method ``to(device)``, that is called once before training: the
place to read weights and to fail early.

Training calls `score`, which holds what a reward returns against this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from simplear.described import Described
from simplear.errors import UserError, note_user_code


@runtime_checkable
class Reward(Protocol):
    """Scores pictures; frozen, without gradient, and the same for a picture whatever else is in the batch.

    Its types are left open, for jsonargparse accepts a class that has the arguments by name and would else want the
    annotations of one's own class to be the very same.
    """

    def __call__(self, images: Any, captions: Any, metadata: Any) -> Any:
        """Scores (B,) float32 on the images' device; higher is better. An array or a list of B numbers will do.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            captions: B texts (``list[str]``), as they were given to the model but for its prefix.
            metadata: B dictionaries, each the metadata of its prompt's row; empty where a source has none.
        """


class RewardOfParts(Described, ABC):
    """A reward computed from named parts, which are logged beside it."""

    @abstractmethod
    def parts(
        self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Each part of the score, (B,) float32 on the images' device. Arguments as for `Reward`."""

    @abstractmethod
    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scores (B,) that the parts make."""

    def __call__(self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """See `Reward`."""
        return self.combine(self.parts(images, captions, metadata))


def score(
    reward: Reward, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and parts, checked; each part is computed once.

    Args:
        reward: any; its parts are those of `RewardOfParts`, else there are none.
        images: (B, 3, H, W) float in [0, 1].
        captions: B texts.
        metadata: B dictionaries.

    Returns:
        scores (B,) float32 on the images' device, and the parts by name, each like the scores.

    Raises:
        UserError: the input is not as above; or the reward returns another number of scores, NaN or an infinite number:
            the message names the reward's class and the caption.
    """
    _require_input(images, captions, metadata)
    try:
        with torch.no_grad():
            if isinstance(reward, RewardOfParts):
                parts = reward.parts(images, captions, metadata)
                scores = reward.combine(parts)
            else:
                parts, scores = {}, reward(images, captions, metadata)
    except UserError:
        raise
    except Exception as error:
        note_user_code(error, f"reward {_name(reward)}")
        raise
    name = _name(reward)
    checked = {part: _checked(values, f"part {part!r} of {name}", images, captions) for part, values in parts.items()}
    return _checked(scores, name, images, captions), checked


def move(reward: Reward, device: torch.device | str) -> None:
    """Let the reward read its weights and bring them to the device, if it has a method ``to``."""
    if hasattr(reward, "to"):
        reward.to(device)


def _require_input(images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(f"a reward needs images (B, 3, H, W) float, not {tuple(images.shape)} {images.dtype}.")
    if not len(images) == len(captions) == len(metadata):
        raise UserError(f"{len(images)} images, {len(captions)} captions and {len(metadata)} metadata do not match.")
    if not (images.amin() >= 0 and images.amax() <= 1):  # NaN too
        raise UserError(
            f"a reward needs images in [0, 1], these lie in [{images.amin():.3f}, {images.amax():.3f}]: scale what a "
            "visual tokenizer decodes, (pixels + 1) / 2."
        )


def _name(reward: Reward) -> str:
    """Of its class, or of the function that it is."""
    return getattr(reward, "__name__", type(reward).__name__)


def _checked(values: Any, name: str, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Scores as (B,) float32, where they are that many numbers: a tensor (B,) or (B, 1), an array, a list."""
    scores = values
    if not isinstance(values, Tensor):
        try:
            scores = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            scores = None
    if isinstance(scores, Tensor) and scores.shape == (len(images), 1):
        scores = scores[:, 0]
    if scores is None or scores.shape != (len(images),):
        what = type(values).__name__ if scores is None else tuple(scores.shape)
        raise UserError(f"{name} must return one score for each of {len(images)} images, not {what}.")
    broken = ~scores.isfinite()
    if broken.any():
        first = int(broken.nonzero()[0])
        raise UserError(f"{name} returned {scores[first].item()} for the caption {captions[first]!r}.")
    return scores.detach().to(images.device, torch.float32)
