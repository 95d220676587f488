"""The token contract: how a caption and an image become one sequence of ids.

    <|t2i|>  caption …  <|soi|>  code(0,0)  code(0,1)  …  code(h-1,w-1)

One id per code in raster order and no end token: the grid says when the image is complete. Code ``c`` has id
``image_token_offset + c``, where the offset is the length of the text tokenizer once it holds the seven special
tokens. Everything here is a pure function of its arguments; nothing knows of models, files or Lightning.

Source of the format: section 3.1 of the SimpleAR paper and its released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from simplear.errors import UserError

TEXT_TO_IMAGE = "<|t2i|>"
START_OF_IMAGE = "<|soi|>"
SPECIAL_TOKENS = (TEXT_TO_IMAGE, "<|i2t|>", START_OF_IMAGE, "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>")
"""The special tokens of the release, in its order. Only the first and third occur in text-to-image sequences."""

IGNORE_INDEX = -100
"""Label of a position that is not predicted (PyTorch's convention for cross-entropy)."""

MAX_TEXT_TOKENS = 512
"""Default limit on caption tokens, ``<|t2i|>`` and ``<|soi|>`` not counted."""


@dataclass(frozen=True)
class TokenLayout:
    """Where text ends and image codes begin in the vocabulary of one checkpoint."""

    text_to_image_id: int
    """Id of ``<|t2i|>``."""
    start_of_image_id: int
    """Id of ``<|soi|>``."""
    image_token_offset: int
    """Id of code 0; ids below it are text."""
    codebook_size: int
    """Number of image codes."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: text ids and image ids."""
        return self.image_token_offset + self.codebook_size

    @property
    def padding_id(self) -> int:
        """Fills the rest of a ragged batch. Any id would do, for every use masks it."""
        return self.text_to_image_id

    def ids_of_codes(self, codes: Tensor) -> Tensor:
        """Image ids of codes, any shape, int64. Raises ValueError on a code outside ``[0, codebook_size)``."""
        _require_range(codes, 0, self.codebook_size, "code")
        return codes.long() + self.image_token_offset

    def codes_of_ids(self, ids: Tensor) -> Tensor:
        """Codes of image ids, any shape, int64. Raises ValueError on any other id: nothing is clamped."""
        _require_range(ids, self.image_token_offset, self.vocab_size, "image id")
        return ids.long() - self.image_token_offset


def _require_range(values: Tensor, low: int, high: int, noun: str) -> None:
    outside = (values < low) | (values >= high)
    if outside.any():
        where = outside.nonzero()[0].tolist()
        raise UserError(
            f"{noun} {int(values[tuple(where)])} at index {where} lies outside [{low}, {high}): the tokens were made "
            f"with another tokenizer or are damaged. Tokenize again, or use the checkpoint that belongs to them."
        )


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Append the missing ones of the seven special tokens, in the release's order; returns how many were added."""
    present = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in present]
    return tokenizer.add_tokens(missing, special_tokens=True)


