"""mpiclip.problems.mlp against plain loops over workers, rows and layers in float64, central differences, PyTorch."""

import json
import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from mpiclip import problems
from mpiclip.errors import InputError
from mpiclip.problems import _layers
from test_problems import (
    BATCH,
    COUNTS,
    NOBODY,
    REGULARIZERS,
    close,
    dense_and_sparse,
    features,
    has_loss_and_gradient,
    prepared,
    rng,
    shard,
)

P, C = 6, 3                             # features, classes
M = sum(COUNTS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
shapes = pytest.mark.parametrize("hidden, activation", [([4], "tanh"), ([5], "relu"), ([3, 7, 2], "tanh"),
                                                        ([4, 3], "relu")])
per_workers = pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])


def example(sparse=False, dtype="float64", counts=COUNTS, p=P, **keys):
    """(problem, data, features, labels from 0)"""
    problem, m = problems.MLP(**keys), sum(counts)
    a, y = features(m, p), rng(3).integers(0, C, m).astype(float)
    return problem, prepared(problem, shard(a, y, counts, sparse, classes=np.arange(C)), dtype), a, y


def points(problem, data, per_worker=False, dtype="float64"):
    d = len(problem.x0(data, 0, dtype))
    return (1.5 * rng(7).standard_normal((len(data.offsets) - 1, d) if per_worker else d)).astype(dtype)


# the reference: one row at a time, layer by layer

def row(problem, sizes, x, a, label):
    """(ℓ, ∇ℓ (d,)) of one row at x (d,), by the chain rule as it stands in textbooks"""
    layers, at = [], 0
    for n, k in pairwise(sizes):
        layers.append((x[at:at + n * k].reshape(k, n), x[at + n * k:at + n * k + k]))
        at += (n + 1) * k
    h = [np.asarray(a, float)]
    for W, bias in layers[:-1]:
        z = W @ h[-1] + bias
        h.append(np.tanh(z) if problem.activation == "tanh" else np.where(z > 0, z, 0))
    z = layers[-1][0] @ h[-1] + layers[-1][1]
    total = math.fsum(math.exp(v - max(z)) for v in z)
    delta = np.array([math.exp(v - max(z)) / total - (c == int(label)) for c, v in enumerate(z)])
    parts = []
    for layer in range(len(layers) - 1, -1, -1):
        parts = [np.outer(delta, h[layer]).ravel(), delta, *parts]
        slope = 1 - h[layer] ** 2 if problem.activation == "tanh" else (h[layer] > 0)
        delta = slope * (layers[layer][0].T @ delta)
    return math.log(total) + max(z) - z[int(label)], np.concatenate(parts)


def sizes_of(problem, p=P):
    return p, *problem.hidden, C


def weights(sizes):
    """(d,) bool: which coordinates are no biases"""
    return np.concatenate([np.arange((n + 1) * k) < n * k for n, k in pairwise(sizes)])


def reference(problem, sizes, a, y, x, counts=COUNTS, batch=None, clip=math.inf):
    """(losses (w,), gradients (w, d))"""
    offsets, mask = np.concatenate([[0], np.cumsum(counts)]), weights(sizes)
    losses, gradients = [], []
    for i, count in enumerate(counts):
        x_i = (x if x.ndim == 1 else x[i]).astype(float)
        if batch is None:
            rows, denominator = range(offsets[i], offsets[i + 1]), count
        else:
            rows, denominator = batch[0][batch[1][i]:batch[1][i + 1]], batch[2][i]
        loss, gradient = 0.0, np.zeros_like(x_i)
        for r in rows:
            value, g = row(problem, sizes, x_i, a[r], y[r])
            loss += value / denominator
            gradient += g * min(1, clip / math.sqrt(math.fsum(g * g))) / denominator
        if count and problem.regularizer == "l2":
            loss += problem.lam * (mask * x_i**2 / 2).sum()
            gradient += problem.lam * mask * x_i
        if count and problem.regularizer == "nonconvex":
            loss += problem.lam * (mask * x_i**2 / (1 + x_i**2)).sum()
            gradient += problem.lam * mask * 2 * x_i / (1 + x_i**2) ** 2
        losses.append(loss)
        gradients.append(gradient)
    return np.array(losses), np.array(gradients)


@dense_and_sparse
@dtypes
@per_workers
@shapes
@pytest.mark.parametrize("batch", [None, BATCH, NOBODY], ids=["full", "batch", "nobody"])
def test_loss_and_gradient(monkeypatch, sparse, dtype, per_worker, hidden, activation, batch):
    """Plain; and clipped, the regularizer as it is. A worker's rows go through the layers at once, or by threes."""
    regularizer = REGULARIZERS[len(hidden) % 3]
    problem, data, a, y = example(sparse, dtype, hidden=hidden, activation=activation, regularizer=regularizer, lam=0.3)
    x = points(problem, data, per_worker, dtype)
    for clip in (None, 1e-3, 1.5):
        losses, gradients = reference(problem, sizes_of(problem), a, y, x, batch=batch, clip=clip or math.inf)
        for part in (_layers.PART, 3):
            with monkeypatch.context() as patch:
                patch.setattr(_layers, "PART", part)
                has_loss_and_gradient(problem, x, data, batch, clip, losses, gradients)


