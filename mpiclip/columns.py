"""What robust aggregation does to all the columns of n vectors: inner products, order statistics, sums. The NumPy
bodies are the definitions; @accelerated sends a call to the compiled twin in kernels/ that knows the arrays.

Everywhere: X is (n, d), float32 or float64, its rows dense, but perhaps columns of a larger array; it is never written
to. E is (m, d), further rows of the same dtype, or None. W is (k, n + m) float64, or None for the rows as they are.
The rows are then W [X; E], k of them, mixed in X's dtype; a row of X or E that has the weight 0 in every mixture is
not read. Nothing of the size of X is allocated: columns are taken a block at a time.

What is computed of a column depends on that column alone, whichever other columns are there: however the columns are
cut over ranks and threads, the compiled kernels give the same bytes. Values that are not finite give no error, and no
number that means anything; other columns do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .device import accelerated, host, xp

BLOCK = 8000            # columns worked on at a time: they stay in cache, and a row's stride is no multiple of a page
GPU_BLOCK = 1 << 17     # the same on a GPU, which wants more at a time


@accelerated
def gram(X, E=None, scale=None, centre=None) -> np.ndarray:
    """Inner products of the rows y_j of [X; E], scaled and about their mean: of z_j = s_j y_j − c_j ȳ (j < b = n + m),
    and, last, of ȳ = 1/n Σ_{j < n} s_j x_j itself. The mean is taken off before any product, so that nothing cancels
    where the rows are close together and far from zero. Of float32 rows the kernel's entries are right to 1e-5 ‖z_i‖
    ‖z_j‖ (1e-7 is usual), and to float64's rounding as soon as a squared distance, G_ii + G_jj − 2 G_ij, or a squared
    norm, G_jj + 2 G_jb + G_bb, is below a hundredth of what it is made of. Its equal rows have equal entries: their
    distance is exactly 0.

    scale: s, (b,), powers of 2, which round nothing (None: 1); centre: c, (b,), 0 or 1 (None: 1).
    Returns (b + 1, b + 1) float64, in host memory.
    Raises ValueError where shapes or dtypes do not fit."""
    check(X, E)
    rows = len(X) + (0 if E is None else len(E))
    scale = xp(X).asarray(weights("scale", scale, rows))[:, None]
    centre = xp(X).asarray(weights("centre", centre, rows))[:, None]
    G = xp(X).zeros((rows + 1, rows + 1))
    for _, Y in blocks(X, E):
        Y = Y * scale
        mean = Y[:len(X)].mean(0)
        Z = xp(X).vstack([Y - centre * mean, mean])
        G += Z @ Z.T
    return host(G)


@accelerated
def median(X, E=None, W=None):
    """The median of each column of the rows, (d,) in X's dtype; of an even number of rows the mean of the middle two.

    Raises ValueError where shapes or dtypes do not fit.

    >>> median(np.array([[1.0, 7.0], [2.0, 5.0], [9.0, 6.0]]))
    array([2., 6.])"""
    def middle(rows):
        return middle_of(xp(X).sort(rows, axis=0))
    return each_column(middle, X, E, W)


@accelerated
def trimmed_mean(X, f, E=None, W=None):
    """The mean of each column of the rows without its f smallest and f largest values, (d,) in X's dtype, added up in
    float64.

    f: a whole number, 0 ≤ f < k/2. Raises ValueError where shapes or dtypes do not fit, or for such an f."""
    k = check(X, E, W)
    check_f(f, k)

    def trimmed(rows):
        return xp(X).sort(rows, axis=0)[f:k - f].mean(0, dtype=np.float64)
    return each_column(trimmed, X, E, W)


@accelerated
def mean_around_median(X, f, E=None, W=None):
    """The mean of those k − f values of each column of the rows that are nearest to its median, (d,) in X's dtype,
    added up in float64. Of two that are equally far, in X's dtype, the smaller one is the nearer.

    f: a whole number, 0 ≤ f < k/2. Raises ValueError where shapes or dtypes do not fit, or for such an f."""
    k = check(X, E, W)
    check_f(f, k)

    def around(rows):
        rows = xp(X).sort(rows, axis=0)
        m = middle_of(rows)
        # The nearest are neighbours in the sorted column. Those from 0 on, unless the next one above is nearer to m
        # than the lowest, and so on: the i-th gives way to the one k − f above it.
        low, high = rows[:f], rows[k - f:]
        given = xp(X).where(high - m < m - low, high, low)
        return (given.sum(0, dtype=np.float64) + rows[f:k - f].sum(0, dtype=np.float64)) / (k - f)
    return each_column(around, X, E, W)


@accelerated
def combine(X, w, E=None):
    """Σ_j w_j y_j, the y_j the rows of [X; E]: (d,) in X's dtype, added up in float64. A row with w_j = 0 is not read.

    w: (n + m,) float64. Raises ValueError where shapes or dtypes do not fit."""
    check(X, E)
    w = weights("w", w, len(X) + (0 if E is None else len(E)))
    out = xp(X).empty(X.shape[1], X.dtype)
    for columns in slices(X):
        total = xp(X).zeros(len(out[columns]))
        for j in np.flatnonzero(w):
            total += w[j] * (X[j, columns] if j < len(X) else E[j - len(X), columns]).astype(np.float64)
        out[columns] = total
    return out


@accelerated
def mixed(X, W, E=None, common=None):
    """Σ_j (common_j + W_ij) y_j, the y_j the rows of [X; E]: (k, d) in X's dtype, a new array.

    W: (k, n + m) float64; common: (n + m,) float64 (None: 0), what the weights of all rows have in common, and W what
    is left: it is summed once, and where W is 0 there is nothing to do. Raises ValueError where shapes or dtypes do not
    fit."""
    k = check(X, E, W)
    W = W if common is None else W + weights("common", common, W.shape[1])
    out = xp(X).empty((k, X.shape[1]), X.dtype)
    for columns, rows in blocks(X, E, W):
        out[:, columns] = rows
    return out


@accelerated
def deviation(X, E=None, W=None):
    """The standard deviation of each column of the rows, √(1/(k − 1) Σ_i (x_i − x̄)²), (d,) in X's dtype, computed in
    float64; the mean is taken off first, so that nothing cancels.

    Raises ValueError where shapes or dtypes do not fit, or for fewer than two rows."""
    k = check(X, E, W)
    if k < 2:
        raise ValueError(f"the deviation of {k} row; expected two or more")
    return each_column(lambda rows: rows.std(0, ddof=1, dtype=np.float64), X, E, W)


@accelerated
def distances(X, v, E=None, W=None) -> np.ndarray:
    """‖row_i − v‖² over these columns, added up in float64: (k,) float64, in host memory.

    v: (d,), X's dtype. Raises ValueError where shapes or dtypes do not fit."""
    k = check(X, E, W)
    if v.shape != X.shape[1:] or v.dtype != X.dtype:
        raise ValueError(f"v is {v.dtype}, shape {v.shape}; expected {X.dtype}, shape {X.shape[1:]}")
    squares = xp(X).zeros(k)
    for columns, rows in blocks(X, E, W):
        difference = rows.astype(np.float64) - v[columns]
        squares += xp(X).einsum("ij,ij->i", difference, difference)
    return host(squares)


