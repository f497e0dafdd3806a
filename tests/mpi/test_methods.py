"""Every method equals the paper's loop (tests/reference.py), on any number of ranks, and is the same on all of them."""

import h5py
import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import config as configs
from mpiclip import methods
from mpiclip.comm import Comm
from mpiclip.importers import import_file
from mpiclip.training import Training

N, D, K = 5, 7, 25
rng = np.random.default_rng(7)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
GRADS = [lambda x, a=a, c=c: a * (x - c) for a, c in zip(CURVATURE, CENTRE, strict=True)]
X0 = np.full(D, 0.25)

DECAY = {"weight_decay": 0.02, "decay": 0.5, "decay_at": [1, 10, 11]}

# method, variant → (constants in the config, the reference's trajectory)
CASES = {
    "gd": ({"stepsize": 0.3}, lambda: reference.gd(GRADS, X0, K, 0.3)),
    "sgd": ({"stepsize": 0.1, "beta": 0.8}, lambda: reference.sgd(GRADS, X0, K, 0.1, 0.8)),
    "clip_gd": ({"tau": 2.0, "stepsize": 0.3}, lambda: reference.clip_gd(GRADS, X0, K, 2.0, 0.3)),
    "clip_gd, momentum": ({"tau": 2.0, "stepsize": 0.3, "beta": 0.4},
                          lambda: reference.clip_gd(GRADS, X0, K, 2.0, 0.3, 0.4)),
    "clip21": ({"tau": 1.0, "stepsize": 0.1}, lambda: reference.clip21(GRADS, X0, K, 1.0, 0.1)),
    "clip21_sgd2m": ({"tau": 1.0, "stepsize": 0.2, "beta": 0.3, "beta_server": 0.6},
                     lambda: reference.clip21_sgd2m(GRADS, X0, K, 1.0, 0.2, 0.3, 0.6)),
    "byz_clip21_sgd2m": ({"tau": 1.0, "stepsize": 0.2, "beta": 0.3, "beta_server": 0.6},
                         lambda: reference.byz_clip21_sgd2m(GRADS, X0, K, 1.0, 0.2, 0.3, 0.6)),
    "robust_dshb": ({"stepsize": 0.3, "beta": 0.6}, lambda: reference.robust_dshb(GRADS, X0, K, 0.3, 0.6)),
    "safe_dshb": ({"tau": 2.0, "stepsize": 0.3, "beta": 0.4},
                  lambda: reference.safe_dshb(GRADS, X0, K, 2.0, 0.3, 0.4)),
    "alpha_normec": ({"alpha": 0.5, "beta": 0.8, "stepsize": 0.1},
                     lambda: reference.alpha_normec(GRADS, X0, K, 0.5, 0.8, 0.1)),
    "alpha_normec, normalized": ({"alpha": 0.5, "beta": 0.8, "stepsize": 0.1, "normalized": True},
                                 lambda: reference.alpha_normec(GRADS, X0, K, 0.5, 0.8, 0.1, True)),
    "clip21_avg": ({"tau": 1.0}, lambda: reference.clip21_avg(CENTRE, K, 1.0)),
    "celgc": ({"eta": 0.1, "gamma": 0.8, "interval": 3}, lambda **s: reference.celgc(GRADS, X0, K, 0.1, 0.8, 3, **s)),
    "celgc, global": (
        {"eta": 0.1, "gamma": 0.2, "interval": 3, "threshold": "global", **DECAY},
        lambda **s: reference.celgc(GRADS, X0, K, 0.1, 0.2, 3, "global", **DECAY, **s)),
    "celgc, max, momentum": (
        {"eta": 0.02, "gamma": 0.16, "interval": 3, "threshold": "max", "momentum": 0.6, **DECAY},
        lambda **s: reference.celgc(GRADS, X0, K, 0.02, 0.16, 3, "max", momentum=0.6, **DECAY, **s)),
    "naive_parallel": ({"eta": 0.3, "gamma": 0.4},
                       lambda **s: reference.naive_parallel(GRADS, X0, K, 0.3, 0.4, **s)),
    "naive_parallel, momentum": (
        {"eta": 0.1, "gamma": 0.2, "momentum": 0.6, **DECAY},
        lambda **s: reference.naive_parallel(GRADS, X0, K, 0.1, 0.2, momentum=0.6, **DECAY, **s)),
    "episode": ({"eta": 0.1, "gamma": 0.2, "interval": 3, **DECAY},
                lambda **s: reference.episode(GRADS, X0, K, 0.1, 0.2, 3, **DECAY, **s)),
    "episode_pp": ({"eta": 0.1, "gamma": 0.2, "interval": 3, **DECAY},
                   lambda **s: reference.episode_pp(GRADS, X0, K, 0.1, 0.2, 3, **DECAY, **s)),
}


