"""CELGC, EPISODE and EPISODE++: golden values, what holds of every step, and what is refused."""

import numpy as np
import pytest

from mpiclip import config as configs
from mpiclip.comm import Comm
from mpiclip.errors import InputError
from mpiclip.training import Training

rng = np.random.default_rng(3)
N, D, K = 4, 6, 15
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
TOY = {"curvature": [[1], [2]], "centre": [[-3], [3]]}      # gradients clipped at 1 cancel for x in [−2, 2.5]


def gradients(n=N):
    return [lambda x, a=a, c=c: a * (x - c) for a, c in zip(CURVATURE[:n], CENTRE[:n], strict=True)]


def training(method, rounds=K, curvature=CURVATURE, centre=CENTRE, start=0.25):
    job = Training(configs.load({
        "problem": {"name": "quadratic", "curvature": np.asarray(curvature, float).tolist(),
                    "centre": np.asarray(centre, float).tolist(), "start": start},
        "method": method, "run": {"workers": len(curvature), "rounds": rounds, "dtype": "float64", "eval_every": 1}}),
        Comm(), None)
    job.result = job.run()
    return job


def end(method, rounds=K, **problem):
    return training(method, rounds, **problem).result.x


def celgc(**constants):
    return {"name": "celgc", "eta": 0.1, "gamma": 0.3, **constants}


def naive(**constants):
    return {"name": "naive_parallel", "eta": 0.1, "gamma": 0.3, **constants}


def episode(**constants):
    return {"name": "episode", "eta": 0.1, "gamma": 0.3, **constants}


# ---- golden values


@pytest.mark.parametrize("constants, x", [
    ({}, [-0.5, -0.15]),                                    # g_1 = (6, 0), g_2 = (0, 1): each is clipped by its norm,
    ({"threshold": "global"}, [-0.9, -0.15]),               # both by ‖(3, ½)‖ < γ/η: not at all,
    ({"threshold": "max"}, [-0.5, -0.15]),                  # or by the larger norm
    ({"eta": np.inf}, [-0.5, -0.5])])                       # steps of length γ
def test_whose_norm_it_is(constants, x):
    method = {"name": "celgc", "eta": 0.3, "gamma": 1, **constants}
    np.testing.assert_allclose(end(method, 1, curvature=[[1, 1]] * 2, centre=[[-6, 0], [0, -1]], start=0.0), x,
                               rtol=1e-14)


def test_a_recorded_norm_clips_all_steps_of_its_round():
    """f = ½ x² from 10, η = ½, γ = 1: the recorded 10 makes every step a tenth of g; the own norm makes it 1 long."""
    for threshold, x in (("global", 10 * 0.9**3), ("local", 7.0), ("max", 10 * 0.9**3)):
        method = {"name": "celgc", "eta": 0.5, "gamma": 1, "interval": 3, "threshold": threshold}
        assert end(method, 1, curvature=[[1]], centre=[[0]], start=10.0) == pytest.approx(x, rel=1e-14)


def test_weight_decay_and_momentum():
    """f = ½ (x − 5)² from 1: ‖g‖ = 4 is clipped to 1, η = ½, λ = 0.1: e = ¼ (−4 + 0.1), m = e, x = 1 + ½ 0.975; then
    ‖g‖ = 3.5125."""
    method = celgc(eta=0.5, gamma=0.5, weight_decay=0.1, momentum=0.5)
    x, m = 1 + 0.975 / 2, -0.975
    assert end(method, 1, curvature=[[1]], centre=[[5]], start=1.0) == pytest.approx(x, rel=1e-15)
    m = 0.5 * m + (-3.5125 + 0.1 * x) / 3.5125
    for same in (method, method | {"name": "naive_parallel"}):
        assert end(same, 2, curvature=[[1]], centre=[[5]], start=1.0) == pytest.approx(x - 0.5 * m, rel=1e-15)


