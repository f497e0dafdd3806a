"""mpiclip.problems against loops over workers and rows in float64, central differences and closed forms; the C kernel
and the NumPy definition alike."""

import dataclasses
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from mpiclip import device, problems
from mpiclip.data import Csr, Shard
from mpiclip.errors import InputError
from mpiclip.problems._linear_model import linear_model
from mpiclip.problems.quadratic import optimum

COUNTS = (5, 0, 7, 7, 1, 0)             # rows of each worker
# A batch: repetitions; none of worker 2's rows; the denominators are not the numbers of rows. And one without rows.
BATCH = np.array([4, 4, 0, 12, 12, 18, 13, 19]), np.array([0, 3, 3, 3, 7, 8, 8]), np.array([3.0, 1, 2, 8, 1, 1])
NOBODY = np.zeros(0, np.int64), np.zeros(7, np.int64), np.full(6, 2.5)
REGULARIZERS = ["none", "l2", "nonconvex"]
LABELS = {"linear": None, "logistic": 2, "softmax": 3}
way = pytest.mark.parametrize("way", [
    pytest.param(linear_model, id="compiled", marks=pytest.mark.skipif(not device.compiled(), reason="no C kernels")),
    pytest.param(linear_model.definition, id="definition")])
model = pytest.mark.parametrize("name", LABELS)
dense_and_sparse = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])


def rng(seed=0):
    return np.random.default_rng(seed)


def csr(a):
    rows, columns = np.nonzero(a)
    indptr = np.searchsorted(rows, np.arange(len(a) + 1)).astype(np.int64)
    return Csr(indptr, columns.astype(np.int32), a[rows, columns], a.shape)


def features(m, p, seed=0, ones=False):
    """Half of it zeros, the second row empty."""
    a = rng(seed).standard_normal((m, p)) * (rng(seed + 1).random((m, p)) < 0.5)
    a[1:2] = 0
    return (a != 0).astype(float) if ones else a


def shard(a, y, counts=COUNTS, sparse=False, classes="labels"):
    counts = np.array(counts)
    if isinstance(classes, str):
        classes = np.unique(y) if (y == np.round(y)).all() else None
    return Shard(x=csr(a) if sparse else a, y=y, offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                 ids=np.arange(len(counts)), n=len(counts), total=len(y), classes=classes, features=a.shape[1])


def labels(name, m, seed=3):
    return rng(seed).integers(0, LABELS[name], m).astype(float) if LABELS[name] else rng(seed).standard_normal(m)


def prepared(problem, s, dtype="float64"):
    return problem.prepare(s, s.ids, s.n, 0, dtype)


def example(name, sparse=False, dtype="float64", p=9, counts=COUNTS, ones=False, **keys):
    """(problem, data, features with the intercept's column, labels)"""
    problem, m = problems.load(name)(**keys), sum(counts)
    a, y = features(m, p, ones=ones), labels(name, m)
    data = prepared(problem, shard(a, y, counts, sparse), dtype)
    return problem, data, np.hstack([a, np.ones((m, 1))]) if problem.intercept else a, y


def points(problem, data, per_worker, dtype="float64", seed=7):
    d = len(problem.x0(data, 0, dtype))
    return rng(seed).standard_normal((len(COUNTS), d) if per_worker else d).astype(dtype)


# the reference: one row at a time, with math's own functions

def row_loss(name, z, b):
    if name == "linear":
        return (z[0] - b) ** 2 / 2
    if name == "logistic":
        t = z[0] * (1 if b == 1 else -1)
        return math.log1p(math.exp(-t)) if t > -30 else -t + math.log1p(math.exp(t))
    return math.log(math.fsum(math.exp(e - max(z)) for e in z)) + max(z) - z[int(b)]


def row_slope(name, z, b):
    if name == "linear":
        return [z[0] - b]
    if name == "logistic":
        sign = 1 if b == 1 else -1
        return [-sign / (1 + math.exp(sign * z[0]))]
    total = math.fsum(math.exp(e - max(z)) for e in z)
    return [math.exp(e - max(z)) / total - (c == int(b)) for c, e in enumerate(z)]


def reference(problem, a, y, x, counts=COUNTS, batch=None, clip=math.inf):
    """(losses (w,), gradients (w, d)); clip: the longest that a row's gradient may be"""
    name, C, p = problem.name, LABELS[problem.name] or 1, a.shape[1] - problem.intercept
    C = 1 if name == "logistic" else C
    offsets = np.concatenate([[0], np.cumsum(counts)])
    losses, gradients = [], []
    for i, count in enumerate(counts):
        x_i = (x if x.ndim == 1 else x[i]).astype(float).reshape(C, -1)
        if batch is None:
            rows, denominator = range(offsets[i], offsets[i + 1]), count
        else:
            rows, denominator = batch[0][batch[1][i]:batch[1][i + 1]], batch[2][i]
        loss, gradient = 0.0, np.zeros_like(x_i)
        for r in rows:
            z = [math.fsum(x_i[c] * a[r]) for c in range(C)]
            loss += row_loss(name, z, y[r]) / denominator
            of_row = np.outer(row_slope(name, z, y[r]), a[r])
            norm = math.hypot(*of_row.flat)
            gradient += of_row * (clip / norm if norm > clip else 1) / denominator
        if count and problem.regularizer == "l2":
            loss += problem.lam * math.fsum(v * v / 2 for v in x_i[:, :p].flat)
            gradient[:, :p] += problem.lam * x_i[:, :p]
        if count and problem.regularizer == "nonconvex":
            loss += problem.lam * math.fsum(v * v / (1 + v * v) for v in x_i[:, :p].flat)
            gradient[:, :p] += problem.lam * 2 * x_i[:, :p] / (1 + x_i[:, :p] ** 2) ** 2
        losses.append(loss)
        gradients.append(gradient.ravel())
    return np.array(losses), np.array(gradients)


