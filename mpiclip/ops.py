"""The papers' vector operations, one vector per row. The NumPy bodies are the definitions; @accelerated sends a call to
the compiled twin in kernels/ that knows the array.

Everywhere: u is (w, d), one row for each of w workers, or (d,), one vector; dtype float32 or float64. The arrays of
one call have one dtype and share no memory, except `out=u`. Sums of squares are accumulated in float64, in an order
that does not depend on the number of threads: the norm of every finite float32 row is right. A float64 row whose sum
of squares overflows (norm above 1e154) counts as not finite.

A row that is not finite has the norm inf or nan. Clipping such a row gives NaN in every place, so that nobody can take
it for a vector that was clipped; other rows do not notice."""

from __future__ import annotations

from typing import Any

import numpy as np

from .device import accelerated, xp


@accelerated
def norms(u, out=None):
    """‖u_i‖₂ of each row, float64.

    u: (w, d) or (d,). out: float64, (w,) or (); None allocates. Returns out, (w,) or ().
    Raises ValueError where shapes or dtypes do not fit."""
    check(u, norms=out)
    out = xp(u).empty(u.shape[:-1]) if out is None else out
    out[...] = xp(u).sqrt(xp(u).einsum("...j,...j->...", u, u, dtype=np.float64))
    return out


row_norms = norms.definition      # where the name `norms` is an argument's


@accelerated
def clip(u, tau, out=None, norms=None):
    """clip_τ(u_i) = u_i min(1, τ/‖u_i‖), row by row: the projection onto the ball of radius τ (Clip21,
    arXiv:2305.18929). A row with ‖u_i‖ ≤ τ keeps its bytes. τ/‖u_i‖ is rounded towards zero to u's dtype, so that a
    clipped row is never longer than τ by more than the rounding of its elements.

    u: (w, d) or (d,), unmodified unless out is u. tau ≥ 0: a number, or (w,) for a threshold per row; 0 gives zeros,
    inf only the norms. out: like u; None allocates; with out=u and nothing to clip nothing is written.
    norms: float64, (w,) or (), filled with ‖u_i‖ before clipping. Returns out.
    Raises ValueError where shapes or dtypes do not fit, or for a negative or NaN tau.

    >>> clip(np.array([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    array([[0.6, 0.8],
           [0.3, 0.4]])"""
    check(u, tau, norms, out=out)
    factor, _ = clip_factor(u, tau, norms)
    if out is u and (factor == 1).all():
        return u
    return xp(u).multiply(u, factor[..., None], out=out)


@accelerated
def clip_step(u, v, tau, out=None, norms=None):
    """Clip21's worker step, row by row: c_i = clip_τ(u_i − v_i), then v_i += c_i (arXiv:2305.18929; u_i is ∇f_i(x)).

    u, v: (w, d) or (d,); v is updated in place; u is unmodified unless out is u (the fast way). tau: as in clip.
    out: like u, not v; None allocates. norms: float64, (w,) or (), filled with ‖u_i − v_i‖ before clipping.
    Returns c (out). A row whose difference is not finite gets c_i = NaN and keeps its v_i.
    Raises ValueError where shapes or dtypes do not fit, or for a negative or NaN tau."""
    check(u, tau, norms, v=v, out=out)
    if out is v:
        raise ValueError("clip_step: out must not be v")
    c = xp(u).subtract(u, v, out=out)
    factor, finite = clip_factor(c, tau, norms)
    if not (factor == 1).all():
        c *= factor[..., None]
    if finite.all():
        v += c
    else:
        xp(u).copyto(v, v + c, where=finite[..., None])
    return c


@accelerated
def apply(x, v, mean, gamma) -> None:
    """The server's step, in place: v += mean, then x −= γ v (Clip21's lines for the server, arXiv:2305.18929).

    x, v, mean: one shape, any; mean is unmodified. gamma: a number, rounded to x's dtype.
    Raises ValueError where shapes or dtypes do not fit."""
    check(x, v=v, mean=mean)
    v += mean
    x -= x.dtype.type(gamma) * v


@accelerated
def row_sum(u, scale=1.0, out=None):
    """scale · Σ_i u_i, added up in u's dtype and in the order i = 0, 1, …: the same bytes on every machine.

    u: (w, d), also columns of a larger array. scale: a number, rounded to u's dtype. out: (d,), dtype of u; None
    allocates. Returns out.
    Raises ValueError where shapes or dtypes do not fit."""
    check(u)
    if u.ndim != 2:
        raise ValueError(f"u has the shape {u.shape}; expected (w, d)")
    out = xp(u).empty(u.shape[1:], u.dtype) if out is None else out
    if out.shape != u.shape[1:] or out.dtype != u.dtype:
        raise ValueError(f"out is {out.dtype}, shape {out.shape}; expected {u.dtype}, shape {u.shape[1:]}")
    out[...] = 0
    for u_i in u:
        out += u_i
    out *= u.dtype.type(scale)
    return out


def clip_factor(u, tau, norms=None) -> tuple[Any, Any]:
    """(min(1, τ/‖u_i‖) in u's dtype, rounded towards zero, NaN for rows that are not finite; which rows are finite)"""
    norm = row_norms(u, norms)
    tau = xp(u).asarray(tau, np.float64)
    finite = xp(u).isfinite(norm)
    clipped = norm > tau
    exact = xp(u).where(clipped, tau / xp(u).where(clipped, norm, 1), 1)
    exact = xp(u).where(finite, exact, np.nan)
    factor = exact.astype(u.dtype)
    return xp(u).where(factor > exact, xp(u).nextafter(factor, u.dtype.type(0)), factor), finite


def check(u, tau=0.0, norms=None, **like) -> None:
    """ValueError unless the arrays named in `like` have u's shape and dtype (None: not handed in), norms is float64
    with a number for each row, and tau is a number ≥ 0 or has one for each row."""
    if u.ndim == 0 or u.dtype.kind != "f":
        raise ValueError(f"u is {u.dtype}, shape {u.shape}; expected float32 or float64, (w, d) or (d,)")
    for name, array in like.items():
        if array is not None and (array.shape != u.shape or array.dtype != u.dtype):
            raise ValueError(f"{name} is {array.dtype}, shape {array.shape}; expected {u.dtype}, shape {u.shape}")
    rows = u.shape[:-1]
    if norms is not None and (norms.shape != rows or norms.dtype != np.float64):
        raise ValueError(f"norms is {norms.dtype}, shape {norms.shape}; expected float64, shape {rows}")
    tau = xp(u).asarray(tau)
    if tau.shape not in ((), rows):
        raise ValueError(f"tau has the shape {tau.shape}; expected a number, or one for each row, shape {rows}")
    if not (tau >= 0).all():
        raise ValueError(f"tau is {tau}; expected numbers ≥ 0")
