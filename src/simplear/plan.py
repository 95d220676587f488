"""`simplear plan`: what a training will take, from the same configurations as `simplear fit`, before it is started.

    simplear plan --config configs/paper/pretrain.yaml --config configs/paper/1.5b.yaml \
        --config configs/paper/a100x32.yaml

No weights are loaded, and nothing is downloaded. What the configurations do not say is an option with a stated default.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from transformers import Qwen2Config

from simplear.data import TokenShards
from simplear.errors import UserError
from simplear.language_model import Adapter, Architecture, load_checkpoint, load_text_tokenizer
from simplear.lightning_cli import ConfigurationCLI
from simplear.sequence import MAX_TEXT_TOKENS, SPECIAL_TOKENS, add_special_tokens
from simplear.stages.decoder_layers import MODES
from simplear.stages.memory import (
    A100,
    BANDWIDTH_UTILISATION,
    GIB,
    H100,
    RESERVED_GIB,
    SAVED_BYTES,
    Rollouts,
    Run,
    drawing_seconds,
    memory,
    seconds_a_step,
)

DAY = 86400.0
QWEN_TEXT_IDS = 151_665 + len(SPECIAL_TOKENS)
"""Of Qwen2.5's tokenizer, where the configured one is not a directory whose ids can be counted."""
CONTROL_TOKENS = 2
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
    gpu_memory_gib: float = A100.memory_gib
    """Memory that the training must fit into."""
    strict: bool = False
    """Exit with 1 if it does not fit."""


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
    composed: Any = _Configuration(arguments[1:], "simplear plan", save_config_callback=None, run=False)
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
    needed = needed_gib(run)
    where = f"{run.devices} GPU" + ("s" if run.devices > 1 else "") + (", FSDP2" if run.sharded else "")
    trained = "" if run.adapter is None else f", {run.trained_parameters / 1e6:,.1f} million of them trained"
    lines = [
        f"{run.architecture.parameters / 1e6:,.0f} million parameters{trained}; {where}; {run.precision}; "
        f"{run.images} images of {run.codes:,} codes a pass, {run.images_a_step} a step",
        "",
        "memory of a GPU at the worst moment, GiB",
        *(f"  {name:<26}{size / GIB:8.2f}" for name, size in memory(run).items()),
        f"  {'CUDA, NCCL, fragmentation':<26}{RESERVED_GIB:8.2f}  (assumed)",
        f"  {'all':<26}{needed:8.2f}  of {settings.gpu_memory_gib:.1f}",
        "",
        f"pace at an MFU of {settings.mfu:.0%} and {settings.caption_tokens} caption tokens on average",
    ]
    tokens = run.images_a_step * (run.mean_text + run.codes)
    for device in (A100, H100):
        seconds = seconds_a_step(run, device, settings.mfu)
        lines.append(
            f"  {device.name}: {seconds:.2f} s a step, {tokens / seconds * DAY / 1e9:,.2f} billion tokens a day, "
            f"{run.steps * seconds / DAY:,.1f} days for {run.steps:,} steps"
        )
        if run.rollouts is not None:
            lines[-1] += f"; {drawing_seconds(run, device):.1f} s of a step draw"
    if run.rollouts is not None:
        lines.append(
            f"  (rollouts by the compiled engine at {BANDWIDTH_UTILISATION:.0%} of the bandwidth; reward and visual "
            "tokenizer are not counted)"
        )
    if needed > settings.gpu_memory_gib:
        lines += ["", f"warning: this does not fit into {settings.gpu_memory_gib:.1f} GiB. {remedy(run)}"]
    return "\n".join(lines)


def remedy(run: Run) -> str:
    """What to change first."""
    stronger = MODES[MODES.index(run.activation_checkpointing) + 1 :]
    if stronger:
        return f"Set --model.init_args.activation_checkpointing {stronger[0]}."
    return (
        "Take fewer images a pass (--trainer.accumulate_grad_batches; of GRPO --model.init_args.micro_batch_size), the "
        "head's loss in chunks (chunk_rows 512), or more GPUs with --trainer.strategy fsdp2."
    )


