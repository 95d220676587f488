"""The demo's learning curve: scene accuracy against processor time, for several training seeds.

    .venv/bin/python benchmarks/demo.py            after make demo; about 13 minutes a seed on two cores, resumable

Each seed trains the demo's language model anew, pretraining and fine-tuning, on the tokenizers and token shards that
`make demo` left. Beside it, with the first seed: what fine-tuning at 64 px takes, spent on more pretraining at 32 px.
Accuracy during training is of 120 held-out captions, that of each end of 600. Writes a table, JSON and a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import runs
from measure import RESULTS, result_text
from simplear.cli import main as simplear
from simplear.evaluation import read_report, stratified_interval, wilson_interval

CATEGORIES = 6


def train(stage: str, run: Path, seed: int, steps: int, every: int, options: dict[str, Any]) -> Path:
    """One stage of the demo, its accuracy and processor time noted every so many steps."""
    callbacks = [runs.scene_accuracy(every, 20), {"class_path": "cpu_seconds.CPUSeconds"}]
    return runs.train(stage, run, seed=seed, steps=steps, options=options, save_every=every, callbacks=callbacks)


def evaluate(checkpoint: Path, run: Path) -> dict[str, dict[str, float]]:
    """Accuracy on the 600 captions of the demo's report, from the run's own report if it is there."""
    report = run / "report.json"
    if checkpoint.name not in read_report(report)["runs"]:
        simplear(["evaluate", "scenes", str(checkpoint), "--out", str(run), "--run", checkpoint.name])
    return read_report(report)["runs"][checkpoint.name]


def curve(run: Path, stage: str, start: float) -> list[tuple[float, float]]:
    """(CPU-seconds, accuracy) of a stage; `start` CPU-seconds were spent before it."""
    curves = runs.read_curves(run / "logs" / stage, ["scenes/overall", "cpu_seconds"])
    spent = dict(zip(*curves["cpu_seconds"], strict=True))
    return [(start + spent[step], value) for step, value in zip(*curves["scenes/overall"], strict=True)]


def spent(run: Path, stage: str) -> float:
    """CPU-seconds of a stage."""
    return runs.read_curves(run / "logs" / stage, ["cpu_seconds"])["cpu_seconds"][1][-1]


def measure(root: Path, seeds: int, quick: bool) -> dict[str, Any]:
    """All runs, and what they gave."""
    every = 5 if quick else 100
    steps = {stage: 10 if quick else runs.configured_steps(stage) for stage in ("pretrain", "sft")}
    results: list[dict[str, Any]] = []
    for seed in range(seeds):
        run = root / f"seed-{seed}"
        pretrain = train("pretrain", run, seed, steps["pretrain"], every, {})
        sft = train("sft", run, seed, steps["sft"], every, {"checkpoint": str(pretrain)})
        first = spent(run, "pretrain")
        results.append(
            {
                "seed": seed,
                "cpu_seconds": {"pretrain": first, "sft": spent(run, "sft")},
                "curve": [*curve(run, "pretrain", 0.0), *curve(run, "sft", first)],
                "pretrain": evaluate(pretrain, run),
                "sft": evaluate(sft, run),
            }
        )
    costs = results[0]["cpu_seconds"]
    longer = round(steps["pretrain"] * (costs["pretrain"] + costs["sft"]) / costs["pretrain"])
    alone = root / "pretraining-alone"
    checkpoint = train("pretrain", alone, 0, longer, 4 * every, {})
    return {
        "runs": results,
        "pretraining_alone": {
            "steps": longer,
            "cpu_seconds": spent(alone, "pretrain"),
            "curve": curve(alone, "pretrain", 0.0),
            "pretrain": evaluate(checkpoint, alone),
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: the ends of all runs."""
    lines = ["| run | CPU-seconds | accuracy (95 % interval) |", "| --- | ---: | ---: |"]
    for run in result["runs"]:
        costs, overall = run["cpu_seconds"], run["sft"]["overall"]
        lines.append(f"| seed {run['seed']} | {sum(costs.values()):.0f} | {_percent(overall)} |")
    counts = [
        (sum(round(run["sft"][name]["accuracy"] * run["sft"][name]["n"]) for run in result["runs"]), n)
        for name in result["runs"][0]["sft"]
        if name != "overall" and (n := int(sum(run["sft"][name]["n"] for run in result["runs"])))
    ]
    assert len(counts) == CATEGORIES
    mean, low, high = stratified_interval([(right / n, *wilson_interval(right, n)) for right, n in counts])
    lines.append(f"| all seeds | | {_percent({'accuracy': mean, 'low': low, 'high': high})} |")
    alone = result["pretraining_alone"]
    lines.append(f"| pretraining alone | {alone['cpu_seconds']:.0f} | {_percent(alone['pretrain']['overall'])} |")
    return "\n".join(lines)


def _percent(entry: dict[str, float]) -> str:
    return f"{100 * entry['accuracy']:.1f} ({100 * entry['low']:.1f}–{100 * entry['high']:.1f})"


def plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against CPU-seconds."""
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for run in result["runs"]:
        axes.plot(*zip(*run["curve"], strict=True), marker="o", markersize=3, label=f"demo, seed {run['seed']}")
    alone = result["pretraining_alone"]["curve"]
    axes.plot(*zip(*alone, strict=True), color="gray", linestyle="--", label="pretraining at 32 px alone")
    axes.set_xlabel("CPU-seconds of training the language model")
    axes.set_ylabel("scene accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="where runs are kept; checkpoints/benchmark-demo[-quick]")
    parser.add_argument("--out", type=Path, help="benchmarks/results, with --quick the root")
    parser.add_argument("--quick", action="store_true", help="ten steps of each stage, to see that it runs")
    arguments = parser.parse_args()
    root = arguments.root or Path("checkpoints/benchmark-demo" + "-quick" * arguments.quick)
    out = arguments.out or (root if arguments.quick else RESULTS)
    result = measure(root, arguments.seeds, arguments.quick)
    out.mkdir(parents=True, exist_ok=True)
    plot(result, out / "demo.png")
    for run in (*result["runs"], result["pretraining_alone"]):
        del run["curve"]
    (out / "demo.json").write_text(result_text(result))
    print(table(result))


if __name__ == "__main__":
    main()
