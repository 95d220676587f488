"""`simplear VERB`: Lightning's verbs (fit, validate, test, predict) and the project's own.

Configurations compose by repeating ``--config``; a later file or flag overrides an earlier one, and ``${…}`` refers to
the composed whole (jsonargparse's ``omegaconf+`` mode), so an overlay can change what another file refers to. A verb
imports only what it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIGHTNING_VERBS = {
    "fit": "train a stage: --config configs/….yaml, repeated; --key value overrides",
    "validate": "loss on held-out data",
    "test": "as validate, on test data",
    "predict": "Lightning's predict",
}
OWN_VERBS = {
    "train-text-tokenizer": ("simplear.data", "train_text_tokenizer_on", "train a byte-level BPE on captions"),
    "recaption": ("simplear.data", "recaption", "pictures → long and short captions by a vision-language model"),
    "tokenize": ("simplear.data", "tokenize", "pictures and captions → token shards"),
    "generate": ("simplear.generation", "generate", "checkpoint and prompts → images"),
    "export": (
        "simplear.export",
        "export",
        "training state or checkpoint → directory for transformers and vLLM, with a card",
    ),
    "compare": ("simplear.evaluation", "compare", "two evaluated runs, REPORT:RUN each → paired differences"),
    "serve": ("simplear.serving", "serve", "checkpoints → OpenAI's image API over HTTP, with a page to draw on"),
    "demo": ("simplear.demo", "demo", "the whole story, small, on two cores"),
}
BENCHMARKS = {
    "scenes": ("simplear.evaluation", "evaluate_scenes", "accuracy on drawn scenes by an exact detector"),
    "geneval": ("simplear.evaluation.geneval", "evaluate_geneval", "GenEval's prompts, its folders, and a judge"),
    "dpg": (
        "simplear.evaluation.dpg",
        "evaluate_dpg",
        "DPG-Bench's prompts, its layout, and a judge",
    ),
    "quality": ("simplear.evaluation.quality", "evaluate_quality", "FID, CLIPScore and HPS v2.1 of drawn prompts"),
    "tokenizer": (
        "simplear.evaluation.reconstruction",
        "evaluate_tokenizer",
        "rFID, PSNR, SSIM, use of the codebook",
    ),
}
DATA_VERBS = {
    "verify": ("simplear.data.inspection", "verify"),
    "repair": ("simplear.data.repair", "repair"),
    "show": ("simplear.data.overview", "show"),
    "merge": ("simplear.data.joining", "merge"),
    "text": ("simplear.data.texts", "write_texts"),
}
STARTED_BY = "SIMPLEAR_STARTED_BY"
"""Environment variable: the process whose further ranks Lightning starts."""
LAST_WORDS = 10
"""Seconds that a rank has to end by itself when the first one is gone, say with the message that explains it."""
PARSER_MODE = "omegaconf+"
PARSER_OPTIONS: dict[str, Any] = {"parser_mode": PARSER_MODE, "allow_abbrev": False}
"""argparse would take ``--trainer.max_step`` for any option that begins so."""
NO_LIGHTNING = "simplear: this environment has no Lightning, it is for drawing with vLLM: use .venv/bin/simplear."
NOISY_LOGGERS = (
    "httpx",
    "filelock",
    "fsspec",
    "PIL",
    "tensorboard",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
"""They say what devices there are and which seed is set, each time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Exits with 2 on a mistake in the command line, as argparse does."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _end_with_first_rank()
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        import simplear

        print(f"simplear {simplear.__version__}")
    elif verb in LIGHTNING_VERBS:
        _quieten()
        run_lightning(arguments)
    elif verb == "plan":
        _quieten()
        importlib.import_module("simplear.plan").plan(arguments[1:])
    elif verb in OWN_VERBS:
        _quieten()
        run_function(*OWN_VERBS[verb][:2], arguments[1:], program=f"simplear {verb}")
    elif verb == "evaluate":
        benchmark = arguments[1] if len(arguments) > 1 else ""
        if benchmark not in BENCHMARKS:
            _fail(f"simplear evaluate: name a benchmark, one of {', '.join(BENCHMARKS)}.")
        _quieten()
        run_function(*BENCHMARKS[benchmark][:2], arguments[2:], program=f"simplear evaluate {benchmark}")
    elif verb == "data":
        action = arguments[1] if len(arguments) > 1 else ""
        if action not in DATA_VERBS:
            _fail(f"simplear data: say what to do, one of {', '.join(DATA_VERBS)}.")
        _quieten()
        run_function(*DATA_VERBS[action], arguments[2:], program=f"simplear data {action}")
    else:
        nearest = difflib.get_close_matches(verb, [*LIGHTNING_VERBS, *OWN_VERBS, "evaluate", "data", "plan"], n=1)
        _fail(
            f"simplear: no verb {verb!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "; see simplear --help.")
        )


