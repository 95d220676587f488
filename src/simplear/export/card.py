"""The model card: a README.md with YAML front matter, as the Hugging Face hub shows it, made of what is known.

Numbers come from the checkpoint, from a report and from manifests; what was not given is left out and never made up.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from simplear.data.shards import MANIFEST_FILE
from simplear.errors import MissingFileError, UserError
from simplear.evaluation import markdown_table, read_report
from simplear.evaluation.report import REPORT_FILE, markdown_rows
from simplear.hashing import sha256_of
from simplear.language_model import Checkpoint
from simplear.text_files import decode, read_object

CARD_FILE = "README.md"
SAMPLES_FILE = "samples.png"
PROMPT = "a red circle"
"""In the card's snippets, where no caption was given."""
TAGS = ["text-to-image", "autoregressive", "qwen2"]


@dataclass
class CardInputs:
    """What the user gives for the card, read and checked before anything is written."""

    report: dict[str, Any] | None
    data: list[dict[str, Any]]
    """Of each directory of token shards: ``name``, ``rows``, ``sha256`` of the manifest, ``visual_tokenizer``."""
    training_config: str | None
    """The text of a run's config.yaml."""


@dataclass
class CardContent:
    """What a card says."""

    name: str
    checkpoint: Checkpoint
    checkpoint_hash: str
    """`simplear.language_model.checkpoint_hash` of the directory."""
    origin: str
    """What was exported, in words."""
    inputs: CardInputs
    prompts: list[str]
    """Of the picture; empty: there is none."""
    license: str | None
    base_model: str | None


def read_card_inputs(
    report: str | None, runs: list[str] | None, data: list[str], training_config: str | None
) -> CardInputs:
    """Read what the card is to show; of the report these runs, or all.

    Raises FileNotFoundError for a file that is not there, and ValueError for one that is not what it should be or a
    run that the report has not.
    """
    if report is not None and Path(report).is_dir():
        report = str(Path(report) / REPORT_FILE)
    for file in (report, training_config):
        if file is not None and not Path(file).is_file():
            raise MissingFileError(f"no file at {file}, which the model card is to show.")
    config = None if training_config is None else decode(Path(training_config).read_bytes(), training_config)
    if config is not None:
        try:
            read = yaml.safe_load(config)
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{training_config} is not YAML: {error}.") from error
        if not isinstance(read, dict) or "model" not in read:
            raise UserError(f"{training_config} has no key 'model': give the config.yaml that a run wrote.")
    content = None if report is None else _of_runs(read_report(report), runs, report)
    return CardInputs(content, [_manifest(Path(each)) for each in data], config)


def _of_runs(report: dict[str, Any], runs: list[str] | None, file: str) -> dict[str, Any]:
    if runs is None:
        return report
    missing = [name for name in runs if name not in report["runs"]]
    if missing:
        raise UserError(f"{file} has no run {missing[0]!r}; it has: {', '.join(report['runs'])}.")
    varied = report.get("diversity", {})
    return {
        "runs": {name: report["runs"][name] for name in runs},
        "diversity": {name: varied[name] for name in runs if name in varied},
    }


def _manifest(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise MissingFileError(f"{file} is missing: give directories of token shards (--data).")
    manifest = read_object(file)
    known = {key: manifest.get(key) for key in ("rows", "visual_tokenizer")}
    if not isinstance(known["rows"], int):
        raise UserError(f"{file} is not a manifest of token shards, it has no rows: tokenize again.")
    return {"name": Path(os.path.abspath(directory)).name, "sha256": sha256_of(file), **known}


def model_card(content: CardContent) -> str:
    """The text of README.md."""
    front = ModelCardData(
        license=content.license,
        library_name="simplear",
        pipeline_tag="text-to-image",
        base_model=content.base_model,
        tags=TAGS,
    )
    settings = content.checkpoint.settings
    height, width = (side * settings.downsample for side in settings.grid)
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {content.name}\n",
        "Text-to-image generation by plain next-token prediction: a caption and the codes of its image are one token "
        f"sequence, which a Qwen2 decoder continues. Images of {width} × {height} pixels; exported from "
        f"{content.origin}.\n",
        *_samples(content),
        *_use(content),
        *_configuration(content),
        *_training(content.inputs),
        *_evaluation(content.inputs),
        "## Licence\n",
        (f"{content.license}." if content.license else "None is stated here: ask whoever trained the model.") + "\n",
    ]
    return "\n".join(parts)


