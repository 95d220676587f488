"""vLLM's side of inference.py, run by it in vLLM's environment: prompts once, then image numbers in and codes out.

Each message is a line of JSON on standard input, and each answer one on standard output.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from simplear.generation import SamplingSettings, SimpleARPipeline


def main(checkpoint: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes elsewhere
    pipeline = SimpleARPipeline.from_pretrained(checkpoint, engine="vllm")
    start = json.loads(sys.stdin.readline())
    prompts = [torch.tensor(ids) for ids in start["prompts"]]
    sampling = SamplingSettings(guidance_scale=start["guidance_scale"])
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        images = json.loads(line)["images"]
        asked, empty = [prompts[number] for number in images], [prompts[-1]] * len(images)
        codes, _ = pipeline.engine.generate(asked, empty, tuple(start["grid"]), sampling, images)
        print(json.dumps(codes.tolist()), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
