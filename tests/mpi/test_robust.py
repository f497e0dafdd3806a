"""Every method with rules and an attack: equal to the paper's loop wherever workers and columns are, and robust."""

import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import methods
from mpiclip.comm import Comm
from mpiclip.device import Device
from mpiclip.server import Server
from mpiclip.workers import Workers

N, F, D, K = 7, 2, 7, 12
HONEST = N - F
RULES = ["arc", "nnm", "trimmed_mean"]
ROBUST = {"rules": RULES, "f": F, "attack": {"name": "sign_flip"}}
rng = np.random.default_rng(11)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (HONEST, D)), rng.normal(0, 3, (HONEST, D))
GRADS = [lambda x, a=a, c=c: a * (x - c) for a, c in zip(CURVATURE, CENTRE, strict=True)] + [np.zeros_like] * F
X0 = np.full(D, 0.25)


def attack(X):
    return reference.sign_flip(X, F)


def rules(X):
    return reference.trimmed_mean(reference.nnm(reference.arc(X, F), F), F)


def loop(name, *constants, **more):
    """The paper's loop under the attack, from x⁰ to x^K."""
    parts = {"attack": attack, "rules": rules} if name == "byz_clip21_sgd2m" else {"F": lambda X: rules(attack(X))}
    return getattr(reference, name)(GRADS, X0, K, *constants, **more, **parts)


# method, variant → its constants, in the order of the loop's arguments
CASES = {
    "gd": {"stepsize": 0.3},
    "sgd": {"stepsize": 0.1, "beta": 0.8},
    "clip_gd": {"tau": 2.0, "stepsize": 0.3},
    "clip_gd, momentum": {"tau": 2.0, "stepsize": 0.3, "beta": 0.4},
    "clip21": {"tau": 1.0, "stepsize": 0.1},
    "clip21_sgd2m": {"tau": 1.0, "stepsize": 0.2, "beta": 0.3, "beta_server": 0.6},
    "byz_clip21_sgd2m": {"tau": 1.0, "stepsize": 0.2, "beta": 0.3, "beta_server": 0.6},
    "robust_dshb": {"stepsize": 0.3, "beta": 0.6},
    "robust_dshb, no momentum": {"stepsize": 0.3, "beta": 0.0},
    "safe_dshb": {"tau": 2.0, "stepsize": 0.3, "beta": 0.4},
    "alpha_normec": {"alpha": 0.5, "beta": 0.8, "stepsize": 0.1},
    "celgc": {"eta": 0.1, "gamma": 0.2, "interval": 3},
    "celgc, global": {"eta": 0.1, "gamma": 0.2, "interval": 3, "threshold": "global", "weight_decay": 0.02,
                      "momentum": 0.4},
    "naive_parallel": {"eta": 0.3, "gamma": 0.4},
    "episode": {"eta": 0.1, "gamma": 0.2, "interval": 3},
    "episode_pp": {"eta": 0.1, "gamma": 0.2, "interval": 3},
}


def config(case, constants=None, rounds=K, aggregate=None, **run):
    return {"problem": {"name": "quadratic", "curvature": CURVATURE.tolist(), "centre": CENTRE.tolist(), "start": 0.25},
            "method": {"name": case.partition(",")[0], **(CASES[case] if constants is None else constants)},
            "aggregate": ROBUST if aggregate is None else aggregate,
            "run": {"workers": N, "rounds": rounds, "dtype": "float64", "eval_every": rounds, **run}}


def test_every_method_that_rules_fit_is_here():
    """Not Clip21-Avg, which calculates a mean, and not what compresses, which takes no rules."""
    fit = {name for name in methods.names() if "compressor" not in methods.load(name).model_fields} - {"clip21_avg"}
    assert {case.partition(",")[0] for case in CASES} == fit


@pytest.mark.parametrize("case, at, board", [
    *((case, "sharded", True) for case in CASES), *(("byz_clip21_sgd2m", *where) for where in (
        ("sharded", False), ("rank0", True), ("rank0", False)))])
def test_equals_the_papers_loop(ranks, case, at, board, monkeypatch):
    """board: vectors are exchanged in shared memory; otherwise as between hosts."""
    if not board:
        monkeypatch.setattr(Comm, "shared", lambda self, shape, dtype: None)
    run = mpiclip.train(config(case, aggregate=ROBUST | {"at": at}), ranks)
    np.testing.assert_allclose(run.x, loop(case.partition(",")[0], *CASES[case].values())[K], rtol=1e-10, atol=1e-11)
    assert len({x.tobytes() for x in ranks.all(run.x)}) == 1, "the ranks hold different models"