def read_run(config: Any, settings: PlanSettings) -> Run:
    """The training of a composed configuration.

    Raises ValueError for a stage without a language model, and where the size of model or image is not known, with the
    option that says it.
    """
    options, trainer, data = config.model.init_args, config.trainer, config.data.init_args
    stage = config.model.class_path.rpartition(".")[2]
    if stage not in ("PretrainModule", "SFTModule", "GRPOModule"):
        raise UserError(f"{stage}: plans are for the stages that train a language model.")
    reinforced = stage == "GRPOModule"
    if not str(trainer.devices).isdigit():
        raise UserError(f"--trainer.devices {trainer.devices}: a plan needs the number of GPUs a machine.")
    if trainer.max_steps <= 0:
        raise UserError("--trainer.max_steps: a plan needs the number of optimizer steps.")
    devices, accumulation = int(trainer.devices) * trainer.num_nodes, trainer.accumulate_grad_batches or 1
    images_a_step = data.global_batch_size * (options.group_size if reinforced else 1)
    images, left = divmod(images_a_step, devices * accumulation)
    if left:
        raise UserError(
            f"--data.init_args.global_batch_size {data.global_batch_size} does not divide over {devices} GPUs × "
            f"{accumulation} micro-batches (--trainer.accumulate_grad_batches)."
        )
    strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
    sharded = str(strategy) == "fsdp2" or str(strategy).endswith(("FSDP2", "ModelParallelStrategy"))
    adapter = None if options.adapter is None else Adapter(**options.adapter.as_dict())
    if adapter is not None and sharded:
        raise UserError("an adapter does not go with FSDP2: set --trainer.strategy ddp.")
    precision = str(trainer.precision) if str(trainer.precision) in SAVED_BYTES else "32-true"
    architecture, codebook_size, codes = _model(config, settings)
    return Run(
        architecture=architecture,
        codebook_size=codebook_size,
        codes=codes,
        mean_text=settings.caption_tokens + CONTROL_TOKENS,
        longest_text=(data.max_text_tokens or MAX_TEXT_TOKENS) + CONTROL_TOKENS,
        images=min(options.micro_batch_size or images, images) if reinforced else images,
        steps=trainer.max_steps // (options.inner_updates if reinforced else 1),
        images_a_step=images_a_step,
        devices=devices,
        sharded=sharded,
        precision=precision,
        activation_checkpointing=options.activation_checkpointing,
        chunk_rows=options.chunk_rows if reinforced else options.objective.chunk_rows,
        full_softmax=not reinforced and options.objective.normalizer == "full",
        rollouts=_rollouts(options, precision) if reinforced else None,
        adapter=adapter,
    )


def _rollouts(options: Any, precision: str) -> Rollouts:
    reference = options.reference
    here = options.beta > 0 and not reference.offload and options.adapter is None
    dtype = reference.dtype or ("bfloat16" if precision == "bf16-true" else "float32")
    return Rollouts(
        group_size=options.group_size,
        batch_size=options.rollout_batch_size,
        inner_updates=options.inner_updates,
        reference_bytes=0 if not here else 2 if dtype == "bfloat16" else 4,
        with_reference=options.beta > 0,
    )


def _model(config: Any, settings: PlanSettings) -> tuple[Architecture, int, int]:
    """Architecture, size of the codebook, and codes of an image: of what is on disk, else of the ``run`` key."""
    options, paths = config.model.init_args, config.data.init_args.paths
    checkpoint = options.get("checkpoint")
    grid, pixels = options.get("grid"), settings.pixels
    text_ids, codebook_size, fields = QWEN_TEXT_IDS, config.run.codebook_size or COSMOS_CODES, config.run.architecture
    if checkpoint is None:
        codebook_size, fields = options.language_model.codebook_size, options.language_model.architecture
        if Path(options.language_model.tokenizer).is_dir():
            tokenizer = load_text_tokenizer(options.language_model.tokenizer)
            add_special_tokens(tokenizer)
            text_ids = len(tokenizer)
    elif Path(checkpoint).is_dir():
        loaded = load_checkpoint(checkpoint, with_weights=False)
        fields, codebook_size = loaded.model.decoder.config.to_dict(), loaded.settings.codebook_size
        text_ids = loaded.settings.image_token_offset
        grid = loaded.settings.grid if grid is None and "group_size" in options else grid
    if not fields:
        raise UserError(
            "the configuration names no size, nor a checkpoint that is here: add one, such as --config "
            "configs/paper/1.5b.yaml."
        )
    shards = [
        path for path in ([paths] if isinstance(paths, str) else paths) if (Path(path) / "manifest.json").is_file()
    ]
    if grid is None and pixels is None and shards:
        grid = max(TokenShards(shards).grids, key=lambda sides: sides[0] * sides[1])
    side = (pixels or config.run.pixels or 0) // DOWNSAMPLE
    height, width = (side, side) if grid is None or pixels is not None else grid
    if height * width == 0:
        raise UserError("the token shards are not there yet, so the size of images is not known: --plan.pixels 512.")
    fields = {**fields, "vocab_size": text_ids + codebook_size}
    return Architecture.of(Qwen2Config(**fields)), codebook_size, int(height) * int(width)
