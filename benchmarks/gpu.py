"""One GPU, one command, eight minutes: is what the CPU tests show true there, and how fast is it?

    python benchmarks/gpu.py                                   # the paper's sizes, random weights
    python benchmarks/gpu.py --device cpu --size tiny          # does it run? Its numbers mean nothing
    python benchmarks/gpu.py --sections fused draw-0.5b-fused  # some of it

First what must hold, then what it takes. Sections share the time and are stopped when theirs is over; what fails is
recorded with its traceback and stops no other section. The JSON is written after each section, the table at the end and
on Ctrl-C. Needed are torch, transformers, Lightning and this package, and no network. `fused` and `cached` draw a few
rows of a picture; their seconds an image are extrapolated, which the table says.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]  # on a machine where nothing is installed

from bounds import Shape, image_seconds, measured_machine, paper_architecture  # noqa: E402
from generation.near_ties import margins  # noqa: E402
from measure import RESULTS, environment, result_text  # noqa: E402
from simplear.atomic import whole_file  # noqa: E402
from simplear.generation import Engine, SamplingSettings, make_engine  # noqa: E402
from simplear.language_model import Architecture, LanguageModel, LanguageModelConfig  # noqa: E402
from simplear.sequence import TokenLayout, training_batch  # noqa: E402

DATA_SHEETS = {"H200": (4.8e12, 989.4e12), "H100": (3.35e12, 989.4e12), "A100": (2.039e12, 312e12)}
"""Bytes a second of memory, and bfloat16 operations a second without sparsity; NVIDIA, SXM, 80 GB and more."""
GIB = 2**30
GUIDED, PLAIN = SamplingSettings(guidance_scale=6.0), SamplingSettings()
NEAR = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""How far a code may be from winning, in nats by a float64 model of the same weights, where engines part."""
PLANNED = (0.7, 1.1)
"""Measured memory of a training step over that of the plan."""
CAPTION = 30
HELD = {None: "", True: "holds", False: "**fails**"}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class Enough(Exception):
    """A drawing has drawn as much as is wanted of it."""


@dataclass
class Bench:
    """What sections are given.

    Args:
        device: to measure.
        tiny: a model and pictures so small that a CPU does it in seconds.
        machine: bytes and operations a second, of the data sheet where it is known.
    """

    device: torch.device
    tiny: bool
    machine: tuple[float, float]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(995, 997, 1000, 500) if self.tiny else TokenLayout(151_665, 151_667, 151_672, 64_000)

    def side(self, pixels: int) -> int:
        """Codes along a side."""
        return pixels // (256 if self.tiny else 16)

    def model(self, size: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LanguageModel:
        """Random weights, so large that codes depend on what stands before them."""
        fields = paper_architecture(size) | {"initializer_range": 0.05}
        config = LanguageModelConfig(
            "", self.layout.codebook_size, architecture=fields | (TINY if self.tiny else {}) | changes
        )
        torch.manual_seed(0)
        with self.device:
            return LanguageModel(config.random_decoder(self.layout.vocab_size).eval(), self.layout).to(dtype)

    def prompts(self, images: int) -> list[Tensor]:
        """Of several lengths."""
        return [torch.arange(2, CAPTION - 3 * (number % 4)) for number in range(images)]

    def batch(self, images: int, side: int) -> dict[str, Any]:
        """For a training step."""
        codes = torch.randint(0, self.layout.codebook_size, (images, side, side))
        batch: dict[str, Any] = training_batch([prompt.tolist() for prompt in self.prompts(images)], codes, self.layout)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()} | {"codes": codes.to(self.device)}
        return batch | {"captions": [str(number) for number in range(images)], "metadata": [{}] * images}

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def note(self, what: str, value: float | None, unit: str = "", ok: bool | None = None, note: str = "") -> None:
        """One row of the table; ``ok`` of what must hold."""
        self.rows.append({"what": what, "value": value, "unit": unit, "ok": ok, "note": note})

    def mixed(self) -> torch.autocast:
        """The Trainer's bf16-mixed."""
        return torch.autocast(self.device.type, torch.bfloat16)


def agree(name: str, **options: Any) -> Callable[[Bench], None]:
    """An engine draws the codes of `cached`, but where two codes nearly tie by the exact model."""

    def agreed(bench: Bench) -> None:
        side, images, none = 6, 4, torch.arange(2)
        asked = (bench.prompts(images), [none] * images, (side, side), GUIDED, range(images))
        for dtype, near in NEAR.items():
            model = bench.model("0.5b", dtype, num_hidden_layers=4)  # of more, compiling takes a minute each time
            oracle = make_engine("cached", model).generate(*asked)[0]
            codes = make_engine(name, model, **options).generate(*asked)[0]
            prompts, negatives = ([ids.to(bench.device) for ids in part] for part in asked[:2])
            found = margins(copy.deepcopy(model).double(), prompts, negatives, *asked[2:], codes, oracle)
            worst = max((margin for margin in found if margin is not None), default=0.0)
            same = f"{found.count(None)} of {images} pictures are cached's"
            bench.note(f"{name}, {str(dtype)[6:]}: margin where it parts", worst, "nats", worst <= near, same)

    return agreed