def close(found, expected, dtype="float64"):
    tolerance = 1e-12 if dtype == "float64" else 3e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def has_central_differences(problem, data, x, every):
    """That each such number of the gradient is the slope of the loss."""
    h = 1e-6
    _, grad = problem.loss_grad(x, data)
    for j in range(0, len(x), every):
        e = np.zeros(len(x))
        e[j] = h
        difference = (problem.loss_grad(x + e, data)[0] - problem.loss_grad(x - e, data)[0]) / (2 * h)
        np.testing.assert_allclose(grad[:, j], difference, atol=1e-7)


def has_loss_and_gradient(problem, x, data, batch, clip, losses, gradients):
    """That loss_grad gives these, in x's dtype, with a place for the gradient and without the loss, too; x stays as it
    is; workers 1 and 5, who have no data, get zeros."""
    out, before = np.full_like(gradients, np.nan, x.dtype), x.copy()
    loss, grad = problem.loss_grad(x, data, batch, out, clip=clip)
    nothing, again = problem.loss_grad(x, data, batch, loss=False, clip=clip)
    assert grad is out and grad.dtype == x.dtype and loss.dtype == np.float64
    close(grad, gradients, x.dtype)
    close(loss, losses, x.dtype)
    assert np.array_equal(x, before)
    assert not grad[1].any() and not grad[5].any() and loss[1] == loss[5] == 0
    assert nothing is None and again.tobytes() == grad.tobytes()


@way
@model
@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("batched", [False, True], ids=["full", "batch"])
def test_loss_and_gradient(way, name, sparse, dtype, per_worker, regularizer, batched):
    problem, data, a, y = example(name, sparse, dtype, regularizer=regularizer, lam=0.3,
                                  intercept=regularizer == "nonconvex")
    x = points(problem, data, per_worker, dtype)
    batch = None
    if batched:
        batch = BATCH
    losses, gradients = reference(problem, a, y, x, batch=batch)
    before = x.copy()
    out = np.full_like(gradients, np.nan, dtype)
    loss, grad = way(x, data, problem, batch, out)
    assert grad is out and grad.dtype == dtype and loss.dtype == np.float64
    close(grad, gradients, dtype)
    close(loss, losses, dtype)
    assert np.array_equal(x, before)
    assert not grad[1].any() and not grad[5].any() and loss[1] == loss[5] == 0
    nothing, again = way(x, data, problem, batch, None, False)
    assert nothing is None and np.array_equal(again, grad)


@way
@model
@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
@pytest.mark.parametrize("batch", [None, BATCH, NOBODY], ids=["full", "batch", "nobody"])
@pytest.mark.parametrize("clip", [1e-4, 0.6, 1e6])
def test_clipped_rows(way, name, sparse, dtype, per_worker, batch, clip):
    """Rows far above and far below C, about as long, and one of zeros; the regularizer is not clipped."""
    problem, data, a, y = example(name, sparse, dtype, regularizer="nonconvex", lam=0.3, intercept=clip < 1)
    a[[0, 7, 12], :9] *= 50
    data = prepared(problem, shard(a[:, :9], y, COUNTS, sparse), dtype)
    x = points(problem, data, per_worker, dtype)
    losses, gradients = reference(problem, a, y, x, batch=batch, clip=clip)
    if clip == 0.6 and batch is not NOBODY:
        for other in (1e-4, 1e6):       # some rows are shorter, some are longer: the reference says so
            assert not np.allclose(reference(problem, a, y, x, batch=batch, clip=other)[1], gradients, rtol=0.01)
    out = np.full_like(gradients, np.nan, dtype)
    loss, grad = way(x, data, problem, batch, out, True, clip)
    assert grad is out
    scale = 1 if clip < 1 else 50 * 50
    np.testing.assert_allclose(grad, gradients, rtol=1e-12 if dtype == "float64" else 3e-5,
                               atol=(1e-13 if dtype == "float64" else 2e-6) * scale)
    np.testing.assert_allclose(loss, losses, rtol=1e-12 if dtype == "float64" else 3e-5, atol=1e-12)
    again = way(x, data, problem, batch, None, False, clip)[1]
    assert again.tobytes() == grad.tobytes()


@way
@model
@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_row_is_longer_than_the_threshold(way, name, sparse, dtype):
    """One row a worker: its gradient is cut to C, to the last bits and in its own direction."""
    m, C = 300, 0.25
    a, y = features(m, 9) * np.geomspace(1e-3, 1e6, m)[:, None], labels(name, m)
    problem = problems.load(name)()
    data = prepared(problem, shard(a, y, [1] * m, sparse), dtype)
    x = np.ones(len(problem.x0(data, 0, dtype)), dtype) if name != "softmax" else np.zeros(27, dtype)
    plain, clipped = (way(x, data, problem, None, None, False, clip)[1].astype(float) for clip in (None, C))
    norms = np.linalg.norm(plain, axis=1)
    assert 20 < (norms > C).sum() < 280
    eps = float(np.finfo(dtype).eps)
    assert np.linalg.norm(clipped, axis=1).max() <= C * (1 + 8 * eps)
    np.testing.assert_allclose(clipped, plain * np.minimum(1, C / np.maximum(norms, C / 2))[:, None], rtol=20 * eps)
    assert np.array_equal(clipped[norms < 0.999 * C], plain[norms < 0.999 * C])


