"""Directories that are claimed for settings, and temporary files of processes that have ended or not."""

from __future__ import annotations

import json
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


def no_link(*_: Any) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_of_many_claims_at_once_one_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Whoever is accepted finds the settings that it asked for, whole, and all others are refused."""
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    for turn in range(10):
        file = tmp_path / str(turn) / "settings.json"
        start, go = os.pipe()
        claims = []
        for height in range(6):
            claims.append(os.fork())
            if claims[-1] == 0:
                os.close(go)
                os.read(start, 1)  # returns for all at once, when the other end is closed
                try:
                    claim_directory(file, {"height": height, "filler": "x" * 5000})
                except UserError as error:
                    os._exit(1 if f"not {height}" in str(error) else 2)
                os._exit(0)
        os.close(go), os.close(start)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in claims]
        assert sorted(codes) == [0, 1, 1, 1, 1, 1]
        assert json.loads(file.read_text())["height"] == codes.index(0)
        assert [path.name for path in file.parent.iterdir()] == ["settings.json"]


WEBDATASET = {"class": "WebDatasetSource", "captions": None, "captions_required": True}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"height": 256}, {"height": 512}, "begun with height = 256, not 512: use the same setting"),
        ({"height": 256}, {}, "height = 256, not None"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "begun with a.b = 1, not 2"),
        ({"filters": [{"x": 1}, {"x": 2}]}, {"filters": [{"x": 1}, {"x": 3}]}, "begun with filters.1.x = 2, not 3"),
        ({"filters": [{"x": 1}]}, {}, "begun with filters.0.x = 1, not None"),
        ({"paths": TARS}, {"paths": TARS[1:]}, "begun with paths = ['/data/corpus/part-00000.tar'"),
        (
            {"source": {"class": "WebDatasetSource", "tars": TARS}},
            {"source": WEBDATASET},
            "begun by another version of simplear, which describes WebDatasetSource in another way",
        ),
        (
            {"filters": [{"class": "Listed", "path": "x", "column": None, "entries": 7}]},
            {"filters": [{"class": "Listed", "column": None, "entries": "0f"}]},
            "begun by another version of simplear, which describes Listed in another way",
        ),
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
def test_settings_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(atomic, "SECONDS_BETWEEN_LOOKS", 0)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings\.json holds no settings .*: name another directory"):
        claim_directory(tmp_path / "settings.json", {})


HERE = os.uname().nodename


@pytest.mark.parametrize(
    ("owner", "answer", "stays"),
    [
        (f"{HERE}-77", ProcessLookupError, False),
        (f"{HERE}-77.140", ProcessLookupError, False),
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
    file = tmp_path / f".x.arrow{TEMPORARY_MARK}{owner}"
    file.touch()
    remove_abandoned(tmp_path)
    assert file.exists() is stays


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
    """Also without links, where they are written under their own name."""
    full: Callable[..., None] = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"settings\.json could not be written .*No space left"):
        claim_directory(tmp_path / "settings.json", {"height": 1})
    assert not list(tmp_path.iterdir())
