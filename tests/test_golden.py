"""Golden values and invariants of the papers, in one process."""

import numpy as np
import pytest

import mpiclip
from mpiclip import config as configs
from mpiclip import rules
from mpiclip.comm import Comm
from mpiclip.rows import Rows
from mpiclip.training import Training

# f_1 = ½(x+3)², f_2 = (x−3)²: their mean is least at 1, but for x in [−2, 2.5] gradients clipped at τ = 1 cancel.
TOY = {"name": "quadratic", "curvature": [[1], [2]], "centre": [[-3], [3]]}


def toy(method, rounds=1000, start=0.0, **constants):
    return mpiclip.train({"problem": {**TOY, "start": start}, "method": {"name": method, **constants},
                          "run": {"workers": 2, "rounds": rounds, "dtype": "float64", "eval_every": 1}})


@pytest.mark.parametrize("start, end", [(0, 0), (2, 2), (5, 2.5), (-5, -2)])
def test_clip_gd_stalls(start, end):
    assert toy("clip_gd", start=float(start), tau=1, stepsize=0.1).x == pytest.approx(end, abs=1e-9)


def test_clip21_toy_trajectory():
    expected = [0, 0, 0, 0, 0.05, 0.1475, 0.275375, 0.38406875]
    for k, x in enumerate(expected):
        assert toy("clip21", k, tau=1, stepsize=0.1).x == pytest.approx(x, abs=1e-15)


def state(method, rounds, **constants):
    """The state after so many rounds on the toy."""
    config = configs.load({"problem": TOY, "method": {"name": method, **constants},
                           "run": {"workers": 2, "rounds": rounds, "dtype": "float64"}})
    training = Training(config, Comm(), None)
    training.run()
    return training.s


def test_clip21_toy_states():
    """v_1, v_2 and v, exactly as calculated by hand."""
    expected = [(1, -1, 0), (2, -2, 0), (3, -3, 0), (3, -4, -0.5), (3.05, -5, -0.975), (3.1475, -5.705, -1.27875),
                (3.275375, -5.44925, -1.0869375)]
    for k, (v_1, v_2, v) in enumerate(expected):
        s = state("clip21", k + 1, tau=1, stepsize=0.1)
        np.testing.assert_allclose([*s.v_i[:, 0], s.v[0]], [v_1, v_2, v], rtol=0, atol=1e-14)


def test_clip21_sgd2m_toy():
    """β = β̂ = ½, τ = 1, γ = 0.1: v_i, g_i and g, which is 0 for four rounds; x moves after the fifth."""
    v_1 = [1.5, 2.25, 2.625, 2.8125, 2.90625]
    g_i = [(0.5, -0.5), (1, -1), (1.5, -1.5), (2, -2), (2.453125, -2.5)]
    for t in range(5):
        s = state("clip21_sgd2m", t + 1, tau=1, stepsize=0.1, beta=0.5, beta_server=0.5)
        np.testing.assert_allclose(s.v_i[:, 0], [v_1[t], -2 * v_1[t]], rtol=0, atol=1e-15)
        np.testing.assert_allclose(s.g_i[:, 0], g_i[t], rtol=0, atol=1e-15)
        np.testing.assert_allclose([s.g[0], s.x[0]], [0, 0] if t < 4 else [-0.0234375, 0.00234375], atol=1e-16)


def test_byz_clip21_sgd2m_toy():
    """The same: m_i is g_i; and with the median of two, which is their mean."""
    for t, m_i in enumerate([(0.5, -0.5), (1, -1), (1.5, -1.5), (2, -2), (2.453125, -2.5)]):
        s = state("byz_clip21_sgd2m", t + 1, tau=1, stepsize=0.1, beta=0.5, beta_server=0.5)
        np.testing.assert_allclose(s.m[:, 0], m_i, rtol=0, atol=1e-15)
        np.testing.assert_allclose(s.x, 0 if t < 4 else 0.00234375, atol=1e-16)


