"""ops.top_k and ops.clip_step_top_k against a stable sort, as NumPy definition and as C kernel."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from threadpoolctl import threadpool_limits

from mpiclip import device, ops

BLOCK, CHUNK, LONG_ROW = 4096, 16384, 65536           # of kernels/select.c and kernels.h
DTYPES = [np.float32, np.float64]
needs_c = pytest.mark.skipif(not device.compiled(), reason="no C kernels")
both = pytest.mark.parametrize("way", [pytest.param(lambda f: f, id="compiled", marks=needs_c),
                                       pytest.param(lambda f: f.definition, id="definition")])
real = pytest.mark.parametrize("dtype", DTYPES)


def rankings(u):
    """The places of each row's numbers by (−|x|, place), or None for a row that is not finite."""
    return [np.argsort(-np.abs(u_i), kind="stable") if np.isfinite(u_i).all() else None
            for u_i in u.reshape(-1, u.shape[-1])]


def check(result, u, k, ranking=None):
    """The result is what is expected, to the last bit, for each row of u."""
    indices, values = result
    assert indices.dtype == np.int32 and values.dtype == u.dtype
    assert indices.shape == values.shape == (*u.shape[:-1], k)
    for u_i, indices_i, values_i, order in zip(u.reshape(-1, u.shape[-1]), indices.reshape(-1, k),
                                               values.reshape(-1, k), ranking or rankings(u), strict=True):
        if order is None:
            assert np.array_equal(indices_i, np.arange(k)) and np.isnan(values_i).all()
        else:
            assert np.array_equal(indices_i, np.sort(order[:k]))
            assert values_i.tobytes() == u_i[indices_i].tobytes()


def row(kind, d, dtype, seed=1):
    """d numbers of some kind."""
    random = np.random.default_rng(seed)
    g = random.standard_normal(d)
    u = {"gaussian": lambda: g,
         "cauchy": lambda: random.standard_cauchy(d),
         "tied": lambda: random.integers(-3, 4, d),
         "equal": lambda: np.where(g > 0, 0.1, -0.1),
         "zeros": lambda: np.where(g > 0, 0.0, -0.0),
         "mostly equal": lambda: np.where(random.random(d) < 0.003, 2 * g, 1),
         "sparse": lambda: np.where(random.random(d) < 0.003, g, -0.0),
         "ascending": lambda: np.sort(np.abs(g)),
         "descending": lambda: -np.sort(-np.abs(g)),
         "huge": lambda: g / 10 * float(np.finfo(dtype).max),
         "denormal": lambda: random.integers(-100, 100, d) * float(np.finfo(dtype).smallest_subnormal),
         "all sizes": lambda: np.ldexp(g, random.integers(np.finfo(dtype).minexp - 20, np.finfo(dtype).maxexp - 3, d)),
         "last bits": lambda: 1 + random.integers(0, 50, d) * np.finfo(dtype).eps}[kind]()
    return u.astype(dtype)


KINDS = ["gaussian", "cauchy", "tied", "equal", "zeros", "mostly equal", "sparse", "ascending", "descending", "huge",
         "denormal", "all sizes", "last bits"]


def some_k(d):
    return sorted({k for k in (1, 2, 3, d // 100, d // 10, d // 2, d - 1, d) if 1 <= k <= d})


# the right elements

@both
@real
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (2,), (5, 7), (3, 31), (2, 33), (20, 123), (1, 1000)])
def test_top_k(way, dtype, kind, shape):
    u = row(kind, math.prod(shape), dtype).reshape(shape)
    before, ranking = u.tobytes(), rankings(u)
    for k in range(1, shape[-1] + 1) if shape[-1] < 40 else some_k(shape[-1]):
        check(way(ops.top_k)(u, k), u, k, ranking)
    assert u.tobytes() == before


@needs_c
@real
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, LONG_ROW - 1, LONG_ROW, 5 * CHUNK + 3])
def test_top_k_of_long_rows(dtype, kind, d):
    u = row(kind, d, dtype)
    ranking = rankings(u)
    for k in some_k(d):
        check(ops.top_k(u, k), u, k, ranking)


