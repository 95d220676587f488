"""From a checkpoint and prompts to images: guidance, sampling, engines, the pipeline."""

from simplear.generation.cached import CachedEngine
from simplear.generation.command import generate
from simplear.generation.engine import ENGINES, Engine, GenerationStats, make_engine
from simplear.generation.fused import CompiledEngine, FusedEngine, JacobiEngine
from simplear.generation.guidance import guide
from simplear.generation.memory import OutOfMemoryError
from simplear.generation.options import DrawingOptions
from simplear.generation.pipeline import PipelineOutput, SimpleARPipeline, pil_images
from simplear.generation.sampling import SamplingSettings

__all__ = [
    "ENGINES",
    "CachedEngine",
    "CompiledEngine",
    "DrawingOptions",
    "Engine",
    "FusedEngine",
    "GenerationStats",
    "JacobiEngine",
    "OutOfMemoryError",
    "PipelineOutput",
    "SamplingSettings",
    "SimpleARPipeline",
    "generate",
    "guide",
    "make_engine",
    "pil_images",
]
