"""Token shards as training batches for language-model stages and for GRPO.

Captions are chosen, prefixed and dropped in each epoch by pure functions of (seed, epoch, row); sequences are built by
`simplear.sequence`. A file of prompts among the paths gives rows with an empty grid, for GRPO; a set of texts,
which `simplear data text` writes, gives rows without images, whose batches are plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simplear.data.shards import RowBatch, TokenShards
from simplear.data.training.order import DROPOUT, PREFIX, Batch, choose_captions, uniforms
from simplear.data.training.ordered_data import BatchDataset, OrderedDataModule
from simplear.errors import UserError
from simplear.language_model import load_text_tokenizer
from simplear.sequence import (
    MAX_TEXT_TOKENS,
    SPECIAL_TOKENS,
    START_OF_IMAGE,
    TEXT_TO_IMAGE,
    TokenLayout,
    add_special_tokens,
    encode_captions,
    text_batch,
    token_layout,
    training_batch,
    training_caption,
)

logger = logging.getLogger(__name__)

VERIFIED_AT_START = 2**30
"""Bytes of shards up to which they are hashed at each start by default: some three seconds on one core."""


class TokenBatches(BatchDataset):
    """Micro-batches of token shards."""

    def __init__(
        self,
        shards: TokenShards,
        tokenizer: PreTrainedTokenizerBase,
        layout: TokenLayout,
        *,
        seed: int,
        caption_dropout: float,
        caption_prefixes: Sequence[str],
        max_text_tokens: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.shards, self.tokenizer, self.layout, self.seed = shards, tokenizer, layout, seed
        self.caption_dropout, self.caption_prefixes = caption_dropout, list(caption_prefixes) or [""]
        self.max_text_tokens = max_text_tokens
        self.buckets = [shards.bucket(grid) for grid in shards.grids]
        self.bucket_sizes = tuple(len(bucket) for bucket in self.buckets)
        self.set_sizes = tuple(tuple(shards.rows_by_path(grid)) for grid in shards.grids)
        self.weights = None if weights is None or len(weights) == 1 else tuple(map(float, weights))

    def read(self, micro_batch: Batch) -> tuple[RowBatch, Tensor, list[str]]:
        """The rows at these positions, their codes (B, h, w) int64, and the caption that the epoch draws for each."""
        rows = self.buckets[micro_batch.bucket].rows(micro_batch.positions)
        read = self.shards.read(rows)
        codes = torch.from_numpy(read.codes.astype(np.int64))
        return read, codes, choose_captions(read.captions, self.seed, micro_batch.epoch, rows)

    def make_batch(self, micro_batch: Batch) -> dict[str, Any]:
        """See `TokenDataModule`; adds ``truncated`` (B,) bool."""
        read, codes, captions = self.read(micro_batch)
        epoch, rows, texts = micro_batch.epoch, read.numbers, captions
        dropped = np.zeros(len(rows), bool)
        plain_text = self.shards.holds_texts and not codes.numel()
        if not plain_text:
            prefixes = choose_captions([self.caption_prefixes] * len(rows), self.seed, epoch, rows, purpose=PREFIX)
            draws = uniforms(self.seed, epoch, rows, DROPOUT)
            dropped = draws < self.caption_dropout
            texts = [
                training_caption(caption, prefix, draw, self.caption_dropout)
                for caption, prefix, draw in zip(captions, prefixes, draws, strict=True)
            ]
        whole = encode_captions(self.tokenizer, texts)
        ids = [caption[: self.max_text_tokens] for caption in whole]
        return {
            "codes": codes,
            **(text_batch(ids, self.layout) if plain_text else training_batch(ids, codes, self.layout)),
            "dropped": torch.from_numpy(dropped),
            "truncated": torch.tensor([len(caption) > self.max_text_tokens for caption in whole]),
            "captions": captions,
            "metadata": read.metadata,
            "keys": read.keys,
        }


class TokenDataModule(OrderedDataModule):
    """Batches of token shards, in an order that no restart and no number of processes changes.

    A batch, of one grid (h, w), is a dictionary of ``codes`` (B, h, w) int64; ``input_ids``, ``labels`` and
    ``attention_mask`` (B, L) int64 as `simplear.sequence.training_batch` makes them; ``dropped`` (B,) bool: the caption
    was left out; ``captions``: the chosen ones, without prefix and whether dropped or not; ``metadata``: dictionaries;
    ``keys``. B is the global batch size divided by ranks and accumulation. Rows of a set of texts have batches of their
    own, grid (0, 0): plain text without prefix, dropout or control tokens.

    Without `weights` an epoch passes through all rows of all paths once. With them each global batch has rows of all
    paths by their shares, exactly but for rounding, and an epoch ends when the last path was passed through
    (`simplear.data.training.mixing`).

    Validation and test take the rows in their order, captions never dropped; rows that fill no global batch are left
    out, with a line that says how many.
    """

    def __init__(
        self,
        paths: str | list[str],
        global_batch_size: int,
        tokenizer: str,
        *,
        weights: list[float] | None = None,
        validation_paths: str | list[str] | None = None,
        codebook_size: int | None = None,
        caption_dropout: float = 0.1,
        caption_prefixes: Sequence[str] = (),
        max_text_tokens: int = MAX_TEXT_TOKENS,
        seed: int = 0,
        num_workers: int = 0,
        shuffle: bool = True,
        verify: bool | None = None,
    ) -> None:
        """
        Args:
            paths: Directories of token shards, of images or of texts, or files of prompts: .txt with a prompt a line,
                .jsonl or .json with objects that have a "prompt". A pattern such as tokens/train-* is one path.
            global_batch_size: Images of one optimizer step, over all ranks and accumulated micro-batches.
            tokenizer: Directory or hub id of the text tokenizer; missing special tokens are appended in memory.
            weights: Share of each of the paths among the training samples, as numbers in any unit; by default all
                rows count alike.
            validation_paths: Token shards or prompts for validation and test; none by default.
            codebook_size: Number of image codes; needed with prompts alone, else the shards say it.
            caption_dropout: Probability that a training caption is empty, for classifier-free guidance.
            caption_prefixes: One of these, drawn at random, is put before each caption, exactly as it is written.
            max_text_tokens: Longer captions are cut at their end, and counted.
            seed: Of the order and of all choices about captions.
            num_workers: Data loader processes on each rank; 0 loads in the training process.
            shuffle: False takes the rows in the order of the files, in every epoch.
            verify: Hash all shards at each start, divided over the ranks, so that damage is found before training; by
                default up to 1 GiB of them. In any case each row's checksum is compared whenever it is read.
        """
        super().__init__(global_batch_size, seed, num_workers, shuffle)
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout {caption_dropout} is not a probability.")
        count = 1 if isinstance(paths, str) else len(paths)
        if weights is not None and len(weights) != count:
            raise UserError(f"{len(weights)} weights for {count} paths: give one for each, in their order.")
        self.paths, self.validation_paths, self.weights = paths, validation_paths, weights
        self.tokenizer_path, self.codebook_size = tokenizer, codebook_size
        self.caption_dropout, self.caption_prefixes = caption_dropout, caption_prefixes
        self.max_text_tokens, self.verify = max_text_tokens, verify
        self._opened: list[TokenShards] = []
        self.downsample: int | None = None
        """Pixels a code; after setup, None with prompts alone."""
        self.fingerprint: str | None = None
        """Of the visual tokenizer that made the codes; after setup, None with prompts alone."""
        self.truncated_captions = 0
        """Captions of training batches that were cut on this rank, so far."""

    @property
    def holds_texts(self) -> bool:
        """Whether there are texts without images among the rows; after setup."""
        return any(shards.holds_texts for shards in self._opened)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Grids (h, w) of training and validation rows, sorted; after setup. Prompts and texts have (0, 0)."""
        return sorted({grid for shards in self._opened for grid in shards.grids})

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and the text tokenizer.

        Raises:
            FileNotFoundError, ValueError: what `TokenShards` raises; shards of two tokenizers, or not as they were
                written; no codebook size.
        """
        super().setup(stage)
        training = TokenShards(self.paths) if stage in (None, "fit") else None
        validation = TokenShards(self.validation_paths) if self.validation_paths else None
        self._opened = [shards for shards in (training, validation) if shards is not None]
        for shards in self._opened:
            if shards.holds_texts and shards.holds_prompts:
                raise UserError(
                    "prompts and texts without images cannot be in one set of paths: prompts are for GRPO, "
                    "texts for pretraining and fine-tuning."
                )
            if shards.fingerprint is not None:
                self._require_same_tokenizer(shards)
            if self.verify or (self.verify is None and shards.size <= VERIFIED_AT_START):
                trainer = self.trainer
                shards.verify(*((0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)))
        if self.codebook_size is None:
            raise UserError(
                "prompts or texts alone do not say the number of image codes: give codebook_size "
                "(--data.init_args.codebook_size)."
            )
        self.text_tokenizer = load_text_tokenizer(self.tokenizer_path)
        vocabulary = self.text_tokenizer.get_vocab()
        if TEXT_TO_IMAGE in vocabulary and START_OF_IMAGE in vocabulary:
            # A released checkpoint's: adding the other tokens would shift its image ids.
            present = [token for token in SPECIAL_TOKENS if token in vocabulary]
            self.text_tokenizer.add_tokens(present, special_tokens=True)
        else:
            add_special_tokens(self.text_tokenizer)
        self.layout = token_layout(self.text_tokenizer, self.codebook_size)
        make = partial(
            TokenBatches,
            tokenizer=self.text_tokenizer,
            layout=self.layout,
            seed=self.seed,
            caption_prefixes=self.caption_prefixes,
            max_text_tokens=self.max_text_tokens,
        )
        if training is not None:
            self.training = make(training, caption_dropout=self.caption_dropout, weights=self.weights)
        if validation is not None:
            self.validation = make(validation, caption_dropout=0.0)

    def teardown(self, stage: str) -> None:
        """Say how many captions were cut."""
        if self.truncated_captions:
            logger.warning(
                "%d captions were cut to %d tokens in this run", self.truncated_captions, self.max_text_tokens
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Also count the captions that were cut."""
        truncated = int(batch.pop("truncated").sum())
        if self.trainer is not None and self.trainer.training:
            self.truncated_captions += truncated
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def _require_same_tokenizer(self, shards: TokenShards) -> None:
        if self.codebook_size not in (None, shards.codebook_size):
            raise UserError(
                f"the shards have {shards.codebook_size} codes, not {self.codebook_size} as codebook_size or the "
                "training shards say: they were made with another visual tokenizer."
            )
        if self.fingerprint not in (None, shards.fingerprint):
            raise UserError(
                f"validation shards were made with the visual tokenizer {str(shards.fingerprint)[:12]}…, training "
                f"shards with {str(self.fingerprint)[:12]}…: tokenize one of them again."
            )
        self.codebook_size, self.fingerprint = shards.codebook_size, shards.fingerprint
        self.downsample = shards.downsample
