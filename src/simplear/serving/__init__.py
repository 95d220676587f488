"""Checkpoints behind HTTP: OpenAI's image API with dynamic batching, and a page to draw on.

A request passes `gate` (keys, hosts, limits) and a route of `app`, is checked by `served` and becomes a `job`, whose
images a `batcher` draws. `schema` has the messages.
"""

from simplear.serving.app import create_app
from simplear.serving.batcher import Batcher
from simplear.serving.command import serve
from simplear.serving.gate import Service
from simplear.serving.served import ServedModel

__all__ = ["Batcher", "ServedModel", "Service", "create_app", "serve"]
