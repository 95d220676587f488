"""One class of error for the user's mistakes: the command line prints its message, and a traceback for all others.

The message says what is wrong, where (file, row, key) and what to do about it. The subclasses are also Python's own
errors, so a caller of the library catches ValueError, FileNotFoundError or OSError as usual.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input, configuration or environment that cannot work as it is."""


class MissingFileError(FileNotFoundError, UserError):
    """A file or directory that the user named, or that a verb should have written before, is missing."""


class ExistingFileError(FileExistsError, UserError):
    """Something else already has the name of what would be written."""


class SystemRefusedError(OSError, UserError):
    """The system refused to read, write or reach something that the user named; (errno, message) as an OSError has."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, whose other lines are for its developers; else the error's class."""
    return (str(error).splitlines() or [type(error).__name__])[0]
