"""`simplear VERB`: Lightning's verbs (fit, validate, test, predict) and the project's own.

Configurations compose by repeating ``--config``; a later file or flag overrides an earlier one, and ``${…}`` refers to
the composed whole (jsonargparse's ``omegaconf+`` mode), so an overlay can change what another file refers to. A verb
imports only what it runs, so that ``--help`` answers at once. How options are read: `simplear.command_line`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simplear.atomic import is_running
from simplear.command_line import errors_for_the_reader, fail, run_function
from simplear.errors import UserError


@dataclass(frozen=True)
class Verb:
    """A verb that is a function."""

    function: str
    """MODULE:NAME; its arguments are the verb's options."""
    summary: str
    configured: bool = False
    """Over the stage and data module of a configuration: the function takes the whole command line and parses it."""


@dataclass(frozen=True)
class Group:
    """A verb that has verbs of its own."""

    verbs: Mapping[str, Verb]
    summary: str


LIGHTNING = "simplear.lightning_cli:run"
VERBS: dict[str, Verb | Group] = {
    "fit": Verb(LIGHTNING, "train a stage: --config configs/….yaml, repeated; --key value overrides", configured=True),
    "validate": Verb(LIGHTNING, "loss on held-out data", configured=True),
    "test": Verb(LIGHTNING, "as validate, on test data", configured=True),
    "predict": Verb(LIGHTNING, "Lightning's predict", configured=True),
    "train-text-tokenizer": Verb("simplear.data:train_text_tokenizer_on", "train a byte-level BPE on captions"),
    "recaption": Verb("simplear.data:recaption", "pictures → long and short captions by a vision-language model"),
    "tokenize": Verb("simplear.data:tokenize", "pictures and captions → token shards"),
    "generate": Verb("simplear.generation:generate", "checkpoint and prompts → images"),
    "export": Verb("simplear.export:export", "training state or checkpoint → directory for transformers and vLLM"),
    "compare": Verb("simplear.evaluation:compare", "two evaluated runs, REPORT:RUN each → paired differences"),
    "serve": Verb("simplear.serving:serve", "checkpoints → OpenAI's image API over HTTP, with a page to draw on"),
    "demo": Verb("simplear.demo:demo", "the whole story, small, on two cores"),
    "data": Group(
        {
            "verify": Verb("simplear.data.shards.verify:verify", "compare token shards with their checksums"),
            "repair": Verb("simplear.data.shards.verify:repair", "move damaged shards aside, to be made again"),
            "show": Verb("simplear.data.shards.show:show", "a page with pictures, captions and counts of token shards"),
            "text": Verb("simplear.data.jobs.texts:write_texts", "text files → shards to train on beside images"),
        },
        "token shards",
    ),
    "plan": Verb("simplear.plan:plan", "memory of a GPU and days of a training, from the options of fit", True),
    "evaluate": Group(
        {
            "scenes": Verb("simplear.evaluation:evaluate_scenes", "accuracy on drawn scenes by an exact detector"),
            "geneval": Verb(
                "simplear.evaluation.geneval:evaluate_geneval", "GenEval's prompts, its folders, and a judge"
            ),
            "dpg": Verb("simplear.evaluation.dpg:evaluate_dpg", "DPG-Bench's prompts, its layout, and a judge"),
            "quality": Verb(
                "simplear.evaluation.quality:evaluate_quality", "FID, CLIPScore and HPS v2.1 of drawn prompts"
            ),
            "tokenizer": Verb(
                "simplear.evaluation.reconstruction:evaluate_tokenizer", "rFID, PSNR, SSIM, use of the codebook"
            ),
        },
        "checkpoint → report",
    ),
}
STARTED_BY = "SIMPLEAR_STARTED_BY"
"""Environment variable: the process whose further ranks Lightning starts."""
LAST_WORDS = 10
"""Seconds that a rank has to end by itself when the first one is gone, say with the message that explains it."""
NO_LIGHTNING = "simplear: this environment has no Lightning, it is for drawing with vLLM: use .venv/bin/simplear."
NOISY_LOGGERS = (
    "httpx",
    "filelock",
    "fsspec",
    "PIL",
    "tensorboard",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
WHY_TRAINING_ENDED = ("`Trainer.fit` stopped", "Time limit reached")
"""Beginnings of the only lines of Lightning's rank_zero logger that are shown; the others name devices and files."""
HELP = ("-h", "--help")
IMPORT = "--import"
"""Option of every verb: a module of the user's to import first, such as one that registers a visual tokenizer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Exits with 2 on a mistake in the command line, as argparse does."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _wait_passively()
    _end_with_first_rank()
    arguments, modules = _without_imports(arguments)
    if arguments[:1] == ["--version"]:
        import simplear

        print(f"simplear {simplear.__version__}")
        return
    program, level, words = "simplear", Group(VERBS, "autoregressive text-to-image generation"), arguments  # type: ignore[arg-type]
    while isinstance(level, Group):
        word = words[0] if words else "--help"
        if word in HELP:
            print(_help(program, level))
            return
        if word not in level.verbs:
            nearest = difflib.get_close_matches(word, level.verbs, n=1)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"one of {', '.join(level.verbs)}."
            fail(f"{program}: no verb {word!r}; {remedy}")
        program, level, words = f"{program} {word}", level.verbs[word], words[1:]  # type: ignore[assignment]
    verb: Verb = level
    _quieten()
    module, _, name = verb.function.partition(":")
    with errors_for_the_reader():
        for each in modules:
            _import_users_module(each)
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "lightning":
                raise
            fail(NO_LIGHTNING)
        if verb.configured:
            function(arguments)
        else:
            run_function(function, words, program)


def _wait_passively() -> None:
    """Have OpenMP's threads sleep at barriers, unless the user chose otherwise. Before PyTorch is imported.

    By default they spin there: beside another process that takes a core, for as long as the thread that they wait for
    is not scheduled, which made steps of small models many times slower.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _without_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without those of `IMPORT`, and the modules that these name."""
    rest, modules, words = [], [], iter(arguments)
    for word in words:
        if word == IMPORT or word.startswith(f"{IMPORT}="):
            modules.append(word.partition("=")[2] or next(words, ""))
        else:
            rest.append(word)
    if not all(each and all(part.isidentifier() for part in each.split(".")) for each in modules):
        fail(f"simplear: {IMPORT} needs the name of a module, such as my_tokenizers, which Python can import.")
    return rest, modules


def _import_users_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{IMPORT} {name}: Python finds no such module; PYTHONPATH=. adds this directory.") from error


def _help(program: str, group: Group) -> str:
    lines = [f"  {verb:<22}{_summary(entry)}" for verb, entry in group.verbs.items()]
    head, tail = f"usage: {program} VERB [options]", f"{program} VERB --help explains a verb."
    return "\n".join([head, "", *lines, "", tail, f"{IMPORT} MODULE imports a module of yours first."])


def _summary(entry: Verb | Group) -> str:
    return entry.summary + (f": {'|'.join(entry.verbs)}" if isinstance(entry, Group) else "")


def _end_with_first_rank() -> None:
    """Have a rank that Lightning started end when the first rank, which started it, is gone.

    Lightning looks the other way alone. Such a rank would wait at a rendezvous or in a collective for half an hour,
    with its memory and its GPU, and beside the same training started again.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[STARTED_BY] = str(os.getpid())
    elif first := int(os.environ.get(STARTED_BY, "0")):
        if os.getppid() == first:
            threading.Thread(target=_wait_for_the_end_of, args=(first,), daemon=True).start()
        elif not is_running(first):  # it ended before this rank could look
            fail("the first process of this training has ended, so this one ends too", 1)


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
    logging.getLogger("lightning").propagate = False  # it has a handler of its own
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_worth_reading)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op. is deprecated.*")  # vLLM's import
    # Denormal numbers slow small models on CPUs many times over and carry no information.
    torch.set_flush_denormal(True)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.getMessage().startswith(WHY_TRAINING_ENDED)


if __name__ == "__main__":
    main()
