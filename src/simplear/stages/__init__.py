"""The training stages, one LightningModule each, and the optimizer that the small ones learn fastest with."""

from simplear.stages.clip import CLIPModule
from simplear.stages.grpo import GRPOModule
from simplear.stages.grpo_objective import group_advantages, grpo_loss
from simplear.stages.language_model_module import LanguageModelModule
from simplear.stages.next_token import NextTokenModule, NextTokenObjective, PretrainModule, SFTModule
from simplear.stages.optimized import CosineWithWarmup
from simplear.stages.optimizers import MuonWithAdamW, parameter_groups
from simplear.stages.reference import ReferenceSettings
from simplear.stages.sharding import FSDP2
from simplear.stages.visual_tokenizer import VisualTokenizerModule

__all__ = [
    "FSDP2",
    "CLIPModule",
    "CosineWithWarmup",
    "GRPOModule",
    "LanguageModelModule",
    "MuonWithAdamW",
    "NextTokenModule",
    "NextTokenObjective",
    "PretrainModule",
    "ReferenceSettings",
    "SFTModule",
    "VisualTokenizerModule",
    "group_advantages",
    "grpo_loss",
    "parameter_groups",
]
