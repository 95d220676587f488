"""Rewards for reinforcement learning: a protocol, CLIP, HPSv2, verifiable scenes, and their weighted sum."""

from simplear.rewards.clip import CLIPReward
from simplear.rewards.clip_model import LoadedCLIP, load_clip, preprocess, save_clip
from simplear.rewards.hps import HPSv2Reward
from simplear.rewards.protocol import Reward, RewardOfParts, move, score
from simplear.rewards.scene import SceneReward
from simplear.rewards.weighted import WeightedReward

__all__ = [
    "CLIPReward",
    "HPSv2Reward",
    "LoadedCLIP",
    "Reward",
    "RewardOfParts",
    "SceneReward",
    "WeightedReward",
    "load_clip",
    "move",
    "preprocess",
    "save_clip",
    "score",
]
