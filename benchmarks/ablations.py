"""The paper's Tables 2 and 3 in miniature, and three further choices of pretraining, one changed at a time.

    python benchmarks/ablations.py --tables table2       after make demo; 50 minutes on two cores, resumable
    python benchmarks/ablations.py                       all: two hours and a half

Every arm is the demo's pretraining at 32 px under several seeds, with one thing changed; seed k gives all arms the same
order of the data. The language model that stands in for Qwen2.5 in Table 2 has the demo's architecture and was trained
on the captions of the training scenes as plain text; it enters through ``language_model.pretrained``, as Qwen2.5 would.
Its learning rate falls to 0, as where language models are made; in one arm it stays, to see what that matters. Text
mixing starts from the former, spends one batch in ten on those captions as texts, and has fewer image batches for it.
The perplexity is that of held-out captions as plain text.

All checkpoints draw the same held-out captions several times, with the configuration's guidance and without any, and
the exact detector judges them. There are two 95 % intervals of a difference, both paired. The one over captions takes
these trainings as given; the one over trainings (Student's t of the differences seed by seed) speaks of other seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from lightning import LightningModule, Trainer, seed_everything
from scipy import stats
from torch.optim.lr_scheduler import PolynomialLR

import runs
from grpo import gain, intervals, values
from measure import parser, write_result
from simplear.atomic import whole_directory, whole_file
from simplear.callbacks import StageProgressBar
from simplear.cli import main as simplear
from simplear.data import TokenDataModule
from simplear.data.shards import (
    SETTINGS_FILE,
    TokenRow,
    TokenShards,
    claim_directory,
    merge_manifest,
    read_json,
    read_manifest,
    write_shard,
)
from simplear.evaluation import read_report
from simplear.language_model import LanguageModelConfig, load_text_tokenizer
from simplear.stages import MuonWithAdamW, PretrainModule, SFTModule

DATA = Path("data/demo")
GUIDANCE: dict[str, list[str]] = {"guided": [], "unguided": ["--guidance_scale", "1"]}
"""Options of the evaluation; guided is the checkpoint's own default, 2."""
TEXT_SHARE = 0.1
"""Of ``configs/paper/texts.yaml``."""
SHORT, LONG = 0, 1
"""Places of a scene's two captions."""

Rate = Literal["falling", "constant"]


@dataclass(frozen=True)
class Arm:
    """The demo's pretraining with something changed."""

    title: str
    language_model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `LanguageModelConfig`."""
    pretrained: Rate | None = None
    """Start from the language model of the same seed that was trained at this rate; None: from random weights."""
    caption: int | None = None
    """The only caption of each scene that training sees; by default one of both is drawn each time."""
    texts: bool = False
    """Mix texts without images in."""
    dropout: float | None = None
    """Of captions; None is the configuration's."""
    against: str = "base"
    """The arm that its differences are taken from."""


ARMS = {
    "base": Arm("as configured: random weights, 1-D RoPE, both captions, dropout 0.1"),
    "llm-init": Arm("from a language model", pretrained="falling"),
    "llm-init-constant": Arm("from a language model of constant rate", pretrained="constant"),
    "rope-2d": Arm("2-D RoPE", {"rope": "2d"}),
    "texts": Arm(
        "from a language model, a tenth texts (over the row without)",
        pretrained="falling",
        texts=True,
        against="llm-init",
    ),
    "dropout-0": Arm("caption dropout 0", dropout=0.0),
    "dropout-0.3": Arm("caption dropout 0.3", dropout=0.3),
    "short": Arm("short captions alone", caption=SHORT),
    "long": Arm("long captions alone", caption=LONG),
}
TABLES = {
    "table2": ["llm-init", "llm-init-constant"],
    "table3": ["rope-2d"],
    "texts": ["llm-init", "texts"],
    "dropout": ["dropout-0", "dropout-0.3"],
    "captions": ["short", "long"],
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "ablations")
    made.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="what to compare; all")
    made.add_argument("--seeds", type=int, default=3, help="trainings of each arm, two or more")
    made.add_argument("--root", type=Path, help="where runs are kept; checkpoints/benchmark-ablations[-quick]")
    chosen = made.parse_args(argv)
    if chosen.seeds < 2:
        made.error(f"--seeds {chosen.seeds}: an interval over trainings needs two or more.")
    chosen.root = chosen.root or Path("checkpoints/benchmark-ablations" + "-quick" * chosen.quick)
    chosen.steps, chosen.prompts, chosen.images = runs.configured_steps("pretrain"), 100, 4
    if chosen.quick:
        chosen.seeds, chosen.steps, chosen.prompts, chosen.images = 2, 10, 2, 1
    return chosen


