"""mpiclip.problems.lstm against plain loops, one token and one unit at a time, differences of those, and PyTorch's
numbers; and the kernels against mpiclip/cells.py."""

import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from mpiclip import cells, device, problems
from mpiclip.data import Text
from mpiclip.errors import InputError
from mpiclip.problems import lstm

if device.compiled():
    from mpiclip.kernels import cpu

DROPPED = {"dropout": 0.3, "dropout_hidden": 0.2, "dropout_embedding": 0.3, "weight_drop": 0.4}
NAMES = "lstm_forward", "lstm_backward", "cross_entropies", "add_rows"
needs_kernels = pytest.mark.skipif(not device.compiled(), reason="the C kernels were not compiled")


def rng(seed=0):
    return np.random.default_rng(seed)


def text(tokens, streams=1, V=None, blocks=None, first=0):
    """A text whose workers have equal streams; with blocks those of all go round, and `first` is the first one here."""
    tokens, n = np.asarray(tokens, np.int32), len(blocks) - 1 if blocks else streams
    ids = np.arange(first, first + streams)
    return Text(tokens, len(tokens) // n * np.arange(first, first + streams + 1), ids, n, len(tokens),
                tuple(map(str, range(V or int(tokens.max()) + 1))), "word", blocks and np.array(blocks))


def example(w=2, V=7, length=33, dtype="float64", **keys):
    """(problem, data)"""
    problem = problems.LSTM(**{"hidden": 3, "sequence": 4} | keys)
    shard = text(rng(1).integers(0, V, w * length), w, V)
    return problem, problem.prepare(shard, shard.ids, w, 0, dtype)


def points(problem, data, per_worker=False, dtype="float64"):
    """Larger than x⁰: gates of all sizes"""
    d = len(problem.x0(data, 0, dtype))
    return rng(3).normal(0, 0.7, (len(data.ids), d) if per_worker else d).astype(dtype)


# the reference

def sigma(a):
    return 1 / (1 + math.exp(-a))


