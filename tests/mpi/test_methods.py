"""Every method equals the paper's loop (tests/reference.py), on any number of ranks, and is the same on all of them."""

import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import methods

N, D, K = 5, 7, 25
rng = np.random.default_rng(7)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
GRADS = [lambda x, a=a, c=c: a * (x - c) for a, c in zip(CURVATURE, CENTRE, strict=True)]
X0 = np.full(D, 0.25)

# method → (constants in the config, the reference's trajectory)
CASES = {
    "gd": ({"stepsize": 0.3}, lambda: reference.gd(GRADS, X0, K, 0.3)),
    "sgd": ({"stepsize": 0.1, "beta": 0.8}, lambda: reference.sgd(GRADS, X0, K, 0.1, 0.8)),
    "clip_gd": ({"tau": 2.0, "stepsize": 0.3}, lambda: reference.clip_gd(GRADS, X0, K, 2.0, 0.3)),
    "clip21": ({"tau": 1.0, "stepsize": 0.1}, lambda: reference.clip21(GRADS, X0, K, 1.0, 0.1)),
    "clip21_avg": ({"tau": 1.0}, lambda: reference.clip21_avg(CENTRE, K, 1.0)),
    "celgc": ({"eta": 0.1, "gamma": 0.2, "interval": 3}, lambda: reference.celgc(GRADS, X0, K, 0.1, 0.2, 3)),
    "naive_parallel": ({"eta": 0.3, "gamma": 0.4}, lambda: reference.naive_parallel(GRADS, X0, K, 0.3, 0.4)),
}


def config(name, constants, rounds, **run):
    return {"problem": {"name": "quadratic", "centre": CENTRE.tolist(),
                        "curvature": (np.ones_like(CURVATURE) if name == "clip21_avg" else CURVATURE).tolist(),
                        "start": 0.0 if name == "clip21_avg" else 0.25},
            "method": {"name": name, **constants},
            "run": {"workers": N, "rounds": rounds, "dtype": "float64", "eval_every": 1, **run}}


def test_every_method_is_here():
    assert set(CASES) == set(methods.names())


@pytest.mark.parametrize("at", ["sharded", "rank0"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_papers_loop(ranks, name, at):
    constants, expected = CASES[name]
    for rounds in (1, 2, K):
        run = mpiclip.train(config(name, constants, rounds) | {"aggregate": {"at": at}}, ranks)
        np.testing.assert_allclose(run.x, expected()[rounds], rtol=1e-12, atol=1e-12)
        assert len({x.tobytes() for x in ranks.all(run.x)}) == 1, "the ranks hold different models"


@pytest.mark.parametrize("name", CASES)
def test_twice_the_same_bytes(ranks, name):
    first, second = (mpiclip.train(config(name, CASES[name][0], K), ranks).x for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_columns_split_over_the_ranks(ranks, name, monkeypatch):
    """The same, with the server's state sharded: small vectors are otherwise replicated."""
    monkeypatch.setattr("mpiclip.server.SMALL", 0)
    constants, expected = CASES[name]
    run = mpiclip.train(config(name, constants, K), ranks)
    np.testing.assert_allclose(run.x, expected()[K], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_metrics(ranks, name):
    """loss and grad_norm are those of f = (1/n) Σ f_i at x^k; clipped is the share of workers that clipped."""
    constants, expected = CASES[name]
    curvature = np.ones_like(CURVATURE) if name == "clip21_avg" else CURVATURE
    metrics = mpiclip.train(config(name, constants, K), ranks).metrics
    for k in (0, 1, K):
        x = expected()[k]
        assert metrics["loss"][k] == pytest.approx(np.mean(np.sum(curvature * (x - CENTRE) ** 2, 1)) / 2, rel=1e-10)
        assert metrics["grad_norm"][k] == pytest.approx(np.linalg.norm(np.mean(curvature * (x - CENTRE), 0)), rel=1e-9,
                                                        abs=1e-12)
    np.testing.assert_array_equal(metrics["round"], np.arange(K + 1))
    if name == "clip_gd":
        norms = [np.linalg.norm(g(expected()[0])) for g in GRADS]
        assert metrics["clipped"][1] == np.mean(np.array(norms) > 2.0)


@pytest.mark.parametrize("name, bad", [("clip21", 0), ("gd", 3)])
def test_permuted_workers(ranks, name, bad):
    """The workers' order changes the trajectory by no more than rounding."""
    order = np.random.default_rng(bad).permutation(N)
    plain = config(name, CASES[name][0], K)
    shuffled = config(name, CASES[name][0], K)
    for key in ("curvature", "centre"):
        shuffled["problem"][key] = [plain["problem"][key][i] for i in order]
    np.testing.assert_allclose(mpiclip.train(shuffled, ranks).x, mpiclip.train(plain, ranks).x, rtol=1e-12, atol=1e-13)


def test_attack_and_robust_rules(ranks):
    """Robust-DGD under sign flip: the last f workers lie; ARC and the trimmed mean contain them."""
    n, f, K = 7, 2, 30
    honest = n - f
    centre = np.random.default_rng(1).normal(5, 0.3, (honest, D))
    expected = np.full(D, 0.25)
    for _ in range(K):
        G = np.vstack([expected - centre, np.zeros((f, D))])
        expected = expected - 0.2 * reference.trimmed_mean(reference.arc(reference.sign_flip(G, f), f), f)
    for at in ("sharded", "rank0"):
        run = mpiclip.train({
            "problem": {"name": "quadratic", "curvature": np.ones((honest, D)).tolist(), "centre": centre.tolist(),
                        "start": 0.25},
            "method": {"name": "gd", "stepsize": 0.2},
            "aggregate": {"rules": ["arc", "trimmed_mean"], "f": f, "at": at, "attack": {"name": "sign_flip"}},
            "run": {"workers": n, "rounds": K, "dtype": "float64"}}, ranks)
        np.testing.assert_allclose(run.x, expected, rtol=1e-11)
        assert run.metrics["loss"][-1] == pytest.approx(
            np.mean(np.sum((run.x - centre) ** 2, 1)) / 2), "the loss is that of the honest workers"
