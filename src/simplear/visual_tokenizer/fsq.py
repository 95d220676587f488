"""A small convolutional autoencoder with finite scalar quantisation (FSQ).

The encoder cuts the picture into patches and looks at each one with `encoder_kernel` 1 alone, so equal patches get
equal codes wherever they stand: a plain background is one code repeated, which a language model learns at once. The
decoder has the context instead: 3 x 3 convolutions over the grid of codes, then over pixels, so it can put together an
edge that its patches describe only roughly.

No adversarial or perceptual loss, no attention and no normalisation over space (which would let one corner of a
picture change the codes of another). There is no codebook to learn, hence none to collapse.

Source of the quantiser: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", through
vector-quantize-pytorch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simplear.errors import UserError
from simplear.visual_tokenizer import protocol


class Convolution(nn.Module):
    """A 2-D convolution that keeps its size and stores its kernel as a matrix, the only shape that Muon takes.

    ``weight`` is (out_channels, in_channels · kernel²); values begin as those of `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        fan_in = in_channels * kernel**2
        self.shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(out_channels, fan_in).uniform_(-(fan_in**-0.5), fan_in**-0.5))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(self.shape), self.bias, padding=self.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """``x + W2 gelu(W1 gelu(x))`` with two convolutions; it begins as the identity."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels, kernel)
        self.second = Convolution(channels, channels, kernel)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class FSQAutoencoder(protocol.TokenizerBase):
    """Patches → codes → pixels, any height and width that are multiples of `downsample`."""

    def __init__(
        self,
        levels: list[int],
        downsample: int,
        encoder_channels: int = 256,
        encoder_blocks: int = 1,
        encoder_kernel: int = 1,
        decoder_channels: int = 128,
        decoder_blocks: int = 2,
        refine_scale: int = 2,
        refine_channels: int = 32,
        refine_blocks: int = 1,
    ) -> None:
        """Random weights from torch's global generator.

        Args:
            levels: values of each quantised number, 3 or more each; their product is the codebook size.
            downsample: pixels a code stands for along each side.
            encoder_channels: width of the encoder.
            encoder_blocks: residual blocks of the encoder.
            encoder_kernel: 1: a code depends on its own patch alone; 3: each convolution also sees the next patches.
            decoder_channels: width of the decoder on the grid of codes.
            decoder_blocks: residual blocks of the decoder on the grid of codes.
            refine_scale: the decoder's last blocks work on a grid this many times coarser than the pixels.
            refine_channels: width of the decoder's last blocks.
            refine_blocks: residual blocks after upsampling, 0 or more.

        Raises:
            ValueError: a level below 3, an even kernel, or a `refine_scale` that does not divide `downsample`.
        """
        super().__init__()
        self.init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if not levels or min(levels) < 3:
            raise UserError(f"levels {levels} must be a list of numbers of 3 or more.")
        if encoder_kernel % 2 == 0:
            raise UserError(f"encoder_kernel {encoder_kernel} must be odd, so that codes keep their place.")
        if downsample % refine_scale:
            raise UserError(f"refine_scale {refine_scale} must divide downsample {downsample}.")
        self.downsample = downsample
        from vector_quantize_pytorch import FSQ  # here, for whoever draws codes alone

        with torch.device("cpu"):  # it computes with its levels at once, which the meta device cannot
            self.quantizer = FSQ(list(levels))
        self.codebook_size = int(self.quantizer.codebook_size)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(downsample),
            Convolution(3 * downsample**2, encoder_channels, 1),
            *[ResidualBlock(encoder_channels, encoder_kernel) for _ in range(encoder_blocks)],
            nn.GELU(),
            Convolution(encoder_channels, len(levels), 1),
        )
        upsample = downsample // refine_scale
        self.decoder = nn.Sequential(
            Convolution(len(levels), decoder_channels, 3),
            *[ResidualBlock(decoder_channels, 3) for _ in range(decoder_blocks)],
            nn.GELU(),
            Convolution(decoder_channels, refine_channels * upsample**2, 1),
            nn.PixelShuffle(upsample),
            *[ResidualBlock(refine_channels, 3) for _ in range(refine_blocks)],
            nn.GELU(),
            Convolution(refine_channels, 3 * refine_scale**2, 3),
            nn.PixelShuffle(refine_scale),
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and codes, for training.

        Args:
            pixels: (B, 3, H, W) float in [-1, 1].

        Returns:
            reconstruction (B, 3, H, W), not bounded, with a straight-through gradient to the encoder; codes
            (B, H / downsample, W / downsample) int64.

        Raises:
            ValueError: H or W is not a multiple of `downsample`.
        """
        protocol.require_whole_patches(pixels, self.downsample)
        quantized, codes = self.quantizer(self.encoder(pixels))
        return self.decoder(quantized), codes.long()

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.quantizer(self.encoder(pixels))[1]

    def _decode(self, codes: Tensor) -> Tensor:
        quantized = self.quantizer.indices_to_codes(codes)
        return self.decoder(quantized.to(self.decoder[0].weight.dtype))  # type: ignore[union-attr, arg-type]
