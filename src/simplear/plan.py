"""`simplear plan`: what a training will take, from the same configurations as `simplear fit`, before it is started.

    simplear plan --config configs/paper/pretrain.yaml --config configs/paper/1.5b.yaml \
        --config configs/paper/a100x32.yaml

Nothing is built, loaded or downloaded. What the configurations do not say is an option with a stated default.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from simplear.command_line import PARSER_OPTIONS
from simplear.errors import UserError
from simplear.language_model import Adapter, Architecture
from simplear.lightning_cli import ConfigurationCLI, StageParser
from simplear.sequence import MAX_TEXT_TOKENS, SPECIAL_TOKENS
from simplear.stages.activation_checkpointing import MODES
from simplear.stages.memory import (
    A100,
    GIB,
    H100,
    LAYER_SECONDS,
    RESERVED_GIB,
    Rollouts,
    Run,
    days,
    drawing_seconds,
    memory,
    seconds_a_step,
    tokens_a_day,
)
from simplear.text_files import read_object

QWEN_TEXT_IDS = 151_665 + len(SPECIAL_TOKENS)
"""Of Qwen2.5's tokenizer, where the configured one is not here to be counted."""
CONTROL_TOKENS = 2
MOMENTS = {"AdamW": 2, "Adam": 2, "MuonWithAdamW": 2, "SGD": 1}
DOWNSAMPLE = 16
COSMOS_CODES = 64_000


@dataclass
class PlanSettings:
    """What the configurations of a training do not say."""

    pixels: int | None = None
    """Side of an image; None takes the grid of the token shards or the checkpoint, or ``run.pixels``."""
    caption_tokens: int = 100
    """On average, for the pace; the memory is that of the longest."""
    mfu: float = 0.4
    """Model FLOPs utilisation of forward and backward passes."""
    bandwidth_utilisation: float = 0.5
    """Of the memory, where rollouts are drawn."""
    gpu_memory_gib: float = A100.memory_gib
    """What must be enough."""
    strict: bool = False
    """Exit with 1 where it is not."""


