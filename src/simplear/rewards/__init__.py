"""Rewards for reinforcement learning: the protocol, weighted sums, CLIP, HPSv2 and verifiable scenes."""

from simplear.rewards.clip import CLIPReward, HPSv2Reward
from simplear.rewards.clip_model import LoadedCLIP, load_clip, preprocess, save_clip
from simplear.rewards.protocol import Reward, RewardOfParts, WeightedReward, move, score
from simplear.rewards.scene import SceneReward

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
