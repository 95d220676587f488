"""How a command line is read: the parser of a function's arguments, and which errors are the user's.

A verb is a function; its signature and docstring are its options and their help. What jsonargparse does not do:

- free text (`FreeText`) is taken as typed, where YAML would turn `null`, `42` or `${HOME}` into something else;
- an option that is given twice is refused, unless it collects;
- a value that begins with ``~/`` is in the user's home, also after ``=``, where the shell leaves it;
- an error names the nearest known option, or the known classes.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import json
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NoReturn

from simplear.errors import UserError
from simplear.text_files import FreeText, valid_unicode

PARSER_MODE = "omegaconf+"
PARSER_OPTIONS: dict[str, Any] = {"parser_mode": PARSER_MODE, "allow_abbrev": False}
"""argparse would take ``--trainer.max_step`` for any option that begins so."""
UNKNOWN_OPTION = re.compile(r"(?:unrecognized arguments: --|ption ')([\w.+-]+)")
BAD_VALUE = re.compile(r'Parser key "([\w.]+)"')
REPEATABLE = {"config"}
"""Options of which a later one adds to an earlier one."""
MISCONFIGURED = {"MisconfigurationException", "OmegaConfBaseException"}
"""Classes of Lightning's and OmegaConf's errors for a mistake in the configuration."""
TRACEBACK_VARIABLE = "SIMPLEAR_TRACEBACK"
STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""
MISTAKE = 2
"""Exit code after a mistake of the user, as argparse has it."""


class SuggestingParser:
    """Mixed into jsonargparse's parsers: an error also names the nearest option, or the known classes.

    jsonargparse parses the options of a class by a parser of that class, which knows them without their prefix.
    """

    typed: Sequence[str] = ()
    """The words of the command line, to find an option's prefix in."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        classes = self._classes()
        if found := UNKNOWN_OPTION.search(message):
            parameters = {
                f"{name}.{parameter}"
                for name, paths in classes.items()
                for path in paths
                for parameter in inspect.signature(pkgutil.resolve_name(path)).parameters
            }
            if nearest := nearest_option(found[1], classes.keys() | parameters):
                typed = [name for name in map(option_name, self.typed) if f".{name}".endswith(f".{found[1]}")]
                prefix = typed[0].removesuffix(found[1]) if typed else ""
                message += f". Did you mean '--{prefix}{nearest}'?"
        elif (found := BAD_VALUE.search(message)) and classes.get(found[1]):
            names = sorted(path.rpartition(".")[2] for path in classes[found[1]])
            message += f"\n--{found[1]} takes one of {', '.join(names)}, or the import path of your own class"
        fail(f"error: {message}\n(--help lists all options)")

    def _classes(self) -> dict[str, list[str]]:
        """The parser's options, and the import paths of the package's classes that each may name."""
        from jsonargparse._typehints import get_all_subclass_paths

        verbs = getattr(getattr(self, "_subcommands_action", None), "choices", {})
        actions = [action for parser in (self, *verbs.values()) for action in parser._actions]  # type: ignore[attr-defined]
        classes: dict[str, list[str]] = {}
        for action in actions:
            paths = get_all_subclass_paths(action._typehint) if hasattr(action, "_typehint") else []
            classes[action.dest] = [path for path in paths if path.startswith("simplear.")]
        return {name: paths for name, paths in classes.items() if not name.endswith(".help")}


def nearest_option(typed: str, known: Set[str]) -> str | None:
    """The shortest known option with the same last part, else the one spelled most alike, else None."""
    last = typed.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: (-len(name), name))}
    if last in by_last:
        return by_last[last]
    alike = difflib.get_close_matches(typed, known, n=1)
    alike += [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1)]
    return alike[0] if alike else None


def run_function(function: Callable[..., Any], arguments: Sequence[str], program: str) -> None:
    """Call a function with the arguments that a command line gives it; see `parse`."""
    parser, parsed, texts = parse(function, arguments, program)
    values = vars(parser.instantiate(parsed)) | texts
    values.pop("config", None)
    function(**values)


def parse(
    function: Callable[..., Any], arguments: Sequence[str], program: str
) -> tuple[Any, Any, dict[str, str | list[str]]]:
    """Parser, parsed options and free text of a verb's command line; nothing is instantiated yet.

    ``CKPT --prompts-file F`` is ``--checkpoint CKPT --prompts_file F``: words in front go by their position, and a
    first parameter that is a list takes them all.

    Raises UserError, or exits with 2, for a mistake in them.
    """
    from jsonargparse import ArgumentParser

    options, texts = split_free_text(_by_name(arguments, function), function)
    refuse_repeated(options)

    class FunctionParser(SuggestingParser, ArgumentParser):
        typed = options

    summary = (function.__doc__ or "").split("\n\n")[0]
    parser = FunctionParser(prog=program, description=summary, **PARSER_OPTIONS)
    parser.add_argument("--config", action="config", help="YAML with any of the options below; may be repeated")
    parser.add_function_arguments(function, as_positional=False)
    return parser, in_home(parser.parse_args(options)), texts


