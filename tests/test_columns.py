"""mpiclip.columns against float64 references written from the definitions, as NumPy definition and as C kernel."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from mpiclip import columns, device

DTYPES = [np.float32, np.float64]
EPS = {np.float32: 1e-6, np.float64: 1e-14}
needs_c = pytest.mark.skipif(not device.compiled(), reason="no C kernels")
both = pytest.mark.parametrize("way", [pytest.param(lambda f: f, id="compiled", marks=needs_c),
                                       pytest.param(lambda f: f.definition, id="definition")])
real = pytest.mark.parametrize("dtype", DTYPES)
D = 531             # more than a panel of the kernel's in either dtype, and no multiple of its tiles


def values(kind, shape, dtype, seed=1):
    """Rows of some kind: columns of a larger array."""
    random = np.random.default_rng(seed)
    large = {"random": lambda s: random.standard_normal(s), "tied": lambda s: random.integers(-2, 3, s),
             "equal": lambda s: np.full(s, 0.1), "zeros": lambda s: np.where(random.random(s) < 0.5, 0.0, -0.0),
             "huge": lambda s: random.standard_normal(s) * 10.0**random.choice([-30, 0, 30], s),
             "near": lambda s: 1 + 1e-6 * random.standard_normal(s)}[kind]((shape[0], shape[1] + 7))
    return large.astype(dtype)[:, 5:shape[1] + 5]


def mixing(kind, k, b, seed=2):
    """(k, b) weights: convex and dense, rows chosen and repeated, rows shortened."""
    random = np.random.default_rng(seed)
    W = {"dense": lambda: random.dirichlet(np.ones(b), k), "chosen": lambda: np.eye(b)[random.integers(0, b, k)],
         "shortened": lambda: np.eye(k, b) * random.random((k, 1))}[kind]()
    return W


def mixed(X, E, W):
    """W [X; E] in float64."""
    Y = X if E is None else np.vstack([X, E])
    return Y.astype(np.float64) if W is None else W @ Y.astype(np.float64)


def sides(f, rows):
    """(median, trimmed mean, mean around the median) of each column of rows in float64, from the definitions; the
    distances to the median are rounded to the dtype of rows."""
    ascending = np.sort(rows, axis=0)
    wide, k = ascending.astype(np.float64), len(rows)
    m = np.median(rows, axis=0).astype(rows.dtype)
    with np.errstate(over="ignore"):
        far = np.abs(ascending - m)
    nearest = np.argsort(far, axis=0, kind="stable")[:k - f]        # of equally far ones the smaller: it comes first
    return np.median(wide, axis=0), wide[f:k - f].mean(0), np.take_along_axis(wide, nearest, 0).mean(0)


RULES = [columns.median, columns.trimmed_mean, columns.mean_around_median]


def close(result, expected, rows, eps):
    """Up to a few roundings of the largest number of each column."""
    assert result.dtype.kind == "f" and result.shape == expected.shape
    assert (np.abs(result - expected) <= eps * np.abs(rows).max(0, initial=0) + 1e-44).all()


@both
@real
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "zeros", "huge"])
def test_coordinate_rules(way, dtype, kind):
    for n in (1, 2, 3, 8, 9, 20, 33, 64, 71):
        X = values(kind, (n, D), dtype)
        for f in {0, n // 5, (n - 1) // 2}:
            expected = sides(f, X)
            for rule, right in zip(RULES, expected, strict=True):
                result = way(rule)(X) if rule is columns.median else way(rule)(X, f)
                assert result.dtype == dtype
                close(result, right, X, EPS[dtype])


@needs_c
@real
def test_every_network_sorts(dtype):
    """Of every number of rows and every f; zeros and ones in every number tell right networks from wrong ones."""
    random = np.random.default_rng(3)
    for k in [*range(1, 42), 64, 100, 200]:
        X = (random.random((k, 120)) < np.linspace(0, 1, 120)).astype(dtype)
        X[:, ::3] = random.permuted(np.tile(np.arange(k), (40, 1)), axis=1).T
        for f in range((k + 1) // 2) if k < 42 else (0, k // 5, k // 3, (k - 1) // 2):
            for rule, right in zip(RULES, sides(f, X), strict=True):
                result = rule(X) if rule is columns.median else rule(X, f)
                close(result, right, X, EPS[dtype])


@both
@real
@pytest.mark.parametrize("kind", ["dense", "chosen", "shortened"])
def test_further_rows_and_mixtures(way, dtype, kind):
    for n, m, k, d in ((1, 0, 1, 1), (5, 1, 5, 70), (12, 2, 13, D), (20, 0, 7, D), (66, 1, 67, D), (9, 2, 11, 64)):
        X, v = values("random", (n, d), dtype), values("random", (1, d), dtype, 5)[0].copy()
        E = np.ascontiguousarray(values("random", (m, d), dtype, 4)) if m else None
        before = X.tobytes()
        for W in (mixing(kind, k, n + m), None):
            rows = mixed(X, E, W)
            f, eps = (len(rows) - 1) // 3, EPS[dtype]
            close(way(columns.median)(X, E, W), np.median(rows, axis=0), rows, eps)
            close(way(columns.trimmed_mean)(X, f, E, W), sides(f, rows)[1], rows, eps)
            if W is None or kind == "chosen":                  # what mixing rounds may decide between equally near ones
                close(way(columns.mean_around_median)(X, f, E, W), sides(f, rows.astype(dtype))[2], rows, eps)
            if len(rows) > 1:
                close(way(columns.deviation)(X, E, W), rows.std(0, ddof=1), rows, eps)
            np.testing.assert_allclose(way(columns.distances)(X, v, E, W), ((rows - v) ** 2).sum(1), rtol=20 * eps,
                                       atol=20 * eps * d)
        assert X.tobytes() == before


@both
@real
@pytest.mark.parametrize("common", [False, True])
def test_mixed_rows(way, dtype, common):
    """Whatever of the weights is called common; a row that nobody weighs may be anything. 1600 columns: whole lines."""
    for n, m, k, d in ((1, 0, 1, 1), (5, 1, 5, 70), (12, 2, 13, D), (20, 0, 20, 1600), (66, 1, 67, D)):
        X, E = values("random", (n, d), dtype), np.ascontiguousarray(values("random", (m, d), dtype, 4)) if m else None
        W = mixing("dense", k, n + m) + 1.0 * mixing("chosen", k, n + m, 3)
        if n > 5:
            W[:, 3], X[3] = 0, np.nan
        W[:, 0] = 0.25
        part = np.median(W, axis=0) if common else None
        expected = mixed(np.where(np.isnan(X), 0, X), E, W)
        close(way(columns.mixed)(X, W - part if common else W, E, part), expected, np.array([[9.0]]), 3 * EPS[dtype])


@both
@real
def test_a_row_without_weight_is_not_read(way, dtype):
    X, w, W = values("random", (9, D), dtype), np.linspace(-1, 2, 9), mixing("dense", 5, 9)
    w[[3, 4]], W[:, [3, 4]] = 0, 0
    expected = np.delete(w, [3, 4]) @ np.delete(X, [3, 4], 0).astype(float), way(columns.trimmed_mean)(X, 1, None, W)
    X[3], X[4] = np.nan, np.inf
    close(way(columns.combine)(X[:7], w, X[7:].copy()), expected[0], X[[0, 1, 2, 5, 6, 7, 8]], EPS[dtype])
    assert way(columns.trimmed_mean)(X, 1, None, W).tobytes() == expected[1].tobytes()
    assert not way(columns.combine)(X, np.zeros(9)).any()


@both
def test_of_two_equally_far_the_smaller_is_the_nearer(way):
    X = np.array([[-1.0], [0.0], [1.0]])
    assert way(columns.mean_around_median)(X, 1) == -0.5


@both
@real
def test_deviation_of_rows_that_are_nearly_equal(way, dtype):
    X = values("near", (12, D), dtype)
    np.testing.assert_allclose(way(columns.deviation)(X), X.astype(float).std(0, ddof=1), rtol=1e-6, atol=1e-12)


@both
def test_sums_of_large_numbers_do_not_overflow(way):
    X = np.full((6, 3), 3e38, np.float32)
    for result in (way(columns.median)(X), way(columns.trimmed_mean)(X, 1), way(columns.combine)(X, np.full(6, 1 / 6))):
        np.testing.assert_allclose(result, 3e38, rtol=1e-6)


def products(X, E, scale, centre):
    """The matrix that gram returns, in long double."""
    Y = np.vstack([X, E]).astype(np.longdouble) * scale[:, None]
    mean = Y[:len(X)].mean(0)
    Z = np.vstack([Y - centre[:, None] * mean, mean])
    return Z @ Z.T


def differences(G):
    return np.diag(G)[:, None] + np.diag(G)[None, :] - 2 * G


@both
@real
@pytest.mark.parametrize(("n", "m", "d"), [(1, 0, 1), (3, 0, 70), (4, 2, 20_001), (20, 0, 2048), (65, 1, 3000)])
def test_gram(way, dtype, n, m, d):
    X, E = values("random", (n, d), dtype) + dtype(0.3), np.ascontiguousarray(values("random", (m, d), dtype, 4))
    random = np.random.default_rng(5)
    for scale, centre in ((None, None), (2.0**random.integers(-3, 4, n + m), 1.0 * (random.random(n + m) < 0.7))):
        right = products(X, E, np.ones(n + m) if scale is None else scale, np.ones(n + m) if centre is None else centre)
        G = way(columns.gram)(X, E if m else None, scale, centre)
        length = np.sqrt(np.diag(right)).astype(float)
        assert G.dtype == np.float64 and (G == G.T).all()
        assert (np.abs(G - right) <= 1e-6 * np.outer(length, length) + 1e-30).all()


@both
@pytest.mark.parametrize("case", ["near", "huge row", "shifted", "small", "large", "one zero row"])
def test_gram_of_float32_loses_no_digits(way, case):
    """What distances and norms are computed of it is right to 1e-6 where float products alone would not be."""
    random, scale, n, d = np.random.default_rng(6), np.ones(8), 8, 3001
    g = random.standard_normal((n, d))
    X = {"near": 1 + 1e-6 * g, "huge row": np.where(np.arange(n)[:, None] == 2, 1e30 * g, g),
         "shifted": np.where(np.arange(n)[:, None] == 2, 1e2, 50 + 0.05 * g), "small": 1e-25 * g, "large": 1e25 * g,
         "one zero row": np.where(np.arange(n)[:, None] == 2, 1e-4 * g, 5 + g)}[case].astype(np.float32)
    if case == "huge row":
        scale[2] = 2.0**-100
    right, G = (how(X, X[:0], scale, np.ones(n)) for how in (products, way(columns.gram)))
    np.testing.assert_allclose(differences(G), differences(right).astype(float), rtol=1e-6, atol=1e-200)
    norms = np.diag(right) + 2 * right[-1] + right[-1, -1]
    np.testing.assert_allclose((np.diag(G) + 2 * G[-1] + G[-1, -1])[:-1], norms[:-1].astype(float), rtol=1e-6)


@needs_c
@real
@pytest.mark.parametrize("n", [5, 22, 66])
def test_equal_rows_have_equal_products(dtype, n):
    X = values("random", (n, 4500), dtype)
    X[n - 2:] = X[1]
    G = columns.gram(X)
    assert (differences(G)[np.ix_([1, n - 2, n - 1], [1, n - 2, n - 1])] == 0).all()
    assert G[1].tobytes() == G[:, n - 1].tobytes()


@needs_c
@real
def test_the_same_bytes_for_any_threads_and_cuts(dtype):
    X, E = values("random", (21, 30_011), dtype), np.ascontiguousarray(values("random", (2, 30_011), dtype, 7))
    W, w, v = mixing("dense", 22, 23), np.linspace(-1, 1, 23), X[0].copy()
    calls = [lambda X, E: columns.median(X, E, W), lambda X, E: columns.trimmed_mean(X, 5, E, W),
             lambda X, E: columns.mean_around_median(X, 5, E), lambda X, E: columns.deviation(X, E, W),
             lambda X, E: columns.combine(X, w, E), lambda X, E: columns.mixed(X, W, E, w)]
    sums = [lambda: columns.gram(X, E), lambda: columns.distances(X, v, E, W)]
    whole, total = [call(X, E).tobytes() for call in calls], [call().tobytes() for call in sums]
    for threads in (1, 3):
        with threadpool_limits(threads):
            assert [call(X, E).tobytes() for call in calls] == whole
            assert [call().tobytes() for call in sums] == total
    for cuts in ([1, 64, 200], [13_000, 13_005]):
        parts = list(zip(np.split(X, cuts, axis=1), np.split(E, cuts, axis=1), strict=True))
        assert [np.concatenate([call(*part) for part in parts], axis=-1).tobytes() for call in calls] == whole


@both
@real
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_numbers_that_are_not_finite_stay_in_their_columns(way, dtype):
    X, W = values("random", (35, D), dtype), mixing("dense", 35, 35)
    v, bad = X[0].copy(), np.zeros(D, bool)
    calls = [lambda: way(columns.median)(X), lambda: way(columns.trimmed_mean)(X, 9),
             lambda: way(columns.mean_around_median)(X, 9), lambda: way(columns.trimmed_mean)(X, 9, None, W),
             lambda: way(columns.deviation)(X)]
    before = [call() for call in calls]
    for column, number in ((3, np.nan), (64, np.inf), (D - 1, -np.inf)):
        X[7, column], bad[column] = number, True
    for call, result in zip(calls, before, strict=True):
        assert call()[~bad].tobytes() == result[~bad].tobytes()
    way(columns.gram)(X)
    way(columns.distances)(X, v)


@settings(max_examples=40, deadline=None)
@given(st.data())
@needs_c
def test_any_rows(data):
    """The compiled rules and the definitions agree, whatever the rows."""
    dtype = data.draw(st.sampled_from(DTYPES))
    n, m, d = (data.draw(st.integers(*bounds)) for bounds in ((1, 40), (0, 2), (0, 150)))
    X = values(data.draw(st.sampled_from(["random", "tied", "zeros", "near"])), (n, d), dtype)
    E = np.ascontiguousarray(values("tied", (m, d), dtype, 8)) if m else None
    f = data.draw(st.integers(0, (n + m - 1) // 2))
    scale = EPS[dtype] * max(np.abs(X).max(initial=0), 2)
    for rule, arguments in ((columns.median, ()), (columns.trimmed_mean, (f,)), (columns.mean_around_median, (f,)),
                            (columns.combine, (np.arange(n + m) - 2.0,))):
        np.testing.assert_allclose(rule(X, *arguments, E), rule.definition(X, *arguments, E), rtol=10 * EPS[dtype],
                                   atol=scale)
    np.testing.assert_allclose(columns.gram(X, E), columns.gram.definition(X, E), rtol=1e-5, atol=1e-5 * (d + 1))


@both
def test_what_does_not_fit_is_an_error(way):
    X, E, W = np.zeros((5, 9)), np.zeros((2, 9)), np.zeros((4, 7))
    for call in (lambda: way(columns.median)(X[0]), lambda: way(columns.median)(X.astype(int)),
                 lambda: way(columns.median)(X[:0]), lambda: way(columns.median)(X, E[:, 1:]),
                 lambda: way(columns.median)(X, E.astype(np.float32)), lambda: way(columns.median)(X, None, W),
                 lambda: way(columns.median)(X, E, W.astype(np.float32)), lambda: way(columns.trimmed_mean)(X, 3),
                 lambda: way(columns.trimmed_mean)(X, 2, E, W), lambda: way(columns.trimmed_mean)(X, -1),
                 lambda: way(columns.mean_around_median)(X, 1.0), lambda: way(columns.deviation)(X[:1]),
                 lambda: way(columns.distances)(X, np.zeros(8)), lambda: way(columns.combine)(X, np.zeros(6)),
                 lambda: way(columns.mixed)(X, W), lambda: way(columns.mixed)(X, W, E, np.zeros(5)),
                 lambda: way(columns.gram)(X, E, np.ones(5)), lambda: way(columns.gram)(X, None, None, np.ones(6))):
        with pytest.raises(ValueError, match=r"expected|shape"):
            call()


def test_no_array_of_the_size_of_the_rows():
    X = values("random", (20, 400_000), np.float32)
    for call in (lambda: columns.trimmed_mean.definition(X, 4), lambda: columns.gram.definition(X),
                 lambda: columns.combine.definition(X, np.ones(20)),
                 lambda: columns.median.definition(X, None, mixing("dense", 20, 20))):
        tracemalloc.start()
        call()
        assert tracemalloc.get_traced_memory()[1] < 0.3 * 400_000 * 20 * 4
        tracemalloc.stop()
