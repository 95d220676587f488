"""Lightning's verbs over any stage and data module of the configuration: ``simplear fit|validate|test|predict``."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf import OmegaConf

from simplear.callbacks import AtomicCheckpoint, Preemption
from simplear.callbacks.checkpointing import require_state
from simplear.callbacks.preemption import Preempted
from simplear.command_line import PARSER_OPTIONS, SuggestingParser, in_home, refuse_repeated
from simplear.errors import UserError
from simplear.stages.sharding import leave_ranks, refuse_fsdp1

BASE = "base"
"""Key of a configuration file: the file to read before it, relative to it."""


class StageParser(SuggestingParser, LightningArgumentParser):
    """Lightning's parser, with the project's error messages."""


@dataclass
class RunSettings:
    """What the stages of a model share: the other keys of a file refer to it, as in ``${run.pixels}``.

    Nothing else reads them but `simplear plan`, for what does not exist yet.

    Args:
        stage: Words that name the stage, such as [grpo, hps].
        name: Words that name the model, such as [0.5b, rope-2d]: what a stage writes is called
            ``${join:${run.stage},${run.name}}``.
        pixels: Side of an image.
        architecture: Of the language model.
        pretrained: Whose weights the language model begins with.
        rope: Positions of its codes.
        visual_tokenizer: Directory or hub id.
        codebook_size: Of the visual tokenizer.
        shards: Ending of the names of its token shards.
        strategy: Of training on several GPUs.
        activation_checkpointing: Of training on GPUs.
        save_every: Optimizer steps between states.
    """

    stage: list[str] = field(default_factory=list)
    name: list[str] = field(default_factory=list)
    pixels: int | None = None
    architecture: dict[str, Any] | None = None
    pretrained: str | None = None
    rope: str = "1d"
    visual_tokenizer: str | None = None
    codebook_size: int | None = None
    shards: str = ""
    strategy: str = "fsdp2"
    activation_checkpointing: str = "selective"
    save_every: int | None = None


def joined(*parts: str | Sequence[str]) -> str:
    """Words and lists of words joined by dashes; ``${join:sft,${run.name}}`` in a configuration."""
    return "-".join(word for part in parts for word in ([part] if isinstance(part, str) else part))


OmegaConf.register_resolver("join", joined, replace=True)


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The command line with the ``base`` of each configuration file before the file; one that was read is not repeated.

    A base may have a base itself. Raises UserError, naming both files, for one that is missing.
    """
    words: list[str] = []
    read: set[Path] = set()
    for word in arguments:
        if word.startswith("--config="):
            words += _with_base(word.removeprefix("--config="), read)
        elif words[-1:] == ["--config"]:
            words[-1:] = _with_base(word, read)
        else:
            words.append(word)
    return words


def _with_base(config: str, read: set[Path]) -> list[str]:
    """``--config FILE``, after its base unless that was read; adds both to ``read``. A text of YAML stays as it is."""
    words, file = ["--config", config], Path(config)
    read.add(file.resolve())
    try:
        content = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError):  # the parser refuses the file
        return words
    base = file.parent / str((isinstance(content, dict) and content.get(BASE)) or "")
    if base == file.parent or base.resolve() in read:
        return words
    if not base.is_file():
        raise UserError(f"{file} names {base} as its base, which does not exist: correct the path, or remove it.")
    return _with_base(str(base), read) + words


class ConfigurationCLI(LightningCLI):
    """Lightning's command line, as the project's verbs read theirs.

    Args:
        arguments: what was typed.
        program: name in the help text.
        options: other arguments of LightningCLI.
    """

    def __init__(self, arguments: Sequence[str], program: str = "simplear", **options: Any) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=StageParser,
            parser_kwargs={**PARSER_OPTIONS, "prog": program},
            load_from_checkpoint_support=False,
            args=list(arguments),
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunSettings, "run", instantiate=False)
        parser.add_argument(f"--{BASE}", type=str | None, help="in a file: the file to read before it, relative to it")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        refuse_repeated(args)
        StageParser.typed = args
        super().parse_arguments(parser, with_bases(args))
        self.config = in_home(self.config)
        # The configuration that a run saves is complete.
        self.config.get(self.config.get("subcommand"), self.config)[BASE] = None


class ConfigurationOfTraining(SaveConfigCallback):
    """Writes ``config.yaml`` right before the first step: a run that is refused keeps the file of the run before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")  # once


class CommandLine(ConfigurationCLI):
    """Runs a verb."""

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no hyperparameters, so resuming cannot override the command line; Lightning would read a
        whole state to look for them.
        """

    def before_instantiate_classes(self) -> None:
        """Lightning's own message, which comes later, names no remedy."""
        refuse_fsdp1(self._get(self.config, "trainer.strategy") or "auto")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, whose constructor checks the flags; a training that saves states also does so on Ctrl-C."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"--trainer: {error}") from error
        if (state := self._get(self.config, "ckpt_path")) is not None:
            places = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
            require_state(state, [place for place in (*places, trainer.default_root_dir) if place])
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        saves = any(isinstance(callback, AtomicCheckpoint) and callback.save_last for callback in callbacks)
        if saves and not any(isinstance(callback, Preemption) for callback in callbacks):
            callbacks.append(Preemption())
        return trainer


def run(arguments: Sequence[str]) -> None:
    """Run one of Lightning's verbs.

    Args:
        arguments: the verb and its options.
    """
    # The verb is a level above the files' keys: ${trainer.…} in a file must still find the file's own.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    # For defaults of Lightning's callbacks (StochasticWeightAveraging, Timer) that YAML cannot represent.
    register_type(torch.device)
    yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
    try:
        CommandLine(arguments, save_config_callback=ConfigurationOfTraining, save_config_kwargs={"overwrite": True})
    except Preempted:
        leave_ranks()
        raise
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning exits without a message
            raise KeyboardInterrupt("stopped; --ckpt_path last resumes from the last state that was saved") from None
        raise
    leave_ranks()
