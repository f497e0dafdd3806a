"""From every worker's vector to one that all agree on: the exchange, the attack that is simulated, the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import numpy as np

from . import rules
from .comm import Comm
from .device import Device, xp
from .errors import InputError
from .rows import Rows
from .server import Server


class Aggregation:
    """What a method calls `aggregate`: u_i (w, d), this rank's workers' vectors → the aggregate, this rank's columns
    of the server (valid until the next call).

    names      the chain of rules; none: the mean
    f          the number of workers that the rules tolerate
    attack     (rows, byzantine) → rows, or None
    byzantine  (n,) bool, the workers that attack
    before     called first: the last place to refuse
    norm       ‖u‖ of a server vector u
    replaced   how many non-finite vectors were replaced by zeros in the last call
    seconds    time spent in attack and rules so far"""

    def __init__(self, server: Server, names: Sequence[str] = (), f: int = 0, attack: Callable | None = None,
                 byzantine: np.ndarray | None = None, before: Callable = lambda: None):
        rules.check(names, f, server.n)
        self.server, self.names, self.f = server, names, f
        self.attack = partial(attack, byzantine=byzantine) if attack else None
        self.norm, self.before = server.norm, before
        self.replaced = 0
        self.seconds = 0.0

    def __call__(self, u_i):
        self.before()
        if not self.names and not self.attack:
            return self.server.mean(u_i)
        rows = self.server.rows(u_i)
        start, exchanged = perf_counter(), self.server.comm.seconds
        rows, self.replaced = without_non_finite(rows, self.f)
        if self.attack:
            rows, more = without_non_finite(self.attack(rows), self.f)
            self.replaced += more
        result = rules.chain(rows, self.names, self.f)
        self.server.release()
        self.seconds += perf_counter() - start - (self.server.comm.seconds - exchanged)
        return result


def without_non_finite(rows: Rows, f: int) -> tuple[Rows, int]:
    """The rows with those that are not finite replaced by zeros, and their number: each counts as one of the f.
    Raises InputError, on every rank, if there are more than f."""
    bad = ~rows.finite()
    if bad.sum() > f:
        raise InputError(f"the vectors of workers {', '.join(map(str, np.flatnonzero(bad)))} are not finite, more than "
                         f"aggregate.f = {f} tolerates", agreed=True)
    return (rows.replace(bad, 0) if bad.any() else rows), int(bad.sum())


def aggregate(X, names: Sequence[str], f: int = 0, comm=None):
    """Robust aggregation of n vectors in one process, or of those of all ranks.

    X: (n, d) NumPy or CuPy array of floats, never modified; with `comm`, an mpi4py communicator, this rank's rows
    only. names: the rules (mpiclip.rules.RULES), applied from left to right. f: how many rows may be anything. Returns
    (d,), with `comm` the same on every rank. Raises InputError unless n > 2f, and if more than f rows are not finite.

    >>> aggregate(np.array([[1., 2.], [3., 4.], [5., 600.]]), ["arc", "trimmed_mean"], f=1)
    array([3., 4.])
    """
    if X.ndim != 2 or X.dtype.kind != "f":
        raise InputError(f"X: an array of {X.dtype} with shape {X.shape}; expected floats (n, d)")
    ranks = Comm(comm)
    if ranks.size == 1:
        rules.check(names, f, len(X))
        return rules.chain(without_non_finite(Rows(X), f)[0], names, f)
    device = Device("cpu") if xp(X) is np else Device("cuda", X.device.id)
    hosted = ranks.all(len(X))
    with ranks.agree():
        rules.check(names, f, sum(hosted))
    server = Server(ranks, X.shape[1], sum(hosted), len(X), device, X.dtype, means_only=False)
    return server.join(Aggregation(server, names, f)(X)).copy()


