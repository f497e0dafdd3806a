"""From every worker's vector to one that all agree on: the exchange, the attack that is simulated, the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from . import attacks, columns, records
from .attacks import ATTACKS
from .comm import Comm
from .device import Device, host, xp
from .errors import InputError
from .noise import add_noise, keys
from .rows import Rows
from .rules import Chain
from .server import Server
from .streams import stream

COUNTS = ("shortened", "left_out", "replaced")      # rows that the rules clipped, did not use, and that were not finite


@dataclass
class Tally:
    """What happened to rows since the last line of metrics: sums over the rounds.

    distance: ‖x_i − aggregate‖ of each worker, (n,), where suspects are looked for"""

    rounds: int = 0
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    distance: list[float] = field(default_factory=list)

    def means(self, suspects: int = 0) -> dict[str, Any]:
        """The means a round: each of COUNTS, and suspicion (n,) of n `suspects`. NaN where there was no round."""
        rounds = self.rounds or np.nan
        means: dict[str, Any] = {name: count / rounds for name, count in self.counts.items()}
        if suspects:
            means["suspicion"] = np.array(self.distance or [np.nan] * suspects) / rounds
        return means


class Aggregation:
    """What a method calls `aggregate`: u_i (w, d), this rank's workers' vectors → the aggregate, this rank's columns
    of the server (valid until the next call).

    chain      the rules; without any: the mean
    attack     { name = …, … } as a config has it, or None
    byzantine  (n,) bool, the workers that attack
    before     called first: the last place to refuse
    flipped    the workers' gradients with flipped labels (w, d), for the attack that wants them
    suspect    keep each worker's distance to the aggregate
    tally      what happened to the rows; whoever has read it puts a new one in its place
    norm       ‖u‖ of a server vector u
    join       the whole of a server vector u, on every rank
    seconds    time spent in attack and rules so far"""

    def __init__(self, server: Server, rules: Sequence[Any] = (), f: int = 0, attack: Any = None,
                 byzantine: np.ndarray | None = None, before: Callable = lambda: None, seed: int = 0,
                 flipped: Callable | None = None, suspect: bool = False):
        self.server, self.chain = server, Chain(rules, f, server.n)
        self.byzantine = np.zeros(server.n, bool) if byzantine is None else byzantine
        self.attack = self._named(attack) if attack else None
        self.norm, self.join, self.before = server.norm, server.join, before
        self.seed, self.flipped, self.suspect = seed, flipped, suspect
        self.round, self.call = 0, 0
        self.lasting: dict[str, Any] = {}
        self.tally = Tally()
        self.seconds = 0.0

    def _named(self, attack: Any) -> tuple[str, dict[str, Any]]:
        """(name, constants) of the attack. Raises InputError, also where its own condition does not hold."""
        name, constants = records.named(ATTACKS, attack, "aggregate.attack", attacks.GIVEN)
        n, f, facts = self.server.n, int(self.byzantine.sum()), attacks.FACTS[name]
        if not facts.holds(n, f, **constants):
            said = ", ".join(f"{key} = {value}" for key, value in constants.items())
            raise InputError(f"aggregate.attack.{name}: {said}, with n = {n} workers and f = {f}; expected "
                             f"{facts.needs}")
        return name, constants

    def init(self, s: Any) -> None:
        """Declare in the state s what rules and attack remember from call to call; s may be loaded later."""
        names = list(self.chain.lasting)
        if self.attack and "memory" in attacks.FACTS[self.attack[0]].wants:
            names.append(f"attack_{self.attack[0]}")
        for name in names:
            self.lasting[name] = np.zeros_like(s.x)
            setattr(s, name, self.lasting[name])

    def begin(self, round: int) -> None:
        """Begin a round."""
        self.round, self.call = round, 0

    def __call__(self, u_i, onto=None, scale: float = 1.0):
        """The aggregate of u_i (w, d). With `onto` (n, columns), vectors that the server keeps for all n workers, what
        the workers send is added to these, onto_i += scale · u_i, and they are aggregated in its place."""
        self.before()
        if not self.chain.links and not self.attack and onto is None:
            return self.server.mean(u_i)
        rows = self.server.rows(u_i)
        start, exchanged = perf_counter(), self.server.comm.seconds
        rows, replaced = self._received(rows, onto, scale)
        result = self.chain(rows, self._random, self.lasting.__getitem__)
        self._note(rows, result, replaced)
        self.server.release()
        self.call += 1
        self.seconds += perf_counter() - start - (self.server.comm.seconds - exchanged)
        return result

    def _received(self, rows: Rows, onto, scale: float) -> tuple[Rows, np.ndarray]:
        """What the rules see: finite rows, those of the Byzantine workers as the attack makes them, added to `onto`;
        and which of them were not finite, (n,) bool."""
        f = self.chain.f if self.chain.links else 0         # a mean tolerates none
        checked = partial(without_non_finite, f=f, where=f"round {self.round}: ")
        if self.attack:                     # what Byzantine workers would have sent is nobody's business
            last = np.flatnonzero(~self.byzantine)[-1] + 1
            rows = Rows(rows.X[:last], rows.total, np.diag(~self.byzantine * 1.0)[:, :last])
        elif onto is None:
            self.chain.look(rows, self.lasting.__getitem__)
        rows, bad = checked(rows)
        if self.attack:
            name, constants = self.attack
            if f"attack_{name}" in self.lasting:
                constants = constants | {"memory": self.lasting[f"attack_{name}"]}
            scene = Scene(self, onto, scale)
            rows, bad = checked(ATTACKS[name](rows, self.byzantine, scene, **constants), before=bad)
        if onto is not None:
            for kept, w in zip(onto, np.eye(rows.n), strict=True):
                sent = rows.combine(w)
                sent *= sent.dtype.type(scale)              # no third array: pages cost more than sums
                kept += sent
            rows = Rows(onto, rows.total)
            self.chain.look(rows, self.lasting.__getitem__)
            rows, bad = checked(rows, before=bad)
        return rows, bad

    def _random(self) -> np.random.Generator:
        return stream(self.seed, "rules", round=self.round, step=self.call)

    def _note(self, rows: Rows, result, replaced: np.ndarray) -> None:
        """What was done to the rows, and how far each is from the result: infinitely, where it was not finite."""
        tally = self.tally
        tally.rounds += self.call == 0
        tally.counts["replaced"] += int(replaced.sum())
        for name, count in rows.counts.items():
            tally.counts[name] += count
        if self.suspect:
            distance = np.where(replaced, np.inf, np.sqrt(rows.distances_to(result)))
            tally.distance = (distance + tally.distance if tally.distance else distance).tolist()


class Scene:
    """mpiclip.attacks.Scene, of one call of an aggregation."""

    def __init__(self, aggregation: Aggregation, onto=None, scale: float = 1.0):
        self._of, self._onto, self._scale = aggregation, onto, scale
        self._ideal: Any = None                             # the honest workers' mean, as the rules see them
        self.round = aggregation.round

    def harm(self, rows: Rows) -> float:
        """‖F(rows) − the honest workers' mean‖₂ if these rows are sent, F being the rules in use: the same on every
        rank. Nothing is remembered or counted."""
        n = rows.n
        if self._onto is not None:
            rows = rows.append(*self._onto).mix(np.hstack([self._scale * np.eye(n), np.eye(n)]))
        rows, _ = without_non_finite(rows.uncounted(), n)
        result = self._of.chain(rows, self._of._random, lambda name: self._of.lasting[name].copy())
        if self._ideal is None:
            self._ideal = rows.combine(attacks.honest_mean(self._of.byzantine))
        return self._of.norm(result - self._ideal)

    def normal(self):
        """A vector of N(0, 1) numbers, a function of the run's seed and the round."""
        server = self._of.server
        whole = np.zeros((1, server.d), server.dtype)
        secret = f"attack {self._of.seed}".encode()
        return server.device.put(add_noise(whole, 1.0, keys(secret, "attack", [0], self.round, self._of.call))[0][
            server.own])

    def flipped(self):
        """The mean of the honest workers' gradients, of the same minibatches, with the labels c → C − 1 − c."""
        assert self._of.flipped is not None
        server = self._of.server
        g_i = self._of.flipped()                            # of Byzantine workers zeros, they have no data
        mine = host(columns.combine(g_i, np.ones(len(g_i))))
        total = server.comm.total(mine)[server.own] / (~self._of.byzantine).sum()
        return server.device.put(total.astype(server.dtype))