def stage(bench: Bench, name: str, model: LanguageModel, **options: Any) -> Any:
    """A stage around a model, as it is under a Trainer on one device; what it logs is in ``logged``."""
    from simplear import stages

    first = {"pretrain": (stages.PretrainModule, {}), "sft": (stages.SFTModule, ""), "grpo": (stages.GRPOModule, "")}
    made: Any = first[name][0](first[name][1], packed=True, **options)  # type: ignore[operator]
    made.load_language_model = lambda: (model, None)
    made._device, made.logged = bench.device, {}
    made.log = lambda key, value, **_: made.logged.update({key: float(value)})
    made.log_dict = lambda values, **_: made.logged.update({key: float(value) for key, value in values.items()})
    made.configure_model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)
    made.optimizers = lambda: optimizer
    made.manual_backward = lambda loss: loss.backward()
    reduce = lambda value, reduce_op=None: value  # noqa: E731
    made._trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(reduce=reduce))
    return made


def step(bench: Bench, made: Any, batch: dict[str, Any]) -> float:
    """One step of pretraining or SFT in bf16-mixed; the loss."""
    with bench.mixed():
        loss = made.training_step(batch, 0)
    loss.backward()
    made.optimizers().step()
    made.optimizers().zero_grad()
    return float(loss.detach())


def grpo_stage(bench: Bench, images: int, engine: str | None) -> Any:
    """GRPO whose pictures and rewards cost nothing."""
    made = stage(
        bench,
        "grpo",
        bench.model("0.5b", torch.float32),
        reward=lambda images, captions, metadata: images.flatten(1).mean(dim=1),
        group_size=4,
        micro_batch_size=images,
        grid=(bench.side(1024),) * 2 if engine is None else (bench.side(256),) * 2,
        chunk_rows=512,
        engine=engine,
    )
    pixels = lambda codes: (codes / bench.layout.codebook_size * 2 - 1)[:, None].expand(-1, 3, -1, -1)  # noqa: E731
    made.visual_tokenizer = SimpleNamespace(decode=pixels)
    made._reference.prepare(bench.device, torch.float32)
    return made


def training(bench: Bench) -> None:
    """Two steps of each stage in bf16-mixed; GRPO's ratio of the first update is 1 and its KL 0."""
    from simplear.stages import NextTokenObjective

    for name in ("pretrain", "sft"):
        made = stage(bench, name, bench.model("0.5b", torch.float32), objective=NextTokenObjective(chunk_rows=512))
        batch = bench.batch(2, bench.side(512))
        losses = [step(bench, made, batch) for _ in range(3)]
        fine = all(torch.tensor(losses).isfinite()) and losses[-1] < losses[0]
        bench.note(f"{name}: loss of the third step on one batch over the first", losses[-1] / losses[0], ok=fine)
    made = grpo_stage(bench, 4, "fused")
    with bench.mixed():
        made.training_step(bench.batch(1, 1), 0)
    found = made.logged
    exact = found["policy/ratio_min"] == found["policy/ratio_max"] == 1
    bench.note("grpo: ratio of the first update", found["policy/ratio_max"], ok=exact)
    bench.note("grpo: KL of equal weights", found["policy/kl"], "nats", found["policy/kl"] == 0)
    bench.note("grpo: norm of the gradient", found["policy/gradient_norm"], ok=0 < found["policy/gradient_norm"] < 1e6)


def fsdp2(bench: Bench) -> None:
    """Loss and gradients of a model that FSDP2 shards over one process are those of the whole model."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from simplear.stages.sharding import shard_language_model

    batch, losses, gradients = bench.batch(2, bench.side(512)), [], []
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=0, world_size=1)
        try:
            for sharded in (False, True):
                model = bench.model("0.5b", torch.float32, num_hidden_layers=4).train()
                if sharded:
                    shard_language_model(model, init_device_mesh(bench.device.type, (1,)))
                with bench.mixed():
                    loss = model(batch["input_ids"], batch["labels"], batch["codes"].shape[1:])[0].mean()
                loss.backward()
                losses.append(float(loss.detach()))
                found: list[Any] = [weight.grad for weight in model.parameters()]
                gradients.append([grad.full_tensor() if sharded else grad for grad in found])
        finally:
            dist.destroy_process_group()
    bench.note("fsdp2: loss over that without", losses[1] / losses[0], ok=abs(losses[1] / losses[0] - 1) < 1e-4)
    apart = max(float((one - other).norm() / one.norm()) for one, other in zip(*gradients, strict=True))
    bench.note("fsdp2: largest relative difference of a weight's gradient", apart, ok=apart < 1e-2)


def planned_bytes(bench: Bench, model: LanguageModel, images: int, codes: int) -> float:
    """Of a training step, by `simplear plan`'s arithmetic."""
    from simplear.stages.memory import Run, memory

    run: dict[str, Any] = {"codes": codes, "mean_text": CAPTION, "longest_text": CAPTION, "images": images}
    run |= {"images_a_step": images, "steps": 1, "devices": 1, "sharded": False, "full_softmax": False}
    run |= {"precision": "bf16-mixed", "activation_checkpointing": "none", "chunk_rows": 512}
    return sum(memory(Run(Architecture.of(model.decoder.config), bench.layout.codebook_size, **run)).values())


