"""Describes a source, filter, crop, captioner or reward by its class and constructor arguments.

A directory of results stores the descriptions of everything that determined them, so that work that is resumed cannot
be mixed with results of other settings. They are taken from the constructor's arguments, so no setting is forgotten.
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
"""Names of values that must never be written down."""
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
"""In an address."""


class Described:
    """Base of classes whose arguments are settings; the arguments survive copying and pickling."""

    not_described: ClassVar[frozenset[str]] = frozenset()
    """Arguments that do not change the result, such as time limits."""
    local_paths: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may name files of this machine: absolute and relative paths of a file are described alike."""
    _arguments: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__new__(cls)
        if cls.__init__ is not object.__init__:
            # Copies and unpickled objects are made without arguments; theirs come with the other attributes.
            # Arguments that do not fit are refused by __init__, whose message is the better one.
            with suppress(TypeError):
                instance.__dict__["_arguments"] = _bound(cls, args, kwargs)
        return instance

    def describe(self) -> dict[str, Any]:
        """Class and arguments as JSON values, for settings and manifests; secrets are left out."""
        arguments = {}
        for name, value in self._arguments.items():
            if name not in self.not_described and not SECRET.search(name):
                arguments[name] = description(_absolute(value) if name in self.local_paths else value)
        return {"class": class_name(type(self)), **arguments}


def _bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])  # without self
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
    return arguments


def class_name(kind: Any) -> str:
    """The full path of a class or function, or for this package's own the name alone, since they may move within it."""
    module, name = kind.__module__, kind.__qualname__
    return name if module.partition(".")[0] == PACKAGE else f"{module}.{name}"


def description(value: Any, nested: bool = False) -> Any:
    """A setting as a JSON value; objects that do not describe themselves give their class and public attributes.

    Args:
        value: anything.
        nested: it is an attribute of such an object, and gives its class alone.
    """
    if isinstance(value, str):
        text = CREDENTIALS.sub("", value)
        return text.encode("utf-8", "backslashreplace").decode()  # names of files may be in another encoding
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
    public = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if not public and " at 0x" not in (text := repr(value)):
        return text  # enumerations, data types, fractions
    return class_name(type(value)) if nested else {"class": class_name(type(value)), **description(public, True)}


def _absolute(value: Any) -> Any:
    """The value, with absolute paths in place of texts that name local files, perhaps by a pattern."""
    if isinstance(value, Mapping):
        return {key: _absolute(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_absolute, value))
    is_local = isinstance(value, str) and (os.path.exists(value) or ("\0" not in value and glob.glob(value)))
    return os.path.realpath(value) if is_local else value
