"""Directories that are claimed for settings, and temporary files of processes that have ended or not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simplear import atomic
from simplear.atomic import TEMPORARY_MARK, claim_directory, difference, is_running, remove_abandoned, temporary_name
from simplear.errors import UserError

TARS = [f"/data/corpus/part-{number:05d}.tar" for number in range(4300)]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"height": 256}, {"height": 512}, "begun with height = 256, not 512: use the same setting"),
        ({"height": 256}, {}, "height = 256, not None"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "begun with a.b = 1, not 2"),
        ({"filters": [{"x": 1}, {"x": 2}]}, {"filters": [{"x": 1}, {"x": 3}]}, "begun with filters.1.x = 2, not 3"),
        ({"filters": [{"x": 1}]}, {}, "begun with filters.0.x = 1, not None"),
        ({"paths": TARS}, {"paths": TARS[1:]}, "begun with paths = ['/data/corpus/part-00000.tar'"),
    ],
)
def test_other_settings_are_refused_in_readable_length(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    claim_directory(tmp_path / "x/settings.json", before)
    with pytest.raises(UserError) as refused:
        claim_directory(tmp_path / "x/settings.json", now)
    assert message in str(refused.value) and len(str(refused.value)) < 1000
    claim_directory(tmp_path / "x/settings.json", before)


@pytest.mark.parametrize("now", [{"a": 1}, {"a": 1, "b": None}, {"a": 1, "b": {}}])
def test_what_is_not_set_makes_no_difference(now: dict[str, Any]) -> None:
    assert difference({"a": 1}, now) is None and difference(now, {"a": 1}) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings\.json holds no settings .*: name another directory"):
        claim_directory(tmp_path / "settings.json", {})


HERE = os.uname().nodename


@pytest.mark.parametrize(
    ("owner", "answer", "stays"),
    [
        (f"{HERE}-77", ProcessLookupError, False),
        (f"{HERE}-77.replaced", ProcessLookupError, False),
        (f"{HERE}-77", PermissionError, True),  # another user's, at work
        (f"{HERE}-77", None, True),
        (f"{HERE}-b-77", ProcessLookupError, True),  # of a machine whose name begins like this one's
        ("elsewhere-77", ProcessLookupError, True),
        (f"{HERE}-x", ProcessLookupError, True),
        (f"{HERE}-{10**30}", OverflowError, False),
    ],
)
def test_only_what_an_ended_process_of_this_machine_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, answer: type[Exception] | None, stays: bool
) -> None:
    def kill(process: int, signal: int) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(os, "kill", kill)
    file, directory = (tmp_path / f".{name}{TEMPORARY_MARK}{owner}" for name in ("x.arrow", "model"))
    file.touch()
    (directory / "inner").mkdir(parents=True)
    remove_abandoned(tmp_path)
    assert file.exists() is directory.exists() is stays


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    file = temporary_name(tmp_path / "x")
    file.touch()
    monkeypatch.setattr(atomic, "is_running", lambda process: False)
    monkeypatch.setattr(Path, "unlink", refuse)
    remove_abandoned(tmp_path)
    assert file.exists()


def test_this_process_is_running() -> None:
    assert is_running(os.getpid()) and not is_running(2**22 + 1)


def test_a_process_that_has_ended_is_not_running() -> None:
    """Before its parent has asked how it ended too: such a first rank would be taken for one that is alive."""
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(os.getpid()) and not is_running(ended.pid)
    assert not is_running(ended.pid)


def test_a_full_disk_leaves_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full: Callable[..., None] = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"settings\.json could not be written .*No space left"):
        claim_directory(tmp_path / "settings.json", {"height": 1})
    assert not list(tmp_path.iterdir())
