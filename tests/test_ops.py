"""mpiclip.ops against plain loops in float64, and the C kernels against the NumPy definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from threadpoolctl import threadpool_limits

from mpiclip import device, kernels, ops

LONG = 70_001                  # a row that the threads share, and no multiple of anything
DTYPES = [np.float32, np.float64]
needs_c = pytest.mark.skipif(not device.compiled(), reason="no C kernels")
WAYS = [pytest.param(lambda f: f, id="compiled", marks=needs_c),
        pytest.param(lambda f: f.definition, id="definition")]
both = pytest.mark.parametrize("way", WAYS)
real = pytest.mark.parametrize("dtype", DTYPES)


def vectors(shape, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def length(row):
    return math.sqrt(math.fsum(e * e for e in row.astype(float).tolist()))


def clipped(row, tau):
    """clip_τ as the paper has it, in float64."""
    norm = length(row)
    factor = tau / norm if norm > tau else 1.0
    return np.array([e * factor for e in row.astype(float).tolist()])


def close(a, b, dtype):
    np.testing.assert_allclose(a, b, rtol=2 * np.finfo(dtype).eps + 1e-13, atol=0)


# against loops

@both
@real
@pytest.mark.parametrize("shape", [(1,), (7,), (123,), (1, 1), (20, 123), (3, 64), (2, LONG), (LONG,)])
def test_norms(way, dtype, shape):
    u = vectors(shape, dtype)
    norm = way(ops.norms)(u)
    assert norm.shape == shape[:-1] and norm.dtype == np.float64
    np.testing.assert_allclose(norm.reshape(-1), [length(row) for row in u.reshape(-1, shape[-1])], rtol=1e-13)
    out = np.empty(shape[:-1])
    assert way(ops.norms)(u, out=out) is out and np.array_equal(out, norm)


@both
@real
@pytest.mark.parametrize("shape", [(7,), (123,), (20, 123), (3, 64), (2, LONG)])
def test_clip(way, dtype, shape):
    u = vectors(shape, dtype)
    u[..., 0] *= np.arange(1, 1 + math.prod(shape[:-1])).reshape(shape[:-1]) * 10
    tau = float(np.median([length(row) for row in u.reshape(-1, shape[-1])])) * 0.999      # some rows are clipped
    before, norms = u.copy(), np.full(shape[:-1], np.nan)
    c = way(ops.clip)(u, tau, norms=norms)
    assert np.array_equal(u, before) and c.dtype == dtype and not np.shares_memory(c, u)
    close(c, np.reshape([clipped(row, tau) for row in u.reshape(-1, shape[-1])], shape), dtype)
    np.testing.assert_allclose(norms.reshape(-1), [length(row) for row in u.reshape(-1, shape[-1])], rtol=1e-13)
    out = np.full_like(u, 7)
    assert way(ops.clip)(u, tau, out=out) is out and np.array_equal(out, c)
    assert way(ops.clip)(u, tau, out=u) is u and np.array_equal(u, c)


@both
@real
@pytest.mark.parametrize("shape", [(7,), (20, 123), (3, 64), (2, LONG)])
def test_clip_step(way, dtype, shape):
    u, v = vectors(shape, dtype), vectors(shape, dtype, seed=2)
    u[..., 0] *= np.arange(1, 1 + math.prod(shape[:-1])).reshape(shape[:-1]) * 10
    rows = (u - v).reshape(-1, shape[-1])
    tau = float(np.median([length(row) for row in rows])) * 0.999
    expected = np.reshape([clipped(row, tau) for row in rows], shape)
    u0, v0, norms = u.copy(), v.copy(), np.empty(shape[:-1])
    c = way(ops.clip_step)(u, v, tau, norms=norms)
    close(c, expected, dtype)
    assert np.array_equal(u, u0) and np.array_equal(v, v0 + c)
    np.testing.assert_allclose(norms.reshape(-1), [length(row) for row in rows], rtol=1e-13)
    v1 = v0.copy()
    assert way(ops.clip_step)(u, v1, tau, out=u) is u
    assert np.array_equal(u, c) and np.array_equal(v1, v)


@both
@real
@pytest.mark.parametrize("shape", [(7,), (20, 123), (3, 64), (2, LONG)])
def test_normalize_step(way, dtype, shape):
    u, v = vectors(shape, dtype), vectors(shape, dtype, seed=2)
    u[..., 0] *= np.arange(1, 1 + math.prod(shape[:-1])).reshape(shape[:-1]) * 10
    rows = (u - v).reshape(-1, shape[-1])
    alpha, beta = length(rows[0]) / 2, 3.0              # on both sides of α
    expected = [row.astype(float) * (beta / (alpha + length(row))) for row in rows]
    u0, v0, norms = u.copy(), v.copy(), np.empty(shape[:-1])
    c = way(ops.normalize_step)(u, v, alpha, beta, norms=norms)
    close(c, np.reshape(expected, shape), dtype)
    assert np.array_equal(u, u0) and np.array_equal(v, v0 + c)
    np.testing.assert_allclose(norms.reshape(-1), [length(row) for row in rows], rtol=1e-13)
    v1 = v0.copy()
    assert way(ops.normalize_step)(u, v1, alpha, beta, out=u) is u
    assert np.array_equal(u, c) and np.array_equal(v1, v)


@both
def test_a_normalized_step_is_not_longer_than_beta(way):
    """Also where α is lost in the sum: one number a row, so that nothing but the factor is rounded."""
    u, beta = np.random.default_rng(5).uniform(1, 1e6, (100, 1)).astype(np.float32), np.float32(0.2499)
    for alpha in (1e-30, 1e-3, 1.0, 1e9):
        c = way(ops.normalize_step)(u, np.zeros_like(u), alpha, float(beta))
        assert (c <= beta).all() and (c > 0).all()


@both
@real
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(7,), (20, 123), (3, 64), (2, LONG)])
def test_momentum_step(way, dtype, shape, beta, scale):
    u, m, v = (vectors(shape, dtype, seed) for seed in (1, 2, 3))
    u[..., 0] *= np.arange(1, 1 + math.prod(shape[:-1])).reshape(shape[:-1]) * 30
    keep, take = dtype(1 - beta), dtype(beta)
    for v_or_none in (v, None):
        new = keep * m + take * u
        rows = (new if v_or_none is None else new - v).reshape(-1, shape[-1])
        tau = float(np.median([length(row) for row in rows])) * 0.999
        expected = np.reshape([clipped(row, tau) for row in rows], shape)
        u0, m1, norms = u.copy(), m.copy(), np.empty(shape[:-1])
        v1 = None if v_or_none is None else v.copy()
        c = way(ops.momentum_step)(u, m1, v1, tau, beta, scale, norms=norms)
        close(c, expected, dtype)
        assert np.array_equal(u, u0) and np.array_equal(m1, new)
        assert v1 is None or np.array_equal(v1, v + dtype(scale) * c)
        np.testing.assert_allclose(norms.reshape(-1), [length(row) for row in rows], rtol=1e-13)
        m2, v2, u2 = m.copy(), None if v1 is None else v.copy(), u.copy()
        assert way(ops.momentum_step)(u2, m2, v2, tau, beta, scale, out=u2) is u2
        assert np.array_equal(u2, c) and np.array_equal(m2, m1) and (v1 is None or np.array_equal(v2, v1))


@both
@real
def test_momentum_step_without_momentum_is_clip_step(way, dtype):
    """To the last bit: Clip21-SGD2M with β = β̂ = 1 is Clip21, and clipped momentum with β = 1 is clipping."""
    u, m, v = (vectors((5, 90), dtype, seed) for seed in (1, 2, 3))
    v1, v2 = v.copy(), v.copy()
    c1, c2 = way(ops.clip_step)(u, v1, 9.0), way(ops.momentum_step)(u, m, v2, 9.0, 1.0, 1.0)
    assert c1.tobytes() == c2.tobytes() and v1.tobytes() == v2.tobytes() and np.array_equal(m, u)
    assert way(ops.momentum_step)(u, m, None, 9.0, 1.0).tobytes() == way(ops.clip)(u, 9.0).tobytes()


@both
@real
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(7,), (20, 123), (3, LONG)])
def test_local_step(way, dtype, shape, normalize):
    """Against a loop in float64, with and without weight decay, momentum and an origin, wherever the result goes."""
    rows, eps = math.prod(shape[:-1]), np.finfo(dtype).eps
    x0, u, m0, origin = (vectors(s, dtype, seed) for s, seed in ((shape, 1), (shape, 2), (shape, 3), (shape[-1], 4)))
    norms = np.array(np.linspace(0.5, 8.0, rows)).reshape(shape[:-1])
    tau, eta, keep = 4.0, 0.3, 0.7
    f = np.array([tau / nu if normalize or nu > tau else 1.0 for nu in norms.reshape(-1)]).reshape((*shape[:-1], 1))
    for decay, m, start in ((0.0, None, None), (0.1, None, None), (0.0, m0, None), (0.1, m0, origin),
                            (0.0, None, origin)):
        e = f * u.astype(float) + decay * np.minimum(f, 1) * x0
        e += 0 if m is None else dtype(keep) * m0.astype(float)
        expected = x0 - dtype(eta) * e - (0 if start is None else start.astype(float))
        for to in ("x", "u", "new"):
            x, g, kept = x0.copy(), u.copy(), None if m is None else m.copy()
            out = {"x": None, "u": g, "new": np.empty_like(x)}[to]
            more = {} if m is None else {"m": kept, "momentum": keep}
            result = way(ops.local_step)(x, g, norms, tau, eta, normalize, decay, **more, origin=start, out=out)
            assert result is (x if out is None else out)
            np.testing.assert_allclose(result, expected, rtol=0, atol=100 * eps)
            assert m is None or np.allclose(kept, e, rtol=0, atol=100 * eps)
            assert to == "x" or np.array_equal(x, x0)
            assert to == "u" or np.array_equal(g, u)


@both
@real
def test_local_step_without_more_is_a_clipped_step(way, dtype):
    """To the last bit; and no step is longer than η τ, nor any that is normalised, however short or tiny u is."""
    x, u = vectors((6, 90), dtype), vectors((6, 90), dtype, 2) * np.logspace(-3, 3, 6, dtype=dtype)[:, None]
    expected = x - dtype(0.3) * ops.clip(u, 2.0)
    assert way(ops.local_step)(x, u, ops.norms(u), 2.0, 0.3).tobytes() == expected.tobytes()
    norms, m = np.array([1, np.nan, np.inf, 2, 3, 5]), u.copy()     # rows that are not finite do not enter m
    got = way(ops.local_step)(x.copy(), u, norms, 2.0, 0.3, m=m, momentum=0.5)
    assert np.isnan(got[1:3]).all() and np.isfinite(got[[0, 3, 4, 5]]).all()
    assert np.array_equal(m[1:3], u[1:3]) and not np.isclose(m[[0, 3, 4, 5]], u[[0, 3, 4, 5]]).any()
    tiny = np.finfo(dtype).tiny
    u = np.array([[0, 0], [3 * tiny, 4 * tiny], [3e3, 4e3]], dtype)
    got = way(ops.local_step)(np.zeros_like(u), u, np.array([0, 5 * tiny, 5e3]), 1.0, 0.5, normalize=True)
    np.testing.assert_allclose(got[[0, 2]], [[0, 0], [-0.3, -0.4]], rtol=1e-6)
    assert np.isfinite(got).all() and (np.linalg.norm(got, axis=1) <= 0.5 * (1 + 4 * np.finfo(dtype).eps)).all()


@both
@real
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(5,), (123,), (3, 4, 5), (LONG,)])
def test_apply(way, dtype, shape, scale):
    x, v, mean = (vectors(shape, dtype, seed=k) for k in range(3))
    x0, v0, mean0 = x.copy(), v.copy(), mean.copy()
    assert way(ops.apply)(x, v, mean, 0.3, *([] if scale == 1 else [scale])) is None
    bound = float(max(np.abs(a).max() for a in (x0, v0, mean0))) * np.finfo(dtype).eps * 4
    assert np.array_equal(mean, mean0)
    np.testing.assert_allclose(v, v0.astype(float) + scale * mean0, rtol=0, atol=bound)
    np.testing.assert_allclose(x, x0 - 0.3 * (v0.astype(float) + scale * mean0), rtol=0, atol=bound)


@both
@real
@pytest.mark.parametrize("shape", [(1, 1), (20, 123), (7, 1), (1000, 1), (3, 5000), (2, LONG)])
def test_row_sum(way, dtype, shape):
    u = vectors(shape, dtype)
    total = np.zeros(shape[1], dtype)
    for row in u:
        total = total + row
    out = np.empty(shape[1], dtype)
    assert np.array_equal(way(ops.row_sum)(u), total)                           # the order of the rows: to the last bit
    assert way(ops.row_sum)(u, 1 / 3, out=out) is out
    exact = [math.fsum(column) / 3 for column in u[:, :50].T.astype(float)]
    bound = shape[0] * np.finfo(dtype).eps * np.abs(u[:, :50]).sum(axis=0).max()
    np.testing.assert_allclose(out[:50], exact, rtol=0, atol=bound)


@both
def test_a_vector_is_a_single_row(way):
    for d in (1, 123, LONG):
        u, v = vectors(d, np.float32), vectors(d, np.float32, seed=2)
        V = v[None].copy()
        assert np.array_equal(way(ops.clip_step)(u[None], V, 1.0)[0], way(ops.clip_step)(u, v, 1.0))
        assert np.array_equal(V[0], v)
        assert np.array_equal(way(ops.clip)(u[None], 1.0)[0], way(ops.clip)(u, 1.0))
        assert way(ops.norms)(u[None])[0] == way(ops.norms)(u)[()]


@both
def test_a_vector_is_a_single_row_in_other_steps(way):
    for d in (1, 123, LONG):
        u, m, v = (vectors(d, np.float32, seed) for seed in (1, 2, 3))
        for name, constants in (("normalize_step", (0.5, 2.0)), ("momentum_step", (1.0, 0.4, 0.3))):
            states = [m, v] if name == "momentum_step" else [v]
            one, rows = [a.copy() for a in states], [a[None].copy() for a in states]
            f = way(getattr(ops, name))
            assert np.array_equal(f(u[None], *rows, *constants)[0], f(u, *one, *constants))
            assert all(np.array_equal(a, b[0]) for a, b in zip(one, rows, strict=True))


@both
def test_threshold_per_row(way):
    u = vectors((4, 123))
    tau = np.array([0.5, np.inf, 0.0, 3.0])
    c = way(ops.clip)(u, tau)
    for i in range(4):
        assert np.array_equal(c[i], way(ops.clip)(u[i], tau[i]))
    for same in (tau.astype(np.float32), tau.tolist(), np.repeat(tau, 2)[::2]):
        assert np.array_equal(way(ops.clip)(u, same), c)
    for one in (2, np.float32(2), np.float64(2), np.array(2.0)):
        assert np.array_equal(way(ops.clip)(u, one), way(ops.clip)(u, 2.0))
    v = np.zeros_like(u)
    assert np.array_equal(way(ops.clip_step)(u, v, tau), c) and np.array_equal(v, c)
    m, v = np.zeros_like(u), np.zeros_like(u)
    assert np.array_equal(way(ops.momentum_step)(u, m, v, tau, 1.0), c) and np.array_equal(v, c)


# edges

@both
@real
def test_zero_and_infinite_threshold(way, dtype):
    u = vectors((3, 50), dtype)
    u[1] = 0
    assert not way(ops.clip)(u, 0.0).any()
    assert way(ops.clip)(u, math.inf).tobytes() == u.tobytes()
    v = vectors((3, 50), dtype, seed=2)
    v0 = v.copy()
    assert not way(ops.clip_step)(u, v, 0.0).any() and np.array_equal(v, v0)


@both
@pytest.mark.parametrize("d", [50, LONG])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(way, d, bad):
    u, v = vectors((3, d), np.float32), vectors((3, d), np.float32, seed=2)
    u[1, d // 2] = bad
    v[1, 0] = -0.0
    v0, norms, alone = v.copy(), np.empty(3), v[[0, 2]]
    c = way(ops.clip_step)(u, v, 1.0, norms=norms)
    assert np.isnan(c[1]).all() and v[1].tobytes() == v0[1].tobytes() and not math.isfinite(norms[1])
    assert np.array_equal(c[[0, 2]], way(ops.clip_step)(u[[0, 2]], alone, 1.0)) and np.array_equal(v[[0, 2]], alone)
    assert np.isfinite(norms[[0, 2]]).all()
    for tau in (1.0, math.inf, 0.0):
        c = way(ops.clip)(u, tau)
        assert np.isnan(c[1]).all() and np.isfinite(c[[0, 2]]).all()


@both
@pytest.mark.parametrize("d", [50, LONG])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_change_no_state(way, d, bad):
    """Nor do other rows notice."""
    u, m, v = (vectors((3, d), np.float32, seed) for seed in (1, 2, 3))
    u[1, d // 2] = bad
    m[1, 0] = v[1, 0] = -0.0
    for f, states in ((lambda u, v, **o: way(ops.normalize_step)(u, v, 0.5, 2.0, **o), [v]),
                      (lambda u, m, v, **o: way(ops.momentum_step)(u, m, v, 1.0, 0.4, 0.3, **o), [m, v]),
                      (lambda u, m, **o: way(ops.momentum_step)(u, m, None, 1.0, 0.4, **o), [m])):
        changed, alone, norms = [a.copy() for a in states], [a[[0, 2]] for a in states], np.empty(3)
        c = f(u, *changed, norms=norms)
        assert np.isnan(c[1]).all() and not math.isfinite(norms[1])
        assert np.array_equal(c[[0, 2]], f(u[[0, 2]], *alone))
        for old, new, other in zip(states, changed, alone, strict=True):
            assert new[1].tobytes() == old[1].tobytes() and np.array_equal(new[[0, 2]], other)
            assert not np.array_equal(new[[0, 2]], old[[0, 2]])


@both
def test_difference_that_overflows(way):
    u, v = np.full((1, 9), 3e38, np.float32), np.full((1, 9), -3e38, np.float32)
    with np.errstate(over="ignore"):
        assert np.isnan(way(ops.clip_step)(u, v, 1.0)).all() and (v == np.float32(-3e38)).all()


@both
@pytest.mark.parametrize("d", [50, LONG])
@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-42])
def test_huge_and_tiny(way, d, size):
    u = (np.sign(vectors(d)) * size).astype(np.float32)
    norm = math.sqrt(d) * abs(float(u[0]))
    np.testing.assert_allclose(way(ops.norms)(u), norm, rtol=1e-12)
    for tau in (1e-3, norm / 3, norm * 3):
        c = way(ops.clip)(u, tau).astype(float)
        assert length(c) <= min(tau, norm) * (1 + 1e-6) or size < 1e-38        # tiny elements have few bits
        assert np.isfinite(c).all()
    assert np.array_equal(way(ops.clip)(u, norm * 3), u)


@both
def test_a_factor_without_full_precision_is_rounded_down(way):
    u = np.full(1000, 3e38, np.float32)                    # τ/‖u‖ = 1e-43: 7 bits in float32
    assert length(way(ops.clip)(u, 1e-3)) <= 1e-3 * (1 + 1e-6)


@both
@real
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0), (0,)])
def test_empty(way, dtype, shape):
    u = np.zeros(shape, dtype)
    assert np.array_equal(way(ops.norms)(u), np.zeros(shape[:-1]))
    assert way(ops.clip)(u, 1.0).shape == shape
    assert way(ops.clip_step)(u, u.copy(), 1.0).shape == shape
    assert way(ops.normalize_step)(u, u.copy(), 1.0, 1.0).shape == shape
    assert way(ops.momentum_step)(u, u.copy(), u.copy(), 1.0, 0.5).shape == shape
    assert way(ops.local_step)(u, u.copy(), np.zeros(shape[:-1]), 1.0, 0.5).shape == shape
    way(ops.apply)(u, u.copy(), u.copy(), 1.0)
    if len(shape) == 2:
        assert np.array_equal(way(ops.row_sum)(u), np.zeros(shape[1], dtype))


@both
def test_nothing_to_clip_writes_nothing(way):
    u = vectors((3, 50))
    u.flags.writeable = False
    copy, out = way(ops.clip)(u, math.inf), np.empty_like(u)
    assert np.array_equal(copy, u) and not np.shares_memory(copy, u)
    assert way(ops.clip)(u, math.inf, out=out) is out and np.array_equal(out, u)
    for tau in (1e9, math.inf):
        w = vectors((3, LONG), np.float32)
        before = w.tobytes()
        assert way(ops.clip)(w, tau, out=w).tobytes() == before


# memory layouts and dtypes that the kernels leave to the definitions

@pytest.mark.parametrize("layout", [
    lambda a: np.repeat(a, 2, axis=1)[:, ::2], np.asfortranarray, lambda a: a[::-1].copy()[::-1],
    lambda a: a.astype(a.dtype.newbyteorder()),
    lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
], ids=["strided", "fortran", "backwards", "byteorder", "unaligned"])
@real
def test_other_layouts(layout, dtype):
    u, v, out = layout(vectors((6, 40), dtype)), vectors((6, 40), dtype, seed=2), np.zeros((6, 40), dtype)
    expected = np.array([clipped(row, 5.0) for row in u])
    close(ops.norms(u), [length(row) for row in u], np.float64)
    close(ops.clip(u, 5.0), expected, dtype)
    if u.dtype == out.dtype:
        close(ops.clip(u, 5.0, out=out), expected, dtype)
        step = np.array([clipped(row, 5.0) for row in u - v])
        assert ops.clip_step(u, v.copy(), 5.0, out=out) is out
        close(out, step, dtype)
        assert ops.momentum_step(u, v.copy(), np.asfortranarray(v), 5.0, 1.0, out=out) is out
        close(out, step, dtype)
        expected = np.array([row * (2.0 / (3.0 + length(row))) for row in (u - v).astype(float)])
        assert ops.normalize_step(u, np.asfortranarray(v), 3.0, 2.0, out=out) is out
        close(out, expected, dtype)
        np.testing.assert_allclose(ops.row_sum(u), u.astype(float).sum(axis=0), rtol=0, atol=1e-5)


def test_strided_outputs():
    u = vectors((6, 40))
    out, norms = np.zeros((6, 80))[:, ::2], np.zeros(12)[::2]
    assert ops.clip(u, 5.0, out=out, norms=norms) is out
    close(out, [clipped(row, 5.0) for row in u], np.float64)
    close(norms, [length(row) for row in u], np.float64)
    x, v = np.zeros(80)[::2], np.ones(80)[::2]
    ops.apply(x, v, np.ones(40), 0.5)
    assert (x == -1).all() and (v == 2).all()


@both
def test_mistakes_are_named(way):
    u, v = np.full((2, 3), 5, np.float32), np.zeros((2, 3), np.float32)
    fixed = np.zeros((2, 3), np.float32)
    fixed.flags.writeable = False
    clip, step, apply, row_sum, norms = map(way, (ops.clip, ops.clip_step, ops.apply, ops.row_sum, ops.norms))
    normalize, momentum, local = way(ops.normalize_step), way(ops.momentum_step), way(ops.local_step)
    for message, call in {
        "tau is -1": lambda: clip(u, -1.0), "tau is nan": lambda: clip(u, math.nan),
        r"tau is \[": lambda: step(u, v, np.array([1.0, -1.0])), "tau has the shape": lambda: clip(u, np.ones(3)),
        "out is float32, shape": lambda: clip(u, 1.0, out=np.empty((3, 2), np.float32)),
        "out is float64": lambda: clip(u, 1.0, out=np.empty((2, 3))),
        "norms is float64, shape": lambda: clip(u, 1.0, norms=np.empty(3)),
        "norms is float32": lambda: norms(u, out=np.empty(2, np.float32)),
        "v is float64": lambda: step(u, v.astype(float), 1.0), "v is float32, shape": lambda: step(u, v[:1], 1.0),
        "out must not be v": lambda: step(u, v, 1.0, out=v), "mean is float32, shape": lambda: apply(u, v, u[0], 1.0),
        "normalize_step: out must not be v": lambda: normalize(u, v, 1.0, 1.0, out=v),
        "alpha is 0": lambda: normalize(u, v, 0.0, 1.0), "alpha is nan": lambda: normalize(u, v, math.nan, 1.0),
        "and beta -1": lambda: normalize(u, v, 1.0, -1.0), "tau is -2": lambda: momentum(u, v, None, -2.0, 0.5),
        "m is float64": lambda: momentum(u, v.astype(float), v, 1.0, 0.5),
        "v is float32, shape ": lambda: momentum(u, v, v[:1], 1.0, 0.5),
        "must be three arrays": lambda: momentum(u, v, v, 1.0, 0.5),
        "must be three arrays ": lambda: momentum(u, v, None, 1.0, 0.5, out=v),
        " must be three arrays": lambda: momentum(u, u.copy(), v, 1.0, 0.5, out=v),
        "u has the shape": lambda: row_sum(u[0]), "expected float32, shape": lambda: row_sum(u, out=np.zeros(3)),
        "u is int64": lambda: clip(np.ones((2, 3), np.int64), 1.0), r"shape \(\)": lambda: norms(np.zeros(())),
        "x is float32, shape": lambda: local(v[:1], u, np.ones(2), 1.0, 0.5),
        "norms is float64, shape ": lambda: local(v, u, np.ones(3), 1.0, 0.5), "tau is -3": lambda: local(
            v, u, np.ones(2), -3.0, 0.5), "origin is float32": lambda: local(v, u, np.ones(2), 1.0, 0.5, origin=u),
        "m must be an array of its own": lambda: local(v, u, np.ones(2), 1.0, 0.5, m=u, momentum=0.1),
        "read-only": lambda: clip(u, 1.0, out=fixed), "read-only ": lambda: step(u, fixed, 1.0),
    }.items():
        with pytest.raises(ValueError, match=message.strip()):
            call()
    assert (u == 5).all() and not v.any()


# C against the definition, and against itself

CALLS = {                      # name: the arrays that a call gives back or changes
    "norms": lambda f, u, v, tau: (f(u),),
    "clip": lambda f, u, v, tau: (f(u, tau),),
    "clip_step": lambda f, u, v, tau: (f(u, v, tau), v),
    "normalize_step": lambda f, u, v, tau: (f(u, v, 4.0, 3.0), v),
    "momentum_step": lambda f, u, v, tau: (f(u, m := u[::-1].copy(), v, tau, 0.3, 0.2), m, v),
    "local_step": lambda f, u, v, tau: (f(v, u, np.linspace(1, 9, len(u)), 3.0, 0.3, False, 0.1, m := u[::-1].copy(),
                                          0.4, u[0].copy()), m),
    "apply": lambda f, u, v, tau: (f(u, v, u[::-1].copy(), 0.1, 0.4), u, v)[1:],
    "row_sum": lambda f, u, v, tau: (f(u, 0.1),),
}


def test_kernels_that_were_built_are_used():
    assert device.compiled() == bool(list(Path(kernels.__file__).parent.glob("_cpu*")))


@needs_c
@real
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (20, 123), (7, 33), (300, 700), (2, LONG), (1, 65536), (1, 65535)])
def test_c_is_the_definition(name, dtype, shape):
    u, v = vectors(shape, dtype), vectors(shape, dtype, seed=2)
    tau = np.linspace(0.5, 1.5, shape[0]) * math.sqrt(2 * shape[1])
    got = CALLS[name](getattr(ops, name), u.copy(), v.copy(), tau)
    expected = CALLS[name](getattr(ops, name).definition, u.copy(), v.copy(), tau)
    bound = {"norms": 1e-13, "apply": 0, "row_sum": 0}.get(name, 4 * np.finfo(dtype).eps + 1e-13)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


@needs_c
@real
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(20, 123), (600, 70), (2, LONG), (1, 1 << 18)])
def test_bytes_do_not_depend_on_the_threads(name, dtype, shape):
    u, v = vectors(shape, dtype), vectors(shape, dtype, seed=2)

    def run(threads):
        with threadpool_limits(threads):
            return b"".join(a.tobytes() for a in CALLS[name](getattr(ops, name), u.copy(), v.copy(), 3.0))

    assert len({run(threads) for threads in (1, 2, 3, 5)}) == 1


# laws

rows = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(
    dtype, arrays.array_shapes(min_dims=1, max_dims=2, max_side=70),
    elements=st.floats(-1e6, 1e6, width=np.finfo(dtype).bits, allow_subnormal=False)))
thresholds = st.one_of(st.just(0.0), st.floats(1e-6, 1e9))


@both
@settings(max_examples=50, deadline=None)
@given(u=rows, tau=thresholds)
def test_laws_of_clip(way, u, tau):
    before, eps = u.copy(), 4 * float(np.finfo(u.dtype).eps)
    c = way(ops.clip)(u, tau)
    assert u.tobytes() == before.tobytes()
    for u_i, c_i in zip(u.reshape(-1, u.shape[-1]), c.reshape(-1, u.shape[-1]), strict=True):
        norm = length(u_i)
        assert length(c_i) <= tau * (1 + eps)
        if norm <= tau * (1 - 1e-12):
            assert c_i.tobytes() == u_i.tobytes()
        elif norm > tau * (1 + 1e-12) and tau > 0:
            np.testing.assert_allclose(c_i.astype(float) * (norm / tau), u_i, rtol=eps, atol=norm * 1e-37 / tau)
        elif tau == 0:
            assert not c_i.any()
    aliased = u.copy()
    assert way(ops.clip)(aliased, tau, out=aliased).tobytes() == c.tobytes()


@both
@settings(max_examples=50, deadline=None)
@given(u=rows, tau=thresholds, seed=st.integers(0, 9))
def test_laws_of_clip_step(way, u, tau, seed):
    """‖u − (v + c)‖ = max(0, ‖u − v‖ − τ): the reason why Clip21's error vanishes after finitely many rounds."""
    v = vectors(u.shape, u.dtype, seed)
    u, v0 = u.copy(), v.copy()
    c, before = way(ops.clip_step)(u, v, tau), u.astype(float) - v0
    size = max(float(np.abs(u).max()), 8.0) * math.sqrt(u.shape[-1]) * float(np.finfo(u.dtype).eps) * 4
    assert np.array_equal(v, v0 + c)
    for old, new in zip(before.reshape(-1, u.shape[-1]), (u.astype(float) - v).reshape(-1, u.shape[-1]), strict=True):
        assert abs(length(new) - max(0.0, length(old) - tau)) <= size
