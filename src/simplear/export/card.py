"""The model card: a README.md with YAML front matter, as the Hugging Face hub shows it.

Numbers come from the checkpoint and from a report. What was not given is left out and never invented.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from simplear.evaluation import markdown_table
from simplear.evaluation.report import markdown_rows
from simplear.language_model import Checkpoint

CARD_FILE = "README.md"
SAMPLES_FILE = "samples.png"
EXAMPLE_PROMPT = "a red circle"
INTRODUCTION = (
    "Text-to-image generation by plain next-token prediction: a caption and the codes of its image are one token "
    "sequence, which a Qwen2 decoder continues."
)
DRAWING = """\
```python
from simplear import SimpleARPipeline

pipe = SimpleARPipeline.from_pretrained({name}{visual_tokenizer})
pipe({prompt}, seed=0).images[0].save("drawn.png")
```
"""
LANGUAGE_MODEL = """\
As a plain language model (code c is id {offset:,} + c):

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name})
```
"""
TWO_DIMENSIONAL = (
    "Its rotary positions are two-dimensional, which plain Qwen2 does not have, so only `simplear` loads it.\n"
)


def model_card(
    checkpoint: Checkpoint,
    *,
    name: str,
    source: str,
    sha256: str,
    prompts: Sequence[str] = (),
    report: Mapping[str, Any] | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        checkpoint: as it was written.
        name: of the exported directory.
        source: name of the checkpoint that was exported.
        sha256: `simplear.language_model.checkpoint_hash` of the exported directory.
        prompts: captions of the picture; empty if there is no picture.
        report: of an evaluation.
        license: by the hub's name.
        base_model: hub id of the model that training started from.
    """
    front = ModelCardData(
        license=license,
        library_name="simplear",
        pipeline_tag="text-to-image",
        base_model=base_model,
        tags=["text-to-image", "autoregressive", "qwen2"],
    )
    settings, quoted = checkpoint.settings, json.dumps(name, ensure_ascii=False)
    parts = [f"---\n{front.to_yaml()}\n---\n", f"# {name}\n", f"{INTRODUCTION} Exported from `{source}`.\n"]
    if prompts:
        parts.append(f"![Images drawn by this checkpoint]({SAMPLES_FILE})\n")
        parts.append(f"One image a caption, not selected, with seeds from 0 to {len(prompts) - 1}.\n")
    prompt = json.dumps(prompts[0] if prompts else EXAMPLE_PROMPT, ensure_ascii=False)
    argument = "" if settings.visual_tokenizer_fingerprint else ', visual_tokenizer="…"'
    parts += ["## Use\n", DRAWING.format(name=quoted, visual_tokenizer=argument, prompt=prompt)]
    if settings.rope == "2d":
        parts.append(TWO_DIMENSIONAL)
    else:
        parts.append(LANGUAGE_MODEL.format(name=quoted, offset=settings.image_token_offset))
    parts += ["## Configuration\n", markdown_rows(["", ""], _configuration(checkpoint, sha256), "---")]
    if report is not None:
        parts += ["## Evaluation\n", "95 % intervals in brackets.\n", markdown_table(report)]
    parts.append(f"## Licence\n\n{license or 'None is stated here: ask whoever trained the model'}.\n")
    return "\n".join(parts)


def _configuration(checkpoint: Checkpoint, sha256: str) -> list[tuple[str, str]]:
    model, settings = checkpoint.model, checkpoint.settings
    rows, columns = settings.grid
    return [
        ("parameters", f"{sum(weight.numel() for weight in model.parameters()):,}"),
        ("weights", str(model.decoder.dtype).removeprefix("torch.")),
        ("vocabulary", f"{settings.image_token_offset:,} text ids + {settings.codebook_size:,} codes"),
        ("image", f"{rows} × {columns} codes of {settings.downsample} × {settings.downsample} pixels"),
        ("SHA-256 of weights and settings", f"`{sha256}`"),
        ("visual tokenizer", f"`{settings.visual_tokenizer_fingerprint or 'unknown: name one'}`"),
    ]