def one_caption(shards: Path, out: Path, which: int) -> Path:
    """The same rows in the same order, each with one of its captions alone."""
    if not (out / "manifest.json").exists():
        claim_directory(out, {**read_json(shards / SETTINGS_FILE), "caption": which})
        source, names, first = TokenShards(shards), [], 0
        for entry in read_manifest(shards)["shards"]:
            read = source.read(np.arange(first, first + entry["rows"]))
            first += entry["rows"]
            names.append(Path(entry["file"]).stem)
            columns = zip(read.keys, read.codes, read.captions, read.metadata, strict=True)
            rows = [
                TokenRow(key, codes, [texts[which]], metadata, names[-1]) for key, codes, texts, metadata in columns
            ]
            write_shard(out, names[-1], rows)
        merge_manifest(out, names)
    return out


def captions_as_texts(shards: Path, out: Path) -> Path:
    """All captions of token shards as a set of texts without images."""
    if not (out / "manifest.json").exists():
        source, lines = TokenShards(shards), out.with_suffix(".jsonl")
        lines.parent.mkdir(parents=True, exist_ok=True)
        captions = source.read(np.arange(len(source))).captions
        with whole_file(lines) as partial:
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for row in captions for text in row))
        simplear(["data", "text", str(lines), "--out", str(out)])
    return out


def demo_model() -> dict[str, Any]:
    """The model's part of the demo's pretraining configuration."""
    return yaml.safe_load((runs.CONFIGS / "pretrain.yaml").read_text())["model"]["init_args"]


def texts_module(settings: argparse.Namespace, part: str, seed: int = 0) -> TokenDataModule:
    """Texts of a part alone, to train on or, with the held-out ones, to validate with."""
    model = demo_model()["language_model"]
    paths = str(captions_as_texts(DATA / f"tokens-{part}", settings.root / f"texts-{part}"))
    return TokenDataModule(
        paths,
        global_batch_size=64,
        tokenizer=model["tokenizer"],
        codebook_size=model["codebook_size"],
        validation_paths=paths,
        max_text_tokens=64,
        seed=seed,
    )


def trainer(**options: Any) -> Trainer:
    """A trainer that writes nothing."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=options.pop("limit_val_batches", None),
        gradient_clip_val=1.0,
        **options,
    )


def language_model(settings: argparse.Namespace, rate: Rate, seed: int) -> Path:
    """A language model of the demo's architecture, trained on captions as texts with the demo's optimizer.

    Its Hugging Face directory has rows for the text tokenizer alone.
    """
    out = settings.root / f"language-model-{rate}" / f"seed-{seed}"
    if not out.exists():
        model = demo_model()
        seed_everything(seed)
        module = PretrainModule(
            LanguageModelConfig(**model["language_model"]),
            optimizer=lambda groups: MuonWithAdamW(groups, **model["optimizer"]["init_args"]),
            lr_scheduler=(lambda made: PolynomialLR(made, total_iters=settings.steps)) if rate == "falling" else None,
        )
        fit = trainer(max_steps=settings.steps, limit_val_batches=0, callbacks=[StageProgressBar("Language model")])
        fit.fit(module, texts_module(settings, "pretrain", seed))
        tokenizer = load_text_tokenizer(model["language_model"]["tokenizer"])
        decoder = module.language_model.decoder
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with whole_directory(out) as partial:
            decoder.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return out


def perplexity(module: LightningModule, settings: argparse.Namespace) -> float:
    """Of held-out captions as plain text."""
    held_out = texts_module(settings, "pretrain-validation")
    (found,) = trainer(enable_progress_bar=False).validate(module, held_out, verbose=False)
    return found["validation/text_perplexity"]


def before(settings: argparse.Namespace, rate: Rate, seed: int) -> float:
    """Perplexity of the language model as pretraining begins with it, its vocabulary grown."""
    config = {**demo_model()["language_model"], "pretrained": str(language_model(settings, rate, seed))}
    return perplexity(PretrainModule(LanguageModelConfig(**config)), settings)


def train(name: str, seed: int, settings: argparse.Namespace) -> Path:
    """One training of an arm; the directory of its checkpoint."""
    arm, shards = ARMS[name], DATA / "tokens-pretrain"
    options: dict[str, Any] = {"language_model": dict(arm.language_model)}
    data: dict[str, Any] = {}
    if arm.pretrained is not None:
        options["language_model"]["pretrained"] = str(language_model(settings, arm.pretrained, seed))
    if arm.caption is not None:
        data["paths"] = [str(one_caption(shards, settings.root / f"tokens-{name}", arm.caption))]
    if arm.texts:
        texts = captions_as_texts(shards, settings.root / "texts-pretrain")
        data |= {"paths": [str(shards), str(texts)], "weights": [1 - TEXT_SHARE, TEXT_SHARE]}
    if arm.dropout is not None:
        data["caption_dropout"] = arm.dropout
    run = settings.root / name / f"seed-{seed}"
    return runs.train("pretrain", run, seed=seed, steps=settings.steps, options=options, data=data, save_every=100)


def evaluated(name: str, seed: int, settings: argparse.Namespace) -> list[str]:
    """The kinds of guidance under which a training has been judged already."""
    reports = {guidance: read_report(settings.root / name / guidance / "report.json") for guidance in GUIDANCE}
    return [guidance for guidance, report in reports.items() if f"seed-{seed}" in report["runs"]]


def evaluate(name: str, seed: int, checkpoint: Path, settings: argparse.Namespace) -> None:
    """Draw and judge, with guidance and without, what has not been."""
    counts = ["--prompts_per_category", str(settings.prompts), "--images_per_prompt", str(settings.images)]
    done = evaluated(name, seed, settings)
    for guidance in [kind for kind in GUIDANCE if kind not in done]:
        out = ["--out", str(settings.root / name / guidance), "--run", f"seed-{seed}"]
        simplear(["evaluate", "scenes", str(checkpoint), *out, *counts, *GUIDANCE[guidance]])


def over_seeds(differences: Sequence[float]) -> list[float]:
    """Mean, low and high of the mean of independent differences, by Student's t."""
    mean = statistics.fmean(differences)
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    margin = float(stats.t.ppf(0.975, len(differences) - 1)) * spread
    return [mean, mean - margin, mean + margin]