# The same for methods with noise, given what was added
NOISE, REPRODUCIBLE = {"sigma": 0.7, "delta": 1e-5}, {"privacy": {"noise": "reproducible", "accountant": "rdp"}}
NOISY = {
    "clip_gd": (CASES["clip_gd"][0], lambda z: reference.clip_gd(GRADS, X0, K, 2.0, 0.3, noise=z)),
    "clip_gd, momentum": (CASES["clip_gd, momentum"][0],
                          lambda z: reference.clip_gd(GRADS, X0, K, 2.0, 0.3, 0.4, noise=z)),
    "clip21": (CASES["clip21"][0], lambda z: reference.clip21(GRADS, X0, K, 1.0, 0.1, noise=z)),
    "clip21, noisy state": (CASES["clip21"][0] | {"noisy_state": True},
                            lambda z: reference.clip21(GRADS, X0, K, 1.0, 0.1, noise=z, noisy_state=True)),
    "clip21_sgd2m": (CASES["clip21_sgd2m"][0],
                     lambda z: reference.clip21_sgd2m(GRADS, X0, K, 1.0, 0.2, 0.3, 0.6, noise=z)),
    "byz_clip21_sgd2m": (CASES["byz_clip21_sgd2m"][0],
                         lambda z: reference.byz_clip21_sgd2m(GRADS, X0, K, 1.0, 0.2, 0.3, 0.6, noise=z)),
    "safe_dshb": (CASES["safe_dshb"][0], lambda z: reference.safe_dshb(GRADS, X0, K, 2.0, 0.3, 0.4, noise=z)),
    "alpha_normec": (CASES["alpha_normec"][0], lambda z: reference.alpha_normec(GRADS, X0, K, 0.5, 0.8, 0.1, noise=z)),
    "alpha_normec, normalized": (CASES["alpha_normec, normalized"][0],
                                 lambda z: reference.alpha_normec(GRADS, X0, K, 0.5, 0.8, 0.1, True, noise=z)),
}


def config(case, constants, rounds, **run):
    name = case.partition(",")[0]
    return {"problem": {"name": "quadratic", "centre": CENTRE.tolist(),
                        "curvature": (np.ones_like(CURVATURE) if name == "clip21_avg" else CURVATURE).tolist(),
                        "start": 0.0 if name == "clip21_avg" else 0.25},
            "method": {"name": name, **constants},
            "run": {"workers": N, "rounds": rounds, "dtype": "float64", "eval_every": 1, **run}}


def test_every_method_is_here():
    """Those that compress are in test_compressed.py."""
    compressing = {name for name in methods.names() if "compressor" in methods.load(name).model_fields}
    assert {case.partition(",")[0] for case in CASES} == set(methods.names()) - compressing


