"""The procedural corpus: coloured shapes on plain backgrounds, drawn, described, detected and judged.

    scene = sample_scene(seed=0, index=7)
    picture = draw(scene, resolution=64)
    short, long = captions(scene, seed=0, index=7)
    judge(metadata(scene), detect(picture))  # True

It answers like GenEval, with an exact detector in place of a neural one. Needs numpy alone.
"""

from simplear.scenes.captions import captions, evaluation_prompts
from simplear.scenes.detection import Detection, detect
from simplear.scenes.drawing import draw
from simplear.scenes.judgement import Verdict, judge, verdict
from simplear.scenes.sampling import SPLITS, sample_scene
from simplear.scenes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    metadata,
    relations_of,
    scene_from_metadata,
)

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "HELD_OUT",
    "RELATIONS",
    "SHAPES",
    "SPLITS",
    "Detection",
    "Scene",
    "SceneObject",
    "Verdict",
    "captions",
    "detect",
    "draw",
    "evaluation_prompts",
    "judge",
    "metadata",
    "relations_of",
    "sample_scene",
    "scene_from_metadata",
    "verdict",
]