@model
@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_infinite_threshold_clips_nothing(name, sparse, dtype):
    problem, data, *_ = example(name, sparse, dtype, regularizer="l2", lam=0.1)
    x = points(problem, data, False, dtype)
    for batch in (None, BATCH):
        plain, clipped = (problem.loss_grad(x, data, batch, clip=clip) for clip in (None, math.inf))
        assert [v.tobytes() for v in plain] == [v.tobytes() for v in clipped]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lengths_of_rows(sparse, dtype):
    """Also where a square leaves the dtype: float32 ends at 3.4e38, and rows of zeros are there."""
    a = features(30, 5, 2) * np.geomspace(1e-30, 1e30, 30)[:, None]
    a[[0, 7, 29]] = 0
    found = prepared(problems.Linear(), shard(a, np.zeros(30), (30,), sparse), dtype).lengths
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [math.hypot(*row) for row in a], rtol=1e-6 if dtype == "float32" else 1e-14)


@way
@dense_and_sparse
@pytest.mark.parametrize("name", ["linear", "logistic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_rows(way, name, sparse, dtype):
    """Parts of a worker, blocks of a part, what is left over of both; SciPy's products of whole blocks as reference."""
    from scipy.special import expit
    counts, p = (3001, 1, 0, 799, 256, 257), 41
    for ones in (False, True):
        problem, data, a, y = example(name, sparse, dtype, p, counts, ones=ones)
        assert data.ones == (sparse and ones)
        x = rng(5).standard_normal((6, p)).astype(dtype)
        loss, grad = way(x, data, problem)
        for i, (j, k) in enumerate(zip(data.offsets[:-1], data.offsets[1:], strict=True)):
            z, b = a[j:k] @ x[i].astype(float), y[j:k] if name == "linear" else 2 * y[j:k] - 1
            slope = z - b if name == "linear" else -b * expit(-b * z)
            value = (z - b) ** 2 / 2 if name == "linear" else np.logaddexp(0, -b * z)
            close(grad[i], a[j:k].T @ slope / max(k - j, 1), dtype)
            np.testing.assert_allclose(loss[i], value.sum() / max(k - j, 1), rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.skipif(not device.compiled(), reason="no C kernels")
def test_the_kernel_answers_itself():
    """Compiled must not mean: declined, and the definition answered."""
    from mpiclip.kernels import cpu
    for name in ("linear", "logistic"):
        for sparse in (False, True):
            for dtype in ("float32", "float64"):
                problem, data, *_ = example(name, sparse, dtype)
                for clip in (None, 1.0):
                    x = points(problem, data, False, dtype)
                    assert cpu.linear_model(x, data, problem, clip=clip) is not NotImplemented
    problem, data, *_ = example("logistic")
    x = points(problem, data, False)
    ends, ones = np.array([0, 1, 1, 1, 1, 1, 1]), np.ones(6)
    declined = [
        (x.astype(np.float32), data, problem), (x[:-1], data, problem), (np.stack([x, x]), data, problem),
        (x, data, problem, None, np.empty((6, 8))), (x, data, problem, None, np.empty((6, 9), order="F")),
        *((x, data, problem, batch) for batch in [
            (np.array([20]), ends, ones), (np.array([-1]), ends, ones), (np.array([0]), ends + 1, ones),
            (np.array([0]), ends, ones[1:]), (np.array([0]), ends[::-1].copy(), ones),
            (np.array([0], np.int32), ends, ones)])]
    for arguments in declined:
        assert cpu.linear_model(*arguments) is NotImplemented


@pytest.mark.skipif(not device.compiled(), reason="no C kernels")
@dense_and_sparse
def test_threads_do_not_change_a_byte(sparse):
    problem, data, *_ = example("logistic", sparse, p=300, counts=(9000, 100, 0, 2500), regularizer="l2", lam=0.1)
    x = rng().standard_normal(300)
    results = []
    for threads in (1, 2, 3, 5):
        with threadpool_limits(threads):
            results += [problem.loss_grad(x, data, clip=0.1) for _ in range(2)]
    assert len({(loss.tobytes(), grad.tobytes()) for loss, grad in results}) == 1


@way
@model
@dense_and_sparse
def test_gradient_against_central_differences(way, name, sparse):
    problem, data, *_ = example(name, sparse, regularizer="nonconvex", lam=0.7, intercept=True)
    x, h = points(problem, data, False), 1e-5
    _, grad = way(x, data, problem)
    for j in range(len(x)):
        e = np.zeros(len(x))
        e[j] = h
        difference = (way(x + e, data, problem)[0] - way(x - e, data, problem)[0]) / (2 * h)
        np.testing.assert_allclose(grad[:, j], difference, atol=1e-8)


@way
@model
@dense_and_sparse
def test_one_point_for_all_is_the_same_as_a_copy_for_each(way, name, sparse):
    problem, data, *_ = example(name, sparse, regularizer="l2", lam=0.1)
    x = points(problem, data, False)
    for a, b in zip(way(x, data, problem), way(np.tile(x, (6, 1)), data, problem), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-16)


@way
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logistic_to_the_last_bits(way, dtype):
    """One row a worker with a = 1: x_i is the margin; gradient and loss against NumPy's long double."""
    margins = np.concatenate([rng().uniform(-40, 40, 4000), rng().standard_normal(4000),
                              [0.0, 1e-30, -1e-9, -700, -1e4, 80, 86.9, 88, 100, 150],
                              [700, 710, 1000, 1400, 1e4]]).astype(dtype)
    w = len(margins)
    problem = problems.Logistic()
    data = prepared(problem, shard(np.ones((w, 1)), np.ones(w), [1] * w, classes=np.array([0, 1])), dtype)
    loss, grad = way(margins[:, None], data, problem)
    t = margins.astype(np.longdouble)
    with np.errstate(under="ignore"):
        expected, values = -np.exp(-np.logaddexp(0, t)), np.logaddexp(0, -t)
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    np.testing.assert_allclose(grad[:, 0], expected.astype(float), rtol=3 * eps, atol=4 * tiny)
    np.testing.assert_allclose(loss, values.astype(float), rtol=3 * eps, atol=4 * tiny)


@way
@model
@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_margins(way, name, sparse, dtype):
    a, y = np.array([[1e4, 0], [1e4, 1.0], [-1e4, 2.0], [-1e4, 0]]), np.array([0.0, 1, 0, 1])
    problem = problems.load(name)()
    data = prepared(problem, shard(a, y, (4,), sparse), dtype)
    x = np.array([1.0, 0.5] if name != "softmax" else [0, 0, 1.0, 0.5], dtype)
    loss, grad = way(x, data, problem)
    assert np.isfinite(loss).all() and np.isfinite(grad).all()
    if name == "linear":
        return
    # wrong: rows 0 (label low, score high) and 3; their slopes are +1 and −1 for the higher class
    slope = (a[0] - a[3]) / 4
    np.testing.assert_allclose(grad[0], slope if name == "logistic" else [*-slope, *slope], rtol=1e-6)
    np.testing.assert_allclose(loss, 2e4 / 4, rtol=1e-6)


@way
@model
@dense_and_sparse
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_what_is_not_finite_shows_and_stays_with_its_worker(way, name, sparse, value, clip):
    problem, data, *_ = example(name, sparse)
    x = points(problem, data, True)
    clean_loss, clean = way(x, data, problem, clip=clip)
    x[2, 0] = value
    with np.errstate(invalid="ignore"):
        loss, grad = way(x, data, problem, clip=clip)
    assert not np.isfinite(loss[2])
    if math.isnan(value):
        assert np.isnan(grad[2]).any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(grad[others], clean[others], rtol=1e-14)
    np.testing.assert_allclose(loss[others], clean_loss[others], rtol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 70), st.sampled_from(["linear", "logistic"]),
       st.booleans(), st.booleans(), st.data())
def test_any_shape(counts, p, name, sparse, per_worker, draw):
    m, w = sum(counts), len(counts)
    if m == 0:
        return
    problem = problems.load(name)(regularizer=draw.draw(st.sampled_from(REGULARIZERS)), lam=0.2)
    a, y = features(m, p), labels(name, m)
    data = prepared(problem, shard(a, y, counts, sparse, classes=np.array([0.0, 1.0])))
    x = rng().standard_normal((w, p) if per_worker else p)
    batch = None
    if draw.draw(st.booleans()):
        sizes = [draw.draw(st.integers(0, 5)) if count else 0 for count in counts]
        rows = [draw.draw(st.integers(data.offsets[i], data.offsets[i + 1] - 1))
                for i in range(w) for _ in range(sizes[i])]
        batch = np.array(rows, np.int64), np.concatenate([[0], np.cumsum(sizes)]), np.maximum(sizes, 1) * 1.5
    losses, gradients = reference(problem, a, y, x, counts, batch)
    for function in (linear_model, linear_model.definition):
        loss, grad = function(x, data, problem, batch)
        close(grad, gradients)
        close(loss, losses)


# sparse rows by columns: what the C kernel reads when it goes over all rows

COLUMN_COUNTS = (9000, 0, 4097, 4096, 1, 0, 300)        # three parts, none, two, one, …
compiled_only = pytest.mark.skipif(not device.compiled(), reason="no C kernels")


@cache
def by_columns(ones, intercept):
    """(features (m, 7), labels ±1): a column that all rows have, an empty one, dense and thin ones; without an
    intercept there are empty rows, too: the first and last of a worker, of a part and of all."""
    m, generator = sum(COLUMN_COUNTS), rng(11)
    a = generator.standard_normal((m, 7)) * (generator.random((m, 7)) < [1, 0, 0.7, 0.5, 0.02, 0.97, 0.3])
    if not intercept:
        a[[0, 2999, 3000, 8999, 9000, 13096, 13097, m - 1]] = 0
    return (a != 0).astype(float) if ones else a, generator.choice([-1.0, 1.0], m)


def column_data(name, dtype, ones, intercept, **keys):
    """(problem, data that go by columns, features with the intercept's column, labels)"""
    a, y = by_columns(ones, intercept)
    problem = problems.load(name)(intercept=intercept, **keys)
    data = prepared(problem, shard(a, y, COLUMN_COUNTS, sparse=True), dtype)
    assert data.by_column is not None, "the kernel would go by rows"
    assert data.by_column[3].any() == data.ones == ones, "columns that are lists of absent rows"
    return problem, data, np.hstack([a, np.ones((len(a), 1))]) if intercept else a, y


def by_whole_blocks(problem, a, y, x, counts, clip=math.inf):
    """reference, for many rows: SciPy's functions of a worker's scores, and all rows' gradients, one below the other"""
    from scipy.special import expit
    offsets, losses, gradients = np.concatenate([[0], np.cumsum(counts)]), [], []
    for i, (j, k) in enumerate(pairwise(offsets)):
        x_i = (x if x.ndim == 1 else x[i]).astype(float)
        z, b, m = a[j:k] @ x_i, y[j:k], max(k - j, 1)
        value = (z - b) ** 2 / 2 if problem.name == "linear" else np.logaddexp(0, -b * z)
        rows = a[j:k] * (z - b if problem.name == "linear" else -b * expit(-b * z))[:, None]
        gradient = (rows * np.minimum(1, clip / np.maximum(np.linalg.norm(rows, axis=1), 1e-9))[:, None]).sum(0) / m
        loss = value.sum() / m
        if problem.regularizer == "nonconvex" and k > j:
            v = np.where(np.arange(a.shape[1]) < a.shape[1] - problem.intercept, x_i, 0)
            loss, gradient = loss + problem.lam * (v**2 / (1 + v**2)).sum(), gradient + problem.lam * 2 * v / (
                1 + v**2) ** 2
        losses.append(loss)
        gradients.append(gradient)
    return np.array(losses), np.array(gradients)


@way
@pytest.mark.parametrize("name", ["linear", "logistic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
@pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_sparse_rows_by_columns(way, name, dtype, per_worker, ones, intercept, clip):
    problem, data, a, y = column_data(name, dtype, ones, intercept, regularizer="nonconvex", lam=0.3)
    q, w = a.shape[1], len(COLUMN_COUNTS)
    x = rng(5).standard_normal((w, q) if per_worker else q).astype(dtype)
    losses, gradients = by_whole_blocks(problem, a, y, x, COLUMN_COUNTS, clip or math.inf)
    out = np.full((w, q), np.nan, dtype)
    loss, grad = way(x, data, problem, None, out, clip=clip)
    assert grad is out and loss.dtype == np.float64
    close(grad, gradients, dtype)
    np.testing.assert_allclose(loss, losses, rtol=1e-12 if dtype == "float64" else 1e-5)
    assert not grad[[1, 5]].any() and not loss[[1, 5]].any()
    nothing, again = way(x, data, problem, None, None, False, clip)
    assert nothing is None and again.tobytes() == grad.tobytes()
    # all rows as one batch: row by row
    loss_b, grad_b = way(x, data, problem, (np.arange(len(a)), data.offsets, data.denominators), clip=clip)
    close(grad_b, gradients, dtype)
    np.testing.assert_allclose(loss_b, losses, rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])
def test_the_copy_by_columns_holds_the_rows(ones):
    """Part after part, column after column, the matrix comes back."""
    _, data, a, _ = column_data("linear", "float64", ones, intercept=True)
    rows, values, starts, absent = data.by_column
    cuts = [[j + (k - j) * p // n for p in range(n)] for j, k, n in zip(
        data.offsets[:-1], data.offsets[1:], [3, 1, 2, 1, 1, 1, 1], strict=True)]
    edges = [*np.concatenate(cuts), len(a)]
    found = np.zeros_like(a)
    for part, (first, last) in enumerate(pairwise(edges)):
        for j in range(a.shape[1]):
            at = slice(*starts[part * a.shape[1] + j:][:2])
            column = np.zeros(last - first)
            column[rows[at]] = 1 if values is None else values[at]
            found[first:last, j] = 1 - column if absent[part * a.shape[1] + j] else column
    np.testing.assert_array_equal(found, a)
    assert (len(starts), len(absent)) == (10 * a.shape[1] + 1, 10 * a.shape[1]) and starts[-1] == len(rows)


@compiled_only
@pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])
def test_the_kernel_goes_by_columns_where_it_can(ones):
    """Not the definition's answer, and not that of the rows: a spoilt copy shows in the full gradient alone."""
    from mpiclip.kernels import cpu
    problem, data, a, y = column_data("logistic", "float64", ones, intercept=False)
    x = rng(5).standard_normal(a.shape[1])
    _, right = by_whole_blocks(problem, a, y, x, COLUMN_COUNTS)
    everything = np.arange(len(a)), data.offsets, data.denominators
    rows, values, starts, absent = data.by_column
    spoilt = dataclasses.replace(data)
    vars(spoilt)["by_column"] = rows, values, starts, ~absent
    close(cpu.linear_model(x, data, problem)[1], right)
    assert not np.allclose(cpu.linear_model(x, spoilt, problem)[1], right, rtol=0.1)
    close(cpu.linear_model(x, spoilt, problem, everything)[1], right)


@pytest.mark.parametrize("name", ["linear", "logistic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])
def test_by_columns_the_bytes_do_not_depend_on_the_threads(name, dtype, ones):
    problem, data, a, _ = column_data(name, dtype, ones, intercept=False)
    x, results = rng(5).standard_normal(a.shape[1]).astype(dtype), set()
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            results |= {tuple(v.tobytes() for v in problem.loss_grad(x, data)) for _ in range(3)}
    assert len(results) == 1


@compiled_only
@pytest.mark.parametrize("ones", [False, True], ids=["values", "ones"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2, 4])
def test_by_columns_what_is_not_finite_shows_and_stays_with_its_worker(ones, value, column):
    problem, data, a, _ = column_data("logistic", "float64", ones, intercept=False)
    x = rng(5).standard_normal((len(COLUMN_COUNTS), a.shape[1]))
    clean_loss, clean = linear_model(x, data, problem)
    x[2, column] = value
    loss, grad = linear_model(x, data, problem)
    assert not np.isfinite(loss[2]) and not (math.isnan(value) and np.isfinite(grad[2]).all())
    others = [0, 1, 3, 4, 5, 6]
    assert np.array_equal(grad[others], clean[others]) and np.array_equal(loss[others], clean_loss[others])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_no_copy_by_columns_where_it_is_not_worth_it(sparse):
    """Dense rows; and sparse ones of fewer than four entries for each column of each part."""
    for entries, there in ((7, False), (8, sparse)):            # two workers, one column: 4 · 1 · 2 = 8
        a = np.zeros((10, 1))
        a[:entries] = 1
        data = prepared(problems.Linear(), shard(a, np.zeros(10), (5, 5), sparse))
        assert (data.by_column is not None) == there


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 3, 40, 255, 256, 257, 700, 4500]), min_size=1, max_size=5), st.integers(1, 9),
       st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]), st.sampled_from(["linear", "logistic"]), st.booleans(),
       st.integers(0, 2**32 - 1))