def judged(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Of an arm by guidance: accuracies, and the differences from the arm that it is held against."""
    names, other = [f"seed-{seed}" for seed in range(settings.seeds)], ARMS[name].against
    result: dict[str, Any] = {}
    for guidance in GUIDANCE:
        here, there = settings.root / name / guidance, settings.root / other / guidance
        found = values(here, names, "correct")
        entry: dict[str, Any] = {"accuracy": intervals(found)}
        entry["by_seed"] = [intervals(values(here, [seed], "correct"))["overall"][0] for seed in names]
        if name != other:
            reference = [intervals(values(there, [seed], "correct"))["overall"][0] for seed in names]
            differences = [mine - its for mine, its in zip(entry["by_seed"], reference, strict=True)]
            entry["difference"] = {
                "over_captions": intervals(gain(found, values(there, names, "correct"))),
                "over_trainings": over_seeds(differences),
                "by_seed": differences,
            }
        result[guidance] = entry
    return result


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """All trainings and evaluations of the tables, and what they gave; arms that were finished before are in it too."""
    chosen = list(dict.fromkeys(["base", *(name for table in settings.tables for name in TABLES[table])]))
    pairs = [(name, seed) for name in chosen for seed in range(settings.seeds)]
    for done, (name, seed) in enumerate(pairs):
        print(f"ablations: {done} of {len(pairs)} trainings done; now {name}, seed {seed}", flush=True)
        evaluate(name, seed, train(name, seed, settings), settings)
    arms: dict[str, Any] = {}
    for name, arm in ARMS.items():
        if not all(len(evaluated(name, seed, settings)) == len(GUIDANCE) for seed in range(settings.seeds)):
            continue
        arms[name] = judged(name, settings)
        if arm.pretrained is not None:
            checkpoints = [train(name, seed, settings) for seed in range(settings.seeds)]
            arms[name]["text_perplexity"] = {
                "before": [before(settings, arm.pretrained, seed) for seed in range(settings.seeds)],
                "after": [perplexity(SFTModule(checkpoint=str(checkpoint)), settings) for checkpoint in checkpoints],
            }
    return {"arms": arms}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each arm."""
    lines = [
        "| pretraining | guided | difference | position, guided | without guidance | difference | text perplexity |",
        "|---" * 7 + "|",
    ]
    for name, entry in result["arms"].items():
        cells = [ARMS[name].title]
        for guidance in GUIDANCE:
            mean, low, high = (100 * bound for bound in entry[guidance]["accuracy"]["overall"])
            cells += [f"{mean:.1f} ({low:.1f}–{high:.1f})", _difference(entry[guidance])]
            if guidance == "guided":
                cells.append(f"{100 * entry[guidance]['accuracy']['position'][0]:.1f}")
        texts = entry.get("text_perplexity")
        cells.append(" → ".join(f"{statistics.median(texts[when]):.3g}" for when in texts) if texts else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(entry: Mapping[str, Any]) -> str:
    if "difference" not in entry:
        return ""
    mean, low, high = (100 * bound for bound in entry["difference"]["over_captions"]["overall"])
    _, lower, higher = (100 * bound for bound in entry["difference"]["over_trainings"])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}; {lower:+.1f} to {higher:+.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    print(table(write_result("ablations", settings, measure(settings))))


if __name__ == "__main__":
    main()
