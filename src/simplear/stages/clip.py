"""Training a small CLIP on pictures and captions, to be the reward of a demo as ViT-H-14 is that of the paper.

Model and loss are open_clip's. Contrast within a batch teaches colours at once and the rest late, since few captions of
a batch differ in a shape, a number or a relation alone; so each picture is also held against its own caption made false
in one such respect (NegCLIP, Yuksekgonul et al., 2023, https://arxiv.org/abs/2210.01936). Pictures are blurred and made
noisy a little, for a visual tokenizer's are, and no reward should see that instead of the scene.

When training ends, the model is written as a directory that open_clip and `CLIPReward` read. Every random choice
follows from (seed, step, rank), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from simplear.errors import MissingFileError, UserError
from simplear.rewards import save_clip
from simplear.scenes import HELD_OUT, perturb
from simplear.stages.optimized import OptimizedModule

LARGEST_LOGIT_SCALE = math.log(100)
"""Bound on the logarithm of the inverse temperature (Radford et al., 2021, section 2.5)."""

HARD = ("shape", "count", "relation", "binding")
"""What captions are made false in; colours and backgrounds are learnt without."""


def degrade(pixels: Tensor, noise: float, blur: float, generator: torch.Generator) -> Tensor:
    """Pictures as a lossy decoder might give them: each blurred and made noisy by an amount of its own.

    Args:
        pixels: (B, 3, H, W) float in [-1, 1].
        noise: largest standard deviation of the noise, on the same scale.
        blur: largest weight, in [0, 1], of the mean over 3 x 3 pixels against the pixel itself.
        generator: draws on the CPU.
    """
    amounts = torch.rand(2, len(pixels), 1, 1, 1, generator=generator).to(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    random = torch.randn(pixels.shape, generator=generator).to(pixels)
    return pixels + amounts[0] * blur * (blurred - pixels) + amounts[1] * noise * random


def falsify(captions: list[str], each: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Captions of scenes made false, up to ``each`` of every one, and the number (N,) of the caption each came from.

    They name no held-out pair, which would otherwise occur in false captions alone. Captions of other pictures say
    nothing that could be changed and get none.
    """
    texts, rows = list[str](), list[int]()
    for row, caption in enumerate(captions):
        kinds = rng.permutation(len(HARD))
        changed = [text for kind in kinds if (text := perturb(caption, HARD[kind], rng, HELD_OUT)) is not None]
        texts += changed[:each]
        rows += [row] * len(changed[:each])
    return texts, torch.tensor(rows, dtype=torch.long)


