"""CLIP similarity as a reward: the cosine between a picture's and its caption's features.

Pictures are resized and normalised as the model's own preprocessing does, in tensors. A caption's features are computed
once, alone, so that they are the same bits whichever captions come with it; they stay in memory while they are used.
The network is no submodule of anything: what holds a reward keeps it out of its own weights.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplear.described import Described
from simplear.rewards.clip_model import LoadedCLIP, load_clip, preprocess, text_ids

logger = logging.getLogger(__name__)


class CLIPReward(Described):
    """Scores in [-1, 1]; the weights are read at the first use or at `to`."""

    not_described = frozenset({"batch_size", "cached_captions"})
    local_paths = frozenset({"model", "pretrained"})
    resize_mode: str | None = None
    """In place of the one in the model's preprocessing, see `preprocess`."""

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        *,
        batch_size: int = 32,
        precision: str = "fp32",
        cached_captions: int = 10_000,
    ) -> None:
        """
        Args:
            model: A directory in open_clip's format, hf-hub:OWNER/REPOSITORY, or an open_clip name such as "ViT-H-14".
            pretrained: Weights for a name: a file, hf-hub:OWNER/REPOSITORY/FILE, or a tag such as "laion2b_s32b_b79k".
            batch_size: Pictures encoded at a time.
            precision: Of the network, as open_clip names it: fp32, bf16, fp16, pure_bf16, pure_fp16.
            cached_captions: Captions whose features are kept; the one unused for longest goes first.
        """
        self.model, self.pretrained = model, pretrained
        self.batch_size, self.precision, self.cached_captions = batch_size, precision, cached_captions
        self.captions_cut = 0
        self._device = torch.device("cpu")
        self._clip: LoadedCLIP | None = None
        self._text_features: OrderedDict[str, Tensor] = OrderedDict()

    def to(self, device: torch.device | str) -> CLIPReward:
        """Bring the network to a device, its weights read before if they were not. Errors: see `load_clip`."""
        clip = self.clip
        if torch.device(device) != self._device:
            clip.network.to(device)
            self._device = torch.device(device)
            self._text_features.clear()
        return self

    @property
    def clip(self) -> LoadedCLIP:
        """The model, read when first asked for."""
        if self._clip is None:
            clip = load_clip(self.model, self.pretrained, self.precision)
            if self.resize_mode is not None:
                clip = replace(clip, preprocessing=replace(clip.preprocessing, resize_mode=self.resize_mode))
            self._clip = clip
        return self._clip

    def __call__(self, images: Tensor, captions: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """See `simplear.rewards.Reward`; metadata is not read."""
        self.to(images.device)
        # Neither a Trainer's mixed precision nor its default dtype is the reward's.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            texts = torch.stack([self._text(caption) for caption in captions])
            pairs = zip(images.split(self.batch_size), texts.split(self.batch_size), strict=True)
            return torch.cat([(self._encode(part) * features).sum(dim=1) for part, features in pairs])

    def _encode(self, images: Tensor) -> Tensor:
        """Normalised features (B, D) float32."""
        pixels = preprocess(images.float(), self.clip.preprocessing).to(self.clip.dtype)
        return torch.nn.functional.normalize(self.clip.network.encode_image(pixels).float(), dim=1)

    def _text(self, caption: str) -> Tensor:
        """Normalised features (D,) float32."""
        features = self._text_features.pop(caption, None)
        if features is None:
            ids, cut = text_ids(self.clip, [caption])
            self._count_cut(int(cut.sum()), caption)
            encoded = self.clip.network.encode_text(ids.to(self._device))
            features = torch.nn.functional.normalize(encoded.float(), dim=1)[0]
        self._text_features[caption] = features
        if len(self._text_features) > self.cached_captions:
            self._text_features.popitem(last=False)
        return features

    def _count_cut(self, cut: int, caption: str) -> None:
        self.captions_cut += cut
        # A line at the first, second, fourth, eighth …
        if cut and self.captions_cut & (self.captions_cut - 1) == 0:
            logger.warning(
                "%s reads %d tokens of a caption: %d captions were cut so far, such as %r",
                self.model,
                self.clip.tokenizer.context_length,
                self.captions_cut,
                caption,
            )
