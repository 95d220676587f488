"""The training stages, one LightningModule each, and the optimizer that the small ones learn fastest with."""

from simplear.stages.clip import CLIPModule
from simplear.stages.next_token import NextTokenModule, NextTokenObjective
from simplear.stages.optimizers import MuonWithAdamW, parameter_groups
from simplear.stages.pretrain import PretrainModule
from simplear.stages.sft import SFTModule
from simplear.stages.visual_tokenizer import VisualTokenizerModule

__all__ = [
    "CLIPModule",
    "MuonWithAdamW",
    "NextTokenModule",
    "NextTokenObjective",
    "PretrainModule",
    "SFTModule",
    "VisualTokenizerModule",
    "parameter_groups",
]