@dense_and_sparse
@shapes
def test_gradient_against_central_differences(sparse, hidden, activation):
    problem, data, *_ = example(sparse, hidden=hidden, activation=activation, regularizer="nonconvex", lam=0.7)
    x, h = points(problem, data), 1e-6
    _, grad = problem.loss_grad(x, data)
    for j in range(len(x)):
        e = np.zeros(len(x))
        e[j] = h
        difference = (problem.loss_grad(x + e, data)[0] - problem.loss_grad(x - e, data)[0]) / (2 * h)
        np.testing.assert_allclose(grad[:, j], difference, atol=2e-8)


@dtypes
def test_against_pytorch(dtype):
    """The flat vector is PyTorch's, and so are loss and gradient."""
    torch = pytest.importorskip("torch")
    problem, data, a, y = example(dtype=dtype, hidden=[8, 5])
    x = points(problem, data, dtype=dtype)
    model = torch.nn.Sequential(torch.nn.Linear(P, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5), torch.nn.Tanh(),
                                torch.nn.Linear(5, C)).to(getattr(torch, dtype))
    torch.nn.utils.vector_to_parameters(torch.tensor(x), model.parameters())
    loss, grad = problem.loss_grad(x, data)
    for i in (0, 2, 3, 4):
        own = slice(*data.offsets[i:i + 2])
        model.zero_grad()
        scores = model(torch.tensor(a[own].astype(dtype)))
        value = torch.nn.functional.cross_entropy(scores, torch.tensor(y[own]).long())
        value.backward()
        close(loss[i], value.item(), dtype)
        close(grad[i], torch.cat([p.grad.ravel() for p in model.parameters()]).numpy(), dtype)


@dtypes
@per_workers
@pytest.mark.parametrize("batch", [None, BATCH, NOBODY], ids=["full", "batch", "nobody"])
def test_an_infinite_threshold_clips_nothing(dtype, per_worker, batch):
    problem, data, *_ = example(dtype=dtype, hidden=[5, 4])
    x = points(problem, data, per_worker, dtype)
    plain, none, high = (problem.loss_grad(x, data, batch, clip=clip) for clip in (None, math.inf, 1e6))
    assert [v.tobytes() for v in plain] == [v.tobytes() for v in none] == [v.tobytes() for v in high]


@dtypes
@dense_and_sparse
def test_no_row_is_longer_than_the_threshold(dtype, sparse):
    """One row a worker, some far above C, some far below; one of zeros."""
    m, clip = 200, 0.3
    a = features(m, P) * np.geomspace(1e-6, 1e6, m)[:, None]
    y = rng(3).integers(0, C, m).astype(float)
    problem = problems.MLP(hidden=[7], activation="relu")
    data = prepared(problem, shard(a, y, [1] * m, sparse, classes=np.arange(C)), dtype)
    x = points(problem, data, dtype=dtype)
    plain, clipped = (problem.loss_grad(x, data, clip=c)[1].astype(float) for c in (None, clip))
    norms = np.linalg.norm(plain, axis=1)
    assert (norms > 100 * clip).sum() > 10 and (norms < 0.9 * clip).sum() > 10
    eps = float(np.finfo(dtype).eps)
    assert np.linalg.norm(clipped, axis=1).max() <= clip * (1 + 10 * eps)
    np.testing.assert_allclose(clipped, plain * np.minimum(1, clip / np.maximum(norms, 1e-9))[:, None], rtol=40 * eps,
                               atol=1e-30)
    assert np.array_equal(clipped[norms < 0.99 * clip], plain[norms < 0.99 * clip])


