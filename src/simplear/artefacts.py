"""What lies at a path, in words: for messages where a verb was given one kind of artefact and reads another."""

from __future__ import annotations

from pathlib import Path

from simplear.text_files import parse_json

STATE = ".ckpt"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")
SHARDED_STATE, CONFIG, SETTINGS, COSMOS = ".metadata", "config.json", "simplear.json", "encoder.jit"
BY_FILE = {
    "adapter_config.json": "an adapter (LoRA): merge it into its model first (merge_and_unload of peft) and save that",
    "model_index.json": "a pipeline of diffusers",
    "open_clip_config.json": "a CLIP model",
    "manifest.json": "token shards or captions",
    "tokenizer.json": "a text tokenizer",
}
"""What a directory without a configuration is, by a file in it."""
SHOWN = 4
"""Directories named in a message."""


def what_is(path: str | Path) -> str:
    """A phrase that says what is at a path and, where something else was probably meant, what to name instead."""
    path = Path(path) if Path(path).name else Path(path).absolute()
    if not path.exists():
        return f"missing (looked for {path.absolute()})"
    if path.suffix == STATE or (path / SHARDED_STATE).is_file():
        return f"a training state: name {path.with_suffix('')}, the checkpoint directory that training writes beside it"
    if path.is_file():
        kind = "a file of weights" if path.suffix in WEIGHTS else "a file"
        return f"{kind}: name the directory that it lies in ({path.absolute().parent})"
    if is_visual_tokenizer(path):
        return "a visual tokenizer (--visual-tokenizer)"
    if (path / CONFIG).is_file():
        kind = "a checkpoint" if (path / SETTINGS).is_file() else "a model of transformers"
        inner = path / "visual_tokenizer"
        return kind + (f" (its visual tokenizer is {inner})" if inner.is_dir() else "")
    for name, kind in BY_FILE.items():
        if (path / name).is_file():
            return kind
    for pattern in ("*", "*/*"):
        if inside := sorted(str(file.parent) for file in path.glob(f"{pattern}/{CONFIG}")):
            return f"a directory of models: name one of {', '.join(inside[:SHOWN])}"
    return "a directory of something else"


def is_visual_tokenizer(directory: Path) -> bool:
    """Whether a directory says that it is one of this project's, or is Cosmos."""
    try:
        content = parse_json((directory / CONFIG).read_bytes())
    except (OSError, ValueError):
        content = None
    known = content if isinstance(content, dict) else {}
    return "class_path" in known or ((directory / COSMOS).is_file() and "vocab_size" not in known)
