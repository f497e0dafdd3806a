"""Rows: n vectors of d coordinates, of which this rank holds some columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .device import host, xp

TINY = np.finfo(np.float64).tiny
BLOCK = 8000        # columns worked on at a time: they stay in cache, and a row's stride is no multiple of a page


class Rows:
    """n vectors x_1 … x_n ∈ R^d as the rows of a matrix X, split by columns over the ranks.

    Rules that look at whole vectors need norms and inner products, tiny sums over all the columns, and answer with a
    mixing matrix W; `mix` only notes it. The data are touched once, at the end, by `columns` or `coordinates`.

    X      this rank's (n, columns) array; never written to
    total  sums a small float64 array over the ranks that hold the other columns (default: this rank has them all)"""

    def __init__(self, X, total: Callable = np.asarray, W: np.ndarray | None = None, known: dict | None = None):
        self.X, self.total = X, total
        self.W = W                                              # (n, rows of X); None is the identity
        self._known = {} if known is None else known            # what was computed of X: all mixtures of it share this

    @property
    def n(self) -> int:
        """The number of vectors."""
        return len(self.X) if self.W is None else len(self.W)

    def mix(self, W: np.ndarray) -> Rows:
        """The rows W X: row i becomes Σ_j W_ij x_j. W: (m, n); costs O(m n²), not d."""
        return Rows(self.X, self.total, W if self.W is None else W @ self.W, self._known)

    def replace(self, row: np.ndarray, vector) -> Rows:
        """The rows with those that `row` (n,) marks replaced by one vector (columns,) that is no mixture of them."""
        X = self.columns(copy=True)
        X[row] = vector
        return Rows(X, self.total)

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
        W = W - W[np.abs(W).sum(1).argmin()]    # what all rows have in common goes; that row is no huge one
        M = W @ G @ W.T
        square = np.diag(M)
        D = np.maximum(square[:, None] + square[None, :] - 2 * M, 0)
        np.fill_diagonal(D, 0)
        return D

    def columns(self, copy: bool = False):
        """W X, this rank's columns (n, columns)."""
        if self.W is None:
            return self.X.copy() if copy else self.X
        return xp(self.X).asarray(self.W, self.X.dtype) @ self.X

    def coordinates(self, rule: Callable):
        """rule: (n, b) → (b,), applied to this rank's columns, a block that stays in cache at a time. → (columns,)"""
        W = None if self.W is None else xp(self.X).asarray(self.W, self.X.dtype)
        result = xp(self.X).empty(self.X.shape[1], self.X.dtype)
        for start in range(0, self.X.shape[1], BLOCK):
            block = self.X[:, start:start + BLOCK]
            result[start:start + BLOCK] = rule(block if W is None else W @ block)
        return result

    def mean(self):
        """The mean of the rows, (columns,)."""
        weights = np.full(self.n, 1 / self.n) if self.W is None else self.W.mean(0)
        return xp(self.X).asarray(weights, self.X.dtype) @ self.X

    def finite(self) -> np.ndarray:
        """Which rows are finite, squared norm included: (n,) bool, the same on every rank."""
        return np.isfinite(self.norms())

    def _lengths(self) -> np.ndarray:
        """The norms of the rows of X, computed once, whatever has been mixed since."""
        if "lengths" not in self._known:
            self._known["lengths"] = np.sqrt(self.total(self._squares()))
        return self._known["lengths"]

    def _squares(self) -> np.ndarray:
        """Σ_j x_ij² over this rank's columns, in float64."""
        squares = np.zeros(len(self.X))
        for start in range(0, self.X.shape[1], BLOCK):
            block = self.X[:, start:start + BLOCK].astype(np.float64)
            squares += host(xp(block).einsum("ij,ij->i", block, block))
        return squares

    def _in_basis(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows as W · B, and the Gram matrix of B = (y_1 − ȳ, …, y_n − ȳ, ȳ), where y_i = s_i x_i: rows much longer
        than the median are shortened to about that, so that a huge one does not blur what the others differ in. The s_i
        are powers of 2, which round nothing."""
        if "basis" not in self._known:
            norm = self._lengths()
            usual = np.median(norm)
            huge = (norm > 16 * usual) & (usual > 0)
            s = np.where(huge, np.exp2(np.floor(np.log2(max(usual, TINY) / np.where(huge, norm, 1)))), 1.0)
            self._known["basis"] = s, self._centred_gram(s)
        s, gram = self._known["basis"]
        W = (np.eye(len(s)) if self.W is None else self.W) / s
        return np.hstack([W, W.sum(1, keepdims=True)]), gram

    def _centred_gram(self, s: np.ndarray) -> np.ndarray:
        """Inner products of the s_i x_i less their mean, and of the mean: (n+1, n+1) float64, summed over the ranks."""
        m = len(self.X)
        gram = np.zeros((m + 1, m + 1))
        for start in range(0, self.X.shape[1], BLOCK):
            block = self.X[:, start:start + BLOCK].astype(np.float64) * xp(self.X).asarray(s)[:, None]
            mean = block.mean(0)
            basis = xp(block).vstack([block - mean, mean])
            gram += host(basis @ basis.T)
        return self.total(gram)