@pytest.mark.parametrize("method", [celgc(), naive(), episode()], ids=lambda method: method["name"])
def test_eta_and_gamma_decay_together(method):
    """From each of these rounds on steps are a tenth as long, and the same gradients are clipped."""
    method = method | {"decay": 0.1, "decay_at": [2, 4]}
    xs = [end(method, k, curvature=[[1]], centre=[[100]], start=0.0)[0] for k in range(6)]
    np.testing.assert_allclose(np.diff(xs), [0.3, 0.3, 0.03, 0.03, 0.003], rtol=1e-10)


def test_episode_toy():
    """η = γ = 0.1, I = 2 from 0: G_i = 3 and −6, G = −1.5 is longer than 1, so steps are 0.1 long. The first goes along
    G for both; then u_1 = 3.1 − 3 − 1.5 and u_2 = −5.8 + 6 − 1.5, to 0.2. With γ = 0.2 nobody clips: 0.15, and then
    u_1 = −1.35, u_2 = −1.2."""
    for gamma, x in ((0.1, 0.2), (0.2, 0.15 + 0.1 * (1.35 + 1.2) / 2)):
        assert end({"name": "episode", "eta": 0.1, "gamma": gamma, "interval": 2}, 1, **TOY,
                   start=0.0) == pytest.approx(x, rel=1e-14)


@pytest.mark.parametrize("name", ["episode", "episode_pp"])
@pytest.mark.parametrize("interval", [1, 4])
def test_episode_reaches_the_minimum_that_celgc_misses(name, interval):
    constants = {"eta": 0.05, "gamma": 0.05, "interval": interval}
    assert end({"name": name, **constants}, 400, **TOY, start=0.0) == pytest.approx(1, abs=1e-6)
    assert end({"name": "celgc", **constants}, 400, **TOY, start=0.0) == pytest.approx(0, abs=1e-6)


# ---- what holds of every step


def test_length_of_a_step():
    """min(γ, η‖g‖), also with weight decay but for η λ ‖x‖; and γ where η = ∞."""
    grad = gradients(1)[0]
    for constants, most in (({"gamma": 0.3}, 0.0), ({"gamma": 0.3, "weight_decay": 0.5}, 0.05), ({"eta": np.inf}, 0.0)):
        xs = [end(celgc(**constants), k, curvature=CURVATURE[:1], centre=CENTRE[:1]) for k in range(12)]
        steps = np.linalg.norm(np.diff(xs, axis=0), axis=1)
        bound = [min(0.3, constants.get("eta", 0.1) * np.linalg.norm(grad(x))) for x in xs[:-1]]
        assert (steps <= np.array(bound) + most * np.linalg.norm(xs[:-1], axis=1) + 1e-12).all()
        if not most:
            np.testing.assert_allclose(steps, bound, rtol=1e-12)


def test_workers_stay_near_their_mean(monkeypatch):
    """‖x_i − x̄‖ ≤ 2 γ I at every local step, and all are equal at the start of a round."""
    seen, interval = [], 5
    job = configs.load({"problem": {"name": "quadratic", "dimension": 9, "spread": 30.0},
                        "method": celgc(interval=interval), "run": {"workers": 6, "rounds": 8}})
    run = Training(job, Comm(), None)
    grad = run.workers.grad
    monkeypatch.setattr(run.workers, "grad", lambda x_i: (seen.append(x_i.copy()), grad(x_i))[1])
    run.run()
    for k, x_i in enumerate(seen):
        spread = np.linalg.norm(x_i - x_i.mean(0), axis=1)
        assert spread.max() <= 2 * 0.3 * interval and (spread.max() > 0.1) == (k % interval > 0)
    assert len(seen) == 8 * interval


SAME = {"curvature": np.repeat(CURVATURE[:1], N, 0), "centre": np.repeat(CENTRE[:1], N, 0)}


