"""The procedural corpus: coloured shapes on plain backgrounds, drawn, described, detected and judged.

    scene = sample_scene(seed=0, index=7)
    picture = draw(scene, resolution=64)
    short, long = captions(scene, seed=0, index=7)
    judge(metadata(scene), detect(picture))  # True

It has GenEval's categories, with an exact detector in place of a neural one. Needs only NumPy and SciPy.
"""

from simplear.scenes.captions import captions, evaluation_prompts, perturb
from simplear.scenes.detection import MATCH, Detection, background_name, detect, residue
from simplear.scenes.drawing import draw
from simplear.scenes.judgement import Verdict, judge, verdict
from simplear.scenes.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    HELD_OUT,
    SHAPES,
    Scene,
    SceneObject,
    metadata,
    sample_scene,
)
from simplear.scenes.strict import strict_verdict

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "HELD_OUT",
    "MATCH",
    "SHAPES",
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
    "residue",
    "sample_scene",
    "strict_verdict",
    "verdict",
]
