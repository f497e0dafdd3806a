"""mpiclip.problems.cnn against a convolution in four nested loops, row by row in float64, and central differences."""

import json
import math
import tracemalloc
from itertools import pairwise, product

import numpy as np
import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from mpiclip import device, problems
from mpiclip.data import Shard
from mpiclip.errors import InputError
from mpiclip.problems import _layers, cnn
from test_problems import BATCH, COUNTS, NOBODY, close, has_central_differences, has_loss_and_gradient, prepared, rng

if device.compiled():
    from mpiclip.kernels import cpu

C = 3                                   # classes
M = sum(COUNTS)
KERNELS = "convolve", "slopes_of_images", "sums_of_patches"
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
per_workers = pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
# Of 10 × 10 a kernel of 3 leaves 8, pooled 4; then 2, pooled 1. With padding 1: 10, 5, 5, 2 (a rest is left over).
networks = pytest.mark.parametrize("image, keys", [
    ((10, 10), {"channels": [2, 3], "kernel": 3, "hidden": [4]}),
    ((2, 10, 10), {"channels": [2, 3], "kernel": 3, "padding": 1, "hidden": [], "activation": "tanh"}),
    ((1, 9, 8), {"channels": [3], "kernel": 2, "padding": 2, "pool": 3, "hidden": [5, 4]}),
    ((3, 4, 6), {"channels": [2, 4], "kernel": 1, "pool": 1, "hidden": [3], "activation": "tanh"})])


def shard(x, y, counts, image):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Shard(x, y, offsets, np.arange(len(counts)), len(counts), len(y), np.arange(float(C)), x.shape[1], image)


def example(image, dtype="float64", counts=COUNTS, **keys):
    """(problem, data, pixels, labels from 0)"""
    problem, m = problems.CNN(**keys), sum(counts)
    a, y = rng(1).standard_normal((m, math.prod(image))), rng(3).integers(0, C, m).astype(float)
    return problem, prepared(problem, shard(a, y, counts, image), dtype), a, y


def points(problem, data, per_worker=False, dtype="float64"):
    d = len(problem.x0(data, 0, dtype))
    return rng(7).standard_normal((len(data.offsets) - 1, d) if per_worker else d).astype(dtype)


# the reference: one row, one place, one channel at a time