def test_by_columns_any_shape(counts, p, density, name, ones, seed):
    m, generator = sum(counts), rng(seed)
    if m == 0:
        return
    a = generator.standard_normal((m, p)) * (generator.random((m, p)) < density)
    a, y = (a != 0).astype(float) if ones else a, generator.choice([-1.0, 1.0], m)
    problem = problems.load(name)()
    data = prepared(problem, shard(a, y, counts, sparse=True, classes=np.array([-1.0, 1.0])))
    x = generator.standard_normal((len(counts), p))
    losses, gradients = by_whole_blocks(problem, a, y, x, counts)
    for function in (linear_model, linear_model.definition):
        loss, grad = function(x, data, problem)
        close(grad, gradients)
        close(loss, losses)


# second derivatives

def hessian(problem, data, x, i, h=1e-4):
    columns = []
    for e in np.eye(len(x)):
        columns.append((problem.loss_grad(x + h * e, data)[1][i] - problem.loss_grad(x - h * e, data)[1][i]) / (2 * h))
    return np.array(columns)


def bounds(problem, data, d, w):
    """H_i, (w, d, d), from products with unit vectors."""
    return np.stack([problem.smoothness_product(np.tile(e, (w, 1)), data) for e in np.eye(d)], axis=2)


@pytest.mark.parametrize("name", [*LABELS, "quadratic"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_smoothness_bounds_the_hessian(name, regularizer):
    keys = {"regularizer": regularizer, "lam": 0.4}
    if name == "quadratic":
        problem = problems.Quadratic(dimension=4, **keys)
        data = problem.prepare(None, np.arange(3), 3, 5, "float64")
        w, owners = 3, [0, 1, 2]
    else:
        problem, data, *_ = example(name, sparse=True, p=4, **keys)
        w, owners = 6, [0, 2, 3, 4]
    d = len(problem.x0(data, 0, "float64"))
    H = bounds(problem, data, d, w)
    exact = name in ("linear", "quadratic") and regularizer != "nonconvex"
    for i in range(w):
        if i not in owners:
            assert not H[i].any()
            continue
        for seed in range(3):
            true = hessian(problem, data, rng(seed).standard_normal(d) * seed, i)
            if exact:
                np.testing.assert_allclose(H[i], true, atol=1e-6)
            else:
                assert np.linalg.eigvalsh(H[i] - true).min() > -1e-6
    at_zero = hessian(problem, data, np.zeros(d), 0)
    if name in ("logistic", "softmax"):         # and it is no more than what is needed: near it at x = 0
        assert np.linalg.eigvalsh(H[0])[-1] < 2 * np.linalg.eigvalsh(at_zero)[-1]


# quadratic

TOY = {"curvature": [[1], [2]], "centre": [[-3], [3]]}


def test_the_toy_of_the_papers():
    """f_1 = ½ (x + 3)², f_2 = (x − 3)²: gradients 3 and −6 at 0, the mean is minimised at 1."""
    problem = problems.Quadratic(**TOY, start=0.5)
    data = problem.prepare(None, np.arange(2), 2, 0, "float64")
    assert problem.x0(data, 0, "float64").tolist() == [0.5]
    loss, grad = problem.loss_grad(np.zeros(1), data)
    assert loss.tolist() == [4.5, 9.0] and grad.tolist() == [[3.0], [-6.0]]
    assert optimum(np.array([[1.0], [2.0]]), np.array([[-3.0], [3.0]])).tolist() == [1.0]
    out = np.empty((2, 1))
    loss, grad = problem.loss_grad(np.array([[0.0], [3.0]]), data, out=out, loss=False)
    assert loss is None and grad is out and grad.tolist() == [[3.0], [0.0]]
    alone = problem.prepare(None, np.array([1]), 2, 0, "float64")
    assert problem.loss_grad(np.zeros(1), alone)[1].tolist() == [[-6.0]]


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_quadratic_loss_and_gradient(regularizer):
    problem = problems.Quadratic(dimension=5, condition=30, spread=2, regularizer=regularizer, lam=0.3)
    data = problem.prepare(None, np.arange(4), 4, 1, "float64")
    x = rng().standard_normal((4, 5))
    loss, grad = problem.loss_grad(x, data)
    for i in range(4):
        f, g = 0.0, []
        for a, c, v in zip(data.a_i[i], data.c_i[i], x[i], strict=True):
            q = 1 / (1 + v * v)
            r, slope = {"none": (0, 0), "l2": (v * v / 2, v), "nonconvex": (1 - q, 2 * v * q * q)}[regularizer]
            f += a * (v - c) ** 2 / 2 + 0.3 * r
            g.append(a * (v - c) + 0.3 * slope)
        close(loss[i], f)
        close(grad[i], g)


def test_a_drawn_quadratic_is_a_function_of_seed_and_worker():
    problem = problems.Quadratic(dimension=6, condition=100, spread=3)
    whole = problem.prepare(None, np.arange(5), 5, 9, "float64")
    part = problem.prepare(None, np.array([3, 4]), 5, 9, "float64")
    assert np.array_equal(whole.a_i[3:], part.a_i) and np.array_equal(whole.c_i[3:], part.c_i)
    np.testing.assert_allclose(np.sort(whole.a_i), np.tile(np.geomspace(0.01, 1, 6), (5, 1)))
    assert len(np.unique(whole.c_i)) == 30
    assert not np.array_equal(problem.prepare(None, np.arange(5), 5, 10, "float64").c_i, whole.c_i)
    x = optimum(whole.a_i, whole.c_i)
    np.testing.assert_allclose(problem.loss_grad(x, whole)[1].mean(0), 0, atol=1e-14)


@dense_and_sparse
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quadratic_with_data_is_the_distributed_mean(sparse, dtype):
    a = features(20, 4)
    s = shard(a.astype(dtype), np.zeros(20), sparse=sparse)
    problem = problems.Quadratic(regularizer="l2", lam=0.5)
    data = prepared(problem, s, dtype)
    x = np.ones(4, dtype)
    loss, grad = problem.loss_grad(x, data)
    assert grad.dtype == dtype
    for i in range(6):
        rows = a[s.offsets[i]:s.offsets[i + 1]]
        difference = 1 - rows.mean(0) if len(rows) else np.zeros(4)
        close(grad[i], difference + 0.5 * (len(rows) > 0), dtype)
        close(loss[i], (difference ** 2).sum() / 2 + 1.0 * (len(rows) > 0), dtype)


# labels, accuracy, start, what is said of bad input

@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1), (1, 2)])
def test_logistic_takes_every_convention_of_labels(low, high):
    a, sign = features(20, 3), np.where(rng().random(20) < 0.5, -1, 1)
    x, problem = np.array([0.3, -1.0, 2.0]), problems.Logistic()
    data = prepared(problem, shard(a, np.where(sign > 0, high, low).astype(float)))
    loss, _ = problem.loss_grad(x, data)
    assert loss[0] == pytest.approx(np.log1p(np.exp(-sign[:5] * (a[:5] @ x))).mean())


