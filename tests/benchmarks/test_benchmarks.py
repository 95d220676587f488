"""The benchmark scripts run at tiny sizes and write what their README promises; no ratio of times is tested."""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from transformers import AutoModelForCausalLM

import ablations
import bounds
import gpu
import grpo
import grpo_speed
import inference
import measure
import runs
import tables
import training
import training_cost
from generation.models import ARCHITECTURE, CODEBOOK, LAYOUT, prompts
from simplear.cli import main as simplear
from simplear.data.shards import TokenShards
from simplear.evaluation.report import merge_run
from simplear.generation import CompiledEngine, SamplingSettings
from simplear.language_model import LanguageModel, LanguageModelConfig, load_text_tokenizer
from simplear.scenes import CATEGORIES

BENCHMARKS = Path(measure.__file__).parent
CLAIM_KEYS = {"what", "ratio", "low", "high", "bar", "met", "note"}


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    runpy.run_path(str(BENCHMARKS / f"{name}.py"))["main"](["--quick", "--out", str(out), *options])
    result = json.loads(out.read_text())
    assert result["benchmark"] == name and result["settings"]["quick"]
    assert result["environment"].keys() == {"processor", "cores", "threads", "load_average", "python", "torch"}
    assert all(row.keys() == CLAIM_KEYS and row["low"] <= row["ratio"] <= row["high"] for row in result["claims"])
    return result


