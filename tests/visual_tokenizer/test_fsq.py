"""The FSQ autoencoder: shapes, locality, an independent account of the quantiser, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from simplear.visual_tokenizer import FSQAutoencoder


def small(**changes) -> FSQAutoencoder:
    arguments = {
        "levels": [5, 4, 3],
        "downsample": 4,
        "encoder_channels": 16,
        "decoder_channels": 8,
        "decoder_blocks": 1,
        "refine_channels": 4,
    }
    torch.manual_seed(0)
    tokenizer = FSQAutoencoder(**(arguments | changes)).eval()
    nn.init.normal_(tokenizer.encoder[-1].weight, std=1.0)  # spreads the codes of an untrained encoder
    return tokenizer


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (8, 24)])
def test_one_tokenizer_serves_every_resolution(height, width):
    tokenizer = small()
    codes = tokenizer.encode(pictures(2, height, width))
    assert codes.shape == (2, height // 4, width // 4)
    assert codes.dtype == torch.int64
    assert tokenizer.codebook_size == 60
    assert codes.min() >= 0
    assert codes.max() < 60
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (2, 3, height, width)
    assert decoded.abs().max() <= 1


def test_codes_count_through_the_levels_first_level_fastest():
    """Oracle: enumerate the product of levels by hand; value k of L levels stands for (k - L // 2) / (L // 2)."""
    tokenizer = small()
    vectors = tokenizer.quantizer.indices_to_codes(torch.arange(60).reshape(1, 1, 60))[0, :, 0].T
    by_hand = [[(a - 2) / 2, (b - 2) / 2, (c - 1) / 1] for c, b, a in itertools.product(range(3), range(4), range(5))]
    torch.testing.assert_close(vectors, torch.tensor(by_hand))


def test_decode_of_encode_is_the_reconstruction_of_forward():
    tokenizer, pixels = small(), pictures(3, 16, 16)
    with torch.no_grad():
        reconstruction, codes = tokenizer(pixels)
    assert torch.equal(codes, tokenizer.encode(pixels))
    torch.testing.assert_close(tokenizer.decode(codes), reconstruction.clamp(-1, 1))


def test_codes_do_not_depend_on_the_batch():
    tokenizer, pixels = small(), pictures(16, 16, 16)
    assert len(tokenizer.encode(pixels).unique()) > 20
    one_by_one = torch.cat([tokenizer.encode(picture[None]) for picture in pixels])
    assert torch.equal(tokenizer.encode(pixels), one_by_one)


def changed_codes(tokenizer: FSQAutoencoder) -> set[tuple[int, int]]:
    pixels = pictures(1, 32, 32)
    other = pixels.clone()
    other[:, :, 12:16, 12:16] *= -1  # the patch in row 3, column 3
    difference = tokenizer.encode(pixels) != tokenizer.encode(other)
    return {(row, column) for _, row, column in difference.nonzero().tolist()}


def test_encoder_kernel_1_sees_its_own_patch_alone_and_3_sees_more():
    assert changed_codes(small(encoder_kernel=1)) == {(3, 3)}
    wide = small(encoder_kernel=3)
    for block in wide.encoder:
        if hasattr(block, "second"):
            nn.init.normal_(block.second.weight, std=0.3)  # blocks begin as the identity
    assert len(changed_codes(wide)) > 1


def test_equal_patches_get_equal_codes_anywhere():
    patch = pictures(1, 4, 4)
    assert len(small().encode(patch.repeat(2, 1, 5, 7)).unique()) == 1


def test_gradient_passes_the_quantiser_to_every_weight():
    tokenizer = small()
    for block in tokenizer.modules():
        if hasattr(block, "second"):
            nn.init.normal_(block.second.weight, std=0.1)
    reconstruction, _ = tokenizer(pictures(2, 16, 16))
    reconstruction.square().mean().backward()
    without = [name for name, weight in tokenizer.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def test_autocast_leaves_codes_alone():
    tokenizer, pixels = small(), pictures(32, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), small().encode(pixels))
        _, rounded = tokenizer(pixels)
    assert not torch.equal(rounded, tokenizer.encode(pixels))  # so the comparison above is able to fail


def test_meta_device_builds_the_size_of_the_paper():
    with torch.device("meta"):
        tokenizer = FSQAutoencoder(levels=[8, 8, 8, 5, 5, 5], downsample=16)
    assert tokenizer.codebook_size == 64_000
    assert {weight.device.type for weight in tokenizer.parameters()} == {"meta"}


def test_fingerprint_changes_with_one_weight_and_with_an_argument():
    tokenizer = small()
    before = tokenizer.fingerprint
    assert before == small().fingerprint
    with torch.no_grad():
        tokenizer.decoder[0].weight[0, 0] += 1e-6
    assert tokenizer.fingerprint != before
    # the same weights of another meaning: the order of levels decides what a code stands for
    reordered = small(levels=[3, 4, 5])
    reordered.load_state_dict(small().state_dict())
    assert reordered.fingerprint != before


def test_pictures_that_are_not_whole_patches_are_refused():
    with pytest.raises(ValueError, match=r"18 x 16 pixels.*multiples of 4"):
        small().encode(pictures(1, 18, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small().encode(pictures(1, 16, 16)[:, :1])


@pytest.mark.parametrize("code", [-1, 60])
def test_codes_out_of_range_are_refused_with_value_and_place(code):
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    codes[1, 2, 3] = code
    with pytest.raises(ValueError, match=f"code {code} at image 1, row 2, column 3"):
        small().decode(codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"levels": [8, 2]}, "3 or more"), ({"encoder_kernel": 2}, "odd"), ({"refine_scale": 3}, "divide")],
)
def test_impossible_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