def loss(problem, V, x, tokens, state, masks):
    """(Σ −log p, what the layers hold) of one stream of tokens; masks: name → this stream's factors"""
    sizes, at, parts = problem.sizes, 0, []
    shapes = [(V, sizes[0])]
    for inputs, n in pairwise(sizes):
        shapes += [(4 * n, inputs), (4 * n, n), (4 * n,), (4 * n,)]
    for shape in [*shapes, *([] if problem.tied else [(V, sizes[-1])]), (V,)]:
        parts.append(x[at:at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    assert at == len(x)
    E, bias, D = parts[0], parts[-1], parts[0] if problem.tied else parts[-2]
    total, state = 0.0, state.copy()
    for token, following in pairwise(tokens):
        h, place = E[token] * masks.get("embedding", np.ones(V))[token] * masks.get("input", 1), 0
        for k, n in enumerate(sizes[1:]):
            W_ih, W_hh, b_ih, b_hh = parts[1 + 4 * k:5 + 4 * k]
            before, c = state[place:place + n].copy(), state[place + n:place + 2 * n].copy()
            a = W_ih @ h + (W_hh * masks.get(("weights", k), 1)) @ before + b_ih + b_hh
            for j in range(n):
                c[j] = sigma(a[n + j]) * c[j] + sigma(a[j]) * math.tanh(a[2 * n + j])
                before[j] = sigma(a[3 * n + j]) * math.tanh(c[j])
            state[place:place + n], state[place + n:place + 2 * n] = before, c
            h, place = before * masks.get(("output", k), 1), place + 2 * n
        z = D @ h + bias
        total += math.log(math.fsum(math.exp(v) for v in z)) - z[following]
    return total, state


def streams_of(batch, g):
    """(tokens, masks) of each stream of the g-th worker of a minibatch"""
    shared = {"embedding", ("weights", 0), ("weights", 1), ("weights", 2)}
    for r in range(batch.tokens.shape[2]):
        yield batch.tokens[g, :, r], {name: m[g] if name in shared else m[g, r] for name, m in batch.masks.items()}


def slope(f, x, v, e=1e-4):
    """∂f/∂v at x, to the fourth order"""
    return (8 * (f(x + e * v) - f(x - e * v)) - (f(x + 2 * e * v) - f(x - 2 * e * v))) / (12 * e)


@pytest.mark.parametrize("keys", [
    {}, {"layers": 2, "embedding": 5, **DROPPED}, {"layers": 3, "embedding": 2, "dropout_input": 0.3},
    {"tied": False, "embedding": 4, **DROPPED, "dropout_input": 0.3},
    {"layers": 3, "tied": False, "embedding": 4, **DROPPED}], ids=str)
@pytest.mark.parametrize("per_worker", [False, True], ids=["shared", "per worker"])
def test_minibatches_of_streams(keys, per_worker):
    problem, data = example(**keys)
    x, (b, numbers) = points(problem, data, per_worker), problem.carried(data, 2)
    carried = rng(4).normal(0, 0.5, (2, b, numbers))
    before = carried.copy()
    batch = problem.follow(data, b, np.arange(2), np.array([1.0, 2.0]), carried, 5)
    losses, grad = problem.loss_grad(x, data, batch)
    for i in range(2):
        x_i = x[i] if per_worker else x

        def f(x, i=i):
            return sum(loss(problem, 7, x, tokens, before[i, r], masks)[0]
                       for r, (tokens, masks) in enumerate(streams_of(batch, i))) / 8
        assert losses[i] == pytest.approx(f(x_i), rel=1e-12)
        for v in rng(6).standard_normal((4, len(x_i))):
            assert grad[i] @ v == pytest.approx(slope(f, x_i, v), rel=1e-7, abs=1e-9)
        for r, (tokens, masks) in enumerate(streams_of(batch, i)):
            np.testing.assert_allclose(carried[i, r], loss(problem, 7, x_i, tokens, before[i, r], masks)[1], rtol=1e-12)


def test_windows(monkeypatch):
    monkeypatch.setattr(lstm, "WINDOWS", 3)             # several pieces
    problem, data = example(layers=2, **DROPPED, regularizer="l2", lam=0.3)
    x, zeros = points(problem, data, True), np.zeros(12)
    batch = np.array([5, 0, 9, 9, 9, 12]), np.array([0, 2, 6]), np.array([2.0, 5.0])
    assert data.bounds.tolist() == [0, 8, 16]
    biases = np.concatenate([np.full(int(np.prod(shape)), len(shape) == 1) for shape in data.shapes])
    for chosen, windows, shares in ((None, [range(8), range(8)], [8, 8]), (batch, [[5, 0], [1, 1, 1, 4]], [2, 5])):
        losses, grad = problem.loss_grad(x, data, chosen)
        for i in range(2):
            def f(x, i=i, windows=windows, shares=shares):
                own = data.tokens[33 * i:]
                return sum(loss(problem, 7, x, own[4 * k:4 * k + 5], zeros, {})[0] for k in windows[i]) / (
                    4 * shares[i]) + 0.3 * (x[~biases] ** 2).sum() / 2
            assert losses[i] == pytest.approx(f(x[i]), rel=1e-12)
            v = rng(7).standard_normal(len(x[i]))
            assert grad[i] @ v == pytest.approx(slope(f, x[i], v), rel=1e-7)
    assert problem.loss_grad(x, data, batch, loss=False)[0] is None


def test_equals_pytorch():
    """Embedding(5, 3), LSTM(3, 4, 2), Linear(4, 5), x_k = sin k², float64: recorded with PyTorch 2.13"""
    V, T, b = 5, 3, 2
    k = np.arange(b * (2 * T + 1))
    problem = problems.LSTM(layers=2, hidden=4, embedding=3, tied=False, sequence=T)
    shard = text((3 * k + k**2) % V, V=V)
    data = problem.prepare(shard, shard.ids, 1, 0, "float64")
    x, carried = np.sin(np.arange(344.0) ** 2), np.zeros((1, *problem.carried(data, b)))
    for taken, value, norm, some in (
            (0, 1.3937214532521225, 0.41857009248803256, [0.010300627900996, -0.000707476841407, -0.000802283874251]),
            (1, 1.3562343044805676, 0.3765147618093641, [0.056190413731452, -0.000910131114014, -0.003048157677618])):
        batch = problem.follow(data, b, np.arange(1), np.array([taken]), carried, 0)
        losses, grad = problem.loss_grad(x, data, batch)
        assert losses[0] == pytest.approx(value, rel=1e-13) and np.linalg.norm(grad) == pytest.approx(norm, rel=1e-12)
        np.testing.assert_allclose(grad[0, [0, 29, 58]], some, atol=2e-15)


def test_what_is_carried():
    problem, data = example(layers=2)
    twice, _ = example(layers=2, sequence=8)
    x, shape = points(problem, data), problem.carried(data, 2)
    carried, whole, losses = np.ones((2, *shape)), np.ones((2, *shape)), []
    for taken in (0, 1):
        batch = problem.follow(data, 2, np.arange(2), np.full(2, taken), carried, 0)
        losses.append(problem.loss_grad(x, data, batch)[0])
    long, _ = twice.loss_grad(x, data, twice.follow(data, 2, np.arange(2), np.zeros(2), whole, 0))
    np.testing.assert_allclose(np.mean(losses, 0), long, rtol=1e-13)        # the same as one of twice the length
    np.testing.assert_allclose(carried, whole, rtol=1e-13)
    # Streams of 16 tokens have three minibatches; the next pass begins like the first, whatever is carried.
    first = problem.follow(data, 2, np.arange(2), np.zeros(2), carried, 0)
    again = problem.follow(data, 2, np.arange(2), np.full(2, 3), carried * np.nan, 0)
    assert (first.tokens == again.tokens).all() and again.fresh.all()
    assert (problem.loss_grad(x, data, first)[1] == problem.loss_grad(x, data, again)[1]).all()
    assert first.tokens[1, :, 1].tolist() == data.tokens[49:54].tolist()


def test_blocks_go_round():
    problem, tokens = problems.LSTM(sequence=4), np.arange(30)
    shard = text(tokens, 2, blocks=[0, 10, 20, 30], first=1)            # workers 1 and 2 of three
    data = problem.prepare(shard, shard.ids, 3, 0, "float64")
    carried = np.zeros((2, *problem.carried(data, 2)))
    begins = [problem.follow(data, 2, shard.ids, np.full(2, e), carried, 0).tokens[:, 0].tolist() for e in range(3)]
    assert begins == [[[10, 15], [20, 25]], [[20, 25], [0, 5]], [[0, 5], [10, 15]]]


def test_workers_without_a_minibatch_keep_what_they_carry():
    problem, data = example(w=3, **DROPPED)
    x, carried = points(problem, data, True), rng(4).standard_normal((3, *problem.carried(data, 2)))
    before, some = carried.copy(), np.array([2.0, -1, 2])
    batch = problem.follow(data, 2, np.arange(3), some, carried, 0)
    losses, grad = problem.loss_grad(x, data, batch, np.full_like(x, 9))
    full, full_grad = problem.loss_grad(x, data, problem.follow(data, 2, np.arange(3), abs(some), before.copy(), 0))
    assert losses[1] == 0 and not grad[1].any() and (carried[1] == before[1]).all() and (carried[0] != before[0]).all()
    assert (losses[[0, 2]] == full[[0, 2]]).all() and (grad[[0, 2]] == full_grad[[0, 2]]).all()
    none = problem.loss_grad(x, data, problem.follow(data, 2, np.arange(3), np.full(3, -1), carried, 0))
    assert not none[0].any() and not none[1].any()


def test_masks_follow_from_the_worker_and_its_minibatches_alone():
    keys = {"layers": 2, **DROPPED, "dropout_input": 0.5}
    problem, data = example(w=3, length=81, **keys)
    alone = problem.prepare(text(data.tokens[162:], V=7), np.array([2]), 3, 0, "float32")
    shape = problem.carried(data, 16)
    together = problem.follow(data, 16, np.arange(3), np.array([7, 1, 5]), np.zeros((3, *shape)), 11)
    single = problem.follow(alone, 16, np.array([2]), np.array([5]), np.zeros((1, *shape)), 11)
    assert set(together.masks) == set(single.masks) and len(single.masks) == 6
    for name, mask in single.masks.items():
        p = {"embedding": 0.3, "input": 0.5, ("output", 0): 0.2, ("output", 1): 0.3}.get(name, 0.4)
        assert (together.masks[name][2] == mask[0]).all() and (together.masks[name][:2] != mask).any()
        assert np.unique(mask).tolist() == [0, 1 / (1 - p)]


def test_perplexity():
    problem, data = example(layers=2, length=30)
    x = points(problem, data)
    total, tokens = problem.perplexity(x, data)
    expected = sum(loss(problem, 7, x, data.tokens[30 * i:30 * i + 30], np.zeros(12), {})[0] for i in range(2))
    assert tokens == 58 and total == pytest.approx(expected, rel=1e-12)
    nothing = text([1, 2], 1, 7)
    empty = problem.prepare(Text(nothing.tokens[:0], np.zeros(1, int), np.arange(0), 2, 2, nothing.vocabulary, "word"),
                            np.arange(0), 2, 0, "float64")
    assert problem.perplexity(x, empty) == (0.0, 0)


def test_float32():
    problem, data = example(hidden=33, layers=2, V=50, length=200, **DROPPED)
    x, carried = problem.x0(data, 0, "float64"), np.zeros((2, *problem.carried(data, 6)))
    results = [problem.loss_grad(x.astype(dtype), data, problem.follow(data, 6, np.arange(2), np.ones(2),
                                                                       carried.astype(dtype), 0))
               for dtype in ("float64", "float32")]
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    np.testing.assert_allclose(results[1][1], results[0][1], atol=3e-7)
    assert results[1][1].dtype == np.float32 and results[1][0].dtype == np.float64


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys, message", [
    ({"layers": 0}, "layers"), ({"layers": 4}, "layers"), ({"dropout": 1.0}, "dropout"), ({"start": 1.0}, "draws x⁰"),
    ({"hidden": 4, "embedding": 5}, "expected hidden = 4, or tied = false")], ids=str)