def token_layout(tokenizer: PreTrainedTokenizerBase, codebook_size: int) -> TokenLayout:
    """The layout that a text tokenizer and a codebook give: image ids follow the tokenizer's last id.

    Raises ValueError when the tokenizer lacks ``<|t2i|>`` or ``<|soi|>``.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (TEXT_TO_IMAGE, START_OF_IMAGE):
        if token not in vocabulary:
            raise UserError(f"the text tokenizer has no {token}: call simplear.sequence.add_special_tokens first.")
    return TokenLayout(
        text_to_image_id=vocabulary[TEXT_TO_IMAGE],
        start_of_image_id=vocabulary[START_OF_IMAGE],
        image_token_offset=len(tokenizer),
        codebook_size=codebook_size,
    )


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """Ids of captions as plain text: a special token spelled out inside one stays text.

    Raises ValueError naming the caption if the tokenizer yields a control token all the same.
    """
    if not captions:
        return []
    encoded = tokenizer(list(captions), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # Not get_vocab(), which builds a dictionary of all ids each time; a missing token gives None.
    control = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} - {None}
    for caption, ids in zip(captions, encoded, strict=True):
        if not control.isdisjoint(ids):
            raise UserError(
                f"caption {caption[:80]!r} was encoded to a control token: the seven tokens {SPECIAL_TOKENS} must be "
                "marked special in the text tokenizer."
            )
    return encoded


def prompt_sequence(caption_ids: Sequence[int], layout: TokenLayout) -> Tensor:
    """``<|t2i|> caption <|soi|>`` as a 1-D int64 tensor; image ids follow it."""
    return torch.tensor([layout.text_to_image_id, *caption_ids, layout.start_of_image_id], dtype=torch.long)


def training_caption(caption: str, prefix: str, uniform: float, dropout: float) -> str:
    """What training puts between the control tokens: prefix and caption or, with probability ``dropout``, nothing.

    Args:
        uniform: the sample's random number in [0, 1).
        dropout: probability of the empty caption, which guidance uses as the unconditional one; it has no prefix.
    """
    return "" if uniform < dropout else prefix + caption


def training_batch(caption_ids: Sequence[Sequence[int]], codes: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """One right-padded batch for next-token prediction.

    Args:
        caption_ids: B captions as ids, already dropped or truncated as wanted.
        codes: (B, h, w) integer codes of one grid; h and w may be 0 for text alone.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, each (B, L) int64. ``labels[:, i]`` is ``input_ids[:, i]``
        itself, the shift is the loss's; it is ``IGNORE_INDEX`` on ``<|t2i|>``, which nothing precedes, and on padding.
    """
    image_ids = layout.ids_of_codes(codes.flatten(1))
    rows = [torch.cat([prompt_sequence(ids, layout), image]) for ids, image in zip(caption_ids, image_ids, strict=True)]
    return _right_padded(rows, layout)


def text_batch(text_ids: Sequence[Sequence[int]], layout: TokenLayout) -> dict[str, Tensor]:
    """One right-padded batch of texts without images: plain text, as a language model reads it, no control token.

    Args:
        text_ids: B texts as ids, none empty.

    Returns:
        as `training_batch`; the first token of a text, which nothing precedes, is not predicted.
    """
    return _right_padded([torch.tensor(ids, dtype=torch.long) for ids in text_ids], layout)


def _right_padded(rows: list[Tensor], layout: TokenLayout) -> dict[str, Tensor]:
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=layout.padding_id)
    lengths = torch.tensor([len(row) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def left_pad(prompts: Sequence[Tensor], layout: TokenLayout, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ragged prompts as one batch that ends together, ready to be continued.

    Args:
        prompts: B 1-D int64 tensors.
        width: pad to this length instead of the longest prompt's.

    Returns:
        ids (B, L) and attention mask (B, L), int64; 1 where there is a token.
    """
    width = max(len(prompt) for prompt in prompts) if width is None else width
    ids = torch.full((len(prompts), width), layout.padding_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if len(prompt) > width:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, more than the {width} to pad to.")
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def text_lengths(input_ids: Tensor, layout: TokenLayout) -> Tensor:
    """Tokens up to and including ``<|soi|>`` in each right-padded row, (B,): where its image begins."""
    return (input_ids == layout.start_of_image_id).int().argmax(dim=1) + 1


def labelled_lengths(labels: Tensor) -> Tensor:
    """Tokens up to and including the last target of each row of labels (B, L), (B,); 1 in a row without targets.

    In a batch as `training_batch` and `text_batch` make it: all tokens but the padding.
    """
    places = torch.arange(labels.shape[1], device=labels.device)
    return (places * (labels != IGNORE_INDEX)).amax(dim=1) + 1


def positions_2d(lengths: Tensor, sequence_length: int, grid_width: int) -> Tensor:
    """Positions of 2-D RoPE, (2, B, L): text at (p, p), code (r, c) of an image that begins at n at (n + r, n + c).

    Args:
        lengths: (B,) tokens before the image, as `text_lengths` gives.
        sequence_length: L.
        grid_width: codes in one row of the image.
    """
    position = torch.arange(sequence_length, device=lengths.device).expand(len(lengths), -1)
    return positions_2d_at(position, lengths, grid_width)


def positions_2d_at(position: Tensor, lengths: Tensor, grid_width: int) -> Tensor:
    """`positions_2d` for given 1-D positions (B, L), so that generation can ask for the next one alone."""
    start = lengths[:, None]
    code = (position - start).clamp(min=0)
    image = position >= start
    rows = torch.where(image, start + code // max(grid_width, 1), position)
    columns = torch.where(image, start + code % max(grid_width, 1), position)
    return torch.stack([rows, columns])


def image_target_mask(labels: Tensor, layout: TokenLayout) -> Tensor:
    """(B, L) bool: positions whose label is an image id, the ones that Eq. 1 of the paper sums over."""
    return labels >= layout.image_token_offset


def text_target_mask(labels: Tensor, layout: TokenLayout) -> Tensor:
    """(B, L) bool: positions whose label is a text id (the caption's and ``<|soi|>``)."""
    return (labels != IGNORE_INDEX) & (labels < layout.image_token_offset)