def test_a_part_of_the_rows_may_have_labels_of_one_class_only():
    problem, y = problems.Logistic(), np.ones(20)
    x = np.array([0.3, -1.0, 2.0])
    for classes, sign in (([0, 1], 1), ([1, 2], -1)):
        data = prepared(problem, shard(features(20, 3), y, classes=np.array(classes)))
        loss, _ = problem.loss_grad(x, data)
        assert loss[0] == pytest.approx(np.log1p(np.exp(-sign * (features(20, 3)[:5] @ x))).mean())


def test_softmax_takes_labels_with_gaps():
    a, kinds = features(20, 3), rng().integers(0, 3, 20)
    x, problem = rng(1).standard_normal(9), problems.Softmax()
    expected = prepared(problem, shard(a, kinds.astype(float)))
    found = prepared(problem, shard(a, np.array([-4.0, 3, 10])[kinds]))
    np.testing.assert_array_equal(problem.loss_grad(x, found)[1], problem.loss_grad(x, expected)[1])


@dense_and_sparse
def test_accuracy(sparse):
    a = np.array([[1.0, 0], [2, 1], [0, 3], [-1, 0], [0, 0]])
    y = np.array([1.0, 0, 1, 0, 0])
    problem = problems.Logistic()
    data = prepared(problem, shard(a, y, (5,), sparse))
    assert problem.accuracy(np.array([1.0, 0.5]), data) == (4, 5)           # row 1 is wrong; row 4 is a tie: lower
    softmax = problems.Softmax()
    data = prepared(softmax, shard(a, np.array([5.0, 5, 7, 9, 5]), (5,), sparse))
    assert softmax.accuracy(np.array([1.0, 0, 0, 1, -1, 0]), data) == (5, 5)
    assert softmax.accuracy(np.array([0, 0, 0, 0, 0, 0.0]), data) == (3, 5)
    classifiers = [p.name for p in map(problems.load, problems.names()) if p.classifier]
    assert classifiers == ["cnn", "logistic", "mlp", "resnet", "softmax"]