def steps(size: str, images: Sequence[int]) -> Callable[[Bench], None]:
    """Tokens a second and MFU of a training step at 512 and 1024 px, and its memory beside its plan."""

    def timed(bench: Bench) -> None:
        for pixels, count in zip((512, 1024), images, strict=True):
            time_step(bench, size, pixels, count)

    return timed


def time_step(bench: Bench, size: str, pixels: int, images: int) -> None:
    """Of one batch of images."""
    from simplear.stages import NextTokenObjective

    cuda = torch.cuda if bench.device.type == "cuda" else None
    side, before = bench.side(pixels), cuda.memory_allocated() if cuda else 0
    made = stage(bench, "pretrain", bench.model(size, torch.float32), objective=NextTokenObjective(chunk_rows=512))
    batch, title = bench.batch(images, side), f"training {size}, {pixels} px, {images} images"
    for _ in range(2):
        step(bench, made, batch)
    if cuda:
        cuda.reset_peak_memory_stats()
    begin, done = bench.now(), 0
    while done < 2 or (done < 10 and not bench.tiny):
        step(bench, made, batch)
        done += 1
    seconds, work = (bench.now() - begin) / done, made.step_work(batch)
    bench.note(f"{title}: tokens a second", float(work.tokens) / seconds)
    bench.note(f"{title}: MFU", float(work.flops) / seconds / bench.machine[1])
    if cuda:
        taken = cuda.max_memory_allocated() - before
        ratio = taken / planned_bytes(bench, made.language_model, images, side**2)
        bench.note(f"{title}: memory over the plan's", ratio, ok=PLANNED[0] < ratio < PLANNED[1])


def tokenizer(bench: Bench) -> None:
    """Codes of pictures do not depend on whether TF32 is allowed elsewhere."""
    from simplear.visual_tokenizer import JanusTokenizer, protocol

    torch.manual_seed(0)
    made = (
        JanusTokenizer(**({"base_channels": 32, "latent_channels": 32} if bench.tiny else {})).to(bench.device).eval()
    )
    pixels = torch.rand(4, 3, *((32, 32) if bench.tiny else (384, 384)), device=bench.device) * 2 - 1
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        found = []
        for allowed, guard in ((False, None), (True, None), (True, lambda device: nullcontext())):
            torch.backends.cudnn.allow_tf32 = allowed
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            with mock.patch.object(protocol, "full_precision", guard) if guard else nullcontext():
                found.append(made.encode(pixels))
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    share = [float((codes != found[0]).double().mean()) for codes in found[1:]]
    note = f"{share[1]:.2%} where nothing keeps TF32 out"
    bench.note("Janus: codes that differ with TF32 allowed", share[0], ok=share[0] == 0, note=note)


def timed_draw(bench: Bench, engine: Engine, images: int, rows: int | None) -> tuple[float, int]:
    """Seconds an image of 1024 px, and the codes that were drawn of it.

    Args:
        rows: of codes to draw; None draws all.
    """
    side, drawn = bench.side(1024), 0

    def on_row(row: int, codes: Tensor) -> None:
        nonlocal drawn
        drawn = row * side
        if row == rows:
            raise Enough

    negatives = [torch.arange(2)] * images
    begin = bench.now()
    with suppress(Enough):
        engine.generate(bench.prompts(images), negatives, (side, side), GUIDED, range(images), on_row)
    return (bench.now() - begin) * side**2 / drawn / images, drawn