def run_lightning(arguments: Sequence[str]) -> None:
    """One of Lightning's verbs over any stage and data module of the configuration."""
    if importlib.util.find_spec("lightning") is None:
        _fail(NO_LIGHTNING)
    from jsonargparse import set_parsing_settings
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from simplear.callbacks.preemption import Preempted
    from simplear.stages.sharding import leave_ranks, refuse_fsdp1

    class ArgumentParser(_SuggestingParser, LightningArgumentParser):
        pass

    class CommandLine(LightningCLI):
        def _parse_ckpt_path(self) -> None:
            """Checkpoints hold no hyperparameters, so resuming cannot override the command line; Lightning would read
            a whole state to look for them.
            """

        def before_instantiate_classes(self) -> None:
            """Before Lightning's own message, which knows no remedy."""
            refuse_fsdp1(self._get(self.config, "trainer.strategy") or "auto")

    # The verb is a level above the files' keys: ${trainer.…} in a file must still find the file's own.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    with _errors_for_the_reader():
        try:
            CommandLine(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_class=ArgumentParser,
                parser_kwargs={**PARSER_OPTIONS, "prog": "simplear"},
                save_config_kwargs={"overwrite": True},
                load_from_checkpoint_support=False,
                args=list(arguments),
            )
        except Preempted:
            leave_ranks()
            raise
        leave_ranks()


def run_function(module: str, name: str, arguments: Sequence[str], program: str) -> None:
    """A verb that is a function: its signature and docstring are the command line and its help."""
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        _fail(NO_LIGHTNING)
    parser = function_parser(function, program)
    with _errors_for_the_reader():
        options = parser.instantiate(parser.parse_args(_spelled_out(arguments, function)))
        options.pop("config", None)
        function(**vars(options))


def function_parser(function: Callable[..., Any], program: str) -> Any:
    """jsonargparse's parser of a function's arguments."""
    from jsonargparse import ArgumentParser

    class FunctionParser(_SuggestingParser, ArgumentParser):
        pass

    summary = (function.__doc__ or "").split("\n\n")[0]
    parser = FunctionParser(prog=program, description=summary, **PARSER_OPTIONS)
    parser.add_argument("--config", action="config", help="YAML with any of the options below; may be repeated")
    parser.add_function_arguments(function, as_positional=False)
    return parser


def _spelled_out(arguments: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """``CKPT --prompts-file F`` → ``--checkpoint CKPT --prompts_file F``: words in front go by their place; a first
    parameter that is a list takes them all.
    """
    spelled = [re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    parameters = inspect.signature(function).parameters.values()
    by_place = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), spelled))
    if words and by_place and str(by_place[0].annotation).startswith("list["):
        return [f"--{by_place[0].name}", json.dumps(words), *spelled[len(words) :]]
    front = words[: len(by_place)]
    named = [word for place, value in zip(by_place, front, strict=False) for word in (f"--{place.name}", value)]
    return [*named, *spelled[len(front) :]]