@needs_c
@real
def test_a_draw_that_misleads(dtype):
    """Whatever the sample says: rows in which any of the numbers is drawn, or none, from among the largest."""
    d, k = 100_003, 1000
    for period in (2, 12, 13, 32, 1024):
        for high in range(0, period, period // 2):
            u = np.random.default_rng(high).standard_normal(d).astype(dtype)
            u[high::period] *= 1000
            check(ops.top_k(u, k), u, k)
    u = np.zeros(d, dtype)
    u[: d // 3] = np.arange(d // 3)             # every number of this piece is larger than all before it
    ranking = rankings(u[None])
    for k in (1, 10, 5000):
        check(ops.top_k(u, k), u, k, ranking)


@needs_c
@real
def test_a_sample_that_is_all_of_the_largest(dtype):
    """The places that the kernel draws hold the largest numbers: its floor is far too high, fewer than k candidates are
    found, and the row is passed over again. In the second row every number is then a candidate; in the third those
    that stay when they become too many are but one bit smaller than others to come."""
    d, k = 1 << 17, 5000
    drawn, state = [], 1
    for i in range(d // 32):
        state = (state * 1664525 + 1013904223) % 2**32
        drawn.append(int((i + state / 2**32) * 32))
    place = np.arange(d)
    rise = np.where(place < d // 2, 1, 1 + np.finfo(dtype).eps)
    u = np.stack([np.random.default_rng(0).standard_normal(d), place, rise])
    u = u.astype(dtype)
    u[:, drawn] += 10 * d
    assert (np.partition(u, d - len(drawn) - 1)[:, -len(drawn) - 1] < 10 * d - 100).all() and len(drawn) < k
    with threadpool_limits(1):
        check(ops.top_k(u, k), u, k)


@both
@real
@pytest.mark.parametrize("d", [1, 10, 70_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite(way, dtype, d, bad):
    u = row("gaussian", 4 * d, dtype).reshape(4, d)
    u[1, d // 2], u[2] = bad, bad
    ranking = rankings(u)
    for k in some_k(d):
        indices, values = way(ops.top_k)(u, k)
        check((indices, values), u, k, ranking)
        assert np.array_equal(indices[1:3], [np.arange(k)] * 2) and np.isnan(values[1:3]).all()
        assert np.isfinite(values[[0, 3]]).all()


@both
@real
def test_signs_of_zero_and_payloads_stay(way, dtype):
    u = np.array([0.0, -0.0, 1.0, -0.0, 0.0], dtype)
    assert way(ops.top_k)(u, 4)[1].tobytes() == np.array([0.0, -0.0, 1.0, -0.0], dtype).tobytes()


# clip_step_top_k: what clip_step does, at k places

@both
@real
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (20, 123), (3, BLOCK + 33), (1, LONG_ROW - 1), (2, LONG_ROW)])
def test_clip_step_top_k(way, dtype, kind, shape):
    size = math.prod(shape)
    u, v = row(kind, size, dtype).reshape(shape), row("gaussian", size, dtype, 2).reshape(shape)
    v[..., ::2] = 0
    if kind in ("denormal", "all sizes"):
        v[...] = -0.0
    norm, step = np.empty(shape[:-1]), way(ops.clip_step)
    step(u, v.copy(), 1.0, norms=norm)          # not finite: huge in float64, in which the norm overflows
    e = np.where(np.isfinite(norm)[..., None], u - v, np.nan).astype(dtype)
    ranking = rankings(e)
    for k in (1, max(1, shape[-1] // 50), shape[-1]):
        for tau in (0.0, float(np.nanmedian(norm)) * 0.999, math.inf, *([norm] if np.isfinite(norm).all() else [])):
            v_all, v_k, norms, u_before = v.copy(), v.copy(), np.full(shape[:-1], 7.0), u.tobytes()
            c = step(u, v_all, tau)
            indices, values = way(ops.clip_step_top_k)(u, v_k, tau, k, norms=norms)
            check((indices, np.take_along_axis(e, indices, -1)), e, k, ranking)
            assert values.dtype == dtype and values.tobytes() == np.take_along_axis(c, indices, -1).tobytes()
            expected_v = v.copy()
            np.put_along_axis(expected_v, indices, np.take_along_axis(v_all, indices, -1), -1)
            assert v_k.tobytes() == expected_v.tobytes()
            assert norms.tobytes() == norm.tobytes() and u.tobytes() == u_before


@both
@real
def test_k_is_d_is_clip_step(way, dtype):
    u, v = row("gaussian", 400, dtype).reshape(4, 100), row("gaussian", 400, dtype, 2).reshape(4, 100)
    v_all = v.copy()
    c = way(ops.clip_step)(u, v_all, 2.0)
    indices, values = way(ops.clip_step_top_k)(u, v, 2.0, 100)
    assert np.array_equal(indices, [np.arange(100)] * 4)
    assert values.tobytes() == c.tobytes() and v.tobytes() == v_all.tobytes()


@both
@pytest.mark.parametrize("d", [50, 70_001])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_steps_of_rows_that_are_not_finite(way, d, bad):
    u, v = row("gaussian", 3 * d, np.float32).reshape(3, d), row("gaussian", 3 * d, np.float32, 2).reshape(3, d)
    u[1, d // 2], v[1, d // 2], v[1, 0] = bad, -bad if bad == 3e38 else 0, -0.0     # 3e38: the difference overflows
    before, norms, alone = v.copy(), np.empty(3), v[[0, 2]]
    for k in (1, 5, d):
        v = before.copy()
        with np.errstate(over="ignore"):
            indices, values = way(ops.clip_step_top_k)(u, v, 1.0, k, norms=norms)
        assert np.array_equal(indices[1], np.arange(k)) and np.isnan(values[1]).all()
        assert v[1].tobytes() == before[1].tobytes() and not math.isfinite(norms[1])
        alone = before[[0, 2]]
        others = way(ops.clip_step_top_k)(u[[0, 2]], alone, 1.0, k)
        assert np.array_equal(indices[[0, 2]], others[0]) and np.array_equal(values[[0, 2]], others[1])
        assert np.array_equal(v[[0, 2]], alone) and np.isfinite(norms[[0, 2]]).all()


@both
def test_thresholds(way):
    u = row("gaussian", 4 * 123, np.float64).reshape(4, 123)
    tau = np.array([0.5, np.inf, 0.0, 3.0])
    v = np.zeros_like(u)
    indices, values = way(ops.clip_step_top_k)(u, v, tau, 9)
    for i in range(4):
        one = way(ops.clip_step_top_k)(u[i], np.zeros(123), tau[i], 9)
        assert np.array_equal(indices[i], one[0]) and np.array_equal(values[i], one[1])
    check((indices, np.take_along_axis(u, indices, -1)), u, 9)          # also where clipping leaves nothing
    for same in (tau.astype(np.float32), tau.tolist(), np.repeat(tau, 2)[::2]):
        assert np.array_equal(way(ops.clip_step_top_k)(u, np.zeros_like(u), same, 9)[1], values)
    for number in (2, np.float32(2), np.array(2.0)):
        assert np.array_equal(way(ops.clip_step_top_k)(u, np.zeros_like(u), number, 9)[1],
                              way(ops.clip_step_top_k)(u, np.zeros_like(u), 2.0, 9)[1])


# edges

@both
@real
def test_no_rows(way, dtype):
    u = np.zeros((0, 5), dtype)
    for indices, values in (way(ops.top_k)(u, 2), way(ops.clip_step_top_k)(u, u.copy(), 1.0, 2, norms=np.empty(0))):
        assert indices.shape == values.shape == (0, 2) and indices.dtype == np.int32 and values.dtype == dtype


@both
def test_mistakes_are_named(way):
    u, v = np.full((2, 3), 5, np.float32), np.zeros((2, 3), np.float32)
    fixed = np.zeros((2, 3), np.float32)
    fixed.flags.writeable = False
    top_k, step = way(ops.top_k), way(ops.clip_step_top_k)
    for message, call in {
        "k is 0, of d = 3": lambda: top_k(u, 0), "k is 4": lambda: top_k(u, 4), "k is -1": lambda: top_k(u, -1),
        "k is 1.0": lambda: top_k(u, 1.0), "k is 1, of d = 0": lambda: top_k(np.zeros((2, 0)), 1),
        "k is 5": lambda: step(u, v, 1.0, 5), "k is 0": lambda: step(u[0], v[0], 1.0, 0),
        "u is int64": lambda: top_k(np.ones((2, 3), np.int64), 1), r"shape \(\)": lambda: top_k(np.zeros(()), 1),
        "tau is -1": lambda: step(u, v, -1.0, 1), "tau is nan": lambda: step(u, v, math.nan, 1),
        r"tau is \[": lambda: step(u, v, np.array([1.0, -1.0]), 1),
        "tau has the shape": lambda: step(u, v, np.ones(3), 1),
        "v is float64": lambda: step(u, v.astype(float), 1.0, 1), "v is float32, shape": lambda: step(u, v[:1], 1.0, 1),
        "norms is float64, shape": lambda: step(u, v, 1.0, 1, norms=np.empty(3)), "read-only": lambda: step(
            u, fixed, 1.0, 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert (u == 5).all() and not v.any()


@pytest.mark.parametrize("layout", [
    lambda a: np.repeat(a, 2, axis=1)[:, ::2], np.asfortranarray, lambda a: a[::-1].copy()[::-1],
    lambda a: a.astype(a.dtype.newbyteorder()), lambda a: a.reshape(2, 3, -1),
    lambda a: np.frombuffer(bytearray(b"\0" + a.tobytes()), np.uint8)[1:].view(a.dtype).reshape(a.shape),
], ids=["strided", "fortran", "backwards", "byteorder", "three axes", "unaligned"])
@real
def test_other_layouts(layout, dtype):
    u, v = row("gaussian", 240, dtype).reshape(6, 40), row("gaussian", 240, dtype, 2).reshape(6, 40)
    for k in (1, 7, 40):
        for got, wanted in zip(ops.top_k(layout(u), k), ops.top_k(u, k), strict=True):
            assert np.array_equal(got.reshape(wanted.shape), wanted)
        v_there, v_here = layout(v), v.copy()
        got, wanted = ops.clip_step_top_k(layout(u), v_there, 1.0, k), ops.clip_step_top_k(u, v_here, 1.0, k)
        assert np.array_equal(got[0].reshape(6, k), wanted[0])
        np.testing.assert_allclose(got[1].reshape(6, k), wanted[1], rtol=4 * np.finfo(dtype).eps)
        np.testing.assert_allclose(v_there.reshape(6, 40), v_here, rtol=1e-5)


def test_numpy_s_whole_numbers():
    u = row("gaussian", 50, np.float32)
    for k in (np.int64(3), np.int32(3), np.uint8(3)):
        assert np.array_equal(ops.top_k(u, k)[0], ops.top_k(u, 3)[0])


# C against itself

@needs_c
@real
@pytest.mark.parametrize("kind", ["gaussian", "tied", "mostly equal", "ascending", "descending"])
@pytest.mark.parametrize("shape", [(20, 123), (600, 70), (2, 70_001), (1, 1 << 18), (1, LONG_ROW)])
def test_bytes_do_not_depend_on_the_threads(dtype, kind, shape):
    u, v = (row(kind, math.prod(shape), dtype, seed).reshape(shape) for seed in (1, 2))

    def run(threads, k):
        with threadpool_limits(threads):
            v_new, norms = v.copy(), np.empty(shape[0])
            arrays = *ops.top_k(u, k), *ops.clip_step_top_k(u, v_new, 3.0, k, norms=norms), v_new, norms
            return b"".join(a.tobytes() for a in arrays)

    for k in (1, shape[1] // 50, shape[1] // 2):
        assert len({run(threads, k) for threads in (1, 2, 3, 7)}) == 1


# laws

rows = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(
    dtype, arrays.array_shapes(min_dims=1, max_dims=2, max_side=70), elements=st.one_of(
        st.floats(width=np.finfo(dtype).bits), st.sampled_from([0.0, -0.0, 1.0, -1.0]))))


@both
@settings(max_examples=200, deadline=None)
@given(u=rows, data=st.data())
def test_any_row(way, u, data):
    k = data.draw(st.integers(1, u.shape[-1]))
    check(way(ops.top_k)(u, k), u, k)


@both
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 300), data=st.data())
def test_it_is_a_contraction(way, seed, d, data):
    """‖top_k(u) − u‖² ≤ (1 − k/d) ‖u‖²: what EF21 and Press-Clip21 need to know of it."""
    u, k = row(data.draw(st.sampled_from(["gaussian", "cauchy", "tied", "equal"])), d, np.float64, seed), data.draw(
        st.integers(1, d))
    indices, values = way(ops.top_k)(u, k)
    rest = u.copy()
    rest[indices] -= values
    assert rest @ rest <= (1 - k / d) * (u @ u) * (1 + 1e-12)
