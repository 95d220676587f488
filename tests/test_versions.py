"""The environment of `make test-floor` has every dependency at the lowest version that pyproject.toml allows."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def test_the_floor_environment_is_at_the_floor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    lines = (ROOT / "constraints-floor.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(name): Version(version) for name, version in pairs}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        lowest = [Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==")]
        if lowest:
            assert [pinned[canonicalize_name(requirement.name)]] == lowest, requirement