class _SuggestingParser:
    """Names the nearest known option beside an unknown one."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        unknown = re.search(r"(?:unrecognized arguments: --|ption ')([\w.]+)", message)
        if unknown:
            options = {option.lstrip("-") for action in self._actions for option in action.option_strings}  # type: ignore[attr-defined]
            nearest = _nearest(unknown[1], options | _class_arguments())
            message += f". Did you mean {nearest!r}?" if nearest else ""
        _fail(f"error: {message}\n(all options: {self.prog} --help)")  # type: ignore[attr-defined]


def _nearest(unknown: str, known: set[str]) -> str | None:
    matches = difflib.get_close_matches(unknown, known, n=1) or difflib.get_close_matches(
        unknown.rpartition(".")[2], {name.rpartition(".")[2] for name in known}, n=1
    )
    return matches[0] if matches else None


def _class_arguments() -> set[str]:
    """Names that init_args of the project's classes may have, and the Trainer's options."""
    if importlib.util.find_spec("lightning") is None:  # vLLM's environment, where nothing is trained
        return set()
    from lightning.pytorch import Trainer

    names = {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    for package in ("stages", "rewards", "data", "callbacks", "language_model", "visual_tokenizer"):
        module = importlib.import_module(f"simplear.{package}")
        for public in module.__all__:
            for base in getattr(getattr(module, public), "__mro__", ()):
                if base.__module__.startswith("simplear.") and not issubclass(base, Exception):
                    names.update(inspect.signature(base).parameters)
    return names - {"args", "kwargs", "self"}


@contextlib.contextmanager
def _errors_for_the_reader() -> Iterator[None]:
    """Mistakes in input, which the project's own checks name, end in one message without a trace."""
    try:
        yield
    except (ValueError, TypeError, OSError) as raised:
        ours = _own_error(raised)
        error = ours or raised
        # What the system refuses with a path is the user's to mend, wherever it was raised.
        refused = isinstance(error, OSError) and error.filename is not None
        if os.environ.get("SIMPLEAR_TRACEBACK") or not (ours or refused):
            raise
        # An error of the system prints its number first; one of our own has none.
        message = error if refused else getattr(error, "strerror", None) or error
        _fail(f"error: {message}\n(SIMPLEAR_TRACEBACK=1 shows where it was raised)")


def _own_error(raised: BaseException) -> BaseException | None:
    """The project's own error, itself or behind what a library made of it, as jsonargparse does of an argument's."""
    error: BaseException | None = raised
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__)[-1:]:
            if Path(__file__).parent in Path(frame.filename).parents:
                return error
        error = error.__cause__
    return None


def _end_with_first_rank() -> None:
    """Have a rank that Lightning started end when the first rank, which started it, is gone.

    Lightning looks the other way alone. Such a rank would wait at a rendezvous or in a collective for half an hour,
    with its memory and its GPU, and beside the same training started again.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[STARTED_BY] = str(os.getpid())
    elif os.environ.get(STARTED_BY) == str(os.getppid()):
        threading.Thread(target=_wait_for_the_end_of, args=(os.getppid(),), daemon=True).start()


def _wait_for_the_end_of(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(LAST_WORDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _quieten() -> None:
    """Keep the terminal for what the user asked for: the libraries' own bars and hints are left out."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).propagate = False  # they have handlers of their own
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op. is deprecated.*")  # vLLM's import
    # Denormal numbers slow small models on CPUs many times over and carry no information.
    torch.set_flush_denormal(True)


def _overview() -> str:
    verbs = {**LIGHTNING_VERBS, **{verb: entry[2] for verb, entry in OWN_VERBS.items()}}
    verbs["data"] = f"token shards: simplear data {'|'.join(DATA_VERBS)} DIR"
    verbs["plan"] = "memory of a GPU and days of a training, from the configurations of fit"
    verbs["evaluate"] = f"checkpoint → report: simplear evaluate {'|'.join(BENCHMARKS)} CKPT --out DIR"
    lines = [f"  {verb:<22}{text}" for verb, text in verbs.items()]
    return "\n".join(["usage: simplear VERB [options]", "", *lines, "", "simplear VERB --help explains a verb."])


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
