"""Robust aggregation: from n vectors, of which up to f may be anything, to one.

A rule is a function (rows, f) → Rows (a pre-aggregation: it is followed by another) or → this rank's columns of the
aggregate. A chain is applied from left to right; if Rows remain, their mean is the aggregate. A new rule is a function
in this file, marked @rule or @pre_aggregation: its name is what is written in `rules = [...]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import InputError, unknown
from .rows import TINY, Rows

RULES: dict[str, Callable] = {}         # every rule by its name in a config
PRE_AGGREGATIONS: set[str] = set()      # those that give Rows, to be followed by another


def rule(function: Callable) -> Callable:
    """Make a function a rule that a config can name."""
    RULES[function.__name__] = function
    return function


def pre_aggregation(function: Callable) -> Callable:
    """Make a function a rule that stands before another."""
    PRE_AGGREGATIONS.add(function.__name__)
    return rule(function)


@rule
def mean(rows: Rows, f: int):
    """The mean; robust to nothing."""
    return rows.mean()


@rule
def median(rows: Rows, f: int):
    """Coordinate-wise median (CWMed); of an even number, the mean of the middle two.
    Yin et al. (2018), arXiv:1803.01498."""
    return rows.coordinates(lambda X: np.median(X, axis=0))


@rule
def trimmed_mean(rows: Rows, f: int):
    """Coordinate-wise trimmed mean (CWTM): of each coordinate, the mean without its f smallest and f largest values.
    Yin et al. (2018), arXiv:1803.01498."""
    return rows.coordinates(lambda X: np.sort(X, axis=0)[f:rows.n - f].mean(axis=0))


@pre_aggregation
def arc(rows: Rows, f: int) -> Rows:
    """Adaptive robust clipping: the k = ⌊2f(n−f)/n⌋ longest rows are shortened to the next one's length.
    Allouah et al. (2024), arXiv:2405.14432, Algorithm 2."""
    n, norm = rows.n, rows.norms()
    k = 2 * f * (n - f) // n
    C = np.sort(norm)[n - k - 1]
    return rows.mix(np.diag(C / np.maximum(norm, np.maximum(C, TINY))))


@pre_aggregation
def nnm(rows: Rows, f: int) -> Rows:
    """Nearest-neighbour mixing: every row becomes the mean of the n − f rows nearest to it, itself included.
    Allouah et al. (2023), "Fixing by mixing", arXiv:2302.01772, Algorithm 2."""
    n = rows.n
    near = np.argsort(rows.distances(), axis=1, kind="stable")[:, :n - f]
    W = np.zeros((n, n))
    np.put_along_axis(W, near, 1 / (n - f), axis=1)
    return rows.mix(W)


def check(names: Sequence[str], f: int, n: int) -> None:
    """Raises InputError for a rule that does not exist or stands in the wrong place, and for an f that no rule can
    tolerate among n workers."""
    for name in names:
        if name not in RULES:
            raise unknown("aggregate.rules", name, RULES)
    for name in names[:-1]:
        if name not in PRE_AGGREGATIONS:
            raise InputError(f"aggregate.rules: '{name}' gives one vector, so it can only be the last rule")
    if f < 0 or n <= 2 * f:
        raise InputError(f"aggregate.f: {f} of {n} workers; robust aggregation needs f ≥ 0 and n > 2f")


def chain(rows: Rows, names: Sequence[str], f: int):
    """Apply the rules from left to right. → this rank's columns of the aggregate."""
    for name in names:
        rows = RULES[name](rows, f)
    return rows.mean() if isinstance(rows, Rows) else rows