def shapes(problem, image):
    """Of W of each layer, in order."""
    before, *size = image if len(image) == 3 else (1, *image)
    found = []
    for channels in problem.channels:
        found.append((channels, before, problem.kernel, problem.kernel))
        size = [(n + 2 * problem.padding - problem.kernel + 1) // problem.pool for n in size]
        before = channels
    sizes = [before * size[0] * size[1], *problem.hidden, C]
    return found + [(k, n) for n, k in pairwise(sizes)]



def convolve(h, W, bias, padding, pool):
    """(pooled (channels, height, width), the place each number comes from)"""
    out, before, kernel, _ = W.shape
    h = np.pad(h, [(0, 0), (padding, padding), (padding, padding)])
    z = np.zeros((out, h.shape[1] - kernel + 1, h.shape[2] - kernel + 1))
    for o in range(out):
        for i in range(z.shape[1]):
            for j in range(z.shape[2]):
                for c in range(before):
                    z[o, i, j] += (W[o, c] * h[c, i:i + kernel, j:j + kernel]).sum()
                z[o, i, j] += bias[o]
    pooled = np.zeros((out, z.shape[1] // pool, z.shape[2] // pool))
    origin = np.zeros((*pooled.shape, 2), int)
    for o, i, j in product(*map(range, pooled.shape)):
        window = [(i * pool + a, j * pool + b) for a in range(pool) for b in range(pool)]
        origin[o, i, j] = max(window, key=lambda place: z[o, place[0], place[1]])
        pooled[o, i, j] = z[o, origin[o, i, j][0], origin[o, i, j][1]]
    return pooled, origin


def row(problem, image, x, a, label):
    """(ℓ, ∇ℓ (d,)) of one row at x (d,), by the chain rule"""
    σ, slope = (np.tanh, lambda h: 1 - h**2) if problem.activation == "tanh" else (lambda z: np.where(z > 0, z, 0),
                                                                                   lambda h: h > 0)
    layers, at = [], 0
    for shape in shapes(problem, image):
        n, k = math.prod(shape), shape[0]
        layers.append((x[at:at + n].reshape(shape), x[at + n:at + n + k]))
        at += n + k
    h, origins = [a.reshape(image if len(image) == 3 else (1, *image))], []
    for W, bias in layers[:-1]:
        if W.ndim == 4:
            z, origin = convolve(h[-1], W, bias, problem.padding, problem.pool)
            origins.append(origin)
        else:
            z = W @ h[-1].ravel() + bias
        h.append(σ(z))
    z = layers[-1][0] @ h[-1].ravel() + layers[-1][1]
    total = math.fsum(math.exp(v - max(z)) for v in z)
    delta = np.array([math.exp(v - max(z)) / total - (c == int(label)) for c, v in enumerate(z)])
    parts = []
    for k in range(len(layers) - 1, -1, -1):
        W = layers[k][0]
        if W.ndim == 2:
            parts = [np.outer(delta, h[k].ravel()).ravel(), delta, *parts]
            delta = (W.T @ delta).reshape(h[k].shape)
        else:
            p, kernel = problem.padding, problem.kernel
            padded = np.pad(h[k], [(0, 0), (p, p), (p, p)])
            dW, dh = np.zeros(W.shape), np.zeros(padded.shape)
            for o, i, j in product(*map(range, delta.shape)):
                u, v = origins[k][o, i, j]
                dW[o] += delta[o, i, j] * padded[:, u:u + kernel, v:v + kernel]
                dh[:, u:u + kernel, v:v + kernel] += delta[o, i, j] * W[o]
            parts = [dW.ravel(), delta.sum((1, 2)), *parts]
            delta = dh[:, p:dh.shape[1] - p, p:dh.shape[2] - p]
        if k:
            delta = delta * slope(h[k])
    return math.log(total) + max(z) - z[int(label)], np.concatenate(parts)


def reference(problem, image, a, y, x, counts=COUNTS, batch=None, clip=math.inf):
    """(losses (w,), gradients (w, d))"""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    mask = np.concatenate([np.arange(math.prod(s) + s[0]) < math.prod(s) for s in shapes(problem, image)])
    losses, gradients = np.zeros(len(counts)), np.zeros((len(counts), len(mask)))
    for i, count in enumerate(counts):
        x_i = (x if x.ndim == 1 else x[i]).astype(float)
        rows, denominator = range(offsets[i], offsets[i + 1]), count
        if batch is not None:
            rows, denominator = batch[0][batch[1][i]:batch[1][i + 1]], batch[2][i]
        for r in rows:
            value, g = row(problem, image, x_i, a[r], y[r])
            losses[i] += value / denominator
            gradients[i] += g * min(1, clip / math.sqrt(math.fsum(g * g))) / denominator
        if count and problem.regularizer == "l2":
            losses[i] += problem.lam * (mask * x_i**2 / 2).sum()
            gradients[i] += problem.lam * mask * x_i
    return losses, gradients


@networks
@dtypes
@per_workers
def test_loss_and_gradient(monkeypatch, image, keys, dtype, per_worker):
    """Plain; and clipped, the regularizer as it is. Rows go through the layers, and through a convolution, at once or
    few at a time; the C kernels and the NumPy definitions alike."""
    problem, data, a, y = example(image, dtype, regularizer="l2", lam=0.3, **keys)
    x = points(problem, data, per_worker, dtype)
    rows_at_once = [(_layers.PART, 1 << 20, True), (3, 1, True), (_layers.PART, 900, False), (3, 1, False)]
    for clip, batch in ((None, None), (1.5, None), (0.7, BATCH), (None, NOBODY)):
        losses, gradients = reference(problem, image, a, y, x, batch=batch, clip=clip or math.inf)
        for part, chunk, compiled in rows_at_once:
            with monkeypatch.context() as patch:
                patch.setattr(_layers, "PART", part)
                patch.setattr(cnn, "CHUNK", chunk)
                for name in () if compiled else KERNELS:
                    patch.setattr(cnn, name, getattr(cnn, name).definition)
                has_loss_and_gradient(problem, x, data, batch, clip, losses, gradients)


@networks
def test_gradient_against_central_differences(image, keys):
    problem, data, *_ = example(image, counts=(4, 0, 3), regularizer="nonconvex", lam=0.7, **keys)
    has_central_differences(problem, data, points(problem, data), every=2)


@pytest.mark.parametrize("image, keys, d", [
    ((28, 28), {}, 431_080),
    ((3, 32, 32), {"channels": [20, 100, 200], "padding": 2, "hidden": [512, 256]}, 2_324_630)])
def test_the_networks_of_the_papers(image, keys, d):
    """As many parameters; x⁰ is a function of the seed, U(±1/√fan in); float32 agrees with float64; a worker's
    gradient does not depend on whom it shares the rank with."""
    random, counts = rng(0), (6, 25, 3)
    a, y = random.random((34, math.prod(image))), random.integers(0, 10, 34).astype(float)
    problem, found = problems.CNN(**keys), {}
    for dtype in ("float32", "float64"):
        s = Shard(a, y, np.array([0, 6, 31, 34]), np.arange(3), 3, 34, np.arange(10.0), a.shape[1], image)
        data = prepared(problem, s, dtype)
        x = problem.x0(data, 5, dtype)
        assert len(x) == d and x.dtype == dtype and not np.array_equal(x, problem.x0(data, 6, dtype))
        found[dtype] = loss, grad = problem.loss_grad(x, data)
        for i, own in enumerate([slice(0, 6), slice(6, 31), slice(31, 34)] if dtype == "float32" else []):
            alone = Shard(a[own], y[own], np.array([0, counts[i]]), np.arange(1), 3, 34, np.arange(10.0), a.shape[1],
                          image)
            one_loss, one = problem.loss_grad(x, prepared(problem, alone, dtype))
            assert np.linalg.norm(one[0] - grad[i]) < 1e-6 * np.linalg.norm(one) and one_loss == pytest.approx(loss[i])
    error = np.linalg.norm(found["float32"][1] - found["float64"][1], axis=1)
    assert (error < 1e-5 * np.linalg.norm(found["float64"][1], axis=1)).all()
    at = 0
    for layer in data.layers:
        part, bound = x[at:at + (layer.inputs + 1) * layer.outputs], layer.inputs**-0.5
        at += len(part)
        assert 0.9 * bound < abs(part).max() <= bound and abs(part.mean()) < 4 * bound / (3 * len(part))**0.5
    assert at == d


@pytest.mark.parametrize("keys", [{}, {"padding": 1}], ids=["", "padded"])
def test_against_pytorch(keys):
    """The flat vector is PyTorch's, and so are loss and gradient."""
    torch = pytest.importorskip("torch")
    problem, data, a, y = example((2, 13, 12), channels=[4, 5], kernel=3, hidden=[6], **keys)
    x, nn, padding = points(problem, data), torch.nn, problem.padding
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(4, 5, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, C)).double()
    model(torch.zeros(1, 2, 13, 12).double())
    nn.utils.vector_to_parameters(torch.tensor(x), model.parameters())
    loss, grad = problem.loss_grad(x, data)
    for i in (0, 2, 3, 4):
        own = slice(*data.offsets[i:i + 2])
        model.zero_grad()
        scores = model(torch.tensor(a[own]).reshape(-1, 2, 13, 12))
        value = nn.functional.cross_entropy(scores, torch.tensor(y[own]).long())
        value.backward()
        close(loss[i], value.item())
        close(grad[i], torch.cat([p.grad.ravel() for p in model.parameters()]).numpy())


@pytest.mark.skipif(not device.compiled(), reason="no C kernels")
@dtypes
@pytest.mark.parametrize("shape, kernel, pool, outputs", [((9, 12, 1), 5, 2, 17), ((7, 6, 20), 3, 1, 50),
                                                          ((8, 19, 3), 2, 3, 70)])
@pytest.mark.parametrize("channels_first", [False, True])
def test_kernels_equal_their_definitions(dtype, shape, kernel, pool, outputs, channels_first):
    """Several vectors of channels, and a rest; pieces of a patch longer and shorter than a vector; numbers that are
    equal, or not finite; one worker without rows. The bytes do not depend on the threads."""
    m, starts = 7, np.array([0, 3, 3, 7])
    down, across = ((n - kernel + 1) // pool for n in shape[:2])
    images, W = rng(1).standard_normal((m, *shape)), rng(2).standard_normal((3, outputs, kernel**2 * shape[2]))
    images[2] = 1                                       # all places are equally good
    images[4, 3, 3, 0] = np.nan
    images[5, 3, 3, 0] = np.inf
    slopes = rng(3).standard_normal((m, down, across, outputs)) * (rng(4).random((m, down, across, outputs)) < 0.5)
    images, W, slopes = (v.astype(dtype) for v in (images, W, slopes))
    found = {}

    def room(name, shape, like, dtype=None):
        return np.empty(shape, dtype or like.dtype)

    for way, threads in (("definition", 1), ("compiled", 1), ("compiled", 3)):
        maps = np.empty((m, outputs, down, across), dtype).transpose(0, 2, 3, 1) if channels_first else (
            np.empty(slopes.shape, dtype))
        which, below, sums = np.empty(slopes.shape, np.uint8), np.empty_like(images), np.full_like(W, np.nan)
        δ = np.ascontiguousarray(slopes.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1) if channels_first else slopes
        arguments = ((images, W, starts, kernel, pool, maps, which), (δ, which, W, starts, kernel, pool, below),
                     (images, δ, which, starts, kernel, pool, sums))
        with threadpool_limits(threads), np.errstate(invalid="ignore"):
            for name, given in zip(KERNELS, arguments, strict=True):
                if way == "definition":
                    getattr(cnn, name).definition(*given, room)
                else:
                    assert getattr(cpu, name)(*given, room) is None, "declined"
        found[way, threads] = maps, which, below, sums
    expected, one, three = found.values()
    assert [v.tobytes() for v in one] == [v.tobytes() for v in three]
    finite = [0, 1, 2, 3, 6]
    for found_array, wanted, rows in zip(one, expected, (finite, finite, finite, [0, 1]), strict=True):
        close(found_array[rows], wanted[rows].astype(float), dtype)
    assert np.array_equal(np.isnan(one[0]), np.isnan(expected[0])) and np.isnan(one[0]).any()
    assert not one[3][1].any() and not np.isfinite(one[3][2]).all()


@dtypes
def test_no_row_is_longer_than_the_threshold(dtype):
    """One row a worker, some far above C, some far below; one black image."""
    m, clip, image = 60, 2.0, (10, 10)
    a = rng(1).standard_normal((m, 100)) * np.geomspace(1e-2, 1e4, m)[:, None]
    a[7] = 0
    problem = problems.CNN(channels=[6, 8], kernel=3, hidden=[16])
    data = prepared(problem, shard(a, rng(3).integers(0, C, m).astype(float), [1] * m, image), dtype)
    x = points(problem, data, dtype=dtype)
    plain, clipped = (problem.loss_grad(x, data, clip=c)[1].astype(float) for c in (None, clip))
    norms = np.linalg.norm(plain, axis=1)
    assert (norms > 100 * clip).sum() > 5 and (norms < 0.9 * clip).sum() > 5
    eps = float(np.finfo(dtype).eps)
    assert np.linalg.norm(clipped, axis=1).max() <= clip * (1 + 20 * eps)
    np.testing.assert_allclose(clipped, plain * np.minimum(1, clip / np.maximum(norms, 1e-9))[:, None], rtol=100 * eps,
                               atol=4 * eps)
    none, high = (problem.loss_grad(x, data, clip=c)[1] for c in (math.inf, 1e12))
    assert none.tobytes() == high.tobytes()


def test_what_is_there_at_once():
    """Neither the patches of all images nor the gradients of all rows."""
    problem, data, *_ = example((28, 28), "float32", counts=(400,), channels=[8, 16])
    x = points(problem, data, dtype="float32") / 30
    tracemalloc.start()
    problem.loss_grad(x, data, clip=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    patches, gradients = 400 * (24 * 24 * 25 + 8 * 8 * 200), 400 * len(x)
    assert peak < 4 * min(patches, gradients)
    kept = problem.loss_grad(x, data)[1]
    memory = {name: flat.ctypes.data for name, flat in data.buffers.items()}
    again = problem.loss_grad(x, data, (np.arange(5), np.array([0, 5]), np.array([5.0])))[1]
    assert not np.shares_memory(kept, again)
    assert all(data.buffers[name].ctypes.data == address for name, address in memory.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_and_stays_with_its_worker(value):
    problem, data, *_ = example((10, 10), channels=[2, 3], kernel=3, hidden=[4])
    x = points(problem, data, True)
    clean_loss, clean = problem.loss_grad(x, data)
    x[2, 0] = value
    with np.errstate(invalid="ignore", over="ignore"):
        loss, grad = problem.loss_grad(x, data)
    assert not np.isfinite(loss[2]) and not np.isfinite(grad[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(grad[others], clean[others], rtol=1e-13)
    np.testing.assert_allclose(loss[others], clean_loss[others], rtol=1e-13)


@networks
def test_accuracy(monkeypatch, image, keys):
    monkeypatch.setattr(_layers, "PART", 3)
    problem, data, a, y = example(image, **keys)
    x, right = points(problem, data), 0
    for r in range(M):
        right += int(np.argmin([row(problem, image, x, a[r], c)[0] for c in range(C)])) == y[r]
    assert problem.accuracy(x, data) == (right, M) and 0 < right < M
    assert problem.accuracy(x, example(image, counts=(0,), **keys)[1]) == (0, 0)


@pytest.mark.parametrize("keys", [
    {"channels": []}, {"channels": [0]}, {"channels": 20}, {"kernel": 0}, {"padding": -1}, {"pool": 0}, {"pool": 17},
    {"hidden": [0]}, {"activation": "gelu"}, {"start": 1.0}])
def test_bad_keys(keys):
    with pytest.raises(ValidationError):
        problems.CNN(**keys)


@pytest.mark.parametrize("image, size, words", [
    (None, 12, ["data.file: found rows of 12 numbers", "'cnn' expected images"]),
    ((2, 2, 2, 2), 16, ["data.file: found rows of 2 × 2 × 2 × 2", "(height, width) or (channels, height, width)"]),
    ((5, 28), 140, ["problem.channels: images of 5 × 28 come to convolution 1", "at least 6 × 6"]),
    ((12, 13), 156, ["problem.channels: images of 4 × 4 come to convolution 2", "at least 6 × 6"])])
def test_images_that_do_not_fit(image, size, words):
    with pytest.raises(InputError) as error:
        prepared(problems.CNN(), shard(np.ones((3, size)), np.arange(3.0), (3,), image))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_from_images_to_a_trained_model(mpiclip, tmp_path):
    """Standardised, with evaluations of some rows; alone and on three ranks: the same losses."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 130).astype(np.uint8)
    x = (random.integers(0, 60, (130, 12, 12)) + 60 * (np.arange(12) // 4 == y[:, None])[:, :, None]).astype(np.uint8)
    for name, array in (("x", x[:100]), ("y", y[:100]), ("xt", x[100:]), ("yt", y[100:])):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    (tmp_path / "cnn.toml").write_text("""
        data = { file = "images.h5", standardize = true }
        problem = { name = "cnn", channels = [3, 4], kernel = 3, hidden = [12], regularizer = "l2", lam = 1e-4 }
        method = { name = "sgd", stepsize = 0.2, beta = 0.5 }
        run = { workers = 5, rounds = 20, batch = 8, dtype = "float64", device = "cpu", eval_every = 10, eval_rows = 9 }
    """)
    found = []
    assert mpiclip(0, "data", "import", "y", "x", "images.h5", "--test", "xt", "yt").returncode == 0
    for ranks in (0, 3):
        run = mpiclip(ranks, "train", "cnn.toml", "--out", f"on-{ranks}")
        assert run.returncode == 0, run.stderr
        found.append(json.loads(mpiclip(0, "show", f"on-{ranks}", "--json").stdout)["final"])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-9) and found[0]["accuracy"] > 0.9
