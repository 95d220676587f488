"""Table 4 of the paper in miniature: what GRPO adds to the demo's fine-tuned checkpoint, by reward and by category.

    python benchmarks/grpo.py                    after make demo; about an hour on two cores, resumable
    python benchmarks/grpo.py --ablations        one option changed at a time; another hour

Each reward trains from ``checkpoints/demo/sft`` under several seeds. Every checkpoint draws the same held-out captions
several times, with guidance 1.5 and without any; the exact detector that gives the scene reward judges
them, and a stricter one that gives none. A model's value on a caption is the mean over its seeds and images; intervals
are clustered by caption, and gains are differences on the same captions. Writes a table, JSON and curves (Figure 3).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import runs
from measure import parser, result_file, write_result
from simplear.cli import main as simplear
from simplear.evaluation import clustered_interval, read_report
from simplear.evaluation.publish import VERDICTS_FILE
from simplear.evaluation.scenes import FOLDER

START = Path("checkpoints/demo/sft")
CLIP = Path("checkpoints/demo/clip")
MODELS = {"sft": "fine-tuned", "clip": "+ CLIP reward", "scene": "+ scene reward (trained on the judge)"}
TITLES = {"scene": "scene", "clip": "CLIP"}
GUIDANCE = {"guided": "1.5", "unguided": "1"}
"""Guidance scales; at 1.5 the fine-tuned checkpoint is as good as at its own default."""
PARTS = runs.GRPO_PARTS
PANELS = {
    "reward": "reward/mean",
    "accuracy on held-out captions": "scenes/overall",
    "KL to the reference, nats a code": "policy/kl",
    "entropy, nats a code": "policy/entropy",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "β = 0": {"beta": 0.0},
    "two inner updates": {"inner_updates": 2},
    "advantages scaled by the group's spread": {"scale_advantages": True},
    "16 captions × 4 images": {"group_size": 4},
    "4 captions × 16 images": {"group_size": 16},
}
IMAGES_A_ROLLOUT = 64

Values = dict[str, dict[str, float]]
"""Of each category, by caption: the mean over images."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "grpo")
    made.add_argument("--ablations", action="store_true", help="the options, one at a time, instead of the table")
    made.add_argument("--seeds", type=int, default=3, help="trainings of each reward")
    made.add_argument("--steps", type=int, help="training steps; the configuration's, and 100 for ablations")
    made.add_argument("--prompts", type=int, default=100, help="captions of each category")
    made.add_argument("--images", type=int, help="of each caption; 4, and 1 for ablations")
    made.add_argument("--root", type=Path, help="where runs are kept; checkpoints/benchmark-grpo[-ablations][-quick]")
    chosen = made.parse_args(argv)
    chosen.steps = chosen.steps or (100 if chosen.ablations else runs.configured_steps("grpo-scene"))
    chosen.images = chosen.images or (1 if chosen.ablations else 4)
    name = "benchmark-grpo" + "-ablations" * chosen.ablations + "-quick" * chosen.quick
    chosen.root = chosen.root or Path("checkpoints") / name
    if chosen.quick:
        chosen.seeds, chosen.steps, chosen.prompts, chosen.images = 1, 2, 2, 2
    return chosen


