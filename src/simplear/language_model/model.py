"""The language model: a plain Qwen2 decoder and the knowledge of which of its ids are image codes.

`LanguageModel` adds no weights to the decoder. It owns three things that every stage and engine needs: hidden states
for positions of either RoPE kind, the image head (logits over the code rows alone, a third of the full head's cost
with Qwen2.5's vocabulary), and the training losses. Sampling, caches and optimisation live elsewhere.

Under FSDP2 the root module is this one, so the head's weights are gathered inside `forward`.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Cache,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import has_file

from simplear.errors import MissingFileError, UserError, first_line
from simplear.hub import is_hub_id
from simplear.language_model.adapter import CodeRows
from simplear.language_model.loss import Normalizer, next_token_losses, token_cross_entropy, token_entropy
from simplear.language_model.packing import PACKED_ATTENTION, Packing
from simplear.language_model.rope import Qwen2Rope2DConfig, Qwen2Rope2DForCausalLM, RotaryEmbedding
from simplear.sequence import (
    TokenLayout,
    add_special_tokens,
    labelled_lengths,
    positions_2d,
    positions_2d_at,
    text_lengths,
    token_layout,
)

logger = logging.getLogger(__name__)

RopeKind = Literal["1d", "2d"]


class LanguageModel(nn.Module):
    """A decoder over text and image ids.

    Args:
        decoder: Qwen2 with ``layout.vocab_size`` embedding rows.
        layout: where image ids begin.
    """

    def __init__(self, decoder: Qwen2ForCausalLM, layout: TokenLayout) -> None:
        super().__init__()
        rows = decoder.config.vocab_size
        if rows != layout.vocab_size:
            raise UserError(
                f"the model has {rows} embedding rows but tokenizer and codebook need {layout.image_token_offset} + "
                f"{layout.codebook_size} = {layout.vocab_size}: it belongs to another text or visual tokenizer."
            )
        self.decoder = decoder
        self.layout = layout
        if not isinstance(decoder.model.rotary_emb, RotaryEmbedding):
            device = decoder.model.embed_tokens.weight.device
            decoder.model.rotary_emb = RotaryEmbedding(config=decoder.config).to(device)
        if decoder.config._attn_implementation == "sdpa":
            decoder.set_attn_implementation(PACKED_ATTENTION)

    @property
    def rope(self) -> RopeKind:
        """Kind of rotary positions."""
        return "2d" if isinstance(self.decoder, Qwen2Rope2DForCausalLM) else "1d"

    @property
    def max_positions(self) -> int:
        """Longest sequence that the decoder was made for."""
        return self.decoder.config.max_position_embeddings

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        grid: tuple[int, int],
        *,
        normalizer: Normalizer = "by_modality",
        with_text: bool = True,
        chunk_rows: int | None = None,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Image loss (B,) and text loss (B,) of right-padded sequences; see `next_token_losses`.

        Padding follows every real token, so causal attention alone keeps it out and no mask is needed. With ``packed``
        what follows a sequence's last target is cut out, padding first of all, and the losses are the same.
        """
        packing = Packing.of(labelled_lengths(labels), labels.shape[1]) if packed else None
        hidden = self._training_states(input_ids, grid, packing)
        return next_token_losses(
            hidden,
            self._head,
            labels,
            self.layout,
            normalizer=normalizer,
            with_text=with_text,
            chunk_rows=chunk_rows,
            packing=packing,
        )

    def image_log_probs(
        self,
        input_ids: Tensor,
        grid: tuple[int, int],
        *,
        temperature: float = 1.0,
        chunk_rows: int | None = None,
        with_entropies: bool = True,
        packed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What sampling at a temperature, without guidance or truncation, gives each code of right-padded sequences.

        Args:
            input_ids: (B, L), from `simplear.sequence.training_batch`; each row holds one image of ``grid``.
            temperature: divides the logits over the codebook.
            chunk_rows: rows of logits held at once; None holds them all. Same values, less memory.
            with_entropies: compute the entropies, which takes the head's logits once more; else they are None.
            packed: cut the padding out. Same values, less arithmetic.

        Returns:
            log-probabilities of the codes (B, h · w), in nats, and the entropies of their distributions (B, h · w),
            the latter without gradient; float32 or wider.
        """
        (batch, length), count = input_ids.shape, grid[0] * grid[1]
        text = text_lengths(input_ids, self.layout)
        packing = Packing.of(text + count, length) if packed else None
        hidden = self._training_states(input_ids, grid, packing)
        image = torch.arange(count, device=input_ids.device)
        codes = self.layout.codes_of_ids(input_ids.gather(1, text[:, None] + image)).flatten()
        starts = torch.arange(batch, device=input_ids.device) * length if packing is None else packing.starts
        # The state before a code predicts it: the image begins at the text's length.
        places = (starts + text - 1)[:, None] + image
        states = hidden.flatten(0, 1).index_select(0, places.flatten()) / temperature
        weight = self.image_head_weight
        log_probs = -token_cross_entropy(states, weight, codes, chunk_rows).view(batch, count)
        if not with_entropies:
            return log_probs, None
        return log_probs, token_entropy(states, weight, chunk_rows).view_as(log_probs)

    def _training_states(self, input_ids: Tensor, grid: tuple[int, int], packing: Packing | None) -> Tensor:
        """Final hidden states of right-padded sequences (B, L): (B, L, D), or packed (1, T, D)."""
        position_ids = self.training_positions(input_ids, grid)
        if packing is None:
            return self.hidden_states(input_ids, position_ids, attention_mask=None)
        if self.decoder.config._attn_implementation != PACKED_ATTENTION:
            raise UserError(
                f"packed sequences need attention by sdpa, the model has {self.decoder.config._attn_implementation}: "
                "leave attn_implementation out, or packed."
            )
        by_sample = position_ids.expand(*position_ids.shape[:-2], *packing.padded)
        packed_positions = by_sample.flatten(-2)[..., packing.places].unsqueeze(-2)
        return self.hidden_states(packing.pack(input_ids)[None], packed_positions, attention_mask=None, packing=packing)

    def training_positions(self, input_ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions of right-padded sequences (B, L): (1, L) for 1-D RoPE, (2, B, L) for 2-D.

        Without codes, grid (0, 0), all tokens are text, and both kinds are the same positions.
        """
        length = input_ids.shape[1]
        if self.rope == "2d" and grid == (0, 0):
            return torch.arange(length, device=input_ids.device).expand(2, len(input_ids), -1)
        if self.rope == "2d":
            return positions_2d(text_lengths(input_ids, self.layout), length, grid[1])
        return torch.arange(length, device=input_ids.device)[None]

    def positions_at(self, position: Tensor, prompt_lengths: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions for a step of generation.

        Args:
            position: (B, T) places in each row's own sequence, counted without padding.
            prompt_lengths: (B,) tokens before each row's image.
        """
        return positions_2d_at(position, prompt_lengths, grid[1]) if self.rope == "2d" else position

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D).

        Args:
            input_ids: (B, T) the new tokens.
            position_ids: of the new tokens, from `training_positions` or `positions_at`.
            attention_mask: (B, past + T), 1 where there is a token; None: every token attends to all before it.
            cache: keys and values of the past, extended in place.
            packing: the tokens are one row (1, T) of samples that do not see each other.
        """
        # A dict passes the decoder's mask construction by: with None, attention is causal and needs no mask tensor.
        mask = {"full_attention": None} if attention_mask is None else attention_mask
        with nullcontext() if cache is None else self._uncompiled():
            return self.decoder.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                packing=packing,
            ).last_hidden_state

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Layers that are compiled for training run as they are: with a cache each would compile again by itself."""
        compiled = self.decoder.model.layers[0]._compiled_call_impl is not None
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    @property
    def image_head_weight(self) -> Tensor:
        """The head's rows of the codes, (codebook_size, D)."""
        return self._head[self.layout.image_token_offset : self.layout.vocab_size]

    @property
    def _head(self) -> Tensor | CodeRows:
        head: Any = self.decoder.lm_head
        return head if isinstance(head, CodeRows) else head.weight

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook alone, (…, codebook_size), for hidden states (…, D)."""
        return F.linear(hidden, self.image_head_weight)


@dataclass
class LanguageModelConfig:
    """What to build a language model from."""

    tokenizer: str
    """Directory or hub id of the text tokenizer; missing ones of the seven special tokens are added."""
    codebook_size: int
    """Number of codes of the visual tokenizer."""
    pretrained: str | None = None
    """Directory or hub id of a Qwen2-style language model to start from; None starts from random weights."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' Qwen2Config; they override those of the pretrained model."""
    rope: RopeKind = "1d"
    """Rotary positions: 1d is plain Qwen2, 2d gives codes a row and a column."""

    def build(self) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """The model and its text tokenizer, on CPU in float32.

        Random weights come from torch's global generator: seed it first. New rows of a pretrained model start at the
        mean of the rows that its tokenizer uses.
        """
        tokenizer = load_text_tokenizer(self.tokenizer)
        text_rows = len(tokenizer)
        add_special_tokens(tokenizer)
        layout = token_layout(tokenizer, self.codebook_size)
        if self.pretrained is None:
            decoder = self.random_decoder(layout.vocab_size)
        else:
            decoder = self._pretrained_decoder(self.pretrained)
            grow_vocabulary(decoder, text_rows, layout.vocab_size)
        return LanguageModel(decoder, layout), tokenizer

    def random_decoder(self, vocab_size: int) -> Qwen2ForCausalLM:
        """A decoder of this architecture with random weights, on torch's current default device."""
        config_class, model_class = _CLASSES[self.rope]
        return model_class(config_class(**{**self.architecture, "vocab_size": vocab_size}))

    def _pretrained_decoder(self, path: str) -> Qwen2ForCausalLM:
        config_class, model_class = _CLASSES[self.rope]
        try:
            fields = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
            if (kind := fields.pop("model_type")) not in (Qwen2Config.model_type, Qwen2Rope2DConfig.model_type):
                raise UserError(f"it is a model of type {kind!r}, but pretraining starts from Qwen2 (or Qwen2.5).")
            return load_decoder(model_class, path, config_class(**{**fields, **self.architecture}), torch.float32)
        except (OSError, ValueError) as error:  # transformers raises these for paths, hub ids and damaged files
            raise UserError(f"--model.init_args.language_model.pretrained {path}: {first_line(error)}") from error


_CLASSES: dict[str, tuple[type[Qwen2Config], type[Qwen2ForCausalLM]]] = {
    "1d": (Qwen2Config, Qwen2ForCausalLM),
    "2d": (Qwen2Rope2DConfig, Qwen2Rope2DForCausalLM),
}


def load_text_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a directory or the hub. Raises ValueError for one without a fast implementation."""
    if not Path(path).is_dir() and not is_hub_id(path):
        raise MissingFileError(
            f"no text tokenizer at {path}: train one (the demo's: make train-tokenizer; a checkpoint brings its "
            "own: make pretrain), or name another."
        )
    # Beside a Qwen2 model, AutoTokenizer would replace the normaliser and splitting that tokenizer.json states by
    # Qwen2's own: the same caption would get other ids in the checkpoint than in the tokenizer it was trained with.
    loader = PreTrainedTokenizerFast if has_file(path, "tokenizer.json") else AutoTokenizer
    tokenizer = loader.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"the text tokenizer at {path} has no fast implementation, which plain-text captions need.")
    return tokenizer


def load_decoder(
    model_class: type[Qwen2ForCausalLM], path: str | Path, config: Qwen2Config, dtype: torch.dtype | str
) -> Qwen2ForCausalLM:
    """`from_pretrained` from safetensors that starts no weight at random.

    Raises ValueError naming the first weight that the files lack or have in another shape.
    """
    loaded: Any = model_class.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    decoder, found = loaded
    wrong = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if wrong:
        raise UserError(
            f"the weights in {path} are no Qwen2 of this configuration: {len(wrong)} are missing or of another shape, "
            f"the first is {min(wrong)}."
        )
    return decoder


@torch.no_grad()
def grow_vocabulary(decoder: Qwen2ForCausalLM, text_rows: int, vocab_size: int) -> None:
    """Resize input and output embeddings to ``vocab_size`` rows in place.

    Rows from ``text_rows`` on, padding rows of the original model included, are set to the mean of the rows before
    them: Qwen2.5 has 151,936 rows of which its tokenizer uses 151,665.

    Raises ValueError when the tokenizer has more ids than the model has rows.
    """
    original_rows = decoder.config.vocab_size
    if text_rows > original_rows:
        raise UserError(
            f"the tokenizer has {text_rows} ids but the pretrained model {original_rows} rows: they do not belong "
            "together."
        )
    decoder.resize_token_embeddings(vocab_size, mean_resizing=False)
    # Tied embeddings are one weight, and setting it twice is harmless.
    for weight in (decoder.model.embed_tokens.weight, decoder.lm_head.weight):
        weight[text_rows:] = weight[:text_rows].mean(dim=0)
    logger.info("vocabulary grown from %d used rows of %d to %d", text_rows, original_rows, vocab_size)