@pytest.mark.parametrize("name", ["logistic", "softmax", "mlp"])
@dense_and_sparse
def test_flipped_labels(name, sparse):
    """c becomes C − 1 − c, a class that this rank has no rows of included; the features are shared, the rows too."""
    keys = {"hidden": [3]} if name == "mlp" else {}
    problem, m, C = problems.load(name)(**keys), sum(COUNTS), 2 if name == "logistic" else 4
    a, y = features(m, 6), np.minimum(labels("softmax", m), C - 1)
    data, other = (prepared(problem, shard(a, labels, COUNTS, sparse, np.arange(C))) for labels in (y, C - 1 - y))
    x = rng(7).standard_normal(len(problem.x0(data, 0, "float64")))
    for batch in (None, BATCH):
        before, expected = problem.loss_grad(x, data, batch), problem.loss_grad(x, other, batch)
        flipped = problem.flipped(data)
        for found, wanted, plain in zip(problem.loss_grad(x, flipped, batch), expected, before, strict=True):
            assert found.tobytes() == wanted.tobytes() != plain.tobytes()
        assert problem.loss_grad(x, data, batch)[1].tobytes() == before[1].tobytes()
    assert flipped is problem.flipped(data) and flipped.a is data.a
    assert vars(flipped).get("by_column") is vars(data).get("by_column")        # nor was it sorted twice


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_no_labels_to_flip(name):
    with pytest.raises(InputError, match=rf"^aggregate\.attack: .*problem\.name = '{name}' has no classes"):
        problems.load(name)().flipped(None)


