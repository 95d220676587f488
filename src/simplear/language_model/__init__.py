"""The decoder: Qwen2 through transformers, its vocabulary grown by image codes, its losses and its checkpoints."""

from simplear.language_model.adapter import (
    Adapter,
    adapter_off,
    add_adapter,
    merged_model,
    merged_weight,
    trained_names,
)
from simplear.language_model.arithmetic import Architecture, StepWork
from simplear.language_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointSettings,
    GenerationDefaults,
    checkpoint_hash,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from simplear.language_model.loss import Normalizer, next_token_losses
from simplear.language_model.model import LanguageModel, LanguageModelConfig, load_text_tokenizer
from simplear.language_model.text_tokenizer import train_text_tokenizer

__all__ = [
    "Adapter",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSettings",
    "GenerationDefaults",
    "LanguageModel",
    "LanguageModelConfig",
    "Normalizer",
    "StepWork",
    "adapter_off",
    "add_adapter",
    "checkpoint_hash",
    "find_checkpoint",
    "load_checkpoint",
    "load_text_tokenizer",
    "merged_model",
    "merged_weight",
    "next_token_losses",
    "save_checkpoint",
    "train_text_tokenizer",
    "trained_names",
    "write_checkpoint",
]
