"""How a command line is read: the parser of a function's arguments, and which errors are the user's.

A verb is a function; its signature and docstring are its options and their help. What is not left to jsonargparse:

- free text (`FreeText`) is taken as it is typed, where YAML would turn `null`, `42` or `${HOME}` into something else;
- an option that is given twice is refused, unless it collects;
- a value that begins with ``~/`` is in the user's home, also after ``=``, where the shell leaves it;
- an unknown option is answered with the nearest known one, by its whole name.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from simplear.errors import USER_CODE, UserError
from simplear.text_files import FreeText

PARSER_MODE = "omegaconf+"
PARSER_OPTIONS: dict[str, Any] = {"parser_mode": PARSER_MODE, "allow_abbrev": False}
"""argparse would take ``--trainer.max_step`` for any option that begins so."""
CLASS_MISTAKE = re.compile(
    r"""Parser key "([\w.]+)":.*?"""
    r"""(?:Expected a dot import path string: |given class_path '|Import path )([\w.]+)(?:':\s+([^\n]+))?""",
    re.S,
)
"""What jsonargparse says of a class that an option cannot be."""
REWARDS = "simplear.rewards"
REPEATABLE = {"config"}
"""Options of which a later one adds to an earlier one."""
TRACEBACK_VARIABLE = "SIMPLEAR_TRACEBACK"
STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""
MISTAKE = 2
"""Exit code after a mistake of the user, as argparse has it."""


class SuggestingParser:
    """Names the nearest known option beside an unknown one, and the known classes beside an unknown class."""

    typed: Sequence[str] = ()
    """The words of the command line, to find an option's whole name in."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        if unknown := re.search(r"(?:unrecognized arguments: --|ption '|Key ')([\w.+-]+)", message):
            message += self._suggestion(unknown[1].split("=")[0])
        elif unknown := CLASS_MISTAKE.search(message):
            what = "is of another kind" if "correspond to a subclass" in message else "there is no such class"
            why = f" ({unknown[3]})" if unknown[3] else ""
            message = f"--{unknown[1]} {unknown[2]}: {what}{why}; {self._classes(unknown[1])}"
        fail(f"error: {message}\n(all options: {self.prog} --help)")  # type: ignore[attr-defined]

    def _suggestion(self, unknown: str) -> str:
        names = [option_name(word) for word in self.typed if word.startswith("--")]
        typed = next((name for name in names if name.rpartition(".")[2] == unknown), unknown)
        known = {option.lstrip("-") for action in self._actions for option in action.option_strings}  # type: ignore[attr-defined]
        nearest = nearest_option(typed, (known | self.class_options()) - {typed})
        return f". Did you mean '--{nearest}'?" if nearest else ""

    def class_options(self) -> set[str]:
        """Whole names of options of the classes that the parser's options may name."""
        return {
            f"{action.dest}.{name}"
            for action in self._actions  # type: ignore[attr-defined]
            for class_ in known_classes(getattr(action, "_typehint", None))
            for name in inspect.signature(class_).parameters
        }

    def _classes(self, key: str) -> str:
        action = next((each for each in self._actions if each.dest == key), None)  # type: ignore[attr-defined]
        names = sorted(class_.__name__ for class_ in known_classes(getattr(action, "_typehint", None)))
        names += sorted(f"{REWARDS}.{class_.__name__}" for class_ in _rewards(getattr(action, "_typehint", None)))
        return f"one of {', '.join(names)}, or the import path of one of your own" if names else "give its import path"


def known_classes(type_: Any) -> list[type]:
    """The package's public classes that a value of this type may be; of a list, its items."""
    wanted = tuple(each for each in _named_types(type_) if not getattr(each, "_is_protocol", False))
    if not wanted:
        return []
    module = importlib.import_module(".".join(wanted[0].__module__.split(".")[:2]))
    public = (getattr(module, name) for name in module.__all__)
    return [
        each for each in public if inspect.isclass(each) and issubclass(each, wanted) and not inspect.isabstract(each)
    ]


def _rewards(type_: Any) -> list[type]:
    """The public rewards, where the type is a protocol that is called as they are; only import paths name these."""
    wanted = [each for each in _named_types(type_) if getattr(each, "_is_protocol", False)]
    called = {tuple(inspect.signature(each.__call__).parameters) for each in wanted if "__call__" in vars(each)}
    module = importlib.import_module(REWARDS) if called else None
    public = [getattr(module, name) for name in module.__all__] if module else []
    return [
        each
        for each in public
        if inspect.isclass(each)
        and "__call__" in dir(each)
        and not getattr(each, "_is_protocol", False)
        and not inspect.isabstract(each)
        and tuple(inspect.signature(each.__call__).parameters) in called
    ]


