"""`mpiclip bench rules`: what it checks, and how its matches end."""

import math

import numpy as np
import pytest

from mpiclip import bench, columns


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    bench._check_rules(np)
    monkeypatch.setattr(columns, "median", columns.trimmed_mean)
    with pytest.raises((AssertionError, TypeError)):
        bench._check_rules(np)


def test_matches_on_few_columns():
    """Every chain has a line, with times and memory; other libraries stand in it where they are installed."""
    lines = list(bench._matches("cpu", 7, 1, 999, 1))
    assert [line["what"].strip() for line in lines] == list(bench.CHAINS)
    for line in lines:
        assert 0 < line["ms"] < math.inf and line["bandwidth"] > 0 and math.isfinite(line["memory"])
        assert ("ratio" in line) == any(name in line for name in bench.PEERS)


def test_who_takes_too_long_is_given_up_and_begins_anew(monkeypatch):
    player = bench.Player("mpiclip, cpu", 7, 1, 999, 1)
    assert "arc + trimmed_mean" in player.labels
    monkeypatch.setattr(bench, "LIMIT", 0.0)
    assert player.call("mean") == (math.inf, math.inf, "given up after 0 s")
    monkeypatch.setattr(bench, "LIMIT", 30.0)
    seconds, _, failed = player.call("mean")
    player.end()
    assert seconds < 30 and not failed
