"""Polynomials whose coefficients are the data; and, on the example of the EPISODE paper, what CELGC misses."""

import numpy as np
import pytest

import mpiclip
from mpiclip import problems
from mpiclip.data import Csr, Shard
from mpiclip.errors import InputError
from mpiclip.importers import import_file

OFFSETS = np.array([0, 3, 3, 8])            # the second of three workers has no rows
A = np.random.default_rng(1).standard_normal((8, 4))
BATCH = np.array([1, 1, 7, 4, 3]), np.array([0, 2, 2, 5]), np.array([2.0, 1.0, 4.0])


def prepared(sparse=False, **keys):
    problem = problems.load("polynomial")(**keys)
    x = Csr(np.arange(0, 33, 4), np.tile(np.arange(4, dtype=np.int32), 8), A.ravel(), A.shape) if sparse else A
    shard = Shard(x=x, y=np.zeros(8), offsets=OFFSETS, ids=np.arange(3), n=3, total=8, classes=None, features=4)
    return problem, problem.prepare(shard, shard.ids, 3, 0, "float64")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("x", [np.array([1.3]), np.array([[1.3], [0.2], [-0.7]])])
@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_against_numpys_polynomials(sparse, x, batch, clip):
    problem, data = prepared(sparse, regularizer="l2", lam=0.1)
    losses, grads = problem.loss_grad(x, data, batch, clip=clip)
    rows, offsets, denominators = batch or (np.arange(8), OFFSETS, np.array([3.0, 1.0, 5.0]))
    clipped = 0
    for i in range(3):
        own, at = rows[offsets[i]:offsets[i + 1]], float(np.broadcast_to(x, (3, 1))[i, 0])
        p = [np.polynomial.Polynomial([0, *A[r]]) for r in own]
        slopes = [q.deriv()(at) for q in p]
        if clip:
            clipped += sum(abs(s) > clip for s in slopes)
            slopes = np.clip(slopes, -clip, clip)
        owner = OFFSETS[i + 1] > OFFSETS[i]
        assert losses[i] == pytest.approx(sum(q(at) for q in p) / denominators[i] + owner * 0.05 * at**2, abs=1e-12)
        assert grads[i, 0] == pytest.approx(sum(slopes) / denominators[i] + owner * 0.1 * at, abs=1e-12)
    assert clip is None or clipped > 0


def test_one_worker_s_nan_is_its_own():
    problem, data = prepared()
    losses, grads = problem.loss_grad(np.array([[np.nan], [0.0], [1.0]]), data)
    assert np.isnan(grads[0, 0]) and np.isnan(losses[0]) and np.isfinite(grads[2, 0]) and np.isfinite(losses[2])


def test_without_data():
    with pytest.raises(InputError, match=r"data.file: missing; 'polynomial' expects"):
        mpiclip.train({"problem": {"name": "polynomial"}, "method": {"name": "gd", "stepsize": 0.1}})


@pytest.mark.parametrize("H, celgc_is_right", [(0, True), (8, False)])
def test_where_celgc_fails_and_episode_does_not(tmp_path, H, celgc_is_right):
    """f_i(x) = x⁴ − 3x³ − H h_i x² + x with h = (−1, 2), noise uniform in [−1, 1], x⁰ = 1, η = 0.01, γ = 0.05, I = 8:
    the mean f is least where f' = 0 right of 1."""
    noise = np.linspace(-1, 1, 101)
    X = np.concatenate([np.stack([1 + noise, np.full(101, -H * h), np.full(101, -3.0), np.ones(101)], 1)
                        for h in (-1, 2)])
    np.savez(tmp_path / "p.npz", X=X, y=np.repeat([0, 1], 101))
    import_file([str(tmp_path / "p.npz")], str(tmp_path / "p.h5"))
    f = np.polynomial.Polynomial([0, 1, -H / 2, -3, 1])
    best = max(f.deriv().roots().real)
    off = {}
    for name in ("celgc", "episode", "episode_pp"):
        run = mpiclip.train({"data": {"file": str(tmp_path / "p.h5"), "split": "label"},
                             "problem": {"name": "polynomial", "start": 1.0},
                             "method": {"name": name, "eta": 0.01, "gamma": 0.05, "interval": 8},
                             "run": {"workers": 2, "rounds": 25, "batch": 1, "dtype": "float64", "eval_every": 5}})
        off[name] = np.mean(run.metrics["loss"][-4:]) - f(best)
    assert off["episode"] < 0.1 and off["episode_pp"] < 0.1
    assert (off["celgc"] < 0.1) == celgc_is_right
