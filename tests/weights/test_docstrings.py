"""The examples in the combiners' docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["averaging", "combiners", "elastic", "layout", "server_optimizers"])
def test_the_examples_come_out_as_they_say(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tensorspark.weights.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
