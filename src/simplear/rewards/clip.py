"""CLIP similarity as a reward: the cosine between an image's and its caption's features; and HPSv2, a CLIP too.

Images are resized and normalised as the model's own preprocessing does, in tensors. A caption's features are computed
alone, so that they are the same bits whichever captions come with it, and they stay in memory while they are used.
The network is not registered as a submodule: a module that holds a reward keeps it out of its own weights.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simplear.described import Described
from simplear.rewards.clip_model import HUB, LoadedCLIP, load_clip, preprocess

logger = logging.getLogger(__name__)

CACHED_CAPTIONS = 10_000
HPS_V2_1 = f"{HUB}xswu/HPSv2/HPS_v2.1_compressed.pt"
"""The weights of version 2.1; ``HPS_v2_compressed.pt`` beside it is version 2.0."""


class CLIPReward(Described):
    """Scores in [-1, 1]; the weights are read at the first use or at `to`."""

    not_described = frozenset({"batch_size"})
    local_paths = frozenset({"model", "pretrained"})
    resize_mode: str | None = None
    """Replaces the one in the model's preprocessing, see `preprocess`."""

    def __init__(
        self, model: str, pretrained: str | None = None, *, batch_size: int = 32, precision: str = "fp32"
    ) -> None:
        """
        Args:
            model: A directory in open_clip's format, hf-hub:OWNER/REPOSITORY, or an open_clip name such as "ViT-H-14".
            pretrained: Weights for a name: a file, hf-hub:OWNER/REPOSITORY/FILE, or a tag such as "laion2b_s32b_b79k".
            batch_size: Images encoded at a time.
            precision: Of the network, as open_clip names it: fp32, bf16, fp16, pure_bf16, pure_fp16.
        """
        self.model, self.pretrained = model, pretrained
        self.batch_size, self.precision = batch_size, precision
        self.captions_cut = 0
        self._device = torch.device("cpu")

    @functools.cached_property
    def clip(self) -> LoadedCLIP:
        """The model, read at the first use."""
        clip = load_clip(self.model, self.pretrained, self.precision)
        if self.resize_mode is not None:
            clip = replace(clip, preprocessing=replace(clip.preprocessing, resize_mode=self.resize_mode))
        return clip

    def to(self, device: torch.device | str) -> CLIPReward:
        """Read the network's weights if they have not been read, and bring it to a device. Errors: see `load_clip`."""
        self.clip.network.to(device)
        if torch.device(device) != self._device:
            self._device = torch.device(device)
            self._text.cache_clear()
        return self

    def __call__(self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """See `simplear.rewards.Reward`; metadata is not read."""
        self.to(images.device)
        # A Trainer's mixed precision and its default dtype are not the reward's.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            texts = torch.stack([self._text(caption) for caption in captions])
            pairs = zip(images.split(self.batch_size), texts.split(self.batch_size), strict=True)
            return torch.cat([(self._encode(part) * features).sum(dim=1) for part, features in pairs])

    def _encode(self, images: Tensor) -> Tensor:
        """Normalised features (B, D) float32."""
        pixels = preprocess(images.float(), self.clip.preprocessing).to(self.clip.dtype)
        return normalize(self.clip.network.encode_image(pixels).float(), dim=1)

    @functools.cached_property
    def _text(self) -> Any:
        """A function that gives a caption's normalised features (D,) float32, from memory if it has them."""
        return functools.lru_cache(CACHED_CAPTIONS)(self._encode_text)

    def _encode_text(self, caption: str) -> Tensor:
        length = self.clip.tokenizer.context_length
        ids = self.clip.tokenizer([caption], context_length=length)
        # With room for one more token, a caption that fits has the same ids and one more pad.
        longer = self.clip.tokenizer([caption], context_length=length + 1)
        if (longer[:, :length] != ids).any():
            self.captions_cut += 1
            if self.captions_cut.bit_count() == 1:  # at the first, second, fourth, eighth …
                cut = "%s reads %d tokens of a caption: %d captions were cut so far, such as %r"
                logger.warning(cut, self.model, length, self.captions_cut, caption)
        return normalize(self.clip.network.encode_text(ids.to(self._device)).float(), dim=1)[0]


class HPSv2Reward(CLIPReward):
    """Human Preference Score v2: a CLIP ViT-H-14 fine-tuned on choices that people made between images of one prompt.

    Scores are in [-1, 1], those of good images near 0.3. As its authors score
    (https://github.com/tgxs002/HPSv2, ``img_score.py``; Wu et al., 2023, https://arxiv.org/abs/2306.09341): the cosine
    of image and caption, the image resized on its longer side and padded with black to a square. They run the network
    in mixed precision; here it is float32 unless ``precision`` says otherwise.
    """

    resize_mode = "longest"

    def __init__(
        self, pretrained: str = HPS_V2_1, model: str = "ViT-H-14", *, batch_size: int = 32, precision: str = "fp32"
    ) -> None:
        """
        Args:
            pretrained: The weights: a file, or hf-hub:OWNER/REPOSITORY/FILE, which is downloaded at the first use.
            model: Architecture, as open_clip names it.
            batch_size: Images encoded at a time.
            precision: Of the network, as open_clip names it: fp32, bf16, fp16, pure_bf16, pure_fp16.
        """
        super().__init__(model, pretrained, batch_size=batch_size, precision=precision)
