"""mpiclip.problems.resnet against convolutions in plain loops, row by row in float64, central differences and PyTorch's
numbers; and the versions of images that minibatches draw from."""

import math
from itertools import product

import numpy as np
import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from mpiclip import device, problems
from mpiclip.data import Csr, Shard, write
from mpiclip.errors import InputError
from mpiclip.problems import cnn, resnet
from mpiclip.show import summary
from test_problems import BATCH, COUNTS, NOBODY, close, has_central_differences, has_loss_and_gradient, prepared, rng

if device.compiled():
    from mpiclip.kernels import cpu

C = 3                                   # classes
M = sum(COUNTS)
KNOWN: dict = {}                        # rows of the reference, for both dtypes
KERNELS = "convolve_all", "slopes_of_all", "sums_of_all"
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
networks = pytest.mark.parametrize("image, keys", [
    ((7, 6), {"channels": [2, 3]}), ((3, 3, 5), {"channels": [3, 2], "blocks": 2}), ((2, 2, 3), {"channels": [17]})])


def shard(x, y, counts, image):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Shard(x, y, offsets, np.arange(len(counts)), len(counts), len(y), np.arange(float(C)), x.shape[1], image)


def example(image, dtype="float64", name="resnet", counts=COUNTS, **keys):
    """(problem, data, pixels, labels from 0)"""
    problem, m = problems.load(name)(**keys), sum(counts)
    a, y = rng(1).standard_normal((m, math.prod(image))), rng(3).integers(0, C, m).astype(float)
    return problem, prepared(problem, shard(a, y, counts, image), dtype), a, y


def points(problem, data, per_worker=False, dtype="float64"):
    d = len(problem.x0(data, 0, dtype))
    x = rng(7).standard_normal((len(data.offsets) - 1, d) if per_worker else d) / 2
    return x.astype(np.float32).astype(dtype)           # the same numbers in both


# the reference: one row, one place at a time, channels first