def test_bad_keys(keys, message):
    with pytest.raises(ValidationError, match=message):
        problems.LSTM(**keys)


def test_bad_data():
    problem, data = example()
    with pytest.raises(InputError, match=r"run.batch: found 'full', .* expected a number"):
        problem.carried(data, None)
    with pytest.raises(InputError, match=r"sequence = 4: worker 0 has 33 tokens, in run.batch = 7 streams 4 each"):
        problem.carried(data, 7)
    with pytest.raises(InputError, match=r"run.batch = 40 streams 0 each; expected more than sequence$"):
        problem.carried(data, 40)
    with pytest.raises(InputError, match=r"privacy: 'lstm' has no rows"):
        problem.loss_grad(points(problem, data), data, clip=1.0)
    with pytest.raises(InputError, match=r"^x has 124 numbers; for a vocabulary of 8 this model expected 128$"):
        problem.loss_grad(points(problem, data), example(V=8)[1])
    with pytest.raises(InputError, match=r"data.file: found tokens from 0 to 6; expected 0 to 4"):
        problem.prepare(text(data.tokens, V=5), np.arange(1), 1, 0, "float32")
    with pytest.raises(InputError, match=r"there is no table \[data\]"):
        problem.prepare(None, np.arange(1), 1, 0, "float32")


