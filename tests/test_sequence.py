"""The token contract against examples written by hand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simplear.language_model import load_text_tokenizer
from simplear.sequence import (
    IGNORE_INDEX,
    SPECIAL_TOKENS,
    TokenLayout,
    add_special_tokens,
    encode_captions,
    image_target_mask,
    left_pad,
    positions_2d,
    positions_2d_at,
    prompt_sequence,
    text_lengths,
    text_target_mask,
    token_layout,
    training_batch,
    training_caption,
)

LAYOUT = TokenLayout(text_to_image_id=90, start_of_image_id=91, image_token_offset=100, codebook_size=8)


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Ids in the order of the words."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_batch_written_by_hand() -> None:
    codes = torch.tensor([[[0, 7], [3, 1]], [[2, 2], [5, 6]], [[4, 0], [0, 1]]])
    batch = training_batch([[11, 12], [], [13]], codes, LAYOUT)
    assert batch["input_ids"].tolist() == [
        [90, 11, 12, 91, 100, 107, 103, 101],
        [90, 91, 102, 102, 105, 106, 90, 90],
        [90, 13, 91, 104, 100, 100, 101, 90],
    ]
    assert batch["labels"].tolist() == [
        [-100, 11, 12, 91, 100, 107, 103, 101],
        [-100, 91, 102, 102, 105, 106, -100, -100],
        [-100, 13, 91, 104, 100, 100, 101, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2, [1] * 7 + [0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    image, text = image_target_mask(batch["labels"], LAYOUT), text_target_mask(batch["labels"], LAYOUT)
    assert image.int().tolist() == [[0] * 4 + [1] * 4, [0] * 2 + [1] * 4 + [0] * 2, [0] * 3 + [1] * 4 + [0]]
    assert text.int().tolist() == [[0] + [1] * 3 + [0] * 4, [0, 1] + [0] * 6, [0, 1, 1] + [0] * 5]
    assert text_lengths(batch["input_ids"], LAYOUT).tolist() == [4, 2, 3]


def test_text_alone_has_no_image_targets() -> None:
    batch = training_batch([[11], [12, 13]], torch.empty(2, 0, 0, dtype=torch.long), LAYOUT)
    assert batch["input_ids"].tolist() == [[90, 11, 91, 90], [90, 12, 13, 91]]
    assert not image_target_mask(batch["labels"], LAYOUT).any()
    assert batch["labels"][0, 3] == IGNORE_INDEX


def test_special_tokens_follow_the_vocabulary_in_the_order_of_the_release() -> None:
    tokenizer = word_tokenizer("unknown", "red", "circle")
    with pytest.raises(ValueError, match=r"no <\|t2i\|>.*add_special_tokens"):
        token_layout(tokenizer, 8)
    assert add_special_tokens(tokenizer) == 7
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(3, 10))
    assert add_special_tokens(tokenizer) == 0
    layout = token_layout(tokenizer, 8)
    assert layout == TokenLayout(text_to_image_id=3, start_of_image_id=5, image_token_offset=10, codebook_size=8)
    assert layout.vocab_size == 18


def test_a_tokenizer_with_some_of_the_seven_keeps_their_ids() -> None:
    tokenizer = word_tokenizer("unknown", "red")
    tokenizer.add_tokens(["<|soi|>", "<|t2i|>"], special_tokens=True)
    layout = token_layout(tokenizer, 4)
    assert (layout.start_of_image_id, layout.text_to_image_id, layout.image_token_offset) == (2, 3, 4)
    assert add_special_tokens(tokenizer) == 5
    assert token_layout(tokenizer, 4).start_of_image_id == 2


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|endoftext|>"])
def test_a_control_token_typed_into_a_caption_stays_text(tiny_text_tokenizer: str, token: str) -> None:
    tokenizer = load_text_tokenizer(tiny_text_tokenizer)
    caption = f"a red {token}{token} circle"
    (ids,) = encode_captions(tokenizer, [caption])
    assert tokenizer.convert_tokens_to_ids(token) not in ids
    assert tokenizer.decode(ids).strip() == caption
    # The same tokenizer would read it as a control token if it were not told otherwise.
    assert tokenizer.convert_tokens_to_ids(token) in tokenizer(caption)["input_ids"]


def test_control_tokens_that_are_not_marked_special_are_refused() -> None:
    tokenizer = word_tokenizer("unknown", "red")
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=False)
    with pytest.raises(ValueError, match=r"caption 'red <\|soi\|>' .*marked special"):
        encode_captions(tokenizer, ["red", "red <|soi|>"])


def test_captions_have_no_tokens_around_them(tiny_text_tokenizer: str) -> None:
    tokenizer = load_text_tokenizer(tiny_text_tokenizer)
    assert encode_captions(tokenizer, []) == []
    assert encode_captions(tokenizer, [""]) == [[]]
    one, two = encode_captions(tokenizer, ["two blue squares", "two blue squares, größer"])
    assert two[: len(one)] == one
    assert tokenizer.decode(two).strip() == "two blue squares, größer"


def test_codes_and_ids_are_one_to_one() -> None:
    codes = torch.arange(8).view(2, 4)
    assert LAYOUT.ids_of_codes(codes).tolist() == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert torch.equal(LAYOUT.codes_of_ids(LAYOUT.ids_of_codes(codes)), codes)
    assert LAYOUT.ids_of_codes(torch.tensor([3], dtype=torch.uint8)).dtype == torch.int64


@pytest.mark.parametrize("code", [-1, 8])
def test_a_code_outside_the_codebook_is_named(code: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.long)
    codes[1, 2] = code
    with pytest.raises(ValueError, match=rf"code {code} at index \[1, 2\] lies outside \[0, 8\)"):
        LAYOUT.ids_of_codes(codes)
    with pytest.raises(ValueError, match=rf"code {code} "):
        training_batch([[1]], codes[1].view(1, 1, 3), LAYOUT)


@pytest.mark.parametrize("id_", [99, 108])
def test_an_id_that_is_no_code_is_named(id_: int) -> None:
    with pytest.raises(ValueError, match=rf"image id {id_} at index \[1\] lies outside \[100, 108\)"):
        LAYOUT.codes_of_ids(torch.tensor([100, id_]))


def test_prompts_end_together() -> None:
    prompts = [prompt_sequence([11, 12], LAYOUT), prompt_sequence([], LAYOUT)]
    ids, mask = left_pad(prompts, LAYOUT)
    assert ids.tolist() == [[90, 11, 12, 91], [90, 90, 90, 91]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    ids, mask = left_pad(prompts, LAYOUT, width=6)
    assert mask.sum(dim=1).tolist() == [4, 2]
    assert torch.equal(ids[0, 2:], prompts[0])
    with pytest.raises(ValueError, match="prompt 0 has 4 tokens, more than the 3"):
        left_pad(prompts, LAYOUT, width=3)


def test_positions_in_two_dimensions_written_by_hand() -> None:
    """Two text tokens and 2 × 3 codes; three text tokens and the first five codes."""
    positions = positions_2d(torch.tensor([2, 3]), 8, grid_width=3)
    assert positions.shape == (2, 2, 8)
    assert positions[:, 0].tolist() == [[0, 1, 2, 2, 2, 3, 3, 3], [0, 1, 2, 3, 4, 2, 3, 4]]
    assert positions[:, 1].tolist() == [[0, 1, 2, 3, 3, 3, 4, 4], [0, 1, 2, 3, 4, 5, 3, 4]]
    one_by_one = [
        positions_2d_at(torch.tensor([[place], [place]]), torch.tensor([2, 3]), grid_width=3) for place in range(8)
    ]
    assert torch.equal(torch.cat(one_by_one, dim=2), positions)


def test_condition_dropout_by_hand() -> None:
    """Below the probability the caption goes, and its prefix with it."""
    assert training_caption("a red circle", "a photo of ", 0.0999, 0.1) == ""
    assert training_caption("a red circle", "a photo of ", 0.1, 0.1) == "a photo of a red circle"
    assert training_caption("a red circle", "", 0.0, 0.0) == "a red circle"
