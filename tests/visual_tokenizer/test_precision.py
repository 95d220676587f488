"""Codes do not depend on what precision the program around them has chosen."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from simplear.visual_tokenizer import FSQAutoencoder, load_visual_tokenizer


@pytest.mark.parametrize("tf32", [True, False])
def test_pictures_are_encoded_and_decoded_in_full_precision_and_the_settings_come_back(tf32: bool) -> None:
    tokenizer = FSQAutoencoder([3, 3, 3], 8, encoder_channels=8, decoder_channels=8, refine_channels=4)
    seen: list[tuple[bool, str, bool]] = []

    def note(*_: object) -> None:
        backend = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        seen.append((*backend, torch.is_autocast_enabled("cpu")))

    for part in (tokenizer.encoder, tokenizer.decoder):
        part.register_forward_hook(note)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        set_so = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        with torch.autocast("cpu", torch.bfloat16):
            codes = tokenizer.encode(torch.rand(1, 3, 16, 16))
            tokenizer.decode(codes)
            assert torch.is_autocast_enabled("cpu")
            with pytest.raises(ValueError, match="lies outside"):
                tokenizer.decode(codes + 100)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == set_so
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == [(False, "highest", False)] * 2


def test_a_tokenizer_that_is_loaded_in_a_bfloat16_training_is_float32(tiny_visual_tokenizer: str) -> None:
    expected = load_visual_tokenizer(tiny_visual_tokenizer)
    with HalfPrecision("bf16-true").forward_context():
        loaded = load_visual_tokenizer(tiny_visual_tokenizer)
    assert loaded.fingerprint == expected.fingerprint