def _named_types(type_: Any) -> Iterator[type]:
    """The package's classes in a type, such as Filter in `list[Filter] | None`."""
    if arguments := typing.get_args(type_):
        for each in arguments:
            yield from _named_types(each)
    elif inspect.isclass(type_) and type_.__module__.startswith("simplear."):
        yield type_


def nearest_option(typed: str, known: set[str]) -> str | None:
    """Of the known options the one with the same last part, else the one spelled most alike, else None."""
    last = typed.rpartition(".")[2]
    if same := sorted((name for name in known if name.rpartition(".")[2] == last), key=lambda name: (len(name), name)):
        return same[0]
    by_last: dict[str, str] = {}
    for name in sorted(known, key=lambda name: (-len(name), name)):
        by_last[name.rpartition(".")[2]] = name
    matches = difflib.get_close_matches(typed, known, n=1) or [
        by_last[match] for match in difflib.get_close_matches(last, by_last, n=1)
    ]
    return matches[0] if matches else None


def function_parser(function: Callable[..., Any], program: str, typed: Sequence[str] = ()) -> Any:
    """jsonargparse's parser of a function's arguments."""
    from jsonargparse import ArgumentParser

    class FunctionParser(SuggestingParser, ArgumentParser):
        pass

    summary = (function.__doc__ or "").split("\n\n")[0]
    parser = FunctionParser(prog=program, description=summary, **PARSER_OPTIONS)
    parser.typed = typed
    parser.add_argument("--config", action="config", help="YAML with any of the options below; may be repeated")
    parser.add_function_arguments(function, as_positional=False)
    return parser


def run_function(function: Callable[..., Any], arguments: Sequence[str], program: str) -> None:
    """Call a function with the arguments that a command line gives it; see `parse`."""
    parser, parsed, texts = parse(function, arguments, program)
    given = vars(parser.instantiate(parsed)) | texts
    given.pop("config", None)
    function(**given)


def parse(
    function: Callable[..., Any], arguments: Sequence[str], program: str
) -> tuple[Any, Any, dict[str, str | list[str]]]:
    """Parser, parsed options and free text of a verb's command line; nothing is instantiated yet.

    ``CKPT --prompts-file F`` is ``--checkpoint CKPT --prompts_file F``: words in front go by their place, and a first
    parameter that is a list takes them all.

    Raises UserError, or exits with 2, for a mistake in them.
    """
    options, texts = split_free_text(_by_name(arguments, function), function)
    refuse_repeated(options)
    parser = function_parser(function, program, options)
    return parser, in_home(parser.parse_args(options)), texts


def option_name(word: str) -> str:
    """The name in ``--NAME`` or ``--NAME=VALUE``."""
    return word[2:].partition("=")[0].replace("-", "_")


