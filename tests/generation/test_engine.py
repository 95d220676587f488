"""Engines by name."""

from __future__ import annotations

import pytest

from generation.models import language_model
from simplear.generation import ENGINES, make_engine


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_each_name_makes_an_engine_over_the_model(name):
    model = language_model()
    engine = make_engine(name, model)
    assert engine.model is model


def test_an_unknown_engine_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"no engine 'cache'.*cached"):
        make_engine("cache", language_model())