class _Configuration(ConfigurationCLI):
    """Lightning's command line up to the composed configuration; nothing of it is instantiated."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanSettings, "plan")

    def instantiate_classes(self) -> None:
        """Nothing."""


def plan(arguments: Sequence[str]) -> None:
    """Print the plan of the training that these options of `simplear fit` describe.

    Args:
        arguments: the verb and its options.
    """
    composed: Any = _Configuration(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=StageParser,
        parser_kwargs={**PARSER_OPTIONS, "prog": "simplear plan"},
        save_config_callback=None,
        load_from_checkpoint_support=False,
        run=False,
        args=list(arguments[1:]),
    )
    settings = PlanSettings(**composed.config.plan.as_dict())
    run = read_run(composed.config, settings)
    print(report(run, settings))
    if settings.strict and needed_gib(run) > settings.gpu_memory_gib:
        sys.exit(1)


def needed_gib(run: Run) -> float:
    """Memory of one GPU at the worst moment."""
    return sum(memory(run).values()) / GIB + RESERVED_GIB


def report(run: Run, settings: PlanSettings) -> str:
    """The plan as lines of text, with the assumptions that it rests on."""
    parts = memory(run)
    needed = needed_gib(run)
    where = f"{run.devices} GPU" + ("s" if run.devices > 1 else "") + (", FSDP2" if run.sharded else "")
    trained = "" if run.adapter is None else f", {run.trained_parameters / 1e6:,.1f} million of them trained"
    lines = [
        f"{run.architecture.parameters / 1e6:,.0f} million parameters{trained}; {where}; {run.precision}; "
        f"{run.images} images of {run.codes:,} codes a pass, {run.images_a_step} a step",
        "",
        "memory of a GPU at the worst moment, GiB",
        *(f"  {name:<26}{size / GIB:8.2f}" for name, size in parts.items()),
        f"  {'CUDA, NCCL, fragmentation':<26}{RESERVED_GIB:8.2f}  (assumed)",
        f"  {'all':<26}{needed:8.2f}  of {settings.gpu_memory_gib:.1f}",
        "",
        f"pace at an MFU of {settings.mfu:.0%} and {settings.caption_tokens} caption tokens on average"
        + (f", rollouts at {settings.bandwidth_utilisation:.0%} of the bandwidth" if run.rollouts else ""),
    ]
    for device in (A100, H100):
        use = device, settings.mfu, settings.bandwidth_utilisation
        lines.append(
            f"  {device.name}: {seconds_a_step(run, *use):.2f} s a step, {tokens_a_day(run, *use) / 1e9:,.2f} billion "
            f"tokens a day, {days(run, *use):,.1f} days for {run.steps:,} steps"
        )
        if run.rollouts is not None:
            lines[-1] += f"; {drawing_seconds(run, device, settings.bandwidth_utilisation):.1f} s of a step draw"
    if run.rollouts is not None:
        lines.append("  (reward, visual tokenizer and their weights are not counted)")
    if needed > settings.gpu_memory_gib:
        lines += ["", f"warning: this does not fit into {settings.gpu_memory_gib:.1f} GiB. {remedy(run)}"]
    return "\n".join(lines)


def remedy(run: Run) -> str:
    """What to change first."""
    stronger = MODES[MODES.index(run.activation_checkpointing) + 1 :]
    if stronger:
        return f"Set --model.init_args.activation_checkpointing {stronger[0]}."
    if run.rollouts is None and run.chunk_rows is None:
        return "Set --model.init_args.objective.chunk_rows 512."
    if run.images > 1:
        option = (
            "trainer.accumulate_grad_batches higher" if run.rollouts is None else "model.init_args.micro_batch_size 1"
        )
        return f"Set --{option}, for fewer images a pass."
    if run.adapter is not None:
        return "Take smaller pictures or a smaller model."
    if not run.sharded and run.devices > 1:
        return "Set --trainer.strategy fsdp2."
    return "Take more GPUs with --trainer.strategy fsdp2, or --trainer.precision bf16-true."


def read_run(config: Any, settings: PlanSettings) -> Run:
    """The training of a composed configuration.

    Raises ValueError for a stage without a language model, and where the size of model or image is not to be found,
    with the option that says it.
    """
    options, trainer, data = config.model.init_args, config.trainer, config.data.init_args
    stage = config.model.class_path.rpartition(".")[2]
    if stage not in ("PretrainModule", "SFTModule", "GRPOModule"):
        raise UserError(f"{stage}: plans are for the stages that train a language model.")
    reinforced = stage == "GRPOModule"
    checkpoint = options.get("checkpoint")
    fields, codebook_size, vocab_size = _model(options, checkpoint, config.run)
    architecture = _architecture(fields, vocab_size)
    devices = _devices(trainer)
    accumulation = trainer.accumulate_grad_batches or 1
    group = options.group_size if reinforced else 1
    a_rank = data.global_batch_size * group // (devices * accumulation)
    if a_rank * devices * accumulation != data.global_batch_size * group:
        raise UserError(
            f"--data.init_args.global_batch_size {data.global_batch_size} does not divide over {devices} GPUs × "
            f"{accumulation} micro-batches (--trainer.accumulate_grad_batches)."
        )
    precision = {"bf16-mixed": "bf16-mixed", "bf16-true": "bf16-true"}.get(str(trainer.precision), "32-true")
    strategy = trainer.strategy
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    sharded = path == "fsdp2" or path.endswith(("FSDP2", "ModelParallelStrategy"))
    optimizer = getattr(options.optimizer, "class_path", "AdamW").rpartition(".")[2]
    objective = options.get("objective")
    adapter = None if options.adapter is None else Adapter(**options.adapter.as_dict())
    if adapter is not None and sharded:
        raise UserError("an adapter does not go with FSDP2: set --trainer.strategy ddp.")
    if trainer.max_steps <= 0:
        raise UserError("--trainer.max_steps: a plan needs the number of optimizer steps.")
    return Run(
        architecture=architecture,
        codebook_size=codebook_size,
        codes=_codes(config, settings),
        mean_text=settings.caption_tokens + CONTROL_TOKENS,
        longest_text=(data.max_text_tokens or MAX_TEXT_TOKENS) + CONTROL_TOKENS,
        images=min(options.micro_batch_size or a_rank, a_rank) if reinforced else a_rank,
        steps=trainer.max_steps // (options.inner_updates if reinforced else 1),
        images_a_step=data.global_batch_size * group,
        devices=devices,
        sharded=sharded,
        precision=precision,
        activation_checkpointing=options.activation_checkpointing,
        chunk_rows=options.chunk_rows if reinforced else objective.chunk_rows,
        full_softmax=not reinforced and objective.normalizer == "full",
        moments=MOMENTS.get(optimizer, 2),
        rollouts=_rollouts(options, precision) if reinforced else None,
        adapter=adapter,
    )


def _rollouts(options: Any, precision: str) -> Rollouts:
    reference = options.reference
    here = options.beta > 0 and not reference.offload and reference.device is None and options.adapter is None
    stored = reference.dtype or ("bfloat16" if precision == "bf16-true" else "float32")
    engine = options.engine or "compiled"  # as GRPO takes on a GPU
    if engine not in LAYER_SECONDS:
        raise UserError(f"--model.init_args.engine {engine}: a plan knows the pace of {', '.join(LAYER_SECONDS)}.")
    return Rollouts(
        group_size=options.group_size,
        batch_size=options.rollout_batch_size,
        inner_updates=options.inner_updates,
        reference_bytes=0 if not here else 2 if stored == "bfloat16" else 4,
        with_reference=options.beta > 0,
        engine=engine,
    )


def _model(options: Any, checkpoint: str | None, run: Any) -> tuple[dict[str, Any], int, int]:
    """Fields of the architecture, size of the codebook, rows of the embedding."""
    if checkpoint is None:
        model = options.language_model
        return dict(model.architecture or {}), model.codebook_size, _text_ids(model.tokenizer) + model.codebook_size
    file = Path(checkpoint) / "config.json"
    if file.is_file():
        fields, known = read_object(file), Path(checkpoint) / "simplear.json"
        if known.is_file():  # config.json may count padding
            stated = read_object(known)
            return fields, stated["codebook_size"], stated["image_token_offset"] + stated["codebook_size"]
        return fields, fields["vocab_size"] - QWEN_TEXT_IDS, fields["vocab_size"]
    if run.architecture is None:
        raise UserError(
            f"no checkpoint at {checkpoint} yet, so its size is not known: name it, such as --config "
            "configs/paper/1.5b.yaml."
        )
    codebook_size = run.codebook_size or COSMOS_CODES
    return run.architecture, codebook_size, QWEN_TEXT_IDS + codebook_size


def _text_ids(tokenizer: str) -> int:
    """Ids of text with the seven special ones."""
    if not Path(tokenizer).is_dir():
        return QWEN_TEXT_IDS
    from simplear.language_model import load_text_tokenizer
    from simplear.sequence import add_special_tokens

    loaded = load_text_tokenizer(tokenizer)
    add_special_tokens(loaded)
    return len(loaded)


def _architecture(fields: dict[str, Any], vocab_size: int) -> Architecture:
    from transformers import Qwen2Config

    if "hidden_size" not in fields:
        raise UserError("the configuration names no size: add one, such as --config configs/paper/1.5b.yaml.")
    return Architecture.of(Qwen2Config(**{**fields, "vocab_size": vocab_size}))


def _devices(trainer: Any) -> int:
    devices = str(trainer.devices)
    if not devices.isdigit():
        raise UserError(f"--trainer.devices {devices}: a plan needs the number of GPUs a machine.")
    return int(devices) * trainer.num_nodes


def _codes(config: Any, settings: PlanSettings) -> int:
    if settings.pixels is not None:
        return (settings.pixels // DOWNSAMPLE) ** 2
    options, data = config.model.init_args, config.data.init_args
    grid = options.get("grid")
    settings_file = Path(options.get("checkpoint") or "") / "simplear.json"
    if grid is None and "group_size" in options and settings_file.is_file():
        grid = read_object(settings_file)["grid"]
    if grid is None:
        paths = [data.paths] if isinstance(data.paths, str) else data.paths
        manifests = [path for path in paths if (Path(path) / "manifest.json").is_file()]
        if manifests:
            from simplear.data import TokenShards

            grid = max(TokenShards(manifests).grids, key=lambda sides: sides[0] * sides[1])
    if grid is None and config.run.pixels is not None:
        return (config.run.pixels // DOWNSAMPLE) ** 2
    if grid is None:
        raise UserError(
            "the token shards are not there yet, so the size of images is not known: --plan.pixels 512 or 1024."
        )
    return int(grid[0]) * int(grid[1])