def _samples(content: CardContent) -> list[str]:
    if not content.prompts:
        return []
    return [
        f"![Images drawn by this checkpoint]({SAMPLES_FILE})\n",
        f"Not chosen: one image a caption, seeds from 0 to {len(content.prompts) - 1}, the defaults below.\n",
    ]


def _use(content: CardContent) -> list[str]:
    prompt = content.prompts[0] if content.prompts else PROMPT
    settings, name = content.checkpoint.settings, json.dumps(content.name, ensure_ascii=False)
    tokenizer = "" if settings.visual_tokenizer_fingerprint else ', visual_tokenizer="…"'
    parts = [
        "## Use\n",
        "Draw:\n",
        "```python\n"
        "from simplear import SimpleARPipeline\n\n"
        f"pipe = SimpleARPipeline.from_pretrained({name}{tokenizer})\n"
        f'pipe({json.dumps(prompt, ensure_ascii=False)}, seed=0).images[0].save("drawn.png")\n'
        "```\n",
    ]
    if settings.rope == "2d":
        return [
            *parts,
            "Its rotary positions are two-dimensional, which plain Qwen2 has not: only `simplear` loads it.\n",
        ]
    return [
        *parts,
        'With vLLM, in an environment that has it: the same with `engine="vllm"`.\n',
        f"As a plain language model (code c is id {settings.image_token_offset:,} + c):\n",
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name})\n"
        "```\n",
        f"```python\nfrom vllm import LLM\n\nmodel = LLM({name}, skip_tokenizer_init=True)\n```\n",
    ]


def _configuration(content: CardContent) -> list[str]:
    checkpoint, settings = content.checkpoint, content.checkpoint.settings
    config = checkpoint.model.decoder.config
    parameters = sum(weight.numel() for weight in checkpoint.model.parameters())
    height, width = settings.grid
    rows = {
        "parameters": f"{parameters:,}",
        "layers, width, heads (key-value)": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads} ({config.num_key_value_heads})",
        "vocabulary": f"{settings.image_token_offset:,} text ids + {settings.codebook_size:,} codes",
        "grid": f"{height} × {width} codes of {settings.downsample} × {settings.downsample} pixels",
        "positions": f"{config.max_position_embeddings:,}, RoPE {settings.rope}; captions up to "
        f"{settings.max_text_tokens} tokens",
        "weights": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
        "SHA-256 of weights and settings": f"`{content.checkpoint_hash}`",
        "visual tokenizer": f"`{settings.visual_tokenizer_fingerprint or 'not known: name one'}`",
        **{
            f"default {name.replace('_', ' ')}": json.dumps(value, ensure_ascii=False)
            for name, value in dataclasses.asdict(settings.generation).items()
            if value is not None
        },
    }
    return ["## Configuration\n", markdown_rows(["", ""], list(rows.items()), "---")]


def _training(inputs: CardInputs) -> list[str]:
    if not inputs.data and inputs.training_config is None:
        return []
    parts = ["## Training\n"]
    if inputs.data:
        rows = [
            [each["name"], f"{each['rows']:,}", f"`{each['sha256']}`", f"`{str(each['visual_tokenizer'])[:12]}…`"]
            for each in inputs.data
        ]
        parts.append(
            markdown_rows(["token shards", "images", "SHA-256 of the manifest", "visual tokenizer"], rows, "---")
        )
    if inputs.training_config is not None:
        fenced = f"```yaml\n{inputs.training_config.strip()}\n```"
        parts.append(f"<details><summary>Configuration of the run</summary>\n\n{fenced}\n\n</details>\n")
    return parts


def _evaluation(inputs: CardInputs) -> list[str]:
    if inputs.report is None:
        return []
    return ["## Evaluation\n", "95 % intervals in brackets.\n", markdown_table(inputs.report)]
