"""A vision-language model of some ten thousand random weights, in the classes and files of Qwen2-VL or Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
PLACEHOLDERS = ["<|image_pad|>", "<|video_pad|>"]
WORDS = "a red circle above the blue square with two green stars on white"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


FAMILIES = {
    "qwen2-vl": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLProcessor,
        {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1},
    ),
    "qwen2.5-vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    ),
}


def write_vision_language_model(directory: Path, ends_at: int = 5, seed: int = 0, family: str = "qwen2-vl") -> str:
    """Save model and processor.

    Args:
        directory: where to.
        ends_at: every so many-th id ends an answer, so that answers end at many lengths.
        seed: of the weights.
        family: one of `FAMILIES`.
    """
    model_class, config_class, processor_class, vision = FAMILIES[family]
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        [WORDS] * 20,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL + PLACEHOLDERS, initial_alphabet=alphabet),
    )
    tokenizer = FastTokenizer(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:] + PLACEHOLDERS,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = processor_class(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=CHAT
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL + PLACEHOLDERS}
    torch.manual_seed(seed)
    model = model_class(
        config_class(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                "initializer_range": 0.4,
            },
            vision_config={"depth": 1, "num_heads": 2, "initializer_range": 0.4, **vision},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    readable = [number for number in range(len(tokenizer)) if tokenizer.decode([number]).isascii()]
    plain = [number for number in readable if number >= len(ids) and tokenizer.decode([number]).isprintable()]
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], *plain[::ends_at]],
        pad_token_id=ids["<|endoftext|>"],
        suppress_tokens=sorted(set(range(len(tokenizer))) - set(plain) - {ids["<|im_end|>"]}),
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)
