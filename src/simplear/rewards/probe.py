"""What a reward can tell apart: pictures of scenes, each with its caption and that caption made false in one respect.

A reward that scores both alike cannot teach a policy the difference; where it prefers the false one it teaches that. So
these accuracies say, before any training, which of GenEval's categories a reward can carry.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from simplear.rewards.protocol import Reward, score
from simplear.scenes import PERTURBATIONS, captions, draw, metadata, perturb, sample_scene


def caption_accuracy(
    reward: Reward,
    *,
    resolution: int,
    split: str = "validation",
    count: int = 100,
    kinds: Sequence[str] = PERTURBATIONS,
    seed: int = 0,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Share of pictures whose reward is higher for their caption than for a false one, by what is false; chance is 0.5.

    Args:
        reward: any that reads captions.
        resolution: of the pictures, in pixels.
        split: of the scenes: "train", whose pairs of shape and colour are those of the training corpus, or
            "validation", where each scene holds a pair that never occurs there.
        count: pictures for each kind.
        kinds: of `simplear.scenes.PERTURBATIONS`.
        seed: of the scenes and of what is changed.
        first: index of the first scene, beyond those that something was trained on.
        device: where the pictures are put.
    """
    return {kind: _accuracy(reward, kind, resolution, split, count, seed, first, device) for kind in kinds}


def _accuracy(
    reward: Reward,
    kind: str,
    resolution: int,
    split: str,
    count: int,
    seed: int,
    first: int,
    device: torch.device | str,
) -> float:
    rng = np.random.default_rng((seed, PERTURBATIONS.index(kind)))
    pictures: list[np.ndarray] = []
    true, false, rows = list[str](), list[str](), []
    for index in itertools.count(first):
        if len(pictures) == count:
            break
        scene = sample_scene(seed, index, split)
        caption = captions(scene, seed, index)[int(rng.integers(2))]
        changed = perturb(caption, kind, rng)
        if changed is not None:
            pictures.append(draw(scene, resolution))
            true.append(caption)
            false.append(changed)
            rows.append(metadata(scene))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device).float() / 255
    return float((score(reward, images, true, rows)[0] > score(reward, images, false, rows)[0]).double().mean())
