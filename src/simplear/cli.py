"""`simplear VERB`: Lightning's verbs (fit, validate, test, predict) and the project's own.

Configurations compose by repeating ``--config``; a later file or flag overrides an earlier one, and ``${…}`` refers to
the composed whole (jsonargparse's ``omegaconf+`` mode), so an overlay can change what another file refers to. A verb
imports only what it runs, so that ``--help`` answers at once: hence this table in place of jsonargparse's subcommands,
which need every function. How options are read: `simplear.command_line`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence

from simplear.atomic import is_running
from simplear.command_line import errors_for_the_reader, fail, run_function
from simplear.errors import UserError

LIGHTNING = "simplear.lightning_cli:run"
PLAN = "simplear.plan:plan"
VERBS = {
    "fit": (LIGHTNING, "train a stage: --config configs/….yaml, repeated; --key value overrides"),
    "validate": (LIGHTNING, "loss on held-out data"),
    "test": (LIGHTNING, "as validate, on test data"),
    "predict": (LIGHTNING, "Lightning's predict"),
    "plan": (PLAN, "memory of a GPU and days of a training, from the options of fit"),
    "train-text-tokenizer": ("simplear.data:train_text_tokenizer_on", "train a byte-level BPE on captions"),
    "recaption": ("simplear.data:recaption", "pictures → long and short captions by a vision-language model"),
    "tokenize": ("simplear.data:tokenize", "pictures and captions → token shards"),
    "generate": ("simplear.generation:generate", "checkpoint and prompts → images"),
    "export": ("simplear.export:export", "training state or checkpoint → directory for transformers and vLLM"),
    "compare": ("simplear.evaluation:compare", "two evaluated runs, REPORT:RUN each → paired differences"),
    "serve": ("simplear.serving:serve", "checkpoints → OpenAI's image API over HTTP, with a page to draw on"),
    "demo": ("simplear.demo:demo", "the whole story, small, on two cores"),
    "data verify": ("simplear.data.shards.verify:verify", "compare token shards with their checksums"),
    "data repair": ("simplear.data.shards.verify:repair", "move damaged shards aside, to be made again"),
    "data show": ("simplear.data.shards.show:show", "a page with pictures, captions and counts of token shards"),
    "data text": ("simplear.data.jobs.texts:write_texts", "text files → shards to train on beside images"),
    "evaluate scenes": ("simplear.evaluation:evaluate_scenes", "accuracy on drawn scenes by an exact detector"),
    "evaluate geneval": ("simplear.evaluation.geneval:evaluate_geneval", "GenEval's prompts, its folders, and a judge"),
    "evaluate dpg": ("simplear.evaluation.dpg:evaluate_dpg", "DPG-Bench's prompts, its layout, and a judge"),
    "evaluate quality": (
        "simplear.evaluation.quality:evaluate_quality",
        "FID, CLIPScore, HPS v2.1 of drawn prompts",
    ),
    "evaluate tokenizer": ("simplear.evaluation.reconstruction:evaluate_tokenizer", "rFID, PSNR, SSIM, codebook use"),
}
"""Verbs, by one word or two: the function, whose arguments are the verb's options, and what the verb does."""
CONFIGURED = (LIGHTNING, PLAN)
"""Functions that take the whole command line and parse it."""
STARTED_BY = "SIMPLEAR_STARTED_BY"
"""Environment variable: the process whose further ranks Lightning starts."""
LAST_WORDS = 10
"""Seconds that a rank has to end by itself after the first one has gone, for example with the message that explains it.
"""
NOISY_LOGGERS = ("lightning.fabric.utilities.seed", "lightning.pytorch.trainer.connectors.checkpoint_connector")
WHY_TRAINING_ENDED = ("`Trainer.fit` stopped", "Time limit reached")
"""Beginnings of the only lines of Lightning's rank_zero logger that are shown; the others name devices and files."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Exits with 2 on a mistake in the command line, as argparse does."""
    _wait_passively()
    _end_with_first_rank()
    general = argparse.ArgumentParser("simplear", add_help=False, allow_abbrev=False)
    general.add_argument("--import", dest="modules", action="append", default=[])
    options, words = general.parse_known_args(arguments)
    if words == ["--version"]:
        import simplear

        print(f"simplear {simplear.__version__}")
        return
    group = next((f"{words[0]} " for verb in VERBS if words and verb.startswith(f"{words[0]} ")), "")
    length = 2 if group else 1
    verb = " ".join(words[:length])
    if verb not in VERBS:
        _say_verbs(group, next(iter(words[length - 1 :]), ""))
        return
    _quieten()
    function = VERBS[verb][0]
    module, _, name = function.partition(":")
    with errors_for_the_reader():
        for users_module in options.modules:
            try:
                importlib.import_module(users_module)
            except ModuleNotFoundError as error:
                raise UserError(f"--import {users_module}: {error}; PYTHONPATH=. adds this directory.") from error
        called = getattr(importlib.import_module(module), name)
        if function in CONFIGURED:
            called(words)
        else:
            run_function(called, words[length:], f"simplear {verb}")


def _say_verbs(group: str, word: str) -> None:
    """Print the verbs, of one group if one is named, as help; after a word that is unknown, exit with the nearest."""
    verbs = {verb.removeprefix(group): summary for verb, (_, summary) in VERBS.items() if verb.startswith(group)}
    if word not in ("", "-h", "--help"):
        nearest = difflib.get_close_matches(word, verbs, n=1)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"one of {', '.join(verbs)}."
        fail(f"simplear: no verb {group + word!r}; {remedy}")
    print(f"usage: simplear {group}VERB [options]\n")
    print("\n".join(f"  {verb:<22}{summary}" for verb, summary in verbs.items()))
    print(f"\nsimplear {group}VERB --help explains a verb. --import MODULE imports a module of yours first.")


def _wait_passively() -> None:
    """Have OpenMP's threads sleep at barriers, unless the user chose otherwise. Call before PyTorch is imported.

    By default they spin there. If another process takes a core, they spin for as long as the thread that they wait for
    is not scheduled, which made steps of small models many times slower.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _end_with_first_rank() -> None:
    """Have a rank that Lightning started end after the first rank, which started it, has gone.

    Lightning only watches in the other direction. Such a rank would wait at a rendezvous or in a collective for half an
    hour, with its memory and its GPU, beside the same training started again.
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
    logging.basicConfig(format="%(message)s")
    logging.getLogger("simplear").setLevel(logging.INFO)
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
