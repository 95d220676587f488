"""What tells one source, filter, crop, captioner or reward from another: its class and the arguments it was made with.

A directory of results keeps the descriptions of all that decided them, so that work that goes on after a stop is not
mixed with work of other settings. They are taken from the constructor's arguments, so that no setting is forgotten.
"""

from __future__ import annotations

import glob
import inspect
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

PACKAGE = __name__.partition(".")[0]
SECRET = re.compile(r"^token$|(^|_)(api_?key|(hf|api|auth|access|bearer)_?token|secret|password|credentials?)$", re.I)
"""Names of what must never be written down."""
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
"""In an address."""
ADDRESS = " at 0x"
"""In the text of objects that say nothing but where in memory they are."""


class Described:
    """Base of classes whose arguments are settings; what it keeps survives copying and pickling."""

    not_described: ClassVar[frozenset[str]] = frozenset()
    """Arguments that decide nothing about the result, such as time limits."""
    local_paths: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may name files of this machine; an absolute and a relative path are described alike."""
    _arguments: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        if cls.__init__ is not object.__init__:
            # Copies and unpickled objects are made without arguments; theirs come with the other attributes.
            # Arguments that do not fit are refused by __init__, whose message is the better one.
            with suppress(TypeError):
                made.__dict__["_arguments"] = _bound(cls, args, kwargs)
        return made

    def describe(self) -> dict[str, Any]:
        """Class and arguments as JSON values, kept in settings and manifests; secrets are left out."""
        arguments = {}
        for name, value in self._arguments.items():
            if name not in self.not_described and not SECRET.search(name):
                arguments[name] = _located(value) if name in self.local_paths else description(value)
        return {"class": class_name(type(self)), **arguments}


def _bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])  # without self
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name)
    return named


def class_name(kind: Any) -> str:
    """The whole path of a class or function; the name alone of the project's own, which may move within it."""
    module, name = kind.__module__, kind.__qualname__
    return name if module.partition(".")[0] == PACKAGE else f"{module}.{name}"


def description(value: Any, nested: bool = False) -> Any:
    """A setting as a JSON value: of objects that do not describe themselves, the class and the public attributes.

    Args:
        value: anything.
        nested: it is an attribute of such an object; then its class alone tells it.
    """
    if isinstance(value, str):
        shown = CREDENTIALS.sub("", value)
        return shown.encode("utf-8", "backslashreplace").decode()  # names of files may be in another encoding
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Described):
        return value.describe()
    if isinstance(value, Path):
        return description(str(value.resolve()))
    if isinstance(value, Mapping):
        return {str(key): description(part, nested) for key, part in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list | tuple):
        return [description(part, nested) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((description(part, nested) for part in value), key=str)
    if isinstance(value, type) or inspect.isroutine(value):
        return class_name(value)
    attributes = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if not attributes and ADDRESS not in (said := repr(value)):
        return said  # enumerations, data types, fractions
    if nested:
        return class_name(type(value))
    public = {name: description(part, True) for name, part in attributes.items() if not SECRET.search(name)}
    return {"class": class_name(type(value)), **public}


def _located(value: Any) -> Any:
    """Text that names something on this machine, perhaps after a prefix such as "local-dir:", as a whole path."""
    if isinstance(value, Mapping):
        return {str(key): _located(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_located, value))
    if not isinstance(value, str):
        return description(value)
    prefix, colon, path = "", "", value
    if not _is_local(path):
        prefix, colon, path = value.rpartition(":")
    return description(f"{prefix}{colon}{os.path.realpath(path)}" if _is_local(path) else value)


def _is_local(path: str) -> bool:
    """Whether there is a file or directory of this name, or one that fits the pattern."""
    return os.path.exists(path) or ("\0" not in path and next(glob.iglob(path), None) is not None)