def without_non_finite(rows: Rows, f: int, before: np.ndarray | None = None,
                       where: str = "") -> tuple[Rows, np.ndarray]:
    """The rows with those that are not finite replaced by zeros, and which these are, (n,) bool: each counts as one of
    the f, and so do those that were replaced `before`. Raises InputError, on every rank, if there are more than f; it
    begins with `where`."""
    found = ~rows.finite()
    bad = found if before is None else found | before
    if bad.sum() > f:
        workers = ", ".join(map(str, np.flatnonzero(bad)))
        raise InputError(f"{where}the vectors of workers {workers} are not finite, more than "
                         f"{f'aggregate.f = {f}' if f else 'a mean, or aggregate.f = 0,'} tolerates", agreed=True)
    return rows.without(found), bad


def aggregate(X, rules: Sequence[Any], f: int = 0, comm=None, seed: int = 0, memory: dict | None = None):
    """Robust aggregation of n vectors in one process, or of those of all ranks.

    X: (n, d) NumPy or CuPy array of floats, never modified; with `comm`, an mpi4py communicator, this rank's rows
    only. rules: names of mpiclip.rules.RULES, or dicts with a name and constants, applied from left to right. f: how
    many rows may be anything. seed: of the rules that draw lots. memory: what rules with a memory keep from call to
    call: a dict, empty at first and handed in again; None: they remember nothing. Returns (d,), with `comm` the same on
    every rank. Raises InputError unless n > 2f and each rule's own condition holds, and if more than f rows are not
    finite.

    >>> aggregate(np.array([[1., 2.], [3., 4.], [5., 600.]]), ["arc", "trimmed_mean"], f=1)
    array([1., 4.])
    """
    if X.ndim != 2 or X.dtype.kind != "f":
        raise InputError(f"X: an array of {X.dtype} with shape {X.shape}; expected floats (n, d)")
    ranks = Comm(comm)
    n = sum(ranks.all(len(X)))
    with ranks.agree():
        chain = Chain(rules, f, n)
    server = None
    if ranks.size > 1:
        device = Device("cpu") if xp(X) is np else Device("cuda", X.device.id)
        server = Server(ranks, X.shape[1], n, len(X), device, X.dtype, means_only=False)
    rows = server.rows(X) if server else Rows(X)
    memory = {} if memory is None else memory
    for name in chain.lasting:
        memory.setdefault(name, xp(X).zeros_like(rows.X[0]))
    chain.look(rows, memory.__getitem__)
    rows, _ = without_non_finite(rows, f)
    result = chain(rows, lambda: stream(seed, "rules"), memory.__getitem__)
    return server.join(result).copy() if server else result