def test_data(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    result = run("data", tmp_path / "data.json")
    assert result["claims"][0]["bar"] == ">= 20"
    assert [row["bar"] for row in result["claims"][3:6]] == [">= 0.9", "<= 1.05", ">= 0.9"]
    details = result["details"]
    assert details["mix_seconds_a_batch"].keys() == {"one set", "mix"}
    assert len(details["memory_bytes"]) >= 8 and min(details["memory_bytes"]) > 2**20
    assert details["seconds_a_picture"].keys() == {"encoder alone", "tokenize"}
    assert details["pairs_a_second"].keys() == {"shards", "files", "datasets, row by row", "datasets, by batch"}
    sizes = details["bytes_a_sample"]
    # 16 codes of two bytes and some text; a file takes at least a block on disk, and there are two a sample.
    assert 32 < sizes["shards"] < 320 < sizes["files_allocated"]
    assert details["startup_seconds"].keys() == {
        "open, small",
        "first batch, small",
        "open, large",
        "first batch, large",
    }
    assert set(tmp_path.iterdir()) - before == {tmp_path / "data.json"}


def test_training(tmp_path: Path) -> None:
    """Our training and the plain one have the same losses; the rungs of the ladder are all there."""
    result = run("training", tmp_path / "training.json")
    claims = {row["what"]: row for row in result["claims"]}
    bars = {row["bar"] for row in claims.values()}
    assert bars == {None, "<= 0.75", "<= 0.35", "<= 0.0001", "<= 1.03", "<= 0.5", "<= 0.9", "<= 1e-05"}
    details = result["details"]
    for kind in ("by_modality", "full"):
        assert claims[f"{kind}: loss, relative difference from plain"]["met"]
        assert details[f"{kind}_gradient_difference"] < 1e-4
    assert all(row["met"] for row in claims.values() if row["bar"] == "<= 0.0001")
    losses = details["losses"]
    assert losses["full, plain"] > losses["by_modality, plain"] > 1
    steps = [*training.LADDER.values(), *training.BESIDE.values(), training.PLAIN]
    for step in steps:
        assert {step.head, f"layers, {step.layers}", f"AdamW, {step.optimizer}"} <= details["seconds"].keys()
    assert sum("over the step without" in what for what in claims) == 2 * (len(steps) - 1)
    assert len(set(details["lengths"])) > 1, "captions of different lengths"


def test_a_step_of_all_layers_by_hand() -> None:
    """Two layers of 10 s that keep 5 bytes each and work in 3; a head of 4 s and 7 bytes; an update of 1 s."""
    seconds = {"h": (4.0, 7), "embedding": (1.0, 0), "layers, l": (10.0, 13), "AdamW, o": (1.0, 0)}
    runs = {name: [measure.Run(time, peak)] for name, (time, peak) in seconds.items()}
    one_layer = {"layers, l": [measure.Run(5.0, 8)]}
    measured = training.Measured(runs, one_layer, layers=24, weights=20.0)
    step = training.Step("h", "l", "o")
    assert measured.seconds(step, 0) == 4 + 1 + 10 * 12 + 20
    assert measured.peak(step) == 24 * 5 + 7
    assert measured.seconds(step, 0, layers=2, optimizer=False) == 15 and measured.peak(step, layers=2) == 2 * 5 + 7


def test_training_cost(tmp_path: Path) -> None:
    result = run("training_cost", tmp_path / "cost.json")
    sizes = list(result["details"]["sizes"].values())
    assert [(size["width"], size["codes"]) for size in sizes] == [(128, 4), (128, 16), (256, 4), (256, 16)]
    assert all(size["seconds"] > 0 and size["computed_mib"] > 0 for size in sizes)
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.width > 1000


def test_the_law_of_cost_is_found() -> None:
    constant, slope, r_squared = training_cost.fitted([1.0, 2.0, 5.0], [5.0, 7.0, 13.0])
    assert (constant, slope, r_squared) == pytest.approx((3, 2, 1))


def test_peak_memory_counts_what_was_freed_again() -> None:
    """64 MiB that live within the variant alone; what is resident before does not count."""
    kept = torch.ones(2**24)
    runs = measure.alternate({"much": lambda: torch.ones(2**24).sum(), "none": kept.sum}, 2, "test", memory=True)
    # The kernel counts resident pages of each thread by themselves and adds them up in batches.
    assert all(0.98 * 2**26 <= (run.peak_bytes or 0) < 1.25 * 2**26 for run in runs["much"])
    assert all(abs(run.peak_bytes or 0) < 2**23 for run in runs["none"])


def test_ratios_are_taken_within_a_round() -> None:
    """A neighbour that slows the second round down does not show in the ratio."""
    runs = {"fast": [measure.Run(1.0), measure.Run(10.0)], "slow": [measure.Run(4.0), measure.Run(40.0)]}
    row = measure.claim("slow over fast", measure.ratios(runs, "slow", "fast"), (">=", 4))
    assert (row["ratio"], row["low"], row["high"], row["met"]) == (4, 4, 4, True)
    assert not measure.claim("slow over fast", [3.9, 3.9, 5], (">=", 4))["met"]


def test_short_variants_repeat_until_they_take_as_long_as_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    calls = {"slow": 0, "fast": 0}

    def take(name: str, seconds: float) -> None:
        calls[name] += 1
        clock[0] += seconds

    variants = {"slow": lambda: take("slow", 8.0), "fast": lambda: take("fast", 2.0)}
    runs = measure.alternate(variants, 3, "test", balance=True)
    assert calls == {"slow": 1 + 3, "fast": 1 + 3 * 4}
    assert [run.seconds for run in runs["fast"]] == [2.0, 2.0, 2.0]


def test_tables_fill_their_places_alone(tmp_path: Path) -> None:
    claims = [measure.claim("a over b", [0.2, 0.3, 0.7], ("<=", 0.25)), measure.claim("c over d", [2.0])]
    result = {"claims": claims, "environment": {"processor": "P", "threads": 2, "torch": "3"}}
    (tmp_path / "one.json").write_text(json.dumps(result))
    text = "before\n<!-- benchmarks/one -->\nold\n<!-- end -->\nbetween\n<!-- benchmarks/two -->\n<!-- end -->\nafter"
    filled = tables.filled(text, tmp_path)
    assert filled.startswith("before\n<!-- benchmarks/one -->\n| ratio")
    assert "| a over b | 0.3 (0.2–0.7) | <= 0.25, missed |\n| c over d | 2 |  |" in filled and "old" not in filled
    assert filled.endswith("between\n<!-- benchmarks/two -->\nNot measured yet: `make bench`.\n<!-- end -->\nafter")
    assert tables.filled(filled, tmp_path) == filled


def test_the_documents_show_the_committed_results() -> None:
    places = set()
    for document in tables.DOCUMENTS:
        text = document.read_text()
        places |= {place[1] for place in tables.MARKED.findall(text)}
        assert tables.filled(text) == text, f"python benchmarks/tables.py brings {document.name} up to date"
    assert {
        "ablations",
        "data",
        "training",
        "training_cost",
        "grpo",
        "grpo_ablations",
        "grpo_speed",
        "inference",
        "serving",
    } <= places


def test_grpo_speed(tmp_path: Path) -> None:
    """Both ways draw the same images and take the same gradient; the script itself refuses to go on otherwise."""
    result = run("grpo_speed", tmp_path / "speed.json")
    assert result["claims"][-1]["met"]
    for shares in result["details"]["share_of_time"].values():
        assert shares.keys() == set(grpo.PARTS) and sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_host_time(tmp_path: Path) -> None:
    result = run("host_time", tmp_path / "host.json")
    assert len(result["claims"]) == 2 and result["details"]["milliseconds_a_code"].keys() == {
        "float32",
        "bf16 autocast",
    }


def test_inference(tmp_path: Path) -> None:
    """On random weights of the demo's sizes, whose pictures are all wrong."""
    checkpoint, _ = grpo_speed.write_start(tmp_path, argparse.Namespace(grid=4))
    result = run("inference", tmp_path / "inference.json", "--checkpoint", str(checkpoint))
    assert {row["bar"] for row in result["claims"] if row["bar"]} == {">= 3", ">= 1.5", ">= 2.5", ">= 1.8", ">= 9"}
    details = result["details"]
    assert details["passes"].keys() == inference.FIXED.keys()
    assert all(2 <= passes <= 16 for passes in details["passes"].values())
    assert details["passes"][inference.NO_DRAFTS] == 16
    assert details["accuracy"] == {"cached": 0.0, "jacobi, W = 16": 0.0}
    assert details["same_pictures"] == {"same": 6, "of": 6}
    assert details["over_kv_cache"].keys() == details["memory"].keys() == {"1", "2"}
    text = inference.tables(result)
    assert "| cached |" in text and "| 16 | " in text and "(the paper's Table 6)" in text
    with Image.open(tmp_path / "inference.png") as picture:
        assert picture.width > 1000


def test_serving(tmp_path: Path) -> None:
    """A server in a process of its own; no image is lost or another than the pipeline's."""
    checkpoint, _ = grpo_speed.write_start(tmp_path, argparse.Namespace(grid=4))
    result = run("serving", tmp_path / "serving.json", "--checkpoint", str(checkpoint))
    claims = {row["what"]: row for row in result["claims"]}
    assert claims["requests that got their image"]["met"]
    assert claims["images that are the pipeline's, pixel by pixel, at the same batch shape"]["met"]
    assert sum(row["bar"] is not None for row in claims.values()) == 4
    assert result["details"]["images_a_second"].keys() == {"1", "4", "16"}
    assert result["details"]["batch_size"]["16"] > result["details"]["batch_size"]["1"] == 1


class TestGPU:
    """The command for a GPU, rehearsed."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Passes are traced and not compiled; bytes and operations a second are made up."""
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda code, **options: compile_(code, **options, backend="eager"))
        monkeypatch.setattr(gpu, "measured_machine", lambda device, dtype: (1e10, 1e11))

    def test_all_that_must_hold_holds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "gpu.json"
        assert gpu.main(["--device", "cpu", "--size", "tiny", "--minutes", "60", "--out", str(out)]) == 0
        result = json.loads(out.read_text())
        assert result["sections"].keys() == gpu.SECTIONS.keys()
        assert not any(section["error"] for section in result["sections"].values())
        rows = [row for section in result["sections"].values() for row in section["rows"]]
        assert sum(row["ok"] is True for row in rows) == 14 and all(row["value"] is not None for row in rows)
        assert [row["what"] for row in rows if "extrapolated" in row["note"]] == [
            f"drawing {size}, 1024 px, cached, {images} at once" for size in ("0.5b", "1.5b") for images in (1, 2)
        ]
        printed = capsys.readouterr().out
        assert all(f"| {row['what']} | " in printed for row in rows) and "[15/15] grpo, at most" in printed

    def test_a_section_that_fails_or_hangs_stops_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And Ctrl-C leaves what was measured."""
        out, seen = tmp_path / "gpu.json", []

        def broken(bench: gpu.Bench) -> None:
            bench.note("before", 1.0, "s")
            raise ValueError("out of order")

        def endless(bench: gpu.Bench) -> None:
            seen.append(json.loads(out.read_text())["sections"].keys())
            threading.Event().wait(600)

        def false(bench: gpu.Bench) -> None:
            bench.note("two", 2.0, ok=False)

        def interrupted(bench: gpu.Bench) -> None:
            bench.note("begun", 3.0)
            raise KeyboardInterrupt

        parts = {"broken": broken, "endless": endless, "false": false, "interrupted": interrupted, "never": false}
        monkeypatch.setattr(gpu, "SECTIONS", {name: (part, 1.0) for name, part in parts.items()})
        options = ["--device", "cpu", "--size", "tiny", "--minutes", "0.1", "--out", str(out)]
        assert gpu.main(options) == 1
        sections = json.loads(out.read_text())["sections"]
        assert list(sections) == ["broken", "endless", "false", "interrupted"] and list(seen[0]) == ["broken"]
        assert 'raise ValueError("out of order")' in sections["broken"]["error"]
        assert "TimeoutError: stopped after" in sections["endless"]["error"]
        assert [section["rows"][0]["value"] for name, section in sections.items() if name != "endless"] == [1, 2, 3]
        printed = capsys.readouterr().out
        assert (
            "| two | 2 | **fails** |  |" in printed
            and "| broken | | **stopped** | ValueError: out of order |" in printed
        )


def test_bounds_are_those_of_pencil_and_paper() -> None:
    """0.5B and 1.5B of Qwen2.5 at 1024 px in bf16 with guidance; seconds an image that memory allows."""
    small = bounds.Shape(24, 896, 14, 2, 64, 4864, 215_672, 64_000)
    large = bounds.Shape(28, 1536, 12, 2, 128, 8960, 215_672, 64_000)
    assert small.layer_weights == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    a100, h100 = bounds.MACHINES["A100"], bounds.MACHINES["H100"]
    seconds = [
        bounds.image_seconds(small, 4096, 1, 2, a100),
        bounds.image_seconds(small, 4096, 32, 2, a100),
        bounds.image_seconds(small, 4096, 1, 2, h100),
        bounds.image_seconds(large, 4096, 1, 2, a100),
    ]
    assert seconds == pytest.approx([1.77, 0.153, 1.08, 5.89], rel=0.01)


def test_predictions_count_the_kernels_of_a_compiled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiler schedules them, for a CPU: it generates no code here, for it is stopped before."""
    sampling, kernels = SamplingSettings(guidance_scale=2.0), []

    def stop(graph: GraphLowering) -> None:
        graph._update_scheduler()
        kernels.append(len(graph.scheduler.nodes))
        raise InterruptedError

    monkeypatch.setattr(GraphLowering, "codegen", stop)
    for layers in (1, 2):
        architecture = {**ARCHITECTURE, "num_hidden_layers": layers}
        config = LanguageModelConfig("", CODEBOOK, architecture=architecture)
        model = LanguageModel(config.random_decoder(LAYOUT.vocab_size).bfloat16(), LAYOUT)
        with pytest.raises(Exception, match="InterruptedError"), fresh_cache():
            CompiledEngine(model).generate(prompts(3), prompts(2), (2, 2), sampling, [0])
    layer = kernels[1] - kernels[0]
    assert (layer, kernels[0] - layer) == (bounds.LAYER_KERNELS, bounds.OTHER_KERNELS)


