"""The procedural corpus: coloured shapes on plain backgrounds, drawn, described, detected and judged.

    scene = sample_scene(seed=0, index=7)
    picture = draw(scene, resolution=64)
    short, long = captions(scene, seed=0, index=7)
    judge(metadata(scene), detect(picture))  # True

It answers like GenEval, with an exact detector in place of a neural one. Needs numpy alone.
"""

from simplear.scenes.captions import captions, evaluation_prompts
from simplear.scenes.detection import MATCH, Detection, background_name, detect
from simplear.scenes.drawing import draw
from simplear.scenes.judgement import Verdict, judge, verdict
from simplear.scenes.perturbation import PERTURBATIONS, perturb
from simplear.scenes.residue import residue
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
from simplear.scenes.strict import strict_verdict

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "HELD_OUT",
    "MATCH",
    "PERTURBATIONS",
    "RELATIONS",
    "SHAPES",
    "SPLITS",
    "Detection",
    "Scene",
    "SceneObject",
    "Verdict",
    "background_name",
    "captions",
    "detect",
    "draw",
    "evaluation_prompts",
    "judge",
    "metadata",
    "perturb",
    "relations_of",
    "residue",
    "sample_scene",
    "scene_from_metadata",
    "strict_verdict",
    "verdict",
]