def train(reward: str, run: Path, seed: int, steps: int, options: Mapping[str, Any], watched: bool = True) -> Path:
    """GRPO with a reward of ``configs/demo/grpo-REWARD.yaml``; if watched, accuracy during training is noted too."""
    options = {"checkpoint": str(START), "seed": seed, **options}
    data = {"global_batch_size": IMAGES_A_ROLLOUT // options["group_size"]} if "group_size" in options else {}
    return runs.train(
        f"grpo-{reward}",
        run,
        seed=seed,
        steps=steps * options.get("inner_updates", 1),
        options=options,
        data=data,
        save_every=25,
        callbacks=[runs.scene_accuracy(25, 20)] if watched else [],
    )


def log_directory(run: Path) -> Path:
    """Where the run's only training keeps its events."""
    (directory,) = (run / "logs").iterdir()
    return directory


def evaluate(checkpoint: Path, name: str, guidance: str, settings: argparse.Namespace) -> Path:
    """Draw and judge, unless it is done; the directory of the report."""
    out = settings.root / guidance
    if name not in read_report(out / "report.json")["runs"]:
        counts = ["--prompts_per_category", str(settings.prompts), "--images_per_prompt", str(settings.images)]
        options = ["--out", str(out), "--run", name, "--guidance_scale", GUIDANCE[guidance], "--strict", "true"]
        simplear(["evaluate", "scenes", str(checkpoint), *options, *counts])
    return out


def values(out: Path, names: Sequence[str], verdict: str) -> Values:
    """Of each caption the mean over all images of these runs; `verdict` is "correct" or "strict"."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for line in (out / FOLDER / name / VERDICTS_FILE).read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["tag"], {}).setdefault(row["prompt"], []).append(float(row[verdict]))
    return {
        category: {caption: statistics.fmean(right) for caption, right in captions.items()}
        for category, captions in found.items()
    }


def gain(after: Values, before: Values) -> Values:
    """Differences on the same captions."""
    return {
        category: {caption: value - before[category][caption] for caption, value in captions.items()}
        for category, captions in after.items()
    }


def intervals(found: Values) -> dict[str, list[float]]:
    """Mean, low and high of each category, and of their mean."""
    strata = {category: list(captions.values()) for category, captions in found.items()}
    return {
        **{category: list(clustered_interval([members])) for category, members in strata.items()},
        "overall": list(clustered_interval(list(strata.values()))),
    }


def judged(names: Mapping[str, Sequence[str]], settings: argparse.Namespace) -> dict[str, Any]:
    """Of each model and guidance: accuracies, gains over the first model, and variety.

    Args:
        names: the evaluated runs of each model, one a seed.
    """
    first = next(iter(names))
    results: dict[str, Any] = {}
    for guidance in GUIDANCE:
        out = settings.root / guidance
        varied = read_report(out / "report.json")["diversity"]
        before = {verdict: values(out, names[first], verdict) for verdict in ("correct", "strict")}
        for model, members in names.items():
            entry: dict[str, Any] = {
                "diversity": {
                    measure: statistics.fmean(varied[name][measure] for name in members)
                    for measure in varied[members[0]]
                },
                "overall_by_seed": [intervals(values(out, [name], "correct"))["overall"][0] for name in members],
            }
            for verdict, start in before.items():
                after = values(out, members, verdict)
                entry[verdict] = intervals(after)
                entry[f"{verdict}_gain"] = intervals(gain(after, start))
            results.setdefault(model, {})[guidance] = entry
    return results


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """All trainings and evaluations, and what they gave."""
    names: dict[str, list[str]] = {"sft": ["sft"]}
    checkpoints = {"sft": START}
    logs: dict[str, Path] = {}
    if not CLIP.exists():
        simplear(["fit", "--config", "configs/demo/clip.yaml"])
    for seed in range(settings.seeds):
        for reward in ("scene", "clip"):
            name = f"{reward}-{seed}"
            run = settings.root / name
            checkpoints[name] = train(reward, run, seed, settings.steps, {})
            logs[name] = log_directory(run)
            names.setdefault(reward, []).append(name)
    for name, checkpoint in checkpoints.items():
        for guidance in GUIDANCE:
            evaluate(checkpoint, name, guidance, settings)
    return {
        "models": judged({model: names[model] for model in MODELS}, settings),
        "curves": {name: runs.read_curves(log, list(PANELS.values())) for name, log in logs.items()},
        "share_of_time": {reward: shares(logs[f"{reward}-0"]) for reward in ("scene", "clip")},
    }


def shares(log: Path) -> dict[str, float]:
    """Of each part in the time of a training step, medians over the run."""
    curves = runs.read_curves(log, [f"seconds/{part}" for part in PARTS])
    seconds = {part: statistics.median(curves[f"seconds/{part}"][1]) for part in PARTS}
    return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def ablate(settings: argparse.Namespace) -> dict[str, Any]:
    """One training an option, as many images a rollout in each."""
    names: dict[str, list[str]] = {"fine-tuned": ["sft"]}
    checkpoints = {"sft": START}
    last: dict[str, dict[str, float]] = {}
    for number, (title, options) in enumerate(ABLATIONS.items()):
        name = f"ablation-{number}"
        run = settings.root / name
        checkpoints[name] = train("scene", run, 0, settings.steps, options, watched=False)
        names[title] = [name]
        curves = runs.read_curves(log_directory(run), ["policy/kl", "policy/entropy", "reward/mean"])
        last[title] = {tag: statistics.fmean(found[1][-20:]) for tag, found in curves.items()}
    for name, checkpoint in checkpoints.items():
        for guidance in GUIDANCE:
            evaluate(checkpoint, name, guidance, settings)
    return {"models": judged(names, settings), "last": last}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a column for each model."""
    models: Mapping[str, Any] = result["models"]
    first = next(iter(models))

    def row(title: str, guidance: str, key: str, category: str = "overall") -> str:
        signed = key.endswith("gain")
        cells = [
            "" if signed and model == first else _percent(entry[guidance][key][category], signed)
            for model, entry in models.items()
        ]
        return " | ".join([f"| {title}", *cells]) + " |"

    lines = [
        " | ".join(["| %", *(MODELS.get(model, model) for model in models)]) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    lines += [row(name.replace("_", " "), "guided", "correct", name) for name in models[first]["guided"]["correct"]]
    lines += [
        row("**gain**", "guided", "correct_gain"),
        row("without guidance", "unguided", "correct"),
        row("gain without guidance", "unguided", "correct_gain"),
        row("by the strict judge", "guided", "strict"),
        row("gain by the strict judge", "guided", "strict_gain"),
    ]
    varied = {model: entry["guided"]["diversity"] for model, entry in models.items()}
    for measure_name in varied[first]:
        cells = [f"{numbers[measure_name]:.2f}" for numbers in varied.values()]
        lines.append(" | ".join([f"| {measure_name.replace('_', ' ')}", *cells]) + " |")
    return "\n".join(lines)


def _percent(interval: Sequence[float], signed: bool) -> str:
    mean, low, high = (100 * bound for bound in interval)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if signed else f"{mean:.1f} ({low:.1f}–{high:.1f})"


def ablation_table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each option."""
    lines = [
        "| trained with | guided | without guidance | strict judge | KL | entropy | backgrounds, bits |",
        "|---" * 7 + "|",
    ]
    for title, entry in result["models"].items():
        last = result["last"].get(title, {})
        cells = [_percent(entry[guidance]["correct"]["overall"], False) for guidance in GUIDANCE]
        cells.append(_percent(entry["guided"]["strict"]["overall"], False))
        cells += [f"{last[tag]:.3f}" if tag in last else "" for tag in ("policy/kl", "policy/entropy")]
        cells.append(f"{entry['guided']['diversity']['background_entropy']:.2f}")
        lines.append(" | ".join([f"| {title}", *cells]) + " |")
    return "\n".join(lines)


def plot(curves: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Figure 3: the curves of all trainings, a row for each reward."""
    rewards = list(dict.fromkeys(name.rpartition("-")[0] for name in curves))
    figure = Figure(figsize=(3.6 * len(PANELS), 2.8 * len(rewards)), dpi=110, layout="constrained")
    rows = figure.subplots(len(rewards), len(PANELS), squeeze=False)
    for reward, row in zip(rewards, rows, strict=True):
        for axes, (title, tag) in zip(row, PANELS.items(), strict=True):
            for name in (name for name in curves if name.rpartition("-")[0] == reward):
                steps, found = curves[name][tag]
                noisy = len(found) > 30
                axes.plot(steps, runs.smooth(found) if noisy else found, label=f"seed {name.rpartition('-')[2]}")
            axes.set_title(title if reward == rewards[0] else "", fontsize="medium")
            axes.set_ylabel(f"{TITLES[reward]} reward" if axes is row[0] else "")
            axes.set_xlabel("optimizer step" if reward == rewards[-1] else "")
            axes.grid(alpha=0.3)
        row[0].legend(fontsize="small")
    figure.savefig(str(file))


def main(argv: Sequence[str] | None = None) -> None:
    settings = arguments(argv)
    if settings.ablations:
        result = write_result("grpo_ablations", settings, ablate(settings))
        print(ablation_table(result))
    else:
        measured = measure(settings)
        curves = measured.pop("curves")
        result = write_result("grpo", settings, measured)
        if (out := result_file("grpo", settings)) is not None:
            plot(curves, out.with_suffix(".png"))
        print(table(result))


if __name__ == "__main__":
    main()