def each_column(rule, X, E, W):
    """rule: (k, b) → (b,), applied to the rows, a block of columns at a time. → (d,) in X's dtype"""
    check(X, E, W)
    out = xp(X).empty(X.shape[1], X.dtype)
    for columns, rows in blocks(X, E, W):
        out[columns] = rule(rows)
    return out


def blocks(X, E=None, W=None) -> Iterator[tuple[slice, Any]]:
    """(columns, the rows W [X; E] there) for one block of columns after another."""
    used = None
    if W is not None:
        used = np.flatnonzero(W.any(0))
        W = xp(X).asarray(W[:, used], X.dtype)
    for columns in slices(X):
        Y = X[:, columns] if E is None else xp(X).concatenate([X[:, columns], E[:, columns]])
        yield columns, Y if used is None else W @ Y[used]


def slices(X) -> Iterator[slice]:
    """The columns of one block after another."""
    block = BLOCK if xp(X) is np else GPU_BLOCK
    yield from (slice(start, start + block) for start in range(0, X.shape[1], block))


def middle_of(rows):
    """The median of sorted columns. Halves are added, so that the sum of two large numbers does not overflow."""
    k = len(rows)
    return rows[k // 2] if k % 2 else rows[k // 2 - 1] / 2 + rows[k // 2] / 2


def weights(name: str, w, rows: int) -> np.ndarray:
    """A number for each row in float64, 1 where there are none. ValueError for another count."""
    w = np.ones(rows) if w is None else np.asarray(w, np.float64)
    if w.shape != (rows,):
        raise ValueError(f"{name} has the shape {w.shape}; expected a number for each of {rows} rows")
    return w


def check_f(f, k: int) -> None:
    """ValueError unless f values at either end of k can be left out."""
    if not (isinstance(f, int | np.integer) and 0 <= 2 * f < k):
        raise ValueError(f"f is {f}, of k = {k} rows; expected a whole number with 0 ≤ f < k/2")


def check(X, E=None, W=None) -> int:
    """The number of rows; ValueError unless the arrays fit together."""
    if X.ndim != 2 or len(X) == 0 or X.dtype not in (np.float32, np.float64):
        raise ValueError(f"X is {X.dtype}, shape {X.shape}; expected float32 or float64, (n, d)")
    if E is not None and (E.ndim != 2 or E.shape[1] != X.shape[1] or E.dtype != X.dtype):
        raise ValueError(f"E is {E.dtype}, shape {E.shape}; expected {X.dtype}, shape (m, {X.shape[1]})")
    rows = len(X) + (0 if E is None else len(E))
    if W is not None and (W.ndim != 2 or W.shape[1] != rows or len(W) == 0 or W.dtype != np.float64):
        raise ValueError(f"W is {W.dtype}, shape {W.shape}; expected float64, shape (k, {rows})")
    return rows if W is None else len(W)
