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
def normalize_step(u, v, alpha, beta, out=None, norms=None):
    """α-NormEC's worker step, row by row: c_i = β (u_i − v_i) / (α + ‖u_i − v_i‖), then v_i += c_i (arXiv:2502.13482;
    u_i is ∇f_i(x)). The factor is rounded towards zero to u's dtype: ‖c_i‖ is below β but for the rounding of its
    elements.

    u, v, out, norms: as in clip_step. alpha > 0, beta ≥ 0: numbers. Returns c (out). A row whose difference is not
    finite gets c_i = NaN and keeps its v_i.
    Raises ValueError where shapes or dtypes do not fit, or for such an alpha or beta."""
    check(u, norms=norms, v=v, out=out)
    if out is v or not (alpha > 0 and beta >= 0):
        raise ValueError("normalize_step: out must not be v" if out is v else
                         f"alpha is {alpha} and beta {beta}; expected alpha > 0 and beta ≥ 0")
    c = xp(u).subtract(u, v, out=out)
    norm = row_norms(c, norms)
    finite = xp(u).isfinite(norm)
    c *= towards_zero(xp(u).where(finite, beta / (alpha + norm), np.nan), u.dtype)[..., None]
    xp(u).copyto(v, v + c, where=finite[..., None])
    return c


@accelerated
def momentum_step(u, m, v, tau, beta, scale=1.0, out=None, norms=None):
    """Clip21-SGD2M's worker step, row by row: m_i = (1 − β) m_i + β u_i, c_i = clip_τ(m_i − v_i), v_i += scale · c_i
    (arXiv:2502.11682, where m_i is v_i, v_i is g_i and scale is β̂; u_i is ∇f_i(x)). v None stands for zeros that
    stay so: c_i = clip_τ(m_i).

    u, m, v: (w, d) or (d,); m and v are updated in place; u is unmodified unless out is u (the fast way). tau, out,
    norms: as in clip_step, norms of m_i − v_i. beta, scale: numbers, rounded to u's dtype, as 1 − β is. Returns c
    (out). A row whose m_i − v_i is not finite gets c_i = NaN and keeps its m_i and v_i.
    Raises ValueError where shapes or dtypes do not fit, or for a negative or NaN tau."""
    check(u, tau, norms, m=m, v=v, out=out)
    if m is v or out is m or (out is v and out is not None):
        raise ValueError("momentum_step: m, v and out must be three arrays")
    real = u.dtype.type
    new = real(1 - beta) * m + real(beta) * u
    c = xp(u).subtract(new, 0 if v is None else v, out=out)
    factor, finite = clip_factor(c, tau, norms)
    c *= factor[..., None]
    xp(u).copyto(m, new, where=finite[..., None])
    if v is not None:
        xp(u).copyto(v, v + real(scale) * c, where=finite[..., None])
    return c


@accelerated
def local_step(x, u, norms, tau, eta, normalize=False, weight_decay=0.0, m=None, momentum=0.0, origin=None, out=None):
    """A step that a worker takes by itself, row by row, as in CELGC (arXiv:2205.05040; u_i is g_i, ν_i its norm):
    f_i = min(1, τ/ν_i), or τ/ν_i where `normalize` is true;  e_i = f_i u_i + λ min(1, f_i) x_i;  m_i = μ m_i + e_i;
    out_i = x_i − η m_i, or (x_i − η m_i) − origin: how far the worker has got. λ is weight_decay, μ momentum; m None:
    there is none, m_i is e_i. f_i is rounded towards zero to x's dtype, and is 0 where normalize has ν_i = 0.

    x, u, m: (w, d) or (d,); m is updated in place, x and u are not. norms: float64, (w,) or (), the ν_i. tau ≥ 0, eta,
    weight_decay, momentum: numbers, the last three rounded to x's dtype. origin: (d,). out: like x, and may be x or u;
    None stands for x. Returns out. A row whose ν_i is not finite becomes NaN and keeps its m_i.
    Raises ValueError where shapes or dtypes do not fit, or for a negative or NaN tau."""
    out = x if out is None else out
    check(u, tau, norms, x=x, m=m, out=out)
    if origin is not None and (origin.shape != x.shape[-1:] or origin.dtype != x.dtype):
        raise ValueError(f"origin is {origin.dtype}, shape {origin.shape}; expected {x.dtype}, shape {x.shape[-1:]}")
    if m is not None and (m is x or m is u or m is out):
        raise ValueError("local_step: m must be an array of its own")
    real, finite = x.dtype.type, xp(x).isfinite(norms)
    shorten = (norms > 0) if normalize else norms > tau
    exact = xp(x).where(shorten, tau / xp(x).where(shorten, norms, 1), 0 if normalize else 1)
    factor = towards_zero(xp(x).where(finite, xp(x).minimum(exact, np.finfo(x.dtype).max), np.nan), x.dtype)[..., None]
    e = factor * u
    if weight_decay:
        e += real(weight_decay) * xp(x).minimum(factor, real(1)) * x
    if m is not None:
        new = real(momentum) * m + e
        xp(x).copyto(m, new, where=finite[..., None])
        e = new
    xp(x).subtract(x, real(eta) * e, out=out)
    if origin is not None:
        out -= origin
    return out