def test_robust_dshb_toy():
    """β = ¾, γ = 0.1: m = (3, −6)/4 and x = 0.0375; then m = ¾ m + ¼ (3.0375, −5.925) and x −= 0.05 Σ m_i"""
    s = state("robust_dshb", 2, stepsize=0.1, beta=0.75)
    np.testing.assert_allclose([*s.m_i[:, 0], s.x[0]], [1.321875, -2.60625, 0.10171875], rtol=1e-14)


def test_alpha_normec_toy():
    """α = 1, β = 2, γ = 0.1: ∇f_i(0) = (3, −6), so c = (6/4, −12/7), g = −3/28 and x = 3/280; then the second round."""
    s = state("alpha_normec", 1, alpha=1, beta=2, stepsize=0.1)
    np.testing.assert_allclose([*s.g_i[:, 0], s.g[0], s.x[0]], [3 / 2, -12 / 7, -3 / 28, 3 / 280], rtol=1e-14)
    e_1, e_2 = 3 + 3 / 280 - 3 / 2, 2 * (3 / 280 - 3) + 12 / 7
    g = -3 / 28 + (2 * e_1 / (1 + e_1) + 2 * e_2 / (1 - e_2)) / 2
    s = state("alpha_normec", 2, alpha=1, beta=2, stepsize=0.1)
    np.testing.assert_allclose([s.g[0], s.x[0]], [g, 3 / 280 - 0.1 * g], rtol=1e-13)


@pytest.mark.parametrize("name, constants", [
    ("clip21_sgd2m", {"tau": 1, "beta": 0.5, "beta_server": 0.5}),
    ("byz_clip21_sgd2m", {"tau": 1, "beta": 0.5, "beta_server": 0.5}), ("clip21_sgd2m", {"tau": 0.3, "beta": 1,
                                                                                    "beta_server": 0.2}),
    ("alpha_normec", {"alpha": 1, "beta": 1}), ("alpha_normec", {"alpha": 0.1, "beta": 0.1})])
def test_others_of_the_family_reach_the_minimum_too(name, constants):
    assert toy(name, stepsize=0.1, **constants).x == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("beta", [0.9, 0.3])
def test_momentum_does_not_help_clip_gd(beta):
    assert toy("clip_gd", tau=1, stepsize=0.1, beta=beta).x == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("stepsize", [0.05, 0.1, 0.2, 0.5])
def test_clip21_reaches_the_minimum_that_clip_gd_misses(stepsize):
    run = toy("clip21", tau=1, stepsize=stepsize)
    assert run.x == pytest.approx(1, abs=1e-12)
    assert np.flatnonzero(run.metrics["clipped"] > 0).max() == 5, "the last round that clips is k = 4"


def test_celgc_is_stuck_where_clip_gd_is():
    assert toy("celgc", eta=0.1, gamma=0.1, start=5.0).x == pytest.approx(2.5, abs=1e-9)


@pytest.mark.parametrize("g, step", [((3, 4), (0.6, 0.8)), ((0.3, 0.4), (0.09, 0.12))])
def test_celgc_step(g, step):
    run = mpiclip.train({"problem": {"name": "quadratic", "curvature": [[1, 1]], "centre": [[-g[0], -g[1]]]},
                         "method": {"name": "celgc", "eta": 0.3, "gamma": 1},
                         "run": {"workers": 1, "rounds": 1, "dtype": "float64"}})
    np.testing.assert_allclose(run.x, [-step[0], -step[1]], rtol=1e-15)


def test_celgc_and_naive_differ():
    """η = 0.3, γ = 1, x = 0, g_1 = (6, 0), g_2 = (0, 1)"""
    def run(name, **more):
        return mpiclip.train({"problem": {"name": "quadratic", "curvature": [[1, 1]] * 2, "centre": [[-6, 0], [0, -1]]},
                              "method": {"name": name, "eta": 0.3, "gamma": 1, **more},
                              "run": {"workers": 2, "rounds": 1, "dtype": "float64"}}).x
    np.testing.assert_allclose(run("celgc"), [-0.5, -0.15], rtol=1e-14)
    np.testing.assert_allclose(run("naive_parallel"), [-0.9, -0.15], rtol=1e-14)


# ---- equivalences between methods, on logistic-like heterogeneity

