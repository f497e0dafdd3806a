"""What a method sees of the workers: their gradients. A function of (seed, worker, round) alone."""

from __future__ import annotations

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
        self.n = sum(comm.all(len(ids)))
        self.secret = b""
        self.examples: Examples | None = None
        self.round, self.wish, self.agreed = 0, GO, GO
        self.seconds = 0.0
        self._g_i = rows            # (w, d): where the gradients are written
        self._step = 0              # calls of grad in this round
        self._noises = 0            # calls of noise in this round
        self._messages = 0          # calls of compress in this round
        self._failed = False        # a gradient of a later local step was not finite
        self._looked_at = None if eval_rows is None or offsets is None else spaced(offsets, eval_rows)
        self._known = None          # the x at which _g_i already holds the full gradients
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
            self._gradients(x, batch, clip=self.examples.clip if self.examples else None)
        if self.secret and self.tolerant and not self.examples:
            self._hide_not_finite(x)
        if self.examples:
            add_noise(self._g_i, self.examples.sigma, self._keys("gradient", self._step))
        self._known = None
        self._step += 1
        bad = not self.tolerant and not isfinite(ops.norms(self._g_i).sum())
        if self._step > 1:
            self._failed |= bad
        else:
            self.agreed = self.comm.highest(NOT_FINITE if bad else self.wish)
            if self.agreed == NOT_FINITE:
                self._raise_not_finite(x)
        return self._g_i

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
        return compressor.compress(u_i, self.ids, lambda worker: stream(self.seed, "compress", worker, round, call))

    def confirm(self) -> None:
        """Before the workers' vectors are aggregated: InputError, on all ranks, if a gradient of a later local step was
        not finite. The server's state is still that of the round before."""
        if self._step > 1 and not self.tolerant and self.comm.highest(self._failed):
            raise InputError(f"round {self.round}: a local step gave gradients that are not finite; a smaller step "
                             "size may help. The newest checkpoint is kept", agreed=True)

    def zeros(self, shape: tuple[int, ...] | None = None):
        """Zeros for each worker: (w, d), or (w, *shape); numbers, shape = (), are float64."""
        xp = self.device.xp
        if shape is None:
            return xp.zeros((len(self.ids), self.d), self.dtype)
        return xp.zeros((len(self.ids), *shape), self.dtype if shape else np.float64)

    def copies(self, x):
        """A copy of x (d,) for each worker, (w, d)."""
        return self.device.xp.tile(x, (len(self.ids), 1))

    # ---- for the attack that is simulated

    def flipped(self):
        """What the last call of grad would have been with the labels c → C − 1 − c, (w, d)."""
        x, batch = self._last
        _, self._flipped_i = self.problem.loss_grad(x, self.problem.flipped(self.data), batch, self._flipped_i,
                                                    loss=False)
        return self._flipped_i

    # ---- for the loop

    def begin(self, round: int) -> None:
        """Begin a round."""
        self.round, self._step, self._noises, self._messages, self._failed = round, 0, 0, 0, False

    def evaluate(self, x, server) -> dict[str, float]:
        """loss f(x) and grad_norm ‖∇f(x)‖ over all rows of all honest workers, or `eval_rows` of each. The gradients of
        all rows are kept: a full-batch round at the same x finds them ready."""
        loss_i = self._gradients(x, self._looked_at, loss=True)
        mean = server.mean(self._g_i)
        kept = self.batch is None and self.examples is None and self._looked_at is None
        self._known = x if kept else None
        norm = server.norm(mean) * server.n / self.honest
        return {"loss": float(self.comm.total(host(loss_i).sum()) / self.honest), "grad_norm": norm}

    def first_norms(self, x) -> np.ndarray:
        """‖∇f_i(x)‖ of all honest workers, in order, on every rank: (honest,) float64."""
        self._gradients(x, None)
        return np.concatenate(self.comm.all(host(ops.norms(self._g_i))))[:self.honest]

    # ---- inside

    def _gradients(self, x, batch, loss: bool = False, clip: float | None = None):
        start = perf_counter()
        loss_i, _ = self.problem.loss_grad(x, self.data, batch, out=self._g_i, loss=loss, clip=clip)
        self.seconds += perf_counter() - start
        return loss_i

    def _hide_not_finite(self, x) -> None:
        """Zeros for gradients that are not finite: no noise would hide which worker's it is. Not where x itself, which
        all see, is not finite: then the rules say that too many are."""
        bad_i = ~self.device.xp.isfinite(ops.norms(self._g_i))
        if bad_i.any() and isfinite(ops.norms(x)):
            self._g_i[bad_i] = 0

    def _draw(self):
        """The rows of this call's minibatch: (rows (w·b,), offsets (w+1,), denominators (w,)); None for all rows."""
        if self.batch is None or self.offsets is None:
            return None
        have = np.flatnonzero(np.diff(self.offsets))            # Byzantine workers have no rows
        rows = self._poisson(have, self.offsets, self.batch) if self.examples else [
            stream(self.seed, "batch", int(self.ids[i]), self.round, self._step)
            .integers(self.offsets[i], self.offsets[i + 1], self.batch) for i in have]
        sizes, expected = np.zeros(len(self.ids), np.int64), np.ones(len(self.ids))
        sizes[have], expected[have] = list(map(len, rows)), self.batch
        return (np.concatenate(rows) if rows else np.empty(0, np.int64), np.concatenate([[0], np.cumsum(sizes)]),
                expected)

    def _poisson(self, have: np.ndarray, offsets: np.ndarray, batch: int) -> list[np.ndarray]:
        """A Poisson sample of each of these workers' rows: every row is in it with the probability batch/m_i, whatever
        the others do. Who could guess it would gain nothing from the sampling, so it follows from the secret."""
        samples = []
        for i, key in zip(have, self._keys("sample", self._step)[have], strict=True):
            draw, m = np.random.Generator(np.random.Philox(key=key)), int(offsets[i + 1] - offsets[i])
            count = draw.binomial(m, batch / m)
            samples.append(offsets[i] + np.sort(draw.choice(m, count, replace=False, shuffle=False)))
        return samples

    def _keys(self, purpose: str, step: int) -> np.ndarray:
        """The keys of this rank's workers' noise in this round, (w, 2) uint64."""
        return keys(self.secret, purpose, self.ids, self.round, step)

    def _raise_not_finite(self, x) -> None:
        norms = host(ops.norms(self._g_i))
        loss_i, _ = self.problem.loss_grad(x, self.data, None, loss=True)
        bad = [(int(self.ids[i]), float(host(loss_i)[i])) for i in np.flatnonzero(~np.isfinite(norms))]
        found = [item for rank in self.comm.all(bad) for item in rank]
        worker, loss = found[0]
        raise InputError(f"round {self.round}: the gradient of worker {worker} is not finite (its loss is {loss:g}); "
                         "a smaller step size may help, or robust rules with f ≥ 1", agreed=True)