class Conv:
    """W ∗ h + β with zeros around: forward, and the slopes in h; what W and β get is kept."""

    def __init__(self, take, before, outputs, kernel, stride):
        self.W, self.bias = take(outputs, before, kernel, kernel), take(outputs)
        self.kernel, self.stride, self.padding = kernel, stride, kernel // 2

    def __call__(self, h):
        p = self.padding
        self.h = np.pad(h, [(0, 0), (p, p), (p, p)])
        height, width = (-(-n // self.stride) for n in h.shape[1:])
        z = np.zeros((len(self.W), height, width))
        for i, j in np.ndindex(height, width):
            z[:, i, j] = (self.W * self.h[self.at(i, j)]).sum((1, 2, 3)) + self.bias
        return z

    def at(self, i, j):
        i, j = i * self.stride, j * self.stride
        return slice(None), slice(i, i + self.kernel), slice(j, j + self.kernel)

    def back(self, δ):
        below, slope = np.zeros_like(self.h), np.zeros_like(self.W)
        for i, j in np.ndindex(δ.shape[1:]):
            below[self.at(i, j)] += (δ[:, i, j, None, None, None] * self.W).sum(0)
            slope += δ[:, i, j, None, None, None] * self.h[self.at(i, j)]
        self.found = np.concatenate([slope.ravel(), δ.sum((1, 2))])
        p = self.padding
        return below[:, p:below.shape[1] - p, p:below.shape[2] - p]


def row(problem, image, x, a, label):
    """(ℓ, ∇ℓ (d,), whether the class is right) of one row at x (d,), by the chain rule"""
    at = 0

    def take(*shape):
        nonlocal at
        at += math.prod(shape)
        return x[at - math.prod(shape):at].reshape(shape)

    h = a.reshape(image if len(image) == 3 else (1, *image))
    layers, blocks, before = [Conv(take, len(h), problem.channels[0], 3, 1)], [], problem.channels[0]
    for k, channels in enumerate(problem.channels):
        for block in range(problem.blocks):
            stride = 2 if k and not block else 1
            inner, outer = Conv(take, before, channels, 3, stride), Conv(take, channels, channels, 3, 1)
            direct = [Conv(take, before, channels, 1, 2)] if stride == 2 else []
            blocks.append((inner, outer, direct))
            layers += [inner, outer, *direct]
            before = channels
    W, bias = take(C, before), take(C)
    assert at == len(x)
    h = layers[0](h)
    seen = [np.where(h > 0, h, 0)]
    for inner, outer, direct in blocks:
        h = inner(seen[-1])
        seen.append(np.where(h > 0, h, 0))
        h = outer(seen[-1]) + (direct[0](seen[-2]) if direct else seen[-2])
        seen.append(np.where(h > 0, h, 0))
    mean = seen[-1].mean((1, 2))
    z = W @ mean + bias
    π = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    slopes = π - (np.arange(C) == label)
    δ = np.zeros_like(seen[-1]) + (W.T @ slopes)[:, None, None] / seen[-1][0].size
    for inner, outer, direct in reversed(blocks):
        δ = δ * (seen.pop() > 0)
        below = inner.back(outer.back(δ) * (seen.pop() > 0))
        δ = below + (direct[0].back(δ) if direct else δ)
    layers[0].back(δ * (seen.pop() > 0))
    return -math.log(π[int(label)]), np.concatenate([*(layer.found for layer in layers),
                                                      np.outer(slopes, mean).ravel(), slopes]), z.argmax() == label


def reference(found, batch=None, clip=math.inf, counts=COUNTS):
    """(losses (w,), gradients (w, d)) of rows that are known: found(worker, row)"""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    losses, gradients = np.zeros(len(counts)), np.zeros((len(counts), len(found(0, 0)[1])))
    for i, count in enumerate(counts):
        rows, denominator = range(offsets[i], offsets[i + 1]), count
        if batch is not None:
            rows, denominator = batch[0][batch[1][i]:batch[1][i + 1]], batch[2][i]
        for r in rows:
            value, g, _ = found(i, r)
            losses[i] += value / denominator
            gradients[i] += g * min(1, clip / math.sqrt(math.fsum(g * g))) / denominator
    return losses, gradients


def definitions(patch):
    """From here on NumPy's definitions compute, not the C kernels."""
    for name in KERNELS:
        patch.setattr(resnet, name, getattr(resnet, name).definition)


@networks
@dtypes
@pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
def test_loss_and_gradient(monkeypatch, image, keys, dtype, per_worker):
    """Plain and clipped. Rows go through the layers, and through a convolution, at once or few at a time; the C kernels
    and the NumPy definitions alike."""
    problem, data, a, y = example(image, dtype, **keys)
    x = points(problem, data, per_worker, dtype)

    def found(i, r):
        which = image, i * per_worker, r
        if which not in KNOWN:
            KNOWN[which] = row(problem, image, (x[i] if per_worker else x).astype(float), a[r], y[r])
        return KNOWN[which]

    for clip, batch in ((None, None), (1.5, None), (0.7, BATCH), (None, NOBODY)):
        losses, gradients = reference(found, batch, clip or math.inf)
        for together, chunk, compiled in ((1 << 20, 1 << 17, True), (400, 1, True), (1 << 20, 900, False),
                                          (400, 1, False)):
            with monkeypatch.context() as patch:
                patch.setattr(resnet, "TOGETHER", together)
                patch.setattr(cnn, "CHUNK", chunk)
                if not compiled:
                    definitions(patch)
                has_loss_and_gradient(problem, x, data, batch, clip, losses, gradients)
    assert per_worker or problem.accuracy(x, data) == (sum(found(0, r)[2] for r in range(M)), M)


def test_gradient_against_central_differences():
    problem, data, *_ = example((2, 6, 5), counts=(2, 0, 2), channels=[2, 3], regularizer="nonconvex", lam=0.7)
    has_central_differences(problem, data, points(problem, data), every=4)


# PyTorch 2.13 in float64: the loss, ‖∇‖ and Σ_j ∇_j cos j at x_j = ½ sin(3 j) of the network as the docstring has it,
# for 4 images of numbers cos(k²), k = 0, 1, …, of the classes 2, 0, 1, 0.
@pytest.mark.parametrize("image, keys, expected", [
    ((28, 28), {}, [76_963, 14.444214541629206, 407.88757109383823, 4.365609632239138]),
    ((3, 32, 32), {"blocks": 2}, [174_243, 193.3985075436687, 28407.556877934687, 5154.328442152259])])
def test_against_pytorch(image, keys, expected):
    a = np.cos(np.arange(4 * math.prod(image), dtype=float)**2).reshape(4, -1)
    problem = problems.ResNet(**keys)
    data = prepared(problem, shard(a, np.array([2.0, 0, 1, 0]), (4,), image))
    j = np.arange(len(problem.x0(data, 0, "float64")))
    loss, grad = problem.loss_grad(np.sin(3.0 * j) / 2, data)
    assert [len(j), loss[0], np.linalg.norm(grad), grad[0] @ np.cos(j)] == pytest.approx(expected, rel=1e-9)


def test_the_start():
    """A function of the seed; of any depth the first gradients are of one size (Fixup), here after a step, since at x⁰
    only the last layer has one."""
    norms = []
    for blocks in (1, 8):
        problem, data, *_ = example((12, 12), channels=[8, 16], blocks=blocks, counts=(8,))
        x = problem.x0(data, 5, "float64")
        assert problem.x0(data, 5, "float32").tobytes() == x.astype("float32").tobytes()
        assert not np.array_equal(x, problem.x0(data, 6, "float64"))
        loss, g = problem.loss_grad(x, data)
        assert loss == pytest.approx(math.log(C)) and np.count_nonzero(g) <= 17 * C
        norms.append(np.linalg.norm(problem.loss_grad(x - 0.1 * g[0], data)[1]))
    assert 0.3 < norms[1] / norms[0] < 3


@pytest.mark.skipif(not device.compiled(), reason="no C kernels")
@dtypes
@pytest.mark.parametrize("shape, kernel, stride, padding, outputs", [
    ((9, 14, 1), 3, 1, 1, 17), ((7, 5, 33), 3, 2, 1, 40), ((8, 7, 3), 1, 2, 0, 16), ((5, 29, 20), 2, 3, 1, 3)])
def test_kernels_equal_their_definitions(dtype, shape, kernel, stride, padding, outputs):
    """Several vectors of channels, and a rest; lines of few and of many places; one worker without rows; a number that
    is not finite stays in its image. The bytes do not depend on the threads."""
    m, starts = 7, np.array([0, 3, 3, 7])
    down, across = ((n + 2 * padding - kernel) // stride + 1 for n in shape[:2])
    images, W = rng(1).standard_normal((m, *shape)), rng(2).standard_normal((3, outputs, kernel**2 * shape[2]))
    bias, slopes = rng(5).standard_normal((3, outputs)), rng(3).standard_normal((m, down, across, outputs))
    images[5, 0, 0, 0] = slopes[5, 0, 0, 0] = np.nan
    images, W, bias, slopes = (v.astype(dtype) for v in (images, W, bias, slopes))
    more, others = slopes[::-1].copy(), images[::-1].copy()
    found = {}

    def room(name, shape, like, dtype=None):
        return np.empty(shape, dtype or like.dtype)

    for way, threads in (("definition", 1), ("compiled", 1), ("compiled", 3)):
        results = [np.full_like(v, 9) for v in (slopes, slopes, images, images, W, bias)]
        plain, whole, below, masked, sums, biases = results
        size = kernel, stride, padding
        arguments = ((0, (images, W, bias, starts, *size, None, False, plain)),
                     (0, (images, W, bias, starts, *size, more, True, whole)),
                     (1, (slopes, W, starts, *size, None, None, below)),
                     (1, (slopes, W, starts, *size, others, images, masked)),
                     (2, (images, slopes, starts, *size, sums, biases)))
        with threadpool_limits(threads), np.errstate(invalid="ignore"):
            for k, given in arguments:
                if way == "definition":
                    getattr(resnet, KERNELS[k]).definition(*given, room)
                else:
                    assert getattr(cpu, KERNELS[k])(*given, room) is None, "declined"
        found[way, threads] = results
    expected, one, three = found.values()
    assert [v.tobytes() for v in one] == [v.tobytes() for v in three]
    scale = kernel * math.sqrt(shape[2] + outputs)
    for here, wanted in zip(one, expected, strict=True):
        rows = [0, 1] if len(here) == 3 else [0, 2, 3, 4, 6]
        close(here[rows] / scale, wanted[rows].astype(float) / scale, dtype)
    assert not one[4][1].any() and not one[5][1].any() and np.isnan(one[4][2]).any() and np.isnan(one[0][5]).any()


# versions of images

def version(pixels, number, crop, flip):
    """A version of an image (channels, height, width), place by place."""
    side, (_, height, width), out = 2 * crop + 1, pixels.shape, np.zeros_like(pixels)
    mirrored, place = (number % 2, number // 2) if flip else (0, number)
    down, across = ([0, *range(1, crop + 1), *range(-crop, 0)][n] for n in divmod(place, side))
    for i, j in product(range(height), range(width)):
        y, x = i + down, j + across
        x = width - 1 - x if mirrored else x
        if 0 <= y < height and 0 <= x < width:
            out[:, i, j] = pixels[:, y, x]
    return out


@pytest.mark.parametrize("name, image, keys", [
    ("resnet", (2, 5, 6), {"channels": [2, 3], "crop": 2, "flip": True}),
    ("cnn", (6, 7), {"channels": [2], "kernel": 3, "hidden": [], "crop": 1}),
    ("cnn", (2, 6, 6), {"channels": [2], "kernel": 3, "hidden": [], "flip": True})])
def test_versions_of_images(name, image, keys):
    """A minibatch of versions is one of images that were shifted and mirrored before; version 0 is the image."""
    problem, data, a, y = example(image, name=name, **keys)
    crop, flip = problem.crop, problem.flip
    views = problem.views(data)
    assert views == (2 * crop + 1)**2 * (1 + flip)
    x, shape = points(problem, data), image if len(image) == 3 else (1, *image)
    versions = np.array([0, views - 1, 1 % views, 0, views // 2, views // 3, 2 % views, views - 2])
    changed = np.array([version(a[r].reshape(shape), v, crop, flip).ravel() for r, v in zip(BATCH[0], versions,
                                                                                             strict=True)])
    everything = {version(a[0].reshape(shape), v, crop, flip).tobytes() for v in range(views)}
    assert len(everything) == views and a[0].tobytes() in everything
    there = prepared(problem, shard(changed, y[BATCH[0]], np.diff(BATCH[1]), image))
    plain = problem.loss_grad(x, there, (np.arange(8), *BATCH[1:]), clip=1.0)
    for found, expected in zip(problem.loss_grad(x, data, (BATCH[0] + M * versions, *BATCH[1:]), clip=1.0), plain,
                               strict=True):
        close(found, expected)
    assert problem.loss_grad(x, data, BATCH)[1].tobytes() == problem.model_copy(update={"crop": 0, "flip": False}
                                                                               ).loss_grad(x, data, BATCH)[1].tobytes()


@pytest.mark.parametrize("keys", [{"channels": []}, {"channels": [0]}, {"blocks": 0}, {"activation": "tanh"},
                                  {"start": 1.0}, {"crop": -1}, {"flip": 2}])
def test_bad_keys(keys):
    with pytest.raises(ValidationError):
        problems.ResNet(**keys)


@pytest.mark.parametrize("image, keys, words", [
    (None, {}, ["data.file: found rows of 12 numbers", "'resnet' expected images"]),
    ((3, 2, 2, 1), {}, ["data.file: found rows of 3 × 2 × 2 × 1", "(height, width) or (channels, height, width)"]),
    ((2, 6), {}, ["problem.channels: images of 2 × 6 come to the 3. channels as 1 × 3", "at least 2 × 2"]),
    ((3, 4), {"crop": 3}, ["problem.crop: found 3 for images of 3 × 4, expected less than 3"])])
def test_images_that_do_not_fit(image, keys, words):
    with pytest.raises(InputError) as error:
        prepared(problems.ResNet(**keys), shard(np.ones((3, 12)), np.arange(3.0), (3,), image))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_sparse_rows_are_no_images():
    sparse = Csr(np.arange(4), np.arange(3, dtype=np.int32), np.ones(3), (3, 16))
    with pytest.raises(InputError, match=r"^data.file: found rows of 16 numbers; problem.name = 'resnet' expected"):
        prepared(problems.ResNet(), shard(sparse, np.arange(3.0), (3,), None))


def test_from_images_to_a_trained_model(mpiclip, tmp_path):
    """Classes are plain, and striped down or across. Alone and on two ranks, with minibatches of versions: the same
    losses."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 130).astype(np.uint8)
    stripes = np.array([np.zeros((9, 9)), np.indices((9, 9))[0] % 3 == 0, np.indices((9, 9))[1] % 3 == 0])
    x = (random.integers(0, 60, (130, 9, 9)) + 190 * stripes[y]).astype(np.uint8)
    x, y = x.reshape(130, 81), y.astype(float)
    write(tmp_path / "images.h5", ["stripes"], (x[:100], y[:100]), (x[100:], y[100:]), (9, 9))
    (tmp_path / "resnet.toml").write_text("""
        data = { file = "images.h5" }
        problem = { name = "resnet", channels = [4, 6], crop = 1 }
        method = { name = "celgc", eta = 0.3, gamma = 0.3, interval = 2 }
        run = { workers = 5, rounds = 30, batch = 8, dtype = "float64", device = "cpu", eval_every = 10, eval_rows = 9 }
    """)
    found = []
    for ranks in (0, 2):
        run = mpiclip(ranks, "train", "resnet.toml", "--out", f"on-{ranks}")
        assert run.returncode == 0, run.stderr
        found.append(summary(tmp_path / f"on-{ranks}")["final"])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-9) and found[0]["accuracy"] > 0.7