rng = np.random.default_rng(3)
HETEROGENEOUS = {"name": "quadratic", "curvature": rng.uniform(0.5, 2, (6, 9)).tolist(),
                 "centre": rng.normal(0, 3, (6, 9)).tolist()}


def trajectory_end(method, rounds=20, **constants):
    return mpiclip.train({"problem": HETEROGENEOUS, "method": {"name": method, **constants},
                          "run": {"workers": 6, "rounds": rounds, "dtype": "float64"}}).x


@pytest.mark.parametrize("a, b", [
    (("clip21", {"tau": np.inf, "stepsize": 0.2}), ("gd", {"stepsize": 0.2})),
    (("clip_gd", {"tau": 1e6, "stepsize": 0.2}), ("gd", {"stepsize": 0.2})),
    (("celgc", {"eta": 0.2, "gamma": 0.3}), ("clip_gd", {"tau": 1.5, "stepsize": 0.2})),
    (("sgd", {"stepsize": 0.2}), ("gd", {"stepsize": 0.2})),
    (("celgc", {"eta": 0.2, "gamma": 1e9}), ("gd", {"stepsize": 0.2})),
    (("naive_parallel", {"eta": 0.2, "gamma": 1e9}), ("gd", {"stepsize": 0.2})),
    (("clip21_sgd2m", {"tau": 1.0, "stepsize": 0.2, "beta": 1, "beta_server": 1}),
     ("clip21", {"tau": 1.0, "stepsize": 0.2})),
    (("clip21_sgd2m", {"tau": np.inf, "stepsize": 0.2, "beta": 1, "beta_server": 1}), ("gd", {"stepsize": 0.2})),
    (("clip21_sgd2m", {"tau": np.inf, "stepsize": 0.2, "beta": 0.3, "beta_server": 1}),
     ("clip_gd", {"tau": np.inf, "stepsize": 0.2, "beta": 0.3})),
    (("byz_clip21_sgd2m", {"tau": 1.0, "stepsize": 0.2, "beta": 1, "beta_server": 1}),
     ("clip21", {"tau": 1.0, "stepsize": 0.2})),
    (("robust_dshb", {"stepsize": 0.2, "beta": 0.8}), ("sgd", {"stepsize": 0.04, "beta": 0.8})),
    (("safe_dshb", {"tau": 1e6, "stepsize": 0.2, "beta": 0.2}), ("robust_dshb", {"stepsize": 0.2, "beta": 0.8})),
])
def test_equivalent_methods(a, b):
    np.testing.assert_allclose(trajectory_end(a[0], **a[1]), trajectory_end(b[0], **b[1]), rtol=1e-12)


def test_first_round_of_clip21_is_clip_gd():
    constants = {"tau": 1.0, "stepsize": 0.2}
    np.testing.assert_allclose(trajectory_end("clip21", 1, **constants), trajectory_end("clip_gd", 1, **constants),
                               rtol=1e-14)


def test_clip21_avg_is_exact_after_finitely_many_rounds():
    """The error falls by τ a round, so x is the mean of the a_i after ⌈max ‖a_i‖/τ⌉ rounds, and stays."""
    a = np.array(HETEROGENEOUS["centre"])
    needed = int(np.ceil(np.linalg.norm(a, axis=1).max() / 2.0))
    problem = {**HETEROGENEOUS, "curvature": np.ones_like(a).tolist()}
    for rounds, exact in ((needed - 1, False), (needed, True), (needed + 7, True)):
        run = mpiclip.train({"problem": problem, "method": {"name": "clip21_avg", "tau": 2.0},
                             "run": {"workers": 6, "rounds": rounds, "dtype": "float64"}})
        assert np.allclose(run.x, a.mean(0), rtol=0, atol=1e-12) == exact


def test_joint_scaling():
    """f_i → c f_i, τ → cτ, γ → γ/c leaves x unchanged."""
    scaled = {**HETEROGENEOUS, "curvature": (10 * np.array(HETEROGENEOUS["curvature"])).tolist()}
    run = mpiclip.train({"problem": scaled, "method": {"name": "clip21", "tau": 10.0, "stepsize": 0.02},
                         "run": {"workers": 6, "rounds": 20, "dtype": "float64"}})
    np.testing.assert_allclose(run.x, trajectory_end("clip21", tau=1.0, stepsize=0.2), rtol=1e-11)