def _by_name(arguments: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Words in front get the names of their parameters, dashes in options become underscores."""
    parameters = inspect.signature(function).parameters.values()
    by_place = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    rest = [re.sub(r"^--[\w.-]+", lambda name: "--" + option_name(name[0]), word) for word in arguments[len(words) :]]
    if words and by_place and str(by_place[0].annotation).startswith("list["):
        return [f"--{by_place[0].name}", json.dumps(words), *rest]
    if len(words) > len(by_place):
        extra = words[len(by_place)]
        raise UserError(
            f"{extra!r} belongs to no option: put a text with spaces in quotes, and name options by --NAME."
        )
    named = [word for place, value in zip(by_place, words, strict=False) for word in (f"--{place.name}", value)]
    return [*named, *rest]


def split_free_text(
    arguments: Sequence[str], function: Callable[..., Any]
) -> tuple[list[str], dict[str, str | list[str]]]:
    """The arguments without those of free text, and their values as typed: a list where several may be given.

    Raises UserError for an option without its text, and for a second text where one counts.
    """
    free = {name: hint for name, hint in _annotations(function).items() if _holds(hint, FreeText)}
    rest: list[str] = []
    texts: dict[str, list[str]] = {}
    words = iter(arguments)
    for word in words:
        name = option_name(word) if word.startswith("--") else ""
        if name not in free:
            rest.append(word)
            continue
        _, equals, value = word.partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--{name} needs a text; one that begins with two dashes is given as --{name}=TEXT.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--{name} is not text in {sys.getfilesystemencoding()}.") from error
        texts.setdefault(name, []).append(value)
    collected: dict[str, str | list[str]] = {}
    for name, values in texts.items():
        if _holds(free[name], list[FreeText]):
            collected[name] = values
        elif len(values) == 1:
            collected[name] = values[0]
        else:
            raise UserError(f"--{name} is given {len(values)} times: {_quoted(values)}. Give it once.")
    return rest, collected


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Of a function's options, those that its ``**kwargs`` stand for among them."""
    # jsonargparse finds where keyword arguments go, but its parsers keep no more than the plain types.
    from jsonargparse._parameter_resolvers import get_signature_parameters

    found: dict[str, Any] = {}
    for component in {id(each.component): each.component for each in get_signature_parameters(function)}.values():
        found = typing.get_type_hints(component, include_extras=True) | found
    return found | typing.get_type_hints(function, include_extras=True)


def _holds(hint: Any, wanted: Any) -> bool:
    return hint == wanted or any(_holds(part, wanted) for part in typing.get_args(hint))


def refuse_repeated(arguments: Sequence[str]) -> None:
    """Raises UserError for an option that is given twice, of which argparse would take the last without a word.

    ``--x+=CLASS`` appends to a list, and the options of the class that follow it are its own.
    """
    values: dict[str, str] = {}
    for number, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name = option_name(word)
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        value = word.partition("=")[2] if "=" in word else following
        if name.endswith("+"):
            for own in [each for each in values if each.startswith(f"{name[:-1]}.")]:
                del values[own]
        elif name in values and name not in REPEATABLE:
            raise UserError(f"--{name} is given twice: {_quoted([values[name], value])}. Give it once.")
        else:
            values[name] = value


def _quoted(values: Sequence[str]) -> str:
    return ", ".join(map(repr, values))


def in_home(parsed: Any) -> Any:
    """A parsed configuration in which every text that begins with ``~/`` names a place in the user's home."""
    if isinstance(parsed, str):
        return os.path.expanduser(parsed) if parsed == "~" or parsed.startswith("~/") else parsed
    if isinstance(parsed, list):
        return [in_home(each) for each in parsed]
    if isinstance(parsed, dict):
        return {key: in_home(value) for key, value in parsed.items()}
    if type(parsed).__name__ == "Namespace":
        for key, value in list(vars(parsed).items()):
            setattr(parsed, key, in_home(value))
    return parsed


@contextlib.contextmanager
def errors_for_the_reader() -> Iterator[None]:
    """The user's mistakes end in one message and exit code 2; everything else is a bug and shows where."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        fail(str(stopped) or "stopped; run the same again to go on", STOPPED)
    except Exception as error:
        message = mistake(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        fail(f"error: {message}\n({TRACEBACK_VARIABLE}=1 shows where it was raised)")


def mistake(raised: BaseException) -> str | None:
    """What to tell the user of an error that is a mistake of theirs; None for a bug.

    Such an error is a `UserError`, itself or behind what a library made of it, as jsonargparse does of an argument's;
    or one of the few errors of libraries that stand for a mistake.
    """
    error: BaseException | None = raised
    while error is not None:
        if any(USER_CODE in note for note in getattr(error, "__notes__", ())):
            return None
        if isinstance(error, UserError):
            return getattr(error, "strerror", None) or str(error)
        error = error.__cause__
    error = raised
    while error is not None:
        if message := _library_mistake(error):
            return message
        error = error.__cause__
    return None


def _library_mistake(error: BaseException) -> str | None:
    """What a library's error says, where its class stands for a mistake in a path, a package or a configuration."""
    if isinstance(error, OSError) and error.filename is not None:  # the system refused a path
        return str(error)
    if isinstance(error, ImportError) and _is_missing_package(error):
        return f"{error} (a package that this needs is not installed)"
    if importlib.util.find_spec("lightning") is None:
        return None
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    text = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException) or text.startswith("Early stopping conditioned on metric"):
        return text
    if isinstance(error, OmegaConfBaseException):
        return f"a reference in the configuration leads nowhere (they work in files, not in options): {text}"
    return None


def _is_missing_package(error: ImportError) -> bool:
    """Not a module of this package, nor a name that a module lacks: those are bugs."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("simplear")
    return error.name is None  # transformers' way to say it


def fail(message: str, code: int = MISTAKE) -> NoReturn:
    """Print a message and exit."""
    print(message, file=sys.stderr)
    raise SystemExit(code)
