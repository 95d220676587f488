"""Next-token prediction over caption and image (Eq. 1): pretraining and supervised fine-tuning.

The two stages differ only in where their model comes from. The loss itself is
`simplear.language_model.next_token_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from simplear.errors import UserError
from simplear.language_model import Architecture, LanguageModel, LanguageModelConfig, Normalizer, StepWork
from simplear.sequence import text_target_mask
from simplear.stages.language_model_module import LanguageModelModule


@dataclass(frozen=True)
class NextTokenObjective:
    """The training loss: image loss + ``text_loss_weight`` × text loss, of captions.

    A batch of texts without images has ``text_only_loss_weight`` × text loss.
    """

    normalizer: Normalizer = "by_modality"
    """by_modality: image targets over image ids, text targets over text ids; full: one softmax over all ids."""
    text_loss_weight: float = 0.0
    """0 is the paper's Eq. 1, 1 is what its release trains with."""
    chunk_rows: int | None = None
    """Rows of logits held in memory at once; None holds them all. Same loss, less memory."""
    text_only_loss_weight: float = 1.0
    """Of the text loss on batches of texts without images; how many such batches there are is the data's."""


class Perplexity(MeanMetric):
    """exp of a mean loss in nats, weighted by tokens."""

    def compute(self) -> Tensor:
        """Over all updates on all ranks."""
        return super().compute().exp()


class NextTokenModule(LanguageModelModule):
    """Base of pretraining and fine-tuning.

    Args:
        objective: the loss.
        kwargs: the arguments of `LanguageModelModule`.
    """

    def __init__(self, objective: NextTokenObjective = NextTokenObjective(), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective
        # Of held-out texts without images: exp of the mean loss of a token, over all batches and ranks.
        self.text_perplexity = Perplexity()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one micro-batch, mean over its samples."""
        return self._loss(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Loss on held-out captions."""
        self._loss(batch, "validation")

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """As validation."""
        self._loss(batch, "test")

    def _loss(self, batch: dict[str, Any], name: str) -> Tensor:
        """The objective's loss of a batch of images or of texts, which are logged apart."""
        training, labels, objective = name == "train", batch["labels"], self.objective
        height, width = batch["codes"].shape[1:]
        has_images = height * width > 0
        if has_images and (training or self.grid is None):
            self.grid = (height, width)
        image_losses, text_losses = self.language_model(
            batch["input_ids"],
            labels,
            (height, width),
            normalizer=objective.normalizer,
            with_text=objective.text_loss_weight > 0 or not has_images,
            chunk_rows=objective.chunk_rows,
            packed=self.packed,
        )
        image_loss, text_loss = image_losses.mean(), text_losses.mean()
        if has_images:
            loss = image_loss + objective.text_loss_weight * text_loss
            values = {f"{name}/loss": loss.detach(), f"{name}/image_loss": image_loss.detach()}
            if objective.text_loss_weight > 0:
                values[f"{name}/text_loss"] = text_loss.detach()
        else:
            loss = objective.text_only_loss_weight * text_loss
            values = {f"{name}/text_only_loss": text_loss.detach()}
            if not training:
                tokens = text_target_mask(labels[:, 1:], self.language_model.layout).sum(dim=1)
                self.text_perplexity.update(text_losses.detach(), tokens)
                self.log(f"{name}/text_perplexity", self.text_perplexity, on_step=False, on_epoch=True)
        self.log_dict(values, on_step=training, on_epoch=not training, sync_dist=not training, batch_size=len(labels))
        return loss

    def step_work(self, batch: dict[str, Any]) -> StepWork:
        """What a training step on this batch takes; reads no tensor of it."""
        architecture, layout = Architecture.of(self.language_model.decoder.config), self.language_model.layout
        lengths = batch["attention_mask"].sum(dim=1)
        by_modality = self.objective.normalizer == "by_modality"
        choices = batch["codes"].numel() * (layout.codebook_size if by_modality else layout.vocab_size)
        without_images = batch["codes"].numel() == 0
        if self.objective.text_loss_weight > 0 or without_images:
            ids = layout.image_token_offset if by_modality else layout.vocab_size
            choices = choices + text_target_mask(batch["labels"][:, 1:], layout).sum() * ids
        sums = lengths.sum(), lengths.square().sum()
        return StepWork(
            images=0 if without_images else len(batch["codes"]),
            tokens=sums[0],
            flops=architecture.training_flops(*sums, choices, self.adapter),
        )


class PretrainModule(NextTokenModule):
    """The paper's first stage (section 3.2; lr 1e-4, 256 images a batch, 512 px).

    Args:
        language_model: what to build; ``pretrained`` in it is the one key between the two columns of Table 2.
        kwargs: the arguments of `NextTokenModule`.
    """

    def __init__(self, language_model: LanguageModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = language_model
        if self.adapter is not None:
            raise UserError(
                "an adapter is too small for pretraining, where new rows and all layers are learned: leave "
                "model.init_args.adapter to fine-tuning and reinforcement learning."
            )

    def load_language_model(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """Build from the configuration."""
        return self.config.build()


class SFTModule(NextTokenModule):
    """The paper's second stage, at 1024 px on better data (section 3.2; lr 2e-5, 256 images a batch).

    Args:
        checkpoint: directory or hub id of a pretraining checkpoint, or of one released with the paper.
        kwargs: the arguments of `NextTokenModule`; where ``generation`` is None the checkpoint's defaults stay, where
            ``visual_tokenizer`` is None the checkpoint's own is kept.
    """

    def __init__(self, checkpoint: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