def test_stepsize_theory_bounds_the_rounds_that_clip():
    """With the step size "theory", no worker clips after ⌈2D/τ⌉ rounds, D = max_i ‖∇f_i(x⁰)‖ − τ."""
    a, c = np.array(HETEROGENEOUS["curvature"]), np.array(HETEROGENEOUS["centre"])
    tau = 2.0
    D = np.linalg.norm(a * c, axis=1).max() - tau
    run = mpiclip.train({"problem": HETEROGENEOUS, "method": {"name": "clip21", "tau": tau, "stepsize": "theory"},
                         "run": {"workers": 6, "rounds": 40, "dtype": "float64", "eval_every": 1}})
    clipping = np.flatnonzero(run.metrics["clipped"] > 0)          # entry k is round k − 1
    assert 0 < clipping.max() - 1 <= np.ceil(2 * D / tau)


def test_stepsize_from_smoothness_and_threshold_by_quantile():
    a, c = np.array(HETEROGENEOUS["curvature"]), np.array(HETEROGENEOUS["centre"])
    norms = np.linalg.norm(a * c, axis=1)
    L, tau = a.mean(0).max(), np.quantile(norms, 0.5)
    by_rule = trajectory_end("clip21", stepsize="1/L", tau={"quantile": 0.5})
    by_number = trajectory_end("clip21", stepsize=1 / L, tau=tau)
    np.testing.assert_allclose(by_rule, by_number, rtol=0.02)


# ---- robust rules

THREE = np.arange(1.0, 10).reshape(3, 3)


def test_arc_golden():
    out = rules.arc(Rows(THREE), 1).columns()
    np.testing.assert_allclose(out, [[1, 2, 3], [4, 5, 6], [4.41004009, 5.04004582, 5.67005155]], atol=1e-8)


@pytest.mark.parametrize("n, f, k", [
    (3, 1, 1), (5, 2, 2), (10, 1, 1), (10, 3, 4), (13, 3, 4), (17, 8, 8), (100, 10, 18), (242, 33, 57)])
def test_arc_clips_k_rows(n, f, k):
    X = np.random.default_rng(n).normal(size=(n, 4))
    changed = (rules.arc(Rows(X), f).columns() != X).any(1)
    assert changed.sum() == k


def test_clipping_golden():
    expected = [[0.5345, 1.0690, 1.6036], [0.9117, 1.1396, 1.3675], [1.0051, 1.1487, 1.2923]]
    np.testing.assert_allclose(mpiclip.clip(THREE, 2.0), expected, atol=5e-5)


def test_nnm_golden():
    np.testing.assert_allclose(rules.nnm(Rows(THREE), 1).columns(), [[2.5, 3.5, 4.5]] * 2 + [[5.5, 6.5, 7.5]])


def test_distances_do_not_cancel():
    """Rows of mean 1 and spread 1e-4 in float32: squared distances keep their digits."""
    X = (1 + 1e-4 * np.random.default_rng(0).normal(size=(20, 30_000))).astype(np.float32)
    exact = [[np.sum((a.astype(np.float64) - b) ** 2) for b in X] for a in X]
    np.testing.assert_allclose(Rows(X).distances(), exact, rtol=1e-6, atol=1e-12)


def test_aggregate_is_one_vector_and_leaves_its_input():
    X = np.random.default_rng(1).normal(size=(9, 30)).astype(np.float32)
    X[7:] = 1e30
    before = X.copy()
    result = mpiclip.aggregate(X, ["arc", "nnm", "trimmed_mean"], f=2)
    assert result.shape == (30,)
    assert np.abs(result).max() < 5
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("rules_, f, message", [
    (["arcc"], 1, "did you mean 'arc'"), (["arc"], 5, "n > 2f"), (["median", "arc"], 1, "can only be the last")])
def test_aggregate_refuses(rules_, f, message):
    with pytest.raises(mpiclip.InputError, match=message):
        mpiclip.aggregate(np.ones((9, 3)), rules_, f)
