"""Rows: n vectors of d coordinates, of which this rank holds some columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from . import columns, ops
from .device import host, xp

TINY = np.finfo(np.float64).tiny
HUGE = 16               # times the median length
FAR = 4                 # times the median length
LONGEST = 1e150         # a longer row counts as not finite: squared distances of any two others are numbers


class Rows:
    """n vectors x_1 … x_n ∈ R^d as the rows of a matrix, split by columns over the ranks.

    Rules that look at whole vectors need norms and inner products, tiny sums over all the columns, and answer with a
    mixing matrix W; `mix` only notes it. The data are touched once, at the end, by `combine` or `coordinates`. The rows
    are W B: the basis B has the rows of X, and below them those of E.

    X       this rank's (·, columns) array; never written to
    total   sums a small float64 array over the ranks that hold the other columns (default: this rank has them all)
    W       (n, rows of B) float64; None is the identity
    E       (·, columns), what `append` put below X; None: nothing
    counts  what rules did to how many rows, for the metrics; all mixtures of these rows share it"""

    def __init__(self, X, total: Callable = np.asarray, W: np.ndarray | None = None, E=None,
                 known: dict | None = None, counts: Counter | None = None):
        self.X, self.total, self.W, self.E = X, total, W, E
        self._known = {} if known is None else known            # what was computed of B: all its mixtures share this
        self.counts: Counter = Counter() if counts is None else counts

    @property
    def n(self) -> int:
        """The number of vectors."""
        return len(self.X) if self.W is None else len(self.W)

    def mix(self, W: np.ndarray) -> Rows:
        """The rows W X: row i becomes Σ_j W_ij x_j. W: (m, n); costs O(m n²), not d."""
        return Rows(self.X, self.total, W if self.W is None else W @ self.W, self.E, self._known, self.counts)

    def append(self, *vectors) -> Rows:
        """These rows, and below them vectors (columns,) that are no mixtures of them. X is not copied."""
        new = xp(self.X).stack(vectors).astype(self.X.dtype, copy=False)
        W = np.eye(self.n) if self.W is None else self.W
        m, (n, b) = len(new), W.shape
        W = np.block([[W, np.zeros((n, m))], [np.zeros((m, b)), np.eye(m)]])
        E = new if self.E is None else xp(new).concatenate([self.E, new])
        known = {"lengths": np.append(self._lengths(), np.sqrt(self.total(_squares(new))))}
        return Rows(self.X, self.total, W, E, known, self.counts)

    def uncounted(self) -> Rows:
        """The same rows, with counts of their own."""
        return Rows(self.X, self.total, self.W, self.E, self._known)

    def norms(self) -> np.ndarray:
        """‖x_i‖₂, (n,) float64; the same bytes on every rank."""
        if self.W is None:
            return self._lengths()
        W, G = self._in_basis()
        return np.sqrt(np.maximum(((W @ G) * W).sum(1), 0))

    def gram(self) -> np.ndarray:
        """⟨x_i, x_j⟩, (n, n) float64; the same bytes on every rank."""
        W, G = self._in_basis()
        return W @ G @ W.T

    def distances(self) -> np.ndarray:
        """‖x_i − x_j‖₂², (n, n) float64. The mean has been taken off before any product, so that nothing cancels when
        the vectors are close together and far from zero."""
        W, G = self._in_basis()
        W = W - np.median(W, axis=0)            # what most rows have in common goes: the mean, but nothing huge
        M = W @ G @ W.T
        square = np.diag(M)
        D = np.maximum(square[:, None] + square[None, :] - 2 * M, 0)
        np.fill_diagonal(D, 0)
        return D

    def columns(self):
        """The rows, this rank's columns (n, columns); a new array, unless nothing was mixed."""
        if self.W is None:
            return self.X
        W, lengths = self.W, self._known.get("lengths")
        if lengths is not None:             # what most rows have in common is added up once, if it is nothing huge
            common = np.where(lengths <= HUGE * np.median(lengths), np.median(W, axis=0), 0)
            if 2 * np.count_nonzero(W - common) < np.count_nonzero(W):
                return columns.mixed(self.X, W - common, self.E, common)
        return columns.mixed(self.X, W, self.E)

    def combine(self, w: np.ndarray):
        """Σ_i w_i x_i, (columns,). w: (n,) float64."""
        return columns.combine(self.X, np.asarray(w, np.float64) if self.W is None else w @ self.W, self.E)

    def mean(self):
        """The mean of the rows, (columns,)."""
        known = self._looked_at(None)
        return self.combine(np.full(self.n, 1 / self.n)) if known is None else known

    def coordinates(self, rule: Callable, *constants):
        """A rule that works coordinate by coordinate (one of mpiclip.columns), on this rank's columns. → (columns,)"""
        same = self.W is not None and self.E is None and np.array_equal(self.W, np.eye(len(self.X)))
        return rule(self.X, *constants, E=self.E, W=None if same else self.W)

    def distances_to(self, vector) -> np.ndarray:
        """‖x_i − v‖₂², (n,) float64, of a vector of which this rank has its columns, or of the row of that number."""
        known = self._looked_at(vector)
        if known is not None:
            return known
        if isinstance(vector, int):
            vector = self.X[vector] if self.W is None else self.combine(np.eye(self.n)[vector])
        return self.total(columns.distances(self.X, vector, E=self.E, W=self.W))

    def finite(self) -> np.ndarray:
        """Which rows are finite, and no longer than LONGEST: (n,) bool, the same on every rank."""
        if self._all_finite():
            return np.ones(self.n, bool)
        lengths, dtype = self._lengths(), self.X.dtype
        fine = lengths < LONGEST
        if self.W is None:
            return fine
        with np.errstate(over="ignore", invalid="ignore"):
            good = np.isfinite(self.W.astype(dtype)).all(1) & ~((self.W != 0) & ~fine).any(1)
            most = np.abs(self.W[good]) @ np.where(fine, lengths, 0)        # no row is longer
            for i in np.flatnonzero(good)[~(most < min(np.finfo(dtype).max, LONGEST))]:
                row = self.combine(np.eye(self.n)[i])                       # rare: only the sum itself can tell
                good[i] = self.total(_squares(row[None]))[0] < LONGEST**2
        return good

    def without(self, bad: np.ndarray) -> Rows:
        """The rows with zeros for those that `bad` (n,) bool marks; and with no vector in the basis that is not finite,
        unless a row that is not marked uses it."""
        if self._all_finite() and not bad.any():
            return self
        finite, m = np.isfinite(self._lengths()), len(self.X)
        W = self.W if self.W is None or not bad.any() else np.where(bad[:, None], 0, self.W)
        keep = (finite & ~bad) if W is None else finite | (W != 0).any(0)
        if keep.all():
            return Rows(self.X, self.total, W, self.E, self._known, self.counts)
        X = self.X if keep[:m].all() else xp(self.X).where(xp(self.X).asarray(keep[:m])[:, None], self.X, 0)
        E = self.E if keep[m:].all() else xp(self.X).where(xp(self.X).asarray(keep[m:])[:, None], self.E, 0)
        known = {"lengths": np.where(keep, self._lengths(), 0)}
        return Rows(X, self.total, W, E, known, self.counts)

    def measure(self) -> None:
        """Norms and inner products in one pass over the data, for rules that will want the latter, unless rows are huge
        or not finite. Norms are then as right as the Gram matrix: of float32 rows to 1e-6, and 1e-7 is usual."""
        if self.W is not None or self._known:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            one, G = np.ones(self.n), self.total(columns.gram(self.X))
            squares = np.diag(G)[:-1] + 2 * G[:-1, -1] + G[-1, -1]
        # Long rows do no harm, but a mean that they have drawn far away, beside which the others are short, would.
        if (squares > 0).all() and squares.max() <= LONGEST**2 and G[-1, -1] <= FAR**2 * np.median(squares):
            self._known |= {"lengths": np.sqrt(squares), "basis": (one, one, G)}

    def look(self, vector=None) -> None:
        """The rows' mean, or their distances to a vector (as `distances_to` takes it), computed before it is known
        whether all rows are finite, and kept for who asks for it first: of float32 rows it is finite if and only if
        they are, for in float64 no such sum is too large."""
        if self.W is not None or self._known or self.X.dtype != np.float32:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            result = self.mean() if vector is None else self.distances_to(vector)
            finite = np.isfinite(self.total(_squares(result[None])) if vector is None else result).all()
        if finite:
            self._known |= {"finite": True, "looked": (vector, result)}

    def _looked_at(self, vector):
        """What `look` has kept of this very vector, once; or None."""
        if self.W is None and "looked" in self._known and self._known["looked"][0] is vector:
            return self._known.pop("looked")[1]
        return None

    def _all_finite(self) -> bool:
        """Whether that is known already, of rows that were not mixed."""
        return self.W is None and "finite" in self._known

    def _lengths(self) -> np.ndarray:
        """The norms of the rows of B, computed once, whatever has been mixed since."""
        if "lengths" not in self._known:
            squares = _squares(self.X)
            if self.E is not None:
                squares = np.concatenate([squares, _squares(self.E)])
            self._known["lengths"] = np.sqrt(self.total(squares))
        return self._known["lengths"]

    def _in_basis(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows as W · Z, and the Gram matrix of Z = (z_1, …, z_b, ȳ), where z_j = y_j − ȳ, y_j = s_j b_j and ȳ is
        the mean of X's y_j: rows much longer than the median are shortened to about that, so that a huge one does not
        blur what the others differ in. The s_j are powers of 2, which round nothing. An appended vector that is nearer
        to 0 than to ȳ (a direction, not another point) stays as it is: z_j = y_j."""
        if "basis" not in self._known:
            norm, m = self._lengths(), len(self.X)
            usual = np.median(norm[:m])
            huge = (norm > HUGE * usual) & (usual > 0)
            s = np.where(huge, np.exp2(np.floor(np.log2(max(usual, TINY) / np.where(huge, norm, 1)))), 1.0)
            c = np.full(len(s), float(usual > 0))       # where most rows are 0, so is what they have in common
            if self.E is not None and usual > 0:
                mean = columns.combine(self.X, s[:m] / m)
                E = self.E * xp(self.X).asarray(s[m:], self.X.dtype)[:, None]
                c[m:] = self.total(columns.distances(E, mean)) < (s[m:] * norm[m:]) ** 2
            self._known["basis"] = s, c, self.total(columns.gram(self.X, self.E, s, c))
        s, c, gram = self._known["basis"]
        W = (np.eye(len(s)) if self.W is None else self.W) / s
        return np.hstack([W, (W @ c)[:, None]]), gram


def _squares(X) -> np.ndarray:
    """‖x_i‖² of this rank's columns, (rows,) float64."""
    norms = (host(ops.norms(X)) if X.flags.c_contiguous else
             np.array([float(ops.norms(row)) for row in X]))        # each row is dense, and the kernel knows it
    with np.errstate(over="ignore"):
        return norms ** 2