def test_curves_of_a_resumed_run_take_the_later_value_of_a_step(tmp_path: Path) -> None:
    for part, values in enumerate([[0.0, 0.1, 0.9], [0.2, 0.3, 0.4]]):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        for step, value in enumerate(values, start=2 * part):
            logger.experiment.add_scalar("reward/mean", value, step, walltime=100 * part + step)
        logger.experiment.close()
    curves = runs.read_curves(tmp_path, ["reward/mean", "absent"])
    assert list(curves) == ["reward/mean"]
    steps, found = curves["reward/mean"]
    assert steps == [0, 1, 2, 3, 4]
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_average_does_not_start_at_zero() -> None:
    assert runs.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert runs.smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)


class TestGRPO:
    """Of two captions a category the second is right for every model; the first for the trained one alone, on half of
    its images."""

    @pytest.fixture
    def result(self, tmp_path: Path) -> dict[str, Any]:
        settings = argparse.Namespace(root=tmp_path)
        names = {"sft": ["sft"], "scene": ["scene-0", "scene-1"]}
        for guidance in grpo.GUIDANCE:
            for name in ("sft", "scene-0", "scene-1"):
                folder = tmp_path / guidance / "scenes" / name
                folder.mkdir(parents=True)
                rows = [
                    {"tag": tag, "prompt": f"{tag} {n}", "correct": n == 1 or (trained and image), "strict": n == 1}
                    for trained in [name != "sft"]
                    for tag in ("counting", "colors")
                    for n in (0, 1)
                    for image in (0, 1)
                ]
                (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                entry = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 8}
                varied = {"background_entropy": 1.5, "color_entropy": 2.0 if name == "scene-0" else 3.0}
                merge_run(tmp_path / guidance / "report.json", name, {"overall": entry}, diversity=varied)
        return {"models": grpo.judged(names, settings)}

    def test_gains_are_differences_on_the_same_captions(self, result: dict[str, Any]) -> None:
        before, after = (result["models"][model]["guided"] for model in ("sft", "scene"))
        assert before["correct"]["overall"][0] == 0.5 and after["correct"]["overall"][0] == 0.75
        # Two captions a category, whose gains are 0.5 and 0: s² / n = 0.125 / 2 in each of two.
        spread = 1.959964 * (2 * 0.125 / 2) ** 0.5 / 2
        assert after["correct_gain"]["overall"] == pytest.approx([0.25, 0.25 - spread, 0.25 + spread], abs=1e-6)
        assert after["strict_gain"]["overall"] == [0, 0, 0]
        assert after["overall_by_seed"] == [0.75, 0.75] and after["diversity"] == {
            "background_entropy": 1.5,
            "color_entropy": 2.5,
        }

    def test_the_table_has_a_column_a_model(self, result: dict[str, Any]) -> None:
        lines = grpo.table(result).splitlines()
        assert lines[0] == "| % | fine-tuned | + scene reward (trained on the judge) |"
        assert all(line.count("|") == 4 for line in lines)
        assert "| **gain** |  | +25.0 (-9.6 to +59.6) |" in lines
        assert "| color entropy | 3.00 | 2.50 |" in lines

    def test_the_ablations_have_a_row_each(self, result: dict[str, Any]) -> None:
        last = {"scene": {"policy/kl": 0.0123, "policy/entropy": 0.5, "reward/mean": 0.9}}
        lines = grpo.ablation_table({**result, "last": last}).splitlines()
        assert lines[3].startswith("| scene | 75.0 (") and "| 0.012 | 0.500 | 1.50 |" in lines[3]
        assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1

    def test_the_curves_are_drawn(self, tmp_path: Path) -> None:
        curve = {tag: ([1, 2, 3], [0.1, 0.2, 0.3]) for tag in grpo.PANELS.values()}
        grpo.plot({"scene-0": curve, "scene-1": curve, "clip-0": curve}, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").width > 1000


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Now the current directory, with tokenizers and token shards as `make demo` leaves them, of few scenes."""
    grpo_speed.write_start(tmp_path, argparse.Namespace(grid=4))
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    for place in ("data/demo/text_tokenizer", "checkpoints/demo/visual_tokenizer"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / Path(place).name).rename(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    for part, count in (("pretrain", 256), ("pretrain-validation", 64)):
        simplear(["tokenize", "--config", f"configs/demo/tokenize-{part}.yaml", "--source.count", str(count)])
    return tmp_path


class TestAblations:
    """Of two captions a category the second is right for every model; the first for the other arm alone, under seed 1
    on both images, under seed 0 on one.
    """

    @pytest.fixture
    def settings(self, tmp_path: Path) -> argparse.Namespace:
        return argparse.Namespace(root=tmp_path / "runs", seeds=2, steps=6, prompts=2, images=2)

    @pytest.fixture
    def result(self, settings: argparse.Namespace) -> dict[str, Any]:
        for arm, guidance, seed in itertools.product(("base", "rope-2d"), ablations.GUIDANCE, range(2)):
            folder = settings.root / arm / guidance / "scenes" / f"seed-{seed}"
            folder.mkdir(parents=True)
            rows = [
                {"tag": tag, "prompt": f"{tag} {n}", "correct": n == 1 or (arm != "base" and image <= seed)}
                for tag, n, image in itertools.product(CATEGORIES, (0, 1), (0, 1))
            ]
            (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"arms": {name: ablations.judged(name, settings) for name in ("base", "rope-2d")}}

    def test_differences_are_paired_by_caption_and_by_seed(self, result: dict[str, Any]) -> None:
        base, other = (result["arms"][name]["guided"] for name in ("base", "rope-2d"))
        assert base["by_seed"] == [0.5, 0.5] and other["by_seed"] == [0.75, 1.0]
        assert other["difference"]["by_seed"] == [0.25, 0.5]
        # Two captions a category, whose differences are 0.75 and 0: s² / n = 0.28125 / 2 in each of six.
        spread = 1.959964 * (6 * 0.28125 / 2) ** 0.5 / 6
        found = other["difference"]["over_captions"]["overall"]
        assert found == pytest.approx([0.375, 0.375 - spread, 0.375 + spread], abs=1e-6)
        # Student's t of one degree of freedom is 12.706; the standard error of 0.25 and 0.5 is 0.125.
        margin = 12.7062 * 0.125
        assert other["difference"]["over_trainings"] == pytest.approx([0.375, 0.375 - margin, 0.375 + margin], abs=1e-5)

    def test_the_table_has_a_row_an_arm(self, result: dict[str, Any]) -> None:
        result["arms"]["rope-2d"]["text_perplexity"] = {"before": [3.0, 5.0], "after": [99.0, 101.0]}
        lines = ablations.table(result).splitlines()
        assert lines[2].startswith("| as configured") and "| 50.0 (" in lines[2] and lines[2].endswith("|  |  |")
        assert lines[3].startswith("| 2-D RoPE | 87.5 (") and "+37.5 (" in lines[3] and "-121.3 to +196.3)" in lines[3]
        assert lines[3].endswith("| 4 → 100 |") and len({line.count("|") for line in lines}) == 1

    def test_one_caption_leaves_everything_else(self, small_demo: Path, settings: argparse.Namespace) -> None:
        shards = ablations.DATA / "tokens-pretrain"
        rows = np.arange(256)
        both = TokenShards(shards).read(rows)
        for which in (ablations.SHORT, ablations.LONG):
            one = TokenShards(ablations.one_caption(shards, settings.root / f"{which}", which)).read(rows)
            assert one.captions == [[texts[which]] for texts in both.captions]
            assert one.keys == both.keys and one.metadata == both.metadata and (one.codes == both.codes).all()

    def test_pretraining_begins_with_what_the_language_model_learned(
        self, small_demo: Path, settings: argparse.Namespace
    ) -> None:
        """Held against transformers' own loss."""
        directory = ablations.language_model(settings, "falling", 0)
        tokenizer = load_text_tokenizer(str(directory))
        model: Any = AutoModelForCausalLM.from_pretrained(directory)
        assert model.config.vocab_size == len(tokenizer) < 500
        shards = TokenShards(ablations.DATA / "tokens-pretrain-validation")
        texts = [text for row in shards.read(np.arange(len(shards))).captions for text in row]
        total, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        learned = float(np.exp(total / count))
        # The demo's text tokenizer has the special tokens already, so the vocabulary grows by the codes alone.
        assert ablations.before(settings, "falling", 0) == pytest.approx(learned, rel=1e-4)
        assert learned < 0.2 * len(tokenizer)

    @pytest.mark.long
    def test_all_arms_run_and_a_second_run_finds_them_done(
        self, small_demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ablations, "TEXT_SHARE", 0.5)  # a tenth of ten steps is one, which shows nothing
        ablations.main(["--quick", "--tables", "table2", "--out", "one.json"])
        assert json.loads(Path("one.json").read_text())["arms"].keys() == {"base", *ablations.TABLES["table2"]}
        ablations.main(["--quick", "--out", "all.json"])
        arms = json.loads(Path("all.json").read_text())["arms"]
        assert arms.keys() == ablations.ARMS.keys()
        after = {name: min(arm["text_perplexity"]["after"]) for name, arm in arms.items() if "text_perplexity" in arm}
        assert after.keys() == {"llm-init", "llm-init-constant", "texts"} and after["texts"] < after["llm-init"]
        capsys.readouterr()
        ablations.main(["--quick", "--tables", "table3", "--out", "again.json"])
        assert json.loads(Path("again.json").read_text())["arms"] == arms
        assert "Pretrain: step" not in capsys.readouterr().out
