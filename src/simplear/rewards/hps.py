"""Human Preference Score v2 (Wu et al., 2023, https://arxiv.org/abs/2306.09341): a CLIP ViT-H-14 fine-tuned on choices
that people made between pictures of one prompt.

As its authors score (https://github.com/tgxs002/HPSv2, ``img_score.py``): the cosine of picture and caption, the
picture resized on its longer side and padded with black to a square. They run the network in mixed precision, here it
is float32 unless ``precision`` says otherwise.
"""

from __future__ import annotations

from simplear.rewards.clip import CLIPReward

HPS_V2_1 = "hf-hub:xswu/HPSv2/HPS_v2.1_compressed.pt"
"""The weights of version 2.1, under the key ``state_dict``; ``HPS_v2_compressed.pt`` beside it is version 2.0."""


class HPSv2Reward(CLIPReward):
    """Scores in [-1, 1], those of good pictures near 0.3."""

    resize_mode = "longest"

    def __init__(
        self,
        pretrained: str = HPS_V2_1,
        model: str = "ViT-H-14",
        *,
        batch_size: int = 32,
        precision: str = "fp32",
        cached_captions: int = 10_000,
    ) -> None:
        """
        Args:
            pretrained: The weights: a file, or hf-hub:OWNER/REPOSITORY/FILE, which is downloaded when it is first read.
            model: Architecture, as open_clip names it.
            batch_size: Pictures encoded at a time.
            precision: Of the network, as open_clip names it: fp32, bf16, fp16, pure_bf16, pure_fp16.
            cached_captions: Captions whose features are kept; the one unused for longest goes first.
        """
        super().__init__(model, pretrained, batch_size=batch_size, precision=precision, cached_captions=cached_captions)