@pytest.mark.parametrize("name", ["safe_dshb", "byz_clip21_sgd2m"])
def test_noise_is_a_part_of_what_is_attacked(ranks, name, added_noise):
    """The attacker sees the honest workers' noisy messages, and so do the rules."""
    noisy = config(name, CASES[name] | {"sigma": 0.7, "delta": 1e-5})
    run = mpiclip.train(noisy | {"privacy": {"noise": "reproducible", "accountant": "rdp"}}, ranks)
    z = np.concatenate(ranks.all(np.array(added_noise)), axis=1)              # (rounds, workers, d)
    np.testing.assert_allclose(run.x, loop(name, *CASES[name].values(), noise=list(z))[K], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("small", [64 * 1024, 0])
@pytest.mark.parametrize("board", [True, False])
def test_the_mean_of_the_rows_that_the_server_keeps(ranks, small, board, monkeypatch):
    """Byz-Clip21-SGD2M with the mean is Clip21-SGD2M, wherever the columns are: each rank all of them, or some."""
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    if not board:
        monkeypatch.setattr(Comm, "shared", lambda self, shape, dtype: None)
    job = config("byz_clip21_sgd2m", aggregate={}, workers=HONEST)
    expected = reference.clip21_sgd2m(GRADS[:HONEST], X0, K, *CASES["clip21_sgd2m"].values())[K]
    run = mpiclip.train(job, ranks)
    np.testing.assert_allclose(run.x, expected, rtol=1e-12, atol=1e-12)
    assert (run.metrics["bytes"][-1] > K * D * 8 / ranks.size) == (ranks.size > 1)


@pytest.mark.parametrize("board", [True, False])
def test_norms_where_every_rank_has_all_columns(ranks, board):
    """They are counted once."""
    here = np.array_split(CENTRE, ranks.size)[ranks.rank]
    server = Server(ranks, D, HONEST, len(here), Device("cpu"), "float64", board=board)
    rows = server.rows(here.copy())
    assert server.at == "replicated"
    np.testing.assert_array_equal(rows.columns(), CENTRE)
    np.testing.assert_allclose(rows.norms(), np.linalg.norm(CENTRE, axis=1), rtol=1e-14)
    server.release()


@pytest.mark.parametrize("a, b", [
    (("safe_dshb", {"tau": 2.0, "stepsize": 0.3, "beta": 1.0}), ("clip_gd", {"tau": 2.0, "stepsize": 0.3})),
    (("robust_dshb", {"stepsize": 0.3}), ("gd", {"stepsize": 0.3})),
    (("celgc", {"eta": 0.3, "gamma": 0.6}), ("clip_gd", {"tau": 2.0, "stepsize": 0.3})),
    (("robust_dshb", {"stepsize": 0.3, "beta": 0.6}), ("clip_gd", {"stepsize": 0.3, "beta": 0.4, "tau": np.inf})),
    (("byz_clip21_sgd2m", {"tau": np.inf, "stepsize": 0.3, "beta": 0.4, "beta_server": 1.0}),
     ("robust_dshb", {"stepsize": 0.3, "beta": 0.6}))], ids=lambda case: case[0])
def test_equivalent_methods(ranks, a, b):
    """Byz-Clip-SGD, Robust-DGD, and CELGC of one local step under the same attack: rules that were handed CELGC's
    models, and not its steps, would not do the same."""
    one, other = (mpiclip.train(config(name, constants), ranks).x for name, constants in (a, b))
    np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def test_a_gradient_that_is_not_finite_goes_into_no_momentum(ranks, monkeypatch):
    """In round 3 worker 1 sends NaN: a row of zeros for that round, and the old momentum afterwards."""
    grad, bad, beta = Workers.grad, 3, 0.6

    def grad_of_a_broken_worker(workers, x):
        g_i = grad(workers, x)
        if workers.round == bad:
            g_i[workers.ids == 1] = np.nan
        return g_i
    monkeypatch.setattr(Workers, "grad", grad_of_a_broken_worker)
    run = mpiclip.train(config("robust_dshb", aggregate={"rules": ["trimmed_mean"], "f": F}, workers=HONEST), ranks)
    x, m = X0, np.zeros((HONEST, D))
    for k in range(K):
        g = np.array([g(x) for g in GRADS[:HONEST]])
        new = beta * m + (1 - beta) * g
        if k == bad:
            new[1] = m[1]
        m, sent = new, new.copy()
        if k == bad:
            sent[1] = 0
        x = x - 0.3 * reference.trimmed_mean(sent, F)
    np.testing.assert_allclose(run.x, x, rtol=1e-11, atol=1e-11)
    assert run.metrics["replaced"][-1] == 1 / K


def test_robust_dgd_stays_near_the_honest_minimum_that_the_mean_leaves(ranks):
    """f = 2 of 11 workers push against the honest mean, ten times as hard: the mean of all goes uphill. ‖∇f‖ where
    Robust-DGD ends is at most √κ times the honest gradients' spread G, κ ≤ 8f/(n−f) (κ' + 1) + 2f/(n−2f) with κ' =
    6f/(n−2f) (1 + f/(n−2f)) of the trimmed mean (arXiv:2302.01772, arXiv:2405.14432); here it is much less."""
    n, f = 11, 2
    generator = np.random.default_rng(7)
    curvature, centre = generator.uniform(0.8, 1.2, (n - f, D)), generator.normal(1, 0.3, (n - f, D))
    minimum = (curvature * centre).sum(0) / curvature.sum(0)
    g_i = curvature * (minimum - centre)
    G = np.sqrt((g_i**2).sum(1).mean())

    def end(rules, rounds):
        run = mpiclip.train({
            "problem": {"name": "quadratic", "curvature": curvature.tolist(), "centre": centre.tolist(), "start": 10.0},
            "method": {"name": "robust_dshb", "stepsize": 0.3},
            "aggregate": {"rules": rules, "f": f, "attack": {"name": "ipm", "factor": 10.0}},
            "run": {"workers": n, "rounds": rounds, "dtype": "float64", "eval_every": rounds}}, ranks)
        return run.metrics["grad_norm"][-1], np.linalg.norm(run.x - minimum)
    assert end([], 20)[1] > 2 * np.linalg.norm(10 - minimum)
    grad_norm, distance = end(RULES, 60)
    kappa = 8 * f / (n - f) * (6 * f / (n - 2 * f) * (1 + f / (n - 2 * f)) + 1) + 2 * f / (n - 2 * f)
    assert grad_norm <= np.sqrt(kappa) * G
    assert grad_norm < 0.5 * G and distance < 0.5 * G