@accelerated
def apply(x, v, mean, gamma, scale=1.0) -> None:
    """The server's step, in place: v += scale · mean, then x −= γ v (Clip21's lines for the server, arXiv:2305.18929;
    with the scale β̂ those of Clip21-SGD2M, arXiv:2502.11682).

    x, v, mean: one shape, any; mean is unmodified. gamma, scale: numbers, rounded to x's dtype.
    Raises ValueError where shapes or dtypes do not fit."""
    check(x, v=v, mean=mean)
    v += mean if scale == 1 else x.dtype.type(scale) * mean
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


@accelerated
def top_k(u, k):
    """The k elements of each row whose absolute values are the largest, the contraction of EF21 (arXiv:2106.05203):
    ‖top_k(u_i) − u_i‖² ≤ (1 − k/d) ‖u_i‖². Of equal ones those with the lower index come first: the answer is exact,
    and the same everywhere.

    u: (w, d) or (d,), unmodified. k: a whole number, 1 ≤ k ≤ d < 2³¹. Returns (indices, values), (w, k) or (k,):
    indices int32, ascending in each row, values in u's dtype, bit for bit. A row with an element that is not finite
    gets the indices 0 … k − 1 and NaN for values.
    Raises ValueError where the dtype does not fit, or for such a k.

    >>> top_k(np.array([[3.0, -5.0, 0.0, 4.0]]), 2)
    (array([[1, 3]], dtype=int32), array([[-5.,  4.]]))"""
    check(u)
    check_k(u, k)
    finite = xp(u).isfinite(u).all(axis=-1)
    indices, chosen = largest(u, k, finite)
    return indices, xp(u).where(finite[..., None], u[chosen].reshape(indices.shape), u.dtype.type(np.nan))


@accelerated
def clip_step_top_k(u, v, tau, k, norms=None):
    """The step of Clip21 with the compression of Press-Clip21, row by row: c_i = top_k(clip_τ(u_i − v_i)), then
    v_i += c_i (arXiv:2305.18929). The k elements are those of largest |u_i − v_i|, as top_k takes them: clipping is a
    factor, and does not change which they are, even where it rounds them to zero.

    u, v: (w, d) or (d,); v is updated in place, k places a row; u is unmodified. tau: as in clip, k: as in top_k.
    norms: float64, (w,) or (), filled with ‖u_i − v_i‖, as clip_step fills it. Returns (indices, values), (w, k) or
    (k,): c_i at its k places, as top_k returns them. A row whose difference is not finite gets the indices 0 … k − 1
    and NaN for values, and keeps its v_i.
    Raises ValueError where shapes or dtypes do not fit, for a negative or NaN tau, or for such a k."""
    check(u, tau, norms, v=v)
    check_k(u, k)
    e = u - v
    factor, finite = clip_factor(e, tau, norms)
    indices, chosen = largest(e, k, finite)
    e *= factor[..., None]
    xp(u).copyto(v, v + e, where=chosen & finite[..., None])
    return indices, e[chosen].reshape(indices.shape)


def largest(u, k, finite) -> tuple[Any, Any]:
    """(indices as in top_k, the same as a mask like u) of the k elements that top_k takes; k first ones of a row that
    is not finite"""
    size, d = abs(u), u.shape[-1]
    kth = xp(u).partition(size, d - k, axis=-1)[..., d - k, None]
    above, ties = size > kth, size == kth
    chosen = above | (ties & (xp(u).cumsum(ties, axis=-1) <= k - above.sum(axis=-1, keepdims=True)))
    chosen = xp(u).where(finite[..., None], chosen, xp(u).arange(d) < k)
    return xp(u).nonzero(chosen)[-1].reshape((*u.shape[:-1], k)).astype(np.int32), chosen


def clip_factor(u, tau, norms=None) -> tuple[Any, Any]:
    """(min(1, τ/‖u_i‖) in u's dtype, rounded towards zero, NaN for rows that are not finite; which rows are finite)"""
    norm = row_norms(u, norms)
    tau = xp(u).asarray(tau, np.float64)
    finite = xp(u).isfinite(norm)
    clipped = norm > tau
    exact = xp(u).where(clipped, tau / xp(u).where(clipped, norm, 1), 1)
    return towards_zero(xp(u).where(finite, exact, np.nan), u.dtype), finite


def towards_zero(exact, dtype):
    """Numbers ≥ 0 in float64, rounded towards zero to the dtype."""
    factor = exact.astype(dtype)
    return xp(factor).where(factor > exact, xp(factor).nextafter(factor, dtype.type(0)), factor)


def check_k(u, k) -> None:
    """ValueError unless k of the d numbers of a row can be chosen, and counted in int32."""
    d = u.shape[-1]
    if not (isinstance(k, int | np.integer) and 1 <= k <= d < 2**31):
        raise ValueError(f"k is {k}, of d = {d} numbers in a row; expected a whole number with 1 ≤ k ≤ d < 2³¹")


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
