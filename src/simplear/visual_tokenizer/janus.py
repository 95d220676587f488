"""Janus's visual tokenizer (LlamaGen's VQ-16 as DeepSeek released it with Janus), through transformers' class.

16,384 codes of 16 × 16 pixels: a quarter of Cosmos's codebook and a better reconstruction as published
(docs/visual-tokenizers.md has figures, sources and the licence). Weights come from a Janus checkpoint or from one of
`JanusVQVAE` alone.

Two things are done here rather than by that class. Its network was trained with vectors of length one on both sides,
so a code is the vector of the smallest *angle*, as DeepSeek's ``vq_model.py`` has it; transformers' `encode` compares
lengths too, which picks other codes wherever the codebook's vectors are not all of one length. And transformers'
`decode` takes one square grid, while the decoder is convolutional and takes any.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simplear.errors import UserError
from simplear.text_files import read_object
from simplear.visual_tokenizer import protocol

MODEL_TYPES = ("janus", "janus_vqgan")
"""In the config.json of directories that `JanusTokenizer.from_pretrained` reads."""
ROWS_AT_ONCE = 4096
"""Vectors compared with the codebook at once: 256 MB of cosines with 16,384 codes."""


class JanusTokenizer(protocol.TokenizerBase):
    """Pictures of any size in multiples of the downsample factor, 16 for the released weights; float32."""

    def __init__(
        self,
        num_embeddings: int = 16_384,
        embed_dim: int = 8,
        latent_channels: int = 256,
        base_channels: int = 128,
        channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        double_latent: bool = False,
    ) -> None:
        """Untrained; for the released weights see `from_pretrained`. Arguments as of transformers' JanusVQVAEConfig.

        Args:
            num_embeddings: size of the codebook.
            embed_dim: length of its vectors.
            latent_channels: channels on either side of the codebook.
            base_channels: channels at full resolution, a multiple of 32.
            channel_multiplier: channels of each resolution over `base_channels`; each but the first halves the sides.
            num_res_blocks: residual blocks of each resolution.
            double_latent: whether the encoder's last layer has twice the channels.
        """
        super().__init__()
        channel_multiplier = list(channel_multiplier)
        self.init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        from transformers import JanusVQVAE, JanusVQVAEConfig  # takes a second, and most users have another tokenizer

        self.codebook_size = num_embeddings
        self.downsample = 2 ** (len(channel_multiplier) - 1)
        self.vqvae = JanusVQVAE(JanusVQVAEConfig(**self.init_args))

    @classmethod
    def from_pretrained(cls, directory: Path) -> JanusTokenizer:
        """The tokenizer of a Janus checkpoint or of one of its VQ-VAE alone, in transformers' layout, on CPU.

        Args:
            directory: has config.json with a model type of `MODEL_TYPES` (deepseek-community/Janus-Pro-1B on the hub
                has; deepseek-ai's own repositories are in another layout).

        Raises ValueError, naming the directory, where weights are missing, damaged or of another shape.
        """
        from transformers import JanusVQVAE, JanusVQVAEConfig
        from transformers.utils import logging

        content = read_object(directory / "config.json")
        fields = content.get("vq_config", {}) if content["model_type"] == "janus" else content
        with torch.device("meta"):  # the weights come with the class below
            tokenizer = cls(**{name: fields[name] for name in inspect.signature(cls).parameters if name in fields})
        config = JanusVQVAEConfig(**tokenizer.init_args)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list all weights of a whole Janus that are not this part's
        try:
            loaded: Any = JanusVQVAE.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                key_mapping={r"^model\.vqmodel\.": ""},  # where a whole Janus has it
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:  # what safetensors and transformers raise at damaged files is any of a dozen kinds
            raise UserError(
                f"the visual tokenizer's weights in {directory} cannot be read: {error} Download it again."
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        vqvae, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"{directory} lacks {len(missing)} weights of Janus's visual tokenizer, the first {missing[0]}: it is "
                "another model or damaged. Download it again."
            )
        tokenizer.vqvae = vqvae
        return tokenizer

    def _encode(self, pixels: Tensor) -> Tensor:
        vectors = self.vqvae.quant_conv(self.vqvae.encoder(pixels))
        flat = vectors.permute(0, 2, 3, 1).reshape(-1, vectors.shape[1])
        codes = torch.cat([(part @ self._codebook.T).argmax(1) for part in flat.split(ROWS_AT_ONCE)])
        return codes.view(len(pixels), *vectors.shape[-2:])

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = self._codebook[codes].permute(0, 3, 1, 2).contiguous()
        return self.vqvae.decoder(self.vqvae.post_quant_conv(vectors))

    @property
    def _codebook(self) -> Tensor:
        """(C, embed_dim), of length one."""
        return F.normalize(self.vqvae.quantize.embedding.weight, dim=-1)