@model
@dense_and_sparse
def test_intercept_is_one_more_coordinate_that_is_not_regularised(name, sparse):
    plain, data, *_ = example(name, sparse, p=3, regularizer="l2", lam=5.0)
    more, with_ones, *_ = example(name, sparse, p=3, regularizer="l2", lam=5.0, intercept=True)
    x = points(plain, data, False).reshape(-1, 3)
    wider = np.hstack([x, np.zeros((len(x), 1))])
    loss, grad = plain.loss_grad(x.ravel(), data)
    loss_1, grad_1 = more.loss_grad(wider.ravel(), with_ones)
    close(loss_1, loss)
    close(grad_1.reshape(6, -1, 4)[:, :, :3], grad.reshape(6, -1, 3))


def test_start():
    problem, data, *_ = example("softmax", p=3, start=0.5, intercept=True)
    x = problem.x0(data, 0, "float32")
    assert x.dtype == np.float32 and x.tolist() == [0.5] * 12


def test_names_and_load():
    assert problems.names() == ["cnn", "linear", "logistic", "lstm", "mlp", "polynomial", "quadratic", "resnet",
                                "softmax"]
    assert problems.load("logistic") is problems.Logistic and problems.Logistic.name == "logistic"
    with pytest.raises(InputError, match=r"^problem.name: there is no 'logistik'; did you mean 'logistic'\?$"):
        problems.load("logistik")
    with pytest.raises(InputError):
        problems.load("_linear_model")
    with pytest.raises(AttributeError):
        _ = problems.Logistik