def test_no_rows_gradient_is_ever_there():
    """The gradients of all rows would take a hundred times what a step with clipping takes."""
    problem, data, *_ = example(dtype="float32", counts=(1000,), p=100, hidden=[200])
    x = points(problem, data, dtype="float32")
    assert len(data.lengths) == 1000        # computed once for a run
    tracemalloc.start()
    problem.loss_grad(x, data, clip=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * len(x) * 4 / 20


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_and_stays_with_its_worker(clip, value):
    problem, data, *_ = example(hidden=[5])
    x = points(problem, data, True)
    clean_loss, clean = problem.loss_grad(x, data, clip=clip)
    x[2, -1] = value
    with np.errstate(invalid="ignore"):
        loss, grad = problem.loss_grad(x, data, clip=clip)
    assert not np.isfinite(loss[2]) and not np.isfinite(grad[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(grad[others], clean[others], rtol=1e-13)
    np.testing.assert_allclose(loss[others], clean_loss[others], rtol=1e-13)


@dtypes
def test_the_first_point_is_a_function_of_the_seed(dtype):
    problem, data, *_ = example(dtype=dtype, hidden=[4, 9])
    other = example(dtype=dtype, counts=(40,), hidden=[4, 9])[1]
    x = problem.x0(data, 5, dtype)
    assert x.dtype == dtype and len(x) == (P + 1) * 4 + 5 * 9 + 10 * C
    assert x.tobytes() == problem.x0(other, 5, dtype).tobytes() != problem.x0(data, 6, dtype).tobytes()
    wide, data, *_ = example(hidden=[3000])
    x = wide.x0(data, 0, "float64")
    first, last = x[:7 * 3000], x[7 * 3000:]
    for part, inputs in ((first, P), (last, 3000)):
        assert abs(part).max() <= inputs**-0.5 and abs(part).max() > 0.99 * inputs**-0.5
        assert part.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.02) and abs(part.mean()) < 0.02 * inputs**-0.5


@dense_and_sparse
def test_accuracy(monkeypatch, sparse):
    monkeypatch.setattr(_layers, "PART", 3)
    problem, data, a, y = example(sparse, hidden=[5, 4], activation="relu")
    x, right = points(problem, data), 0
    for r in range(M):
        losses = [row(problem, sizes_of(problem), x, a[r], c)[0] for c in range(C)]
        right += int(np.argmin(losses)) == y[r]
    assert problem.accuracy(x, data) == (right, M) and 0 < right < M
    assert problem.accuracy(x, example(sparse, counts=(0,), hidden=[5, 4])[1]) == (0, 0)


def test_more_rows_than_go_through_the_layers_together():
    """Workers of more than PART rows, and several workers in one piece."""
    counts = (_layers.PART + 5, 0, 3, 2 * _layers.PART, 1, 400)
    problem, data, a, y = example(counts=counts, hidden=[6])
    x = points(problem, data)
    for clip in (None, 0.5):
        loss, grad = problem.loss_grad(x, data, clip=clip)
        for i in (0, 2, 3, 4, 5):
            one = slice(*data.offsets[i:i + 2])
            alone = prepared(problem, shard(a[one], y[one], [1] * counts[i], classes=np.arange(C)))
            each_loss, each = problem.loss_grad(x, alone, clip=clip)
            close(loss[i], each_loss.mean())
            close(grad[i], each.mean(0))


def test_buffers_are_used_again():
    """Smaller batches and larger ones; another dtype has other data. What was returned stays."""
    problem, data, *_ = example(dtype="float32", hidden=[5])
    x = points(problem, data, dtype="float32")
    full = problem.loss_grad(x, data)
    kept = full[1].copy()
    memory = {name: flat.ctypes.data for name, flat in data.buffers.items()}
    batch = problem.loss_grad(x, data, BATCH)
    assert np.array_equal(problem.loss_grad(x, data, BATCH)[1], batch[1]) and np.array_equal(full[1], kept)
    assert all(data.buffers[name].ctypes.data == address for name, address in memory.items())


@pytest.mark.parametrize("keys", [{"hidden": []}, {"hidden": [0]}, {"hidden": 256}, {"hidden": [2.5]},
                                  {"activation": "sigmoid"}, {"start": 1.0}, {"intercept": True}])
def test_bad_keys(keys):
    with pytest.raises(ValidationError):
        problems.MLP(**keys)


def test_labels_that_are_no_classes():
    with pytest.raises(InputError, match=r"^data\.file: the labels are not classes; problem\.name = 'mlp' expected"):
        prepared(problems.MLP(), shard(np.ones((3, 2)), np.array([0.5, 1, 2]), (3,)))
    with pytest.raises(InputError, match=r"method\.stepsize: the smoothness of the problem 'mlp' is not known"):
        problems.MLP().smoothness_product(None, None)


def test_from_images_to_a_trained_model(mpiclip, tmp_path):
    """Alone, on three ranks, and interrupted: the same losses."""
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 230).astype(np.uint8)
    x = (random.integers(0, 60, (230, 5, 6)) + 60 * (np.arange(5) == y[:, None])[:, :, None]).astype(np.uint8)
    for name, array in (("x", x[:200]), ("y", y[:200]), ("xt", x[200:]), ("yt", y[200:])):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    (tmp_path / "mlp.toml").write_text("""
        data.file = "images.h5"
        problem = { name = "mlp", hidden = [12], regularizer = "l2", lam = 1e-4 }
        method = { name = "clip21", tau = 1.0, stepsize = 0.5 }
        run = { workers = 5, rounds = 60, batch = 16, seed = 3, dtype = "float64", device = "cpu", eval_every = 30 }
    """)
    found = []
    assert mpiclip(0, "data", "import", "y", "x", "images.h5", "--test", "xt", "yt").returncode == 0
    for ranks, out, rounds in ((0, "alone", 60), (3, "three", 60), (2, "parts", 30)):
        run = mpiclip(ranks, "train", "mlp.toml", "--out", out, "--set", f"run.rounds={rounds}")
        assert run.returncode == 0, run.stderr
    run = mpiclip(0, "resume", "parts", "--set", "run.rounds=60")
    assert run.returncode == 0, run.stderr
    for out in ("alone", "three", "parts"):
        found.append(json.loads(mpiclip(0, "show", out, "--json").stdout)["final"])
    for other in found[1:]:
        assert other["round"] == 60 and other["loss"] == pytest.approx(found[0]["loss"], rel=1e-9)
    assert found[0]["accuracy"] > 0.9