@pytest.mark.parametrize("at", ["sharded", "rank0"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_papers_loop(ranks, name, at):
    constants, expected = CASES[name]
    for rounds in (1, 2, K):
        run = mpiclip.train(config(name, constants, rounds) | {"aggregate": {"at": at}}, ranks)
        np.testing.assert_allclose(run.x, expected()[rounds], rtol=1e-12, atol=1e-12)
        assert len({x.tobytes() for x in ranks.all(run.x)}) == 1, "the ranks hold different models"


@pytest.mark.parametrize("small", [64 * 1024, 0])
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_added_where_the_paper_adds_it(ranks, name, small, monkeypatch, added_noise):
    """The noise is recorded and handed to the paper's loop."""
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    constants, expected = NOISY[name]
    run = mpiclip.train(config(name, constants | NOISE, K, eval_every=K) | REPRODUCIBLE, ranks)
    z = np.concatenate(ranks.all(np.array(added_noise)), axis=1)              # (rounds, workers, d)
    assert z.shape == (K, N, D) and 0.6 < z.std() < 0.8
    assert len(set(z.ravel().tolist())) == z.size, "some numbers were drawn twice"
    np.testing.assert_allclose(run.x, expected(list(z))[K], rtol=1e-12, atol=1e-12)
    assert len({x.tobytes() for x in ranks.all(run.x)}) == 1, "the ranks hold different models"


@pytest.mark.parametrize("small", [64 * 1024, 0])
@pytest.mark.parametrize("name, of_worker, of_server", [
    ("clip21", "v_i", "v"), ("clip21_sgd2m", "g_i", "g"), ("alpha_normec", "g_i", "g"),
    ("alpha_normec, normalized", "g_i", "g")])
def test_the_server_has_the_mean_of_all_workers_states(ranks, name, of_worker, of_server, small, monkeypatch):
    """After any number of rounds, wherever workers and columns are: a rank that misses an update shows."""
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    for rounds in (1, 2, K):
        training = Training(configs.load(config(name, CASES[name][0], rounds, eval_every=K)), ranks, None)
        training.run()
        everyone = np.concatenate(ranks.all(getattr(training.s, of_worker)))
        assert everyone.shape == (N, D) and everyone.any()
        np.testing.assert_allclose(training.server.join(getattr(training.s, of_server)), everyone.mean(0), atol=1e-12)


@pytest.mark.parametrize("name", NOISY)
def test_noise_does_not_depend_on_the_ranks(ranks, name):
    job = config(name, NOISY[name][0] | NOISE, K, eval_every=K) | REPRODUCIBLE
    alone, together = mpiclip.train(job, Comm()).x, mpiclip.train(job, ranks).x
    np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-12)
    quiet = mpiclip.train(config(name, NOISY[name][0], K, eval_every=K), ranks).x
    assert np.abs(together - quiet).max() > 1e-3


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


@pytest.mark.parametrize("name", CASES)
def test_permuted_workers(ranks, name):
    """The workers' order changes the trajectory by no more than rounding."""
    order = [3, 0, 4, 2, 1]
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


def test_rules_without_an_attack(ranks):
    """All n workers have an f_i: f of them may be bad, but none is said to be."""
    expected = X0
    for _ in range(10):
        expected = expected - 0.3 * reference.trimmed_mean(np.array([g(expected) for g in GRADS]), 1)
    run = mpiclip.train(config("gd", {"stepsize": 0.3}, 10) | {"aggregate": {"rules": ["trimmed_mean"], "f": 1}}, ranks)
    np.testing.assert_allclose(run.x, expected, rtol=1e-12)
    assert run.metrics["grad_norm"][0] == pytest.approx(np.linalg.norm(sum(g(X0) for g in GRADS) / N), rel=1e-12)


# ---- the same run on any number of ranks, from a data set

ROWS = {"data": {"split": "dirichlet_worker", "alpha": 0.7},
        "problem": {"name": "logistic", "regularizer": "nonconvex", "lam": 0.01},
        "run": {"workers": 6, "rounds": 12, "dtype": "float64", "eval_every": 3}}


@pytest.fixture(scope="session")
def rows(ranks, tmp_path_factory):
    """A file of 90 training and 31 test rows, made by rank 0."""
    path = None
    if ranks.rank == 0:
        folder, generator = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
        for name, m in (("train", 90), ("test", 31)):
            X = generator.normal(size=(m, 5)) * [1, 2, 0.5, 1, 1]
            np.savez(folder / f"{name}.npz", X=X, y=np.where(X.sum(1) + generator.normal(size=m) > 0, 1, -1))
        path = str(folder / "rows.h5")
        import_file([str(folder / "train.npz")], path, test=[str(folder / "test.npz")])
    return ranks.same(path)


@pytest.mark.parametrize("method", [
    {"name": "clip21", "tau": {"quantile": 0.4}, "stepsize": "1/L"},
    {"name": "clip21", "tau": 0.1, "stepsize": "theory"},
    {"name": "clip21_sgd2m", "tau": {"quantile": 0.4}, "stepsize": "1/L", "beta": 0.5, "beta_server": 0.7},
    {"name": "celgc", "eta": 1.0, "gamma": 0.1, "interval": 3}])
@pytest.mark.parametrize("batch", ["full", 4])
@pytest.mark.parametrize("aggregate", [
    {}, {"f": 2, "attack": {"name": "sign_flip"}}, {"rules": ["arc", "nnm", "median"], "f": 1},
    {"rules": ["arc", "trimmed_mean"], "f": 2, "at": "rank0", "attack": {"name": "sign_flip"}}], ids=str)
def test_alone_and_together(ranks, rows, method, batch, aggregate):
    """Constants, minibatches, metrics: what one process finds, many find."""
    tables = {**ROWS, "data": {**ROWS["data"], "file": rows}, "method": method, "aggregate": aggregate,
              "run": {**ROWS["run"], "batch": batch}}
    alone, together = mpiclip.train(tables, Comm()), mpiclip.train(tables, ranks)
    np.testing.assert_allclose(together.x, alone.x, rtol=1e-10, atol=1e-12)
    assert set(together.metrics) == set(alone.metrics) >= {"accuracy", "clipped"}
    for name, values in alone.metrics.items():
        if name not in ("bytes", "seconds") and not name.startswith("seconds_"):
            np.testing.assert_allclose(together.metrics[name], values, rtol=1e-9, atol=1e-12, err_msg=name)
    assert (np.diff(together.metrics["bytes"]) > 0).all() == (ranks.size > 1)
    assert len({str(values["bytes"]) for values in ranks.all(together.metrics)}) == 1
    assert together.metrics["round"].tolist() == [0, 3, 6, 9, 12]


def test_accuracy_is_of_the_test_rows(ranks, rows):
    tables = {**ROWS, "data": {**ROWS["data"], "file": rows}, "method": {"name": "gd", "stepsize": 1.0}}
    run = mpiclip.train(tables, ranks)
    with h5py.File(rows, "r") as f:
        right = (f["test/x"][:] @ run.x > 0) == (f["test/y"][:] > 0)
    assert run.metrics["accuracy"][-1] == right.mean()


def test_naive_parallel_stays_at_a_minimum(ranks):
    """ḡ = 0 is not divided by."""
    run = mpiclip.train({"problem": {"name": "quadratic", "curvature": [[1]] * N, "centre": [[0]] * N},
                         "method": {"name": "naive_parallel", "eta": 0.3, "gamma": 0.4},
                         "run": {"workers": N, "rounds": 3, "dtype": "float64"}}, ranks)
    assert run.x.tolist() == [0] and run.metrics["clipped"][-1] == 0


@pytest.mark.parametrize("name", CASES)
def test_clipped_is_the_share_of_steps_that_clipped(ranks, name):
    """Against what the paper's loop does at x^k: for CELGC of all local steps in the round."""
    constants, expected = CASES[name]
    xs, k = expected(), 2
    run = mpiclip.train(config(name, constants, K), ranks)
    if name.startswith(("gd", "sgd", "alpha_normec", "robust_dshb")):
        assert "clipped" not in run.metrics
        return
    assert np.isnan(run.metrics["clipped"][0]), "no round has made x⁰"
    if name.startswith(("celgc", "naive_parallel", "episode")):
        shares = []
        expected(clipped=shares)
        np.testing.assert_allclose(run.metrics["clipped"][1:], shares, atol=1e-12)
        assert 0 <= min(shares) < max(shares) <= 1
        return
    norms = {"clip_gd": lambda: [np.linalg.norm(g(xs[k])) for g in GRADS],
             "clip_gd, momentum": lambda: momentum_norms(xs[:k + 1], 0.4),
             "clip21": lambda: clip21_differences(k),
             "clip21_sgd2m": lambda: sgd2m_differences(xs[:k + 1]),
             "byz_clip21_sgd2m": lambda: sgd2m_differences(xs[:k + 1]),
             "safe_dshb": lambda: [np.linalg.norm(g(xs[k])) for g in GRADS],
             "clip21_avg": lambda: [np.linalg.norm(c) - k * 1.0 for c in CENTRE]}[name]()
    bound = {"clip_gd": 2.0, "clip_gd, momentum": 2.0, "clip21": 1.0, "clip21_sgd2m": 1.0, "clip21_avg": 1.0,
             "byz_clip21_sgd2m": 1.0, "safe_dshb": 2.0}[name]
    assert run.metrics["clipped"][k + 1] == pytest.approx(np.mean(np.array(norms) > bound))


def clip21_differences(k):
    """‖∇f_i(x^k) − v_i^k‖ of Clip21"""
    xs, v_i = reference.clip21(GRADS, X0, k, 1.0, 0.1), [np.zeros(D) for _ in GRADS]
    for x in xs[:-1]:
        v_i = [v + reference.clip(g(x) - v, 1.0) for g, v in zip(GRADS, v_i, strict=True)]
    return [np.linalg.norm(g(xs[k]) - v) for g, v in zip(GRADS, v_i, strict=True)]


def momentum_norms(xs, beta):
    """‖v_i‖ of clipped momentum after the rounds at these x"""
    return [np.linalg.norm(sum(beta * (1 - beta) ** (len(xs) - 1 - j) * g(x) for j, x in enumerate(xs))) for g in GRADS]


def sgd2m_differences(xs):
    """‖v_i − g_i‖ of Clip21-SGD2M in the last of the rounds at these x"""
    norms = []
    for g in GRADS:
        v, g_i = np.zeros(D), np.zeros(D)
        for x in xs:
            v = 0.7 * v + 0.3 * g(x)
            difference = v - g_i
            g_i = g_i + 0.6 * reference.clip(difference, 1.0)
        norms.append(np.linalg.norm(difference))
    return norms