def option_name(word: str) -> str:
    """The name in ``--NAME`` or ``--NAME=VALUE``, with underscores; empty for a word that is not an option."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def _by_name(arguments: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Words in front get the names of their parameters, dashes in options become underscores."""
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    rest = [re.sub(r"^--[\w.-]+", lambda name: "--" + option_name(name[0]), word) for word in arguments[len(words) :]]
    if words and positional and str(positional[0].annotation).startswith("list["):
        return [f"--{positional[0].name}", json.dumps(words), *rest]
    if len(words) > len(positional):
        raise UserError(
            f"{words[len(positional)]!r} belongs to no option: put a text with spaces in quotes, and name options by "
            "--NAME."
        )
    named = [word for place, value in zip(positional, words, strict=False) for word in (f"--{place.name}", value)]
    return [*named, *rest]


def split_free_text(
    arguments: Sequence[str], function: Callable[..., Any]
) -> tuple[list[str], dict[str, str | list[str]]]:
    """The arguments without those of free text, and their values as typed: a list where several may be given.

    Raises UserError for an option without its text, and for a second text where only one is taken.
    """
    free = {name: hint for name, hint in _annotations(function).items() if _holds(hint, FreeText)}
    rest: list[str] = []
    texts: dict[str, list[str]] = {}
    words = iter(arguments)
    for word in words:
        name = option_name(word)
        if name not in free:
            rest.append(word)
            continue
        _, equals, value = word.partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--{name} needs a text; give one that begins with two dashes as --{name}=TEXT.")
        if not valid_unicode(value):
            raise UserError(f"--{name} is not text in {sys.getfilesystemencoding()}.")
        texts.setdefault(name, []).append(value)
    collected: dict[str, str | list[str]] = {}
    for name, values in texts.items():
        several = _holds(free[name], list[FreeText])
        if len(values) > 1 and not several:
            raise UserError(f"--{name} is given {len(values)} times: {_quoted(values)}. Give it once.")
        collected[name] = values if several else values[0]
    return rest, collected


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of a function's options, including those that its ``**kwargs`` stand for."""
    # jsonargparse finds where keyword arguments go, but its parsers do not keep what is annotated.
    from jsonargparse._parameter_resolvers import get_signature_parameters

    found: dict[str, Any] = {}
    for component in {id(each.component): each.component for each in get_signature_parameters(function)}.values():
        found = typing.get_type_hints(component, include_extras=True) | found
    return found | typing.get_type_hints(function, include_extras=True)


def _holds(hint: Any, wanted: Any) -> bool:
    return hint == wanted or any(_holds(part, wanted) for part in typing.get_args(hint))


def refuse_repeated(arguments: Sequence[str]) -> None:
    """Raises UserError for an option that is given twice, of which argparse would silently take the last.

    ``--x+=CLASS`` appends to a list, and the options of the class that follow it are its own.
    """
    values: dict[str, str] = {}
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, value = option_name(word), word.partition("=")[2] or following
        if name.endswith("+"):
            values = {each: own for each, own in values.items() if not each.startswith(f"{name[:-1]}.")}
        elif name in values and name not in REPEATABLE:
            raise UserError(f"--{name} is given twice: {_quoted([values[name], value])}. Give it once.")
        elif name:
            values[name] = value


def _quoted(values: Sequence[str]) -> str:
    return ", ".join(map(repr, values))


def in_home(parsed: Any) -> Any:
    """A parsed configuration in which every text that begins with ``~/`` names a place in the user's home."""
    if isinstance(parsed, str):
        return os.path.expanduser(parsed) if parsed.startswith("~/") else parsed
    if isinstance(parsed, list):
        return [in_home(each) for each in parsed]
    values = parsed if isinstance(parsed, dict) else vars(parsed) if type(parsed).__name__ == "Namespace" else {}
    for key, value in values.items():
        values[key] = in_home(value)
    return parsed


@contextlib.contextmanager
def errors_for_the_reader() -> Iterator[None]:
    """The user's mistakes end in one message and exit code 2; everything else is a bug and shows a traceback."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        fail(str(stopped) or "stopped; run the same command again to resume", STOPPED)
    except Exception as error:
        message = mistake(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        fail(f"error: {message}\n({TRACEBACK_VARIABLE}=1 shows where it was raised)")


def mistake(raised: BaseException) -> str | None:
    """What to tell the user of an error that is a mistake of theirs; None for a bug.

    Such an error is a `UserError`, itself or behind what a library made of it, as jsonargparse does of an argument's;
    or one of the few errors of libraries that mean a wrong path, package or configuration.
    """
    chain: list[BaseException] = [raised]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for error in chain:
        if isinstance(error, UserError):
            return getattr(error, "strerror", None) or str(error)
    for error in chain:
        classes = {class_.__name__ for class_ in type(error).__mro__}
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:
            return text
        if isinstance(error, ImportError) and not (error.name or "").startswith("simplear"):
            return f"{text} (a package that this needs is not installed)"
        if classes & MISCONFIGURED or text.startswith("Early stopping conditioned on metric"):
            return text
    return None


def fail(message: str, code: int = MISTAKE) -> NoReturn:
    """Print a message and exit."""
    print(message, file=sys.stderr)
    raise SystemExit(code)