def draw(size: str, name: str, rows: int | None = None) -> Callable[[Bench], None]:
    """Seconds an image with guidance, one and 32 at once, and the share of what the memory's bandwidth allows."""

    def drawn(bench: Bench) -> None:
        model = bench.model(size)
        engine, shape = make_engine(name, model), Shape.of(model.decoder.config, bench.layout.codebook_size)
        codes = bench.side(1024) ** 2
        for images in (1, 2 if bench.tiny else 32):
            begin = bench.now()
            timed_draw(bench, engine, images, 1)
            warm = bench.now() - begin
            found, whole = timed_draw(bench, engine, images, rows)
            bound = image_seconds(shape, codes, images, 2, bench.machine)
            note = f"{bound / found:.1%} of the bound; the first row of the first drawing took {warm:.1f} s"
            if whole < codes:
                note += f"; extrapolated from {whole} of {codes} codes"
            bench.note(f"drawing {size}, 1024 px, {name}, {images} at once", found, "s an image", note=note)

    return drawn


def rollout(bench: Bench) -> None:
    """One training step of GRPO at 1024 px: 8 images drawn, scored and learned from; compiled before."""
    made = grpo_stage(bench, 2, None)
    for which in ("first, which compiles", "second"):
        with bench.mixed():
            made.training_step(bench.batch(2, 1), 0)
        for part in ("rollout", "update"):
            bench.note(f"grpo 0.5b, 8 images, {which}: {part}", made.logged[f"seconds/{part}"], "s")


SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "fused": (agree("fused"), 10),
    "compiled": (agree("compiled"), 30),
    "jacobi": (agree("jacobi", window=3), 10),
    "training": (training, 30),
    "fsdp2": (fsdp2, 20),
    "tokenizer": (tokenizer, 10),
    "draw-0.5b-compiled": (draw("0.5b", "compiled"), 80),
    "draw-0.5b-fused": (draw("0.5b", "fused", 4), 15),
    "draw-0.5b-cached": (draw("0.5b", "cached", 2), 15),
    "draw-1.5b-compiled": (draw("1.5b", "compiled"), 100),
    "draw-1.5b-fused": (draw("1.5b", "fused", 4), 15),
    "draw-1.5b-cached": (draw("1.5b", "cached", 2), 15),
    "steps-0.5b": (steps("0.5b", (16, 4)), 20),
    "steps-1.5b": (steps("1.5b", (8, 2)), 25),
    "grpo": (rollout, 55),
}
"""Each with its share of the time; what one leaves over the following ones get."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine_of(device: torch.device) -> tuple[str, tuple[float, float]]:
    """A device's name, and its data sheet or what is measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = next((sheet for key, sheet in DATA_SHEETS.items() if key in name), None)
    return name, known or measured_machine(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def markdown_table(result: dict[str, Any]) -> str:
    """All rows, and what failed."""
    lines = ["| | value | | |", "|---|---:|---|---|"]
    for name, section in result["sections"].items():
        for row in section["rows"]:
            value = "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
            lines.append(f"| {row['what']} | {value} | {HELD[row['ok']]} | {row['note']} |")
        if section["error"]:
            lines.append(f"| {name} | | **stopped** | {section['error'].strip().splitlines()[-1]} |")
    return "\n".join(
        [*lines, "", f"{result['device']}, torch {torch.__version__}, transformers {transformers.__version__}."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda")
    made.add_argument("--size", choices=("tiny", "paper"), default="paper")
    made.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--minutes", type=float, default=7.5, help="for everything; no section begins or runs beyond")
    made.add_argument("--out", type=Path, help="JSON; benchmarks/results/gpu.json, or ./gpu-tiny.json")
    settings = made.parse_args(argv)
    settings.out = settings.out or (RESULTS / "gpu.json" if settings.size == "paper" else Path("gpu-tiny.json"))
    device = torch.device(settings.device)
    name, machine = machine_of(device)
    end = time.monotonic() + 60 * settings.minutes
    stated = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": name,
        "machine": machine,
        "settings": stated,
        "sections": {},
    }
    result |= {"environment": environment() | {"transformers": transformers.__version__, "cuda": torch.version.cuda}}
    try:
        for number, section in enumerate(settings.sections, 1):
            run, share = SECTIONS[section]
            bench, error, begin = Bench(device, settings.size == "tiny", machine), None, time.monotonic()
            left = (end - begin) * share / sum(SECTIONS[name][1] for name in settings.sections[number - 1 :])
            print(f"[{number}/{len(settings.sections)}] {section}, at most {left:.0f} s", flush=True)
            try:
                if left <= 0:
                    raise TimeoutError("no time left for it")
                with stopped_after(left):
                    run(bench)
            except Exception:
                error = traceback.format_exc()
                print(error, file=sys.stderr, flush=True)
            finally:
                took = time.monotonic() - begin
                result["sections"][section] = {"seconds": took, "rows": bench.rows, "error": error}
                with whole_file(settings.out) as partial:
                    partial.write_text(result_text(result))
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    print(markdown_table(result) + f"\n\nwritten to {settings.out}", flush=True)
    sections = result["sections"].values()
    return int(any(section["error"] or any(row["ok"] is False for row in section["rows"]) for section in sections))


if __name__ == "__main__":
    sys.exit(main())
