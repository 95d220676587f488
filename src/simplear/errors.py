"""One class of error for mistakes in what the user gave: the command line prints its message, and a trace for all else.

The message says what is wrong, where (file, row, key) and what to do about it. The subclasses are Python's own errors
too, so a caller of the library catches ValueError, FileNotFoundError or OSError as usual.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input, configuration or environment that cannot work as it is."""


USER_CODE = "raised by the user's own"


def note_user_code(error: Exception, what: str) -> None:
    """Note in an error that the user's own class raised it: the command line shows its trace, which leads there."""
    error.add_note(f"{USER_CODE} {what}")


class MissingFileError(FileNotFoundError, UserError):
    """A file or directory that the user named, or that a verb should have written before, is missing."""


class ExistingFileError(FileExistsError, UserError):
    """Something is in the way of what would be written."""


class SystemRefusedError(OSError, UserError):
    """The system refused to read, write or reach something that the user named; (errno, message) as an OSError has."""


def first_line(error: BaseException) -> str:
    """Of what a library says, whose further lines are for its developers; the error's class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
