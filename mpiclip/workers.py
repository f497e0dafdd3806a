"""What a method sees of the workers: their gradients. A function of (seed, worker, round) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any

import numpy as np

from . import ops
from .comm import Comm
from .compressors import Compressor, Message
from .device import Device, host
from .errors import InputError
from .noise import add_noise, keys
from .streams import stream

# What the ranks agree on once a round: the highest of all wishes counts.
GO, CHECKPOINT, STOP, NOT_FINITE = range(4)


@dataclass(frozen=True)
class Examples:
    """What makes single rows private: each one's gradient is clipped at C, and their mean gets the noise N(0, σ² I)."""

    clip: float         # C
    sigma: float        # σ


def spaced(offsets: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most so many rows of each worker, evenly spaced over its own, as a problem's `batch`: (rows, offsets,
    denominators)."""
    rows = [begin + np.arange(min(most, have)) * have // min(most, have) if have else np.empty(0, np.int64)
            for begin, have in zip(offsets[:-1], np.diff(offsets), strict=True)]
    sizes = np.array([len(own) for own in rows], np.int64)
    return np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate([[0], np.cumsum(sizes)]), np.maximum(
        sizes, 1).astype(np.float64)


class Workers:
    """This rank's w workers, of n. Names ending in `_i` are arrays with one row for each of them.

    problem, data   f_i: problem.loss_grad(x, data, batch)
    n               the number of workers on all ranks
    rows            (w, d), where the gradients are written: this rank's part of the server's board
    offsets         worker i's rows are offsets[i]:offsets[i+1] of this rank's rows (w+1,); None: f_i needs no rows
    batch           rows that a worker draws for a gradient, independently and uniformly from its own; None: all of them
    honest          how many of the n workers are honest (the first ones): only they have an f_i
    eval_rows       rows of each worker that an evaluation looks at, evenly spaced over its own; None: all of them
    tolerant        robust rules deal with gradients that are not finite; otherwise they stop the run
    secret          the key of the noise and of whatever else must not be guessed; empty: there is no noise
    examples        what makes single rows private; None: the messages are, or nothing is
    taking_part     how many of the n workers take part in this round; arrays `_i` then have rows for those only
    round           the number of the round, set by the loop
    wish            what this rank wishes for at the next agreement: GO, CHECKPOINT or STOP
    agreed          what all ranks agreed on in this round; NOT_FINITE: before any state had changed
    seconds         time spent in gradients so far"""

    def __init__(self, problem: Any, data: Any, offsets: np.ndarray | None, ids: np.ndarray, d: int, dtype: str,
                 device: Device, comm: Comm, rows: Any, seed: int, batch: int | None, honest: int, tolerant: bool,
                 eval_rows: int | None = None):
        self.problem, self.data, self.offsets, self.ids = problem, data, offsets, ids
        self.d, self.dtype, self.device, self.comm = d, np.dtype(dtype), device, comm
        self.seed, self.batch, self.honest, self.tolerant = seed, batch, honest, tolerant
        self.n = self.taking_part = sum(comm.all(len(ids)))
        self.secret = b""
        self.examples: Examples | None = None
        self.round, self.wish, self.agreed = 0, GO, GO
        self.seconds = 0.0
        self._rows = rows           # (w, d): where the gradients of all of them are written
        self._all_i = self._g_i = rows  # where those of this round are; and of those that take part
        self._here: Any = slice(None)   # which of this rank's workers take part in this round
        self._aside: Any = None     # (w, d), what becomes of gradients when not all take part
        self._step = 0              # calls of grad in this round
        self._noises = 0            # calls of noise in this round
        self._messages = 0          # calls of compress in this round
        self._failed = False        # a gradient of a later local step was not finite
        self._looked_i: Any = None      # (w, d), the gradients of an evaluation aside
        self._looked_at = None if eval_rows is None or offsets is None else spaced(offsets, eval_rows)
        self._known = None          # the x at which _g_i already holds the full gradients
        self._norm_i: Any = None    # of what grad returned last
        self._copies: Any = None    # what `copies` returned last
        self._purpose = "batch"     # of the random numbers that draw minibatches
        self._s: Any = None         # the state that a problem on sequences needs: carried_i and taken_i
        self._before: Any = None    # that state at the beginning of the round
        self._last: Any = None      # (x, batch) of the last call of grad
        self._flipped_i: Any = None     # (w, d), what `flipped` writes on

    # ---- for methods

    def grad(self, x):
        """∇f_i(x), (w, d), or its estimate from a minibatch. x: (d,), or (w, d) with a point for each worker. The array
        is the caller's to overwrite until the next call. In the first call of a round all ranks agree whether to go on:
        a gradient that is not finite raises InputError on all of them before any state has changed.

        Where workers are private, and rules tolerate such a gradient, zeros take its place.

        Where single rows are private: (1/B_i) Σ_r clip_C(∇ℓ_r(x)) + λ∇r(x) + N(0, σ² I), the sum over a Poisson sample
        of worker i's rows, B_i its expected size (DP-SGD: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1). Whatever a
        method makes of it is as private."""
        batch = self._draw()
        self._last = x, batch
        if x is not self._known:
            self._gradients(self._of_all(x), batch, self._all_i, clip=self.examples.clip if self.examples else None)
            if self._g_i is not self._all_i:
                self._g_i[:] = self._all_i[self._here]
        if self.secret and self.tolerant and not self.examples:
            self._hide_not_finite(x)
        if self.examples:
            add_noise(self._g_i, self.examples.sigma, self._keys("gradient", self._step))
        self._known = None
        self._step += 1
        self._norm_i = None
        bad = not self.tolerant and not isfinite(self.norms().sum())
        if self._step > 1:
            self._failed |= bad
        else:
            self.agreed = self.comm.highest(NOT_FINITE if bad else self.wish)
            if self.agreed == NOT_FINITE:
                if self._s is not None:
                    self._s.carried_i[:], self._s.taken_i[:] = self._before
                self._raise_not_finite(x)
        return self._g_i

    def norms(self):
        """‖g_i‖ of what grad returned last, if that is still there: (w,) float64, not to be written to."""
        if self._norm_i is None:
            self._norm_i = ops.norms(self._g_i)
        return self._norm_i

    def noise(self, u_i, sigma: float | None):
        """u_i + N(0, σ² I), in place: what makes messages u_i (w, d) private. σ = 0 or None adds nothing, nor is there
        anything to add where single rows are private: their gradients have had their noise. Returns u_i."""
        if sigma and not self.examples:
            add_noise(u_i, sigma, self._keys("message", self._noises))
            self._noises += 1
        return u_i

    def compress(self, u_i, compressor: Compressor) -> Message:
        """C(u_i) as it travels; u_i (w, d) is unmodified. message.add_to(v_i) does v_i += C(u_i), aggregate(message) is
        (1/n) Σ C(u_i)."""
        round, call = self.round, self._messages
        self._messages += 1
        return compressor.compress(u_i, self.ids[self._here],
                                   lambda worker: stream(self.seed, "compress", worker, round, call))

    def confirm(self) -> None:
        """Before the workers' vectors are aggregated: InputError, on all ranks, if a gradient of a later local step was
        not finite. The server's state is still that of the round before."""
        if self._step > 1 and not self.tolerant and self.comm.highest(self._failed):
            raise InputError(f"round {self.round}: a local step gave gradients that are not finite; a smaller step "
                             "size may help. The newest checkpoint is kept", agreed=True)

    def zeros(self, shape: tuple[int, ...] | None = None):
        """Zeros for each worker: (w, d), or (w, *shape); numbers, shape = (), are float64."""
        shape = (self.d,) if shape is None else shape
        return self.device.xp.zeros((len(self._g_i), *shape), self.dtype if shape else np.float64)

    def copies(self, x):
        """A copy of x (d,) for each worker, (w, d), until the next call: fresh pages cost more than what is copied."""
        if self._copies is None or len(self._copies) != len(self._g_i):
            self._copies = self.device.xp.empty((len(self._g_i), self.d), self.dtype)
        self._copies[:] = x
        return self._copies

    # ---- for the attack that is simulated

    def flipped(self):
        """What the last call of grad would have been with the labels c → C − 1 − c, (w, d)."""
        x, batch = self._last
        _, self._flipped_i = self.problem.loss_grad(x, self.problem.flipped(self.data), batch, self._flipped_i,
                                                    loss=False)
        return self._flipped_i

    # ---- for the loop

    def init(self, s: Any) -> None:
        """Declare in the state s what minibatches of sequences carry on: carried_i (w, …), and taken_i (w,), how many
        each worker has had. Raises InputError where a worker's data are too short."""
        with self.comm.agree():
            shape = self.problem.carried(self.data, self.batch)
        if shape is not None:
            s.carried_i, s.taken_i = self.zeros(shape), self.zeros(())
            self._s = s

    def begin(self, round: int, purpose: str = "batch") -> None:
        """Begin a round. purpose: of the random numbers that draw its minibatches."""
        self.round, self._step, self._noises, self._messages, self._failed = round, 0, 0, 0, False
        self._purpose = purpose

    @contextmanager
    def only(self, here: np.ndarray, taking_part: int, rows: Any) -> Iterator[None]:
        """Only some of the workers take part: of this rank's those at the places `here` of `ids`, of all so many.
        rows: (len(here), d), where their gradients are written."""
        if self._aside is None:
            self._aside = self.device.xp.zeros((len(self.ids), self.d), self.dtype)
        self._here, self.taking_part, self._g_i, self._all_i, self._known = here, taking_part, rows, self._aside, None
        try:
            yield
        finally:
            self._here, self.taking_part, self._g_i, self._all_i = slice(None), self.n, self._rows, self._rows

    def evaluate(self, x, server) -> dict[str, float]:
        """loss f(x) and grad_norm ‖∇f(x)‖ over all rows of all honest workers, or `eval_rows` of each."""
        loss, g_i = self.look(x)
        return {"loss": loss, "grad_norm": server.norm(server.mean(g_i)) * self.n / self.honest}

    def look(self, x, aside: bool = False):
        """What an evaluation begins with: the loss f(x), and of all this rank's workers ∇f_i(x), (w, d). The gradients
        of all rows are kept: a full-batch round at the same x finds them ready.

        aside: in memory of their own; a round may have begun, and the gradients stay until the next call."""
        if aside and self._looked_i is None:
            self._looked_i = self.device.xp.empty_like(self._rows)
        g_i = self._looked_i if aside and not self.keeps else self._rows
        loss_i = self._gradients(x, self._looked_at, g_i, loss=True)
        self._known = x if self.keeps else None
        if aside and self.keeps:
            self._looked_i[:] = g_i
            g_i = self._looked_i
        return float(self.comm.total(host(loss_i).sum()) / self.honest), g_i

    @property
    def keeps(self) -> bool:
        """Whether a round begins with the gradients that an evaluation at the same x has left."""
        return self.batch is None and self.examples is None and self._looked_at is None

    def first_norms(self, x) -> np.ndarray:
        """‖∇f_i(x)‖ of all honest workers, in order, on every rank: (honest,) float64."""
        self._gradients(x, None, self._g_i)
        return np.concatenate(self.comm.all(host(ops.norms(self._g_i))))[:self.honest]

    # ---- inside

    def _gradients(self, x, batch, out, loss: bool = False, clip: float | None = None):
        start = perf_counter()
        loss_i, _ = self.problem.loss_grad(x, self.data, batch, out=out, loss=loss, clip=clip)
        self.seconds += perf_counter() - start
        return loss_i

    def _hide_not_finite(self, x) -> None:
        """Zeros for gradients that are not finite: no noise would hide which worker's it is. Not where x itself, which
        all see, is not finite: then the rules say that too many are."""
        bad_i = ~self.device.xp.isfinite(ops.norms(self._g_i))
        if bad_i.any() and isfinite(ops.norms(x)):
            self._g_i[bad_i] = 0

    def _draw(self):
        """This call's minibatch, as problem.loss_grad takes it: (rows, offsets (w+1,), denominators (w,)), or what the
        problem itself makes of it; None for all rows of all workers."""
        if self._s is not None:
            return self._follow()
        if self.offsets is None or (self.batch is None and self._all_i is self._rows):
            return None
        here = np.arange(len(self.ids))[self._here]
        here = here[np.diff(self.offsets)[here] > 0]            # Byzantine workers have no rows
        if self.batch is None:
            rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in here]
        elif self.examples:
            rows = self._poisson(here, self.offsets, self.batch)
        else:
            rows = [self._uniform(i, self.offsets, self.batch) for i in here]
        sizes, expected = np.zeros(len(self.ids), np.int64), np.ones(len(self.ids))
        sizes[here] = list(map(len, rows))
        expected[here] = sizes[here] if self.batch is None else self.batch
        return np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate([[0], np.cumsum(sizes)]), expected

    def _uniform(self, i: int, offsets: np.ndarray, batch: int) -> np.ndarray:
        """So many rows of the i-th worker here, drawn independently and uniformly."""
        random = stream(self.seed, self._purpose, int(self.ids[i]), self.round, self._step)
        return self._viewed(random.integers(offsets[i], offsets[i + 1], batch), offsets, random)

    def _viewed(self, rows: np.ndarray, offsets: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Each of the rows in one of the versions that the problem has of it."""
        views = self.problem.views(self.data)
        return rows if views == 1 else rows + offsets[-1] * random.integers(0, views, len(rows))

    def _follow(self):
        """The next minibatch of sequences of those who take part. Of a round that ends before it has changed anything
        the sequences are taken back."""
        if self._step == 0:
            self._before = self._s.carried_i.copy(), self._s.taken_i.copy()
        taken = np.full(len(self.ids), -1)
        taken[self._here] = host(self._s.taken_i)[self._here]
        self._s.taken_i[self._here] += 1
        return self.problem.follow(self.data, self.batch, self.ids, taken, self._s.carried_i, self.seed)

    def _of_all(self, x):
        """x as the problem takes it: where it is (w, d), with a row for those workers, too, that do not take part."""
        if x.ndim == 1 or self._all_i is self._rows:
            return x
        x_i = self.device.xp.zeros_like(self._all_i)
        x_i[self._here] = x
        return x_i

    def _poisson(self, have: np.ndarray, offsets: np.ndarray, batch: int) -> list[np.ndarray]:
        """A Poisson sample of each of these workers' rows: every row is in it with the probability batch/m_i, whatever
        the others do. Who could guess it would gain nothing from the sampling, so it follows from the secret."""
        samples = []
        for i, key in zip(have, self._keys("sample", self._step)[have], strict=True):
            draw, m = np.random.Generator(np.random.Philox(key=key)), int(offsets[i + 1] - offsets[i])
            count = draw.binomial(m, batch / m)
            rows = offsets[i] + np.sort(draw.choice(m, count, replace=False, shuffle=False))
            samples.append(self._viewed(rows, offsets, draw))
        return samples

    def _keys(self, purpose: str, step: int) -> np.ndarray:
        """The keys of this rank's workers' noise in this round, (w, 2) uint64."""
        purpose = purpose if self._purpose == "batch" else f"{self._purpose}: {purpose}"
        return keys(self.secret, purpose, self.ids, self.round, step)

    def _raise_not_finite(self, x) -> None:
        norms = host(ops.norms(self._g_i))
        losses = host(self.problem.loss_grad(self._of_all(x), self.data, self._looked_at, loss=True)[0])[self._here]
        bad = [(int(worker), float(loss)) for worker, loss, norm in
               zip(self.ids[self._here], losses, norms, strict=True) if not isfinite(norm)]
        found = [item for rank in self.comm.all(bad) for item in rank]
        worker, loss = found[0]
        raise InputError(f"round {self.round}: the gradient of worker {worker} is not finite (its loss is {loss:g}); "
                         "a smaller step size may help, or robust rules with f ≥ 1", agreed=True)