# --- the kernels ------------------------------------------------------------------------------------------------------


def numbers(w, T, b, n, dtype, shared):
    z, W = rng(1).normal(0, 2, (w, T, b, 4 * n)), rng(2).standard_normal((1 if shared else w, 4 * n, n)) / math.sqrt(n)
    h, c = rng(3).standard_normal((2, w, T + 1, b, n))
    return [a.astype(dtype) for a in (z, W, h, c, rng(4).standard_normal((w, T, b, n)))]


def there_and_back(forward, backward, z, W, h, c, slopes):
    assert forward(z, W, h, c) is None
    gates = z.copy()
    assert backward(z, W, c, slopes) is None
    return gates, h, c, z, slopes


@needs_kernels
@pytest.mark.parametrize("w, T, b, n", [(1, 3, 20, 16), (2, 4, 3, 7), (3, 2, 13, 33), (2, 1, 1, 1)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cells(w, T, b, n, shared, dtype):
    arrays = numbers(w, T, b, n, dtype, shared)
    expected = there_and_back(cells.lstm_forward.definition, cells.lstm_backward.definition, *map(np.copy, arrays))
    wide = np.zeros((len(arrays[1]), 4 * n * n + 3), dtype)                 # W as it lies in (w, d)
    wide[:, 1:-2] = arrays[1].reshape(len(wide), -1)
    arrays[1] = wide[:, 1:-2].reshape(arrays[1].shape)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(there_and_back(cpu.lstm_forward, cpu.lstm_backward, *(np.copy(a) if k != 1 else a for k, a in
                                                                                 enumerate(arrays))))
    for one, two, definition in zip(*results, expected, strict=True):
        assert one.tobytes() == two.tobytes()
        np.testing.assert_allclose(one, definition, rtol=0, atol=2e-6 if dtype == "float32" else 4e-15)


@needs_kernels
@pytest.mark.parametrize("dtype, wider", [(np.float32, np.float64), (np.float64, np.longdouble)])
def test_sigma_and_tanh(dtype, wider):
    sizes = np.geomspace(1e-30, 80, 500)
    a = np.concatenate([rng(5).normal(0, 4, 3000), sizes, -sizes]).astype(dtype)
    n = len(a)
    z, h = a.repeat(4).reshape(1, 1, n, 4), np.zeros((1, 2, n, 1), dtype)           # each in a sequence of its own
    cpu.lstm_forward(z, np.zeros((1, 4, 1), dtype), h, h.copy())
    exact_sigma, exact_tanh = 1 / (1 + np.exp(-a.astype(wider))), np.tanh(a.astype(wider))
    for gate, exact in ((0, exact_sigma), (1, exact_sigma), (2, exact_tanh), (3, exact_sigma)):
        assert (abs(z[0, 0, :, gate] - exact) <= 4 * np.spacing(abs(exact).astype(dtype))).all()
    special = np.array([np.inf, -np.inf, 800, -800, 0], dtype).repeat(4).reshape(1, 1, 5, 4)
    h = np.zeros((1, 2, 5, 1), dtype)
    cpu.lstm_forward(special, np.zeros((1, 4, 1), dtype), h, h.copy())
    np.testing.assert_allclose(special[0, 0, :, 0], [1, 0, 1, 0, 0.5], atol=2e-38)
    assert special[0, 0, :, 2].tolist() == [1, -1, 1, -1, 0]


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_not_finite(dtype):
    """A sequence with a NaN is NaN from there on, and the others do not notice."""
    arrays = numbers(2, 4, 3, 5, dtype, True)
    clean = there_and_back(cpu.lstm_forward, cpu.lstm_backward, *map(np.copy, arrays))
    arrays[0][1, 2, 1, 7] = np.nan
    gates, h, c, *_ = there_and_back(cpu.lstm_forward, cpu.lstm_backward, *arrays)
    assert np.isnan(c[1, 3, 1]).any() and np.isnan(h[1, 4, 1]).all() and np.isnan(gates[1, 3, 1]).all()
    h[1, :, 1] = clean[1][1, :, 1]
    assert h.tobytes() == clean[1].tobytes()


@needs_kernels
@pytest.mark.parametrize("m, V", [(1, 1), (5, 3), (7, 2500)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropies_and_sums(m, V, dtype):
    z, bias = rng(6).normal(0, 5, (m, V)).astype(dtype), rng(7).standard_normal(V).astype(dtype)
    y = rng(8).integers(0, V, m)
    if m > 1:
        z[1] += 1000
        z[0, 0], z[2, V - 1], z[3, 0] = -np.inf, np.nan, np.inf
    s = (z + bias).astype(np.float64)
    with np.errstate(invalid="ignore"):
        p = np.exp(s - s.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        expected = -np.log(p[np.arange(m), y]), (p - np.eye(V)[y]) * 0.3
        for call in (cpu.cross_entropies, cells.cross_entropies.definition):
            slopes, values = z.copy(), np.empty(m)
            assert call(slopes, bias, y, 0.3, values) is None
            np.testing.assert_allclose(values, expected[0], rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)
            np.testing.assert_allclose(slopes, expected[1], rtol=2e-5 if dtype == "float32" else 1e-11, atol=1e-7)
    out, again = rng(9).standard_normal((2, 4, V)).astype(dtype)[:1].repeat(2, 0)
    rows = rng(10).integers(0, 4, m)
    cpu.add_rows(out, rows, slopes)
    cells.add_rows.definition(again, rows, slopes)
    assert out.tobytes() == again.tobytes()


@needs_kernels
def test_kernels_decline_what_they_do_not_know():
    z, W, h, c, slopes = numbers(2, 3, 4, 5, "float32", True)
    for bad in ((z[:, :, ::2], W, h, c), (z, W[:, :, ::-1], h, c), (z, W.astype(float), h, c), (z, W, h[:, 1:], c),
                (z, W, h, c[:1]), (z, W[:, :19], h, c), (z, np.tile(W, (3, 1, 1)), h, c)):
        assert cpu.lstm_forward(*bad) is NotImplemented
    assert cpu.lstm_backward(z, W, c, slopes[:, 1:]) is NotImplemented
    scores, y = np.zeros((3, 4)), np.array([0, 1, 4])
    assert cpu.cross_entropies(scores, np.zeros(4), y, 1.0, np.zeros(3)) is NotImplemented          # no such class
    assert cpu.add_rows(scores, y, np.zeros((3, 4))) is NotImplemented
    assert cpu.add_rows(scores, y - 1, np.zeros((3, 4))) is NotImplemented
    assert not scores.any()


@needs_kernels
def test_without_kernels_the_same(monkeypatch):
    problem, data = example(layers=2, hidden=5, **DROPPED)
    x, carried = points(problem, data), np.zeros((2, *problem.carried(data, 2)))
    batch = problem.follow(data, 2, np.arange(2), np.ones(2), carried, 0)
    fast = problem.loss_grad(x, data, batch)[1].copy()
    for name in NAMES:
        monkeypatch.setattr(lstm, name, getattr(cells, name).definition)
    carried[:] = 0
    np.testing.assert_allclose(problem.loss_grad(x, data, batch)[1], fast, atol=1e-14)
