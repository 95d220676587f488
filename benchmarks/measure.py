"""What the benchmark scripts share: variants run in turn, their peak memory, the machine in words, claims, results.

A claim is a ratio of two variants within one round, so that a neighbour's load falls on both; over the rounds its
median and its range are stated. Seconds are kept in the results for the arithmetic, and mean little by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import operator
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
COMPARISONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Run:
    """One variant in one round."""

    seconds: float
    """Of one execution."""
    peak_bytes: int | None = None
    """Resident memory at its highest, above what was resident before; None when it was not asked for."""


Runs = dict[str, list[Run]]


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    title: str,
    *,
    memory: bool = False,
    balance: bool = False,
) -> Runs:
    """Run all variants in each round, one after another, every other round backwards.

    Args:
        variants: by name; what they return is dropped before the next begins.
        rounds: how many.
        title: of the progress line.
        memory: measure peak memory too (Linux alone).
        balance: begin with a round that is not counted, and repeat fast variants within each later round until they
            take as long as the slowest: else a neighbour's load would pass short ones by.
    """
    runs: Runs = {name: [] for name in variants}
    repeats = dict.fromkeys(variants, 1)
    if balance:
        first = {name: _run(variant, memory, 1).seconds for name, variant in variants.items()}
        repeats = {name: max(1, round(max(first.values()) / seconds)) for name, seconds in first.items()}
    with tqdm(total=rounds * len(variants), desc=title, unit="run") as progress:
        for number in range(rounds):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                progress.set_postfix_str(name)
                runs[name].append(_run(variants[name], memory, repeats[name]))
                progress.update()
    return runs


def _run(variant: Callable[[], object], memory: bool, repeats: int) -> Run:
    before = _restart_peak() if memory else 0
    start = time.perf_counter()
    for _ in range(repeats):
        variant()
    seconds = (time.perf_counter() - start) / repeats
    return Run(seconds, _status("VmHWM") - before if memory else None)


def _restart_peak() -> int:
    """Let the kernel's record of this process's peak begin anew; returns the bytes resident now."""
    # See "clear_refs" in proc(5). Tensors of megabytes are mapped one by one, so what was freed is not resident; of
    # smaller ones the allocator keeps the pages, unless it is told not to.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].removesuffix("kB")) * 1024


def resident_anonymous() -> int:
    """Bytes resident now that are this process's own, no file's; what was freed is given back first (Linux alone)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("RssAnon")


def median(runs: Sequence[Run], attribute: str = "seconds") -> float:
    """Median over the rounds of "seconds" or "peak_bytes"."""
    return statistics.median(getattr(run, attribute) for run in runs)


def ratios(runs: Runs, variant: str, reference: str, attribute: str = "seconds") -> list[float]:
    """A variant's measure divided by the reference's of the same round."""
    return [
        getattr(mine, attribute) / getattr(other, attribute)
        for mine, other in zip(runs[variant], runs[reference], strict=True)
    ]


def claim(what: str, values: Sequence[float], bar: tuple[str, float] | None = None, note: str = "") -> dict[str, Any]:
    """One row of a table: median and range of a ratio over the rounds, and the bar it is held to, if any.

    Args:
        what: the ratio in words.
        values: one a round, or the only one.
        bar: ("<=" or ">=", value), compared with the median.
        note: what the reader should know beside the ratio.
    """
    middle = statistics.median(values)
    return {
        "what": what,
        "ratio": middle,
        "low": min(values),
        "high": max(values),
        "bar": None if bar is None else f"{bar[0]} {bar[1]:g}",
        "met": None if bar is None else COMPARISONS[bar[0]](middle, bar[1]),
        "note": note,
    }


def environment() -> dict[str, Any]:
    """Processor, cores, versions, and the load on the machine as the measurement ends."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Command line with what all scripts have: --rounds, --quick, --out."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: does the script run? Its ratios mean nothing")
    made.add_argument("--out", type=Path, help=f"JSON to write; benchmarks/results/{name}.json, with --quick none")
    return made


def publish(name: str, arguments: argparse.Namespace, claims: list[dict[str, Any]], details: Mapping[str, Any]) -> None:
    """Print the table and write the JSON."""
    print(markdown_table(write_result(name, arguments, {"claims": claims, "details": dict(details)})))


def write_result(name: str, arguments: argparse.Namespace, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the JSON, with what it was measured on and how, unless the run was a quick one without a place for it."""
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("out", "directory")
    }
    result = {"benchmark": name, "environment": environment(), "settings": settings, **content}
    if (out := result_file(name, arguments)) is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(result_text(result))
        print(f"written to {out}")
    return result


def result_file(name: str, arguments: argparse.Namespace) -> Path | None:
    """The JSON to write; None for a quick run that names no place."""
    return arguments.out or (None if arguments.quick else RESULTS / f"{name}.json")


def markdown_table(result: Mapping[str, Any]) -> str:
    """The claims of a result, and the machine, as Markdown."""
    lines = ["| ratio | median (range) | bar |", "|---|---:|---:|"]
    for row in result["claims"]:
        measured = f"{row['ratio']:.3g}" + (
            f" ({row['low']:.3g}–{row['high']:.3g})" if row["low"] < row["high"] else ""
        )
        bar = (row["bar"] or "") + ("" if row["met"] in (None, True) else ", missed")
        lines.append(f"| {row['what']}{': ' * bool(row['note'])}{row['note']} | {measured} | {bar} |")
    where = result["environment"]
    return "\n".join([*lines, "", f"{where['processor']}, {where['threads']} threads, torch {where['torch']}."])


def result_text(result: Any) -> str:
    """JSON with four digits of each number, and lists of numbers in one line."""
    text = json.dumps(_rounded(result), indent=2, ensure_ascii=False)
    return re.sub(r'\[\s+([^][{}"]+?)\s+\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def _rounded(value: Any) -> Any:
    """Four digits of each number: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