@pytest.mark.parametrize("name, keys", [
    *(("logistic", keys) for keys in [{"lam": -1}, {"lam": math.nan}, {"regularizer": "l1"}, {"lambda": 1},
                                      {"start": math.inf}]),
    *(("quadratic", keys) for keys in [
        {"dimension": 0}, {"dimension": 2, "condition": 0.5}, {"dimension": 2, "spread": -1},
        {"curvature": [[1]]}, {"centre": [[1]]}, {"curvature": [[1]], "centre": [[1], [2]]},
        {"curvature": [[1], [1, 2]], "centre": [[1], [1, 2]]}, {"curvature": [[]], "centre": [[]]},
        {"curvature": [[-1]], "centre": [[1]]}])])
def test_bad_keys(name, keys):
    with pytest.raises(ValidationError):
        problems.load(name)(**keys)


@pytest.mark.parametrize("name, y, words", [
    ("logistic", [0.0, 1, 2], ["labels are 0, 1, 2", "two different"]), ("logistic", [1.0, 1, 1], ["are 1;", "two"]),
    ("logistic", [0.5, 1, 1], ["not classes", "two"]), ("softmax", [0.5, 1, 1], ["not classes", "integers"])])
def test_labels_that_do_not_fit(name, y, words):
    with pytest.raises(InputError) as error:
        prepared(problems.load(name)(), shard(np.ones((3, 2)), np.array(y), (3,)))
    assert all(word in str(error.value) for word in ["data.file", name, *words]) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["linear", "logistic", "softmax", "mlp", "cnn", "resnet"])
def test_no_data(name):
    with pytest.raises(InputError, match=f"'{name}' learns from data.*expected data.file"):
        problems.load(name)().prepare(None, np.arange(2), 2, 0, "float64")


def test_bad_sources_of_a_quadratic():
    problem = problems.Quadratic(**TOY)
    with pytest.raises(InputError, match=r"found nothing; expected one of problem\.curvature, problem\.dimension"):
        problems.Quadratic().prepare(None, np.arange(2), 2, 0, "float64")
    with pytest.raises(InputError, match=r"found problem\.dimension and data\.file"):
        problems.Quadratic(dimension=2).prepare(shard(np.ones((3, 2)), np.ones(3), (3,)), np.arange(1), 1, 0, "float64")
    with pytest.raises(InputError, match=r"found problem\.curvature and problem\.dimension"):
        problems.Quadratic(**TOY, dimension=1).prepare(None, np.arange(2), 2, 0, "float64")
    with pytest.raises(InputError, match=r"problem\.curvature: 2 rows; expected one for each of 3 workers"):
        problem.prepare(None, np.arange(3), 3, 0, "float64")
    with pytest.raises(InputError, match=r"run\.batch"):
        problem.loss_grad(np.zeros(1), problem.prepare(None, np.arange(2), 2, 0, "float64"),
                          (np.zeros(0, np.int64), np.zeros(3, np.int64), np.ones(2)))
    with pytest.raises(InputError, match=r"^privacy\.level: .* no rows .* expected \"worker\"$"):
        problem.loss_grad(np.zeros(1), problem.prepare(None, np.arange(2), 2, 0, "float64"), clip=1.0)