def false_caption_loss(images: Tensor, texts: Tensor, false: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of each picture's own caption against its false ones, scalar: the mean over pictures with any.

    Args:
        images, texts: normalised features (B, D) of pictures and their captions.
        false: normalised features (N, D) of false captions; N may be 0, and then so is the loss.
        rows: (N,) int64, the picture of each.
        scale: scalar, the inverse temperature.
    """
    if not len(rows):
        return images.sum() * 0
    own = scale * (images * texts).sum(dim=1)
    others = torch.exp(scale * (images[rows] * false).sum(dim=1) - own[rows])
    rivals = torch.zeros_like(own).index_add(0, rows, others)
    return torch.log1p(rivals)[rows.unique()].mean()


class CLIPModule(OptimizedModule):
    """Batches are ``{"pixels": (B, 3, H, W) float in [-1, 1], "captions": B texts, …}``, H and W the model's own."""

    def __init__(
        self,
        model: dict[str, Any],
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        false_captions: int = 2,
        noise: float = 0.06,
        blur: float = 0.7,
        seed: int = 0,
        export_dir: str | None = None,
    ) -> None:
        """
        Args:
            model: Architecture as in open_clip's model files: embed_dim, vision_cfg, text_cfg.
            tokenizer: Directory of a fast Hugging Face text tokenizer, which then gives the vocabulary; none takes
                open_clip's own.
            optimizer: Any torch optimizer class by class_path. Biases get no weight decay.
            lr_scheduler: Any scheduler class by class_path, stepped every optimizer step; none keeps the rate constant.
            false_captions: False captions of each picture to learn from, at most; 0 for open_clip's loss alone.
            noise: Largest standard deviation of the noise on training pictures, which lie in [-1, 1].
            blur: Largest share of a 3 x 3 mean in training pictures.
            seed: Of false captions, noise and blur.
            export_dir: Where to write the trained model when training ends; None writes none.
        """
        super().__init__(optimizer, lr_scheduler, export_dir)
        self.architecture, self.tokenizer_path = copy.deepcopy(model), tokenizer
        self.false_captions, self.noise, self.blur = false_captions, noise, blur
        self.seed = seed

    def configure_model(self) -> None:
        """Build model and text tokenizer. Raises FileNotFoundError where the tokenizer is missing."""
        if hasattr(self, "clip"):
            return
        import open_clip
        from open_clip.transform import PreprocessCfg

        self.tokenizer = _tokenizer(self.tokenizer_path, self.architecture["text_cfg"])
        self.clip = open_clip.CLIP(**self.architecture)
        # Pixels of the data are in [-1, 1] already.
        self.preprocessing = PreprocessCfg(self.clip.visual.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)
        open_clip.model.set_model_preprocess_cfg(self.clip, asdict(self.preprocessing))

    @property
    def trained_module(self) -> nn.Module:
        """The CLIP model."""
        return self.clip

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        key = (self.seed, self.global_step, batch_idx, self.global_rank)
        rng = np.random.default_rng(key)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)
        captions = batch["captions"]
        false, rows = falsify(captions, self.false_captions, rng)
        images = self.clip.encode_image(degrade(batch["pixels"], self.noise, self.blur, generator), normalize=True)
        texts = self._encode([*captions, *false])
        scale = self.clip.logit_scale.exp()
        contrast = self._contrast(images, texts[: len(captions)], scale)
        hard = false_caption_loss(images, texts[: len(captions)], texts[len(captions) :], rows.to(self.device), scale)
        self.log_dict({"train/loss": contrast + hard, "train/contrastive": contrast}, prog_bar=True)
        return contrast + hard

    def _encode(self, captions: list[str]) -> Tensor:
        features: Tensor = self.clip.encode_text(self.tokenizer(captions).to(self.device), normalize=True)
        return features

    def _contrast(self, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        """open_clip's loss over the batches of all ranks, each rank its own rows."""
        from open_clip import ClipLoss

        loss: Tensor = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=self.global_rank, world_size=self.trainer.world_size
        )(images, texts, scale)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = self.clip.encode_image(batch["pixels"], normalize=True)
        loss = self._contrast(images, self._encode(batch["captions"]), self.clip.logit_scale.exp())
        self.log("validation/contrastive", loss, prog_bar=True, batch_size=len(images), sync_dist=True)

    def export(self, directory: str) -> None:
        """Write the CLIP model and its text tokenizer."""
        save_clip(self.clip, self.architecture, self.tokenizer, directory)
        print(f"CLIP written to {directory}", flush=True)


def _tokenizer(directory: str | None, text: dict[str, Any]) -> Any:
    """The text tokenizer; completes the text tower's configuration with what follows from it."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    length = text.setdefault("context_length", DEFAULT_CONTEXT_LENGTH)
    if directory is None:
        return SimpleTokenizer(context_length=length)
    if not Path(directory).is_dir():
        raise MissingFileError(
            f"text tokenizer {directory} is not here: train one (the demo's: make train-tokenizer), or leave it out."
        )
    tokenizer = HFTokenizer(directory, context_length=length)
    plain = tokenizer.tokenizer
    if plain.eos_token is None:
        raise UserError(f"text tokenizer {directory} has no end token, at which CLIP reads a caption.")
    # It ends no text by itself, and so would cut the end token off a long one.
    backend = plain.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"$A {plain.eos_token}", special_tokens=[(plain.eos_token, plain.eos_token_id)]
    )
    tokenizer.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=plain.eos_token, pad_token=plain.pad_token or plain.eos_token
    )
    text.update(hf_tokenizer_name=directory, vocab_size=len(plain), pool_type="eos", eos_id=plain.eos_token_id)
    return tokenizer
