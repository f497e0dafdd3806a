"""What linear, logistic and softmax regression have in common: f_i is a mean over rows of a function of scores, and
scores are linear in x. All of a rank's workers at once."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from ..device import accelerated, host, xp
from ..errors import InputError
from . import Problem, load

PART = 4096         # as in kernels/glm.c: rows whose margins stay in the first-level cache


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of w workers, one worker after the other."""

    a: Any                      # (m, q) dense, or data.Csr: the p features and, for an intercept, a column of ones
    y: Any                      # (m,) labels, as the problem's `link` wants them
    offsets: np.ndarray         # (w+1,) int64: worker i's rows are offsets[i]:offsets[i+1]
    features: int               # p: so many columns, the first ones, are regularised
    outputs: int                # C: scores of a row; x is a (C, q) matrix, flattened
    ones: bool                  # CSR in which every value is 1

    @cached_property
    def bounds(self) -> np.ndarray:
        """offsets on the host, fetched once"""
        return host(self.offsets)

    @cached_property
    def denominators(self) -> np.ndarray:
        """(w,) float64: each worker's number of rows, or 1."""
        return np.maximum(np.diff(self.bounds), 1).astype(np.float64)

    @cached_property
    def lengths(self):
        """‖a_r‖ (m,) of each row, with the dtype of the rows."""
        if is_sparse(self.a):           # on the host: a GPU's bincount adds in any order
            row = np.repeat(np.arange(len(self.y)), np.diff(host(self.a.indptr)))
            total = np.bincount(row, np.square(host(self.a.data).astype(np.float64)), len(self.y))
        else:
            total = xp(self.y).empty(len(self.y))
            for k in range(0, len(total), PART):
                total[k:k + PART] = squares(self.a[k:k + PART].astype(np.float64))
        return xp(self.y).asarray(np.sqrt(total), self.y.dtype)

    @cached_property
    def by_column(self) -> tuple[Any, ...] | None:
        """The sparse rows once more, for the C kernel: cut into parts of at most PART rows of one worker, evenly, and
        each part sorted by column. Where all values are 1, a column that more than half of the rows have is the list of
        those that do not. (row within the part (entries,) uint16; values (entries,), None: all are 1; where column j of
        part k starts, at k q + j, (parts·q + 1,) int64; which columns are such lists, (parts·q,) bool). None for dense
        rows, and where columns are too empty to be worth it."""
        if not is_sparse(self.a):
            return None
        q, starts = self.a.shape[1], [0]
        for begin, end in pairwise(self.bounds.tolist()):
            parts = max(1, -(-(end - begin) // PART))
            starts += [begin + (end - begin) * (k + 1) // parts for k in range(parts)]
        if len(self.a.indices) < 4 * q * (len(starts) - 1):
            return None
        sorted_parts = [self._sorted_by_column(first, last) for first, last in pairwise(starts)]
        rows, values, counts, absent = map(np.concatenate, zip(*sorted_parts, strict=True))
        return rows, None if self.ones else values, np.concatenate([[0], np.cumsum(counts)]), absent

    def _sorted_by_column(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """(row, value, entries of each column, whether these are the absent ones) of the rows first … last − 1."""
        q, n, indptr = self.a.shape[1], last - first, self.a.indptr[first:last + 1]
        column, value = (v[indptr[0]:indptr[-1]] for v in (self.a.indices, self.a.data))
        row = np.repeat(np.arange(n, dtype=np.uint16), np.diff(indptr))
        count = np.bincount(column, minlength=q)
        absent = count > n // 2 if self.ones else np.zeros(q, bool)
        if absent.any():
            number = np.cumsum(absent) - 1
            present, often = np.zeros((number[-1] + 1, n), bool), absent[column]
            present[number[column[often]], row[often]] = True
            missing, missing_row = np.nonzero(~present)
            column = np.concatenate([column[~often], np.flatnonzero(absent)[missing]])
            row = np.concatenate([row[~often], missing_row.astype(np.uint16)])
            value = np.ones(len(row), value.dtype)
            count = np.bincount(column, minlength=q)
        order = np.argsort(column, kind="stable")
        return row[order], value[order], count.astype(np.int64), absent

    @cached_property
    def unlabelled(self) -> Rows:
        """The same rows with the labels 0."""
        return self._labelled(xp(self.y).zeros_like(self.y))

    @cached_property
    def flipped(self) -> Rows:
        """The same rows with the labels of classes c the other way round, C − 1 − c; or −b where there is one score."""
        return self._labelled(-self.y if self.outputs == 1 else self.outputs - 1 - self.y)

    def _labelled(self, y) -> Rows:
        """The same rows, and what has been made of them, with these labels."""
        rows = copy.copy(self)
        object.__setattr__(rows, "y", y)
        return rows

    @cached_property
    def matrix(self):
        """a as `scores` and `combine` want it."""
        return matrix(self.a, self.bounds)


class LinearModel(Problem):
    """f_i(x) = (1/m_i) Σ_r ℓ(z_r, b_r) + λ r(x), over worker i's m_i rows (a_r, b_r). The scores z_r = x a_r are C
    numbers, x is a (C, p) matrix, flattened. intercept: every a_r gets one more element, its last, which is 1; x's
    coordinates for it are not regularised."""

    intercept: bool = False

    def labels(self, shard: Any) -> tuple[np.ndarray, int]:
        """(the labels (m,) as `link` wants them, C)"""
        raise NotImplementedError

    def link(self, z, y) -> tuple[Any, Any]:
        """(ℓ(z, y) (m,), ∂ℓ/∂z (m, C)) of scores z (m, C)"""
        raise NotImplementedError

    def curvature(self, z):
        """The product (m, C) of a bound of the Hessian ∂²ℓ/∂z², from above and for all scores, with z (m, C)"""
        raise NotImplementedError

    def prepare(self, shard, ids, n, seed, dtype):
        if shard is None:
            raise no_data(self)
        y, outputs = self.labels(shard)
        a = contiguous(with_intercept(shard.x) if self.intercept else shard.x, dtype)
        ones = is_sparse(a) and bool((a.data == 1).all())
        return Rows(a, y.astype(dtype), np.asarray(shard.offsets, np.int64), shard.features, outputs, ones)

    def x0(self, data, seed, dtype):
        return np.full(data.outputs * data.a.shape[1], self.start, dtype)

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        return linear_model(x, data, self, batch, out, loss, None if clip == inf else clip)

    def smoothness_product(self, u_i, data):
        if data.outputs == 1:       # c Aᵀ A u / m is c times a gradient of least squares: at u, with the labels 0
            _, product = linear_model(u_i, data.unlabelled, load("linear")(), loss=False)
            product *= self.curvature(1)
        else:
            product = xp(u_i).empty_like(u_i)
            u, h = (v.reshape(len(u_i), data.outputs, -1) for v in (u_i, product))
            z = scores(data.matrix, u, data.bounds)
            combine(data.matrix, self.curvature(z) / per_row(data.denominators, data.bounds, z), data.bounds, h)
        h = product.reshape(len(u_i), data.outputs, -1)[..., :data.features]
        u = u_i.reshape(len(u_i), data.outputs, -1)[..., :data.features]
        curvature = self.regularizer_curvature * (np.diff(data.bounds) > 0)
        h += xp(u).asarray(curvature, u.dtype)[:, None, None] * u
        return product


@accelerated
def linear_model(x, data: Rows, problem: LinearModel, batch=None, out=None, loss: bool = True, clip=None):
    """LinearModel.loss_grad; clip: finite or None. Row r's gradient is slopes_r a_rᵀ, its norm ‖slopes_r‖ ‖a_r‖."""
    owners = np.diff(data.bounds) > 0
    a, y, rows = data.matrix, data.y, slice(None)
    if batch is None:
        offsets, denominators = data.bounds, data.denominators
    else:
        rows = xp(x).asarray(batch[0])
        a, y, offsets, denominators = a[rows], y[rows], host(batch[1]), host(batch[2])
    grad = xp(x).empty((len(owners), x.shape[-1]), x.dtype) if out is None else out
    x = x.reshape(*x.shape[:-1], data.outputs, -1)                          # (C, q), or (w, C, q)
    g = grad.reshape(len(owners), data.outputs, -1)

    z = scores(a, x, offsets)
    values, slopes = problem.link(z, y)
    slopes = slopes / per_row(denominators, offsets, z)
    if clip is not None:
        slopes *= shrinkage(norms(slopes) * data.lengths[rows, None], per_row(clip / denominators, offsets, z))
    combine(a, slopes, offsets, g)
    losses = sums(values, offsets) / xp(x).asarray(np.where(np.diff(offsets), denominators, 1)) if loss else None
    penalised = np.s_[..., :data.features]
    problem.regularize(x[penalised] if x.ndim == 3 else x[None][penalised], g[penalised], losses, owners)
    return losses, grad


# Linear algebra on rows, worker after worker as in offsets (w+1,). a: (m, q) dense; or sparse, (m, w q), where worker
# i's rows have the columns i q … i q + q − 1: products with it, and with its transpose, keep the workers apart.

def matrix(a, offsets):
    """a (m, q), dense or data.Csr, as the functions below want it; a sparse one becomes a matrix of SciPy or CuPy."""
    if not is_sparse(a):
        return a
    sparse = importlib.import_module("scipy.sparse" if xp(a.data) is np else "cupyx.scipy.sparse")
    ends = a.indptr[xp(a.data).asarray(offsets[1:])]
    owner = xp(a.data).searchsorted(ends, xp(a.data).arange(len(a.data)), side="right")
    (m, q), w = a.shape, len(offsets) - 1
    return sparse.csr_matrix((a.data, a.indices + owner * q, a.indptr), shape=(m, w * q))


def scores(a, x, offsets):
    """z_r = x_i a_r for the rows r of worker i, (m, C). x: (C, q), or (w, C, q) with a matrix for each worker."""
    w, (C, q) = len(offsets) - 1, x.shape[-2:]
    if is_sparse(a):
        return a @ xp(x).broadcast_to(x, (w, C, q)).transpose(0, 2, 1).reshape(w * q, C)
    if x.ndim == 2:
        return a @ x.T
    z = xp(x).empty((len(a), C), x.dtype)
    for workers, rows, shape in blocks(offsets):
        z[rows] = (a[rows].reshape(*shape, q) @ x[workers].transpose(0, 2, 1)).reshape(-1, C)
    return z


def decisions(a, x):
    """a_rᵀ x of all rows of a, dense or data.Csr, (m,). Without SciPy, whose import takes longer than a short run."""
    if not is_sparse(a):
        return a @ x
    if xp(x) is not np:
        return matrix(a, np.array([0, a.shape[0]])) @ x
    products = np.append(a.data * x[a.indices], 0)              # the last rows may be empty
    return np.where(np.diff(a.indptr), np.add.reduceat(products, a.indptr[:-1]), 0)


def combine(a, t, offsets, out) -> None:
    """out_i = Σ_r t_r a_rᵀ over the rows r of worker i. t: (m, C), out: (w, C, q)."""
    w, C, q = out.shape
    if is_sparse(a):
        out[:] = (a.T @ t).reshape(w, q, C).transpose(0, 2, 1)
        return
    for workers, rows, shape in blocks(offsets):
        out[workers] = t[rows].reshape(*shape, C).transpose(0, 2, 1) @ a[rows].reshape(*shape, q)


def sums(values, offsets):
    """Σ_r values_r over the rows r of worker i, (w,) float64."""
    total = xp(values).empty(len(offsets) - 1)
    for workers, rows, shape in blocks(offsets):
        total[workers] = values[rows].reshape(shape).sum(1, dtype=np.float64)
    return total


def norms(v):
    """‖v_r‖ (m, 1) of the rows of v (m, C)"""
    return abs(v) if v.shape[1] == 1 else xp(v).sqrt(squares(v))[:, None]


def squares(v):
    """‖v_r‖² (m,) of the rows of v (m, n)"""
    return xp(v).einsum("rn,rn->r", v, v)


def shrinkage(norm, most):
    """min(1, most / norm) for norms ≥ 0 and most > 0; NaN for a norm that is NaN, 0 for an infinite one."""
    return most / xp(norm).maximum(norm, most)


def per_row(value_i, offsets, like):
    """value_i (w,) once for each row of worker i, (m, 1), on the device and with the dtype of `like`."""
    return xp(like).asarray(np.repeat(value_i, np.diff(offsets))[:, None], like.dtype)


def blocks(offsets) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Neighbouring workers that have equally many rows are one array: (the workers, their rows, (workers, rows each)).
    Few blocks, as a rule: rows are dealt out as evenly as they can be, and minibatches have one size."""
    counts = np.diff(offsets)
    edges = np.flatnonzero(np.diff(counts, prepend=-1, append=-1))
    for i, j in pairwise(edges):
        yield slice(i, j), slice(offsets[i], offsets[j]), (int(j - i), int(counts[i]))


def is_sparse(a) -> bool:
    return hasattr(a, "indptr")


def contiguous(a, dtype):
    """a, dense or data.Csr, with its numbers in one block of this dtype."""
    if is_sparse(a):
        return dataclasses.replace(a, data=np.ascontiguousarray(a.data, dtype))
    return np.ascontiguousarray(a, dtype)


def no_data(problem: Problem) -> InputError:
    """What to raise where a problem that learns from data gets none."""
    return InputError(f"problem.name: '{problem.name}' learns from data, but there is no table [data]; expected "
                      "data.file")


def with_intercept(a):
    """a with a column of ones behind it."""
    m, p = a.shape
    if not is_sparse(a):
        return np.hstack([a, np.ones((m, 1), a.dtype)])
    ends = a.indptr[1:]
    return dataclasses.replace(a, indptr=a.indptr + np.arange(m + 1), indices=np.insert(a.indices, ends, p),
                               data=np.insert(a.data, ends, 1), shape=(m, p + 1))