@pytest.mark.parametrize("a, b, problem", [
    (celgc(gamma=np.inf), naive(gamma=np.inf), {}),                         # nobody clips
    (celgc(gamma=2.0, momentum=0.6, weight_decay=0.1), naive(gamma=2.0, momentum=0.6, weight_decay=0.1), {}),
    (celgc(), naive(), SAME),                                               # all gradients are equal
    (celgc(momentum=0.6), naive(momentum=0.6), {"curvature": CURVATURE[:1], "centre": CENTRE[:1]}),     # N = 1
    (celgc(threshold="global", weight_decay=0.1), naive(weight_decay=0.1), {}),     # one factor for all gradients
    (celgc(eta=0.1, gamma=0.3), {"name": "clip_gd", "tau": 3.0, "stepsize": 0.1}, {}),
    (celgc(gamma=np.inf), {"name": "gd", "stepsize": 0.1}, {}),
    (episode(weight_decay=0.1), naive(weight_decay=0.1), {}),               # I = 1, full gradients: u_i = G
    (episode(interval=3, gamma=np.inf), celgc(interval=3, gamma=np.inf), SAME),     # u_i = ∇f(x_i)
], ids=str)
def test_the_same(a, b, problem):
    np.testing.assert_allclose(end(a, **problem), end(b, **problem), rtol=1e-11, atol=1e-12)


def test_without_clipping_it_is_local_sgd():
    x = np.full(D, 0.25)
    for _ in range(K):
        ends = []
        for g in gradients():
            x_i = x
            for _ in range(4):
                x_i = x_i - 0.1 * g(x_i)
            ends.append(x_i)
        x = sum(ends) / N
    np.testing.assert_allclose(end(celgc(gamma=np.inf, interval=4)), x, rtol=1e-12)


def test_doubling_both_constants_clips_the_same_gradients():
    one, two = (training(celgc(eta=eta, gamma=8 * eta, interval=1), 1).result.metrics["clipped"][1]
                for eta in (0.01, 0.02))
    assert one == two and 0 < one < 1


def test_corrections_of_episode_pp():
    """G is the mean of the G_i, which with I = 1 are the gradients of the round before."""
    before = np.full(D, 0.25)
    for k in range(1, 6):
        s = training({"name": "episode_pp", "eta": 0.1, "gamma": 0.3}, k).s
        np.testing.assert_allclose(s.G, s.G_i.mean(0), rtol=1e-12)
        np.testing.assert_allclose(s.G_i, [g(before) for g in gradients()], rtol=1e-12)
        before = s.x.copy()


# ---- what is refused


@pytest.mark.parametrize("name, constants, words", [
    ("celgc", {"interval": 0}, "method.interval = 0"),
    ("celgc", {"threshold": "mine"}, "method.threshold = 'mine'"),
    ("celgc", {"momentum": 1.0}, "method.momentum = 1.0"),
    ("naive_parallel", {"momentum": -0.1}, "method.momentum = -0.1"),
    ("episode", {"weight_decay": -1e-4}, "method.weight_decay = -0.0001"),
    ("celgc", {"decay": 0.1}, "decay and decay_at go together, found only decay"),
    ("episode_pp", {"decay_at": [10]}, "decay and decay_at go together, found only decay_at"),
    ("naive_parallel", {"decay": 0.1, "decay_at": [80, 80]}, r"decay_at = \[80, 80\]: expected rounds in ascending"),
    ("celgc", {"decay": 0.1, "decay_at": [0, 5]}, r"method.decay_at = \[0, 5\]"),
    ("celgc", {"decay": 1.5, "decay_at": [5]}, "method.decay = 1.5"),
    ("celgc", {"eta": np.inf, "gamma": np.inf}, "eta = inf: expected with a finite gamma"),
    ("episode", {"eta": np.inf}, "method.eta = inf"),
    ("episode", {"momentum": 0.9}, "method.momentum"),
    ("naive_parallel", {"interval": 2}, "method.interval")])
def test_refused(name, constants, words):
    with pytest.raises(InputError, match=words) as error:
        training({"name": name, "eta": 0.1, "gamma": 0.1, **constants}, 1)
    assert "\n" not in str(error.value)
