"""What the papers prove of the Clip21 family, seen from outside: messages, states and steps of whole runs."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import methods
from mpiclip.importers import import_file

N, D = 6, 9
rng = np.random.default_rng(3)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
X0 = np.full(D, 0.25)
L_I, L = CURVATURE.max(1), CURVATURE.mean(0).max()
NOISE = {"sigma": 0.5, "delta": 1e-5}


def gradients(x, curvature=CURVATURE, centre=CENTRE):
    """∇f_i(x), (n, d), of f_i = ½ Σ_j a_ij (x_j − c_ij)²"""
    return curvature * (x - centre)


GRADS = [lambda x, i=i: gradients(x)[i] for i in range(N)]


def lengths(rows):
    return np.linalg.norm(rows, axis=1)


def tables(method, rounds, curvature=CURVATURE, centre=CENTRE, start=0.25):
    return {"problem": {"name": "quadratic", "curvature": np.asarray(curvature).tolist(),
                        "centre": np.asarray(centre).tolist(), "start": start},
            "method": method,
            "run": {"workers": len(curvature), "rounds": rounds, "dtype": "float64", "eval_every": rounds},
            **({"privacy": {"noise": "reproducible", "accountant": "rdp"}} if "sigma" in method else {})}


def watched(method, rounds=30, config=None, **changes):
    """What each round leaves: `at`, the model it began with, `sent`, the messages (n, d), and the state after it."""
    seen, record = [], methods.load(method["name"])
    of_the_paper = record.round

    def round(self, x, s, workers, aggregate):
        sent, at = [], x.copy()

        def send(u_i, **kept):
            sent.append(u_i.copy())
            return aggregate(u_i, **kept)
        send.norm = aggregate.norm
        of_the_paper(self, x, s, workers, send)
        assert len(sent) == 1
        seen.append(SimpleNamespace(at=at, sent=sent[0], **{name: value.copy() for name, value in vars(s).items()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "round", round)
        mpiclip.train(config or tables(method, rounds, **changes))
    assert len(seen) == rounds
    return seen


def path(method, rounds=30, **changes):
    """The trajectory x⁰ … x^K."""
    seen = watched(method, rounds, **changes)
    return np.array([seen[0].at, *(one.x for one in seen)])


CLIP_GD = {"name": "clip_gd", "tau": 2.0, "stepsize": 0.2}
MOMENTUM = CLIP_GD | {"beta": 0.3}
CLIP21 = {"name": "clip21", "tau": 1.0, "stepsize": 0.2}
SGD2M = {"name": "clip21_sgd2m", "tau": 1.0, "stepsize": 0.2, "beta": 0.4, "beta_server": 0.6}
BYZ = SGD2M | {"name": "byz_clip21_sgd2m"}
SAFE = {"name": "safe_dshb", "tau": 2.0, "stepsize": 0.2, "beta": 0.3}
NORMEC = {"name": "alpha_normec", "alpha": 0.5, "beta": 1.0, "stepsize": 0.2}
ROBUST = {"name": "robust_dshb", "stepsize": 0.2}
FAMILY = {"clip_gd": CLIP_GD, "clip_gd, momentum": MOMENTUM, "clip21": CLIP21, "clip21_sgd2m": SGD2M,
          "byz_clip21_sgd2m": BYZ, "safe_dshb": SAFE, "alpha_normec": NORMEC,
          "alpha_normec, normalized": NORMEC | {"normalized": True}}
family = pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY)
# Methods that keep what they have sent: a worker's name for it, the server's, and the share of a message that counts.
KEPT = {"clip21": (CLIP21, "v_i", "v", 1.0), "clip21_sgd2m": (SGD2M, "g_i", "g", 0.6),
        "alpha_normec": (NORMEC, "g_i", "g", 1.0)}
kept = pytest.mark.parametrize("method, of_worker, of_server, share", KEPT.values(), ids=KEPT)


# ---- all of them


@family
def test_no_message_is_longer_than_the_bound(method):
    record = methods.load(method["name"])
    bound = record(**{key: value for key, value in method.items() if key != "name"}).bound()
    assert bound == method["beta" if method["name"] == "alpha_normec" else "tau"]
    lengths_sent = np.array([lengths(one.sent) for one in watched(method)])
    assert lengths_sent.max() <= bound * (1 + 1e-12)
    assert lengths_sent.max() > 0.9 * bound, "and it is reached"


def test_other_methods_have_no_bound():
    bounded = {name for name in methods.names() if methods.load(name).bound is not methods.Method.bound}
    assert bounded == {"clip_gd", "clip21", "clip21_sgd2m", "alpha_normec", "press_clip21", "byz_clip21_sgd2m",
                       "safe_dshb"}


@family
def test_identical_workers_are_one(method):
    one = path(method, curvature=CURVATURE[:1], centre=CENTRE[:1])
    for n in (2, 3, 5):
        many = path(method, curvature=CURVATURE[:1].repeat(n, 0), centre=CENTRE[:1].repeat(n, 0))
        np.testing.assert_allclose(many, one, rtol=1e-12, atol=1e-12)


@family
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("c", [0.01, 8.0])
def test_joint_scaling(method, noise, c):
    """f_i → c f_i with every length of the method times c, and γ/c (γ itself is a length if steps are normalised):
    the same x."""
    method = method | NOISE if noise else method
    factors = {"tau": c, "sigma": c, "alpha": c, "stepsize": 1 if method.get("normalized") else 1 / c}
    if method["name"] == "alpha_normec":
        factors["beta"] = c
    scaled = {key: value * factors.get(key, 1) for key, value in method.items()}
    np.testing.assert_allclose(path(scaled, curvature=c * CURVATURE), path(method), rtol=1e-10, atol=1e-10)


@family
def test_no_noise_is_no_noise(method):
    assert path(method | NOISE | {"sigma": 0.0}).tobytes() == path(method).tobytes()
    assert np.abs(path(method | NOISE) - path(method)).max() > 0.01


# ---- what the server has is the mean of what the workers have


@kept
@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
def test_the_server_has_the_mean_of_the_workers_states_and_all_noise(method, of_worker, of_server, share, noise,
                                                                     added_noise):
    """v − (1/n) Σ v_i is the mean noise added up, times β̂ in Clip21-SGD2M: zero without noise."""
    total = np.zeros(D)
    for k, one in enumerate(watched(method | NOISE if noise else method)):
        total += share * added_noise[k].mean(0)
        np.testing.assert_allclose(getattr(one, of_server) - getattr(one, of_worker).mean(0), total, atol=1e-12)
    assert total.any() == noise


@pytest.mark.parametrize("noise", [False, True], ids=["", "noise"])
def test_byz_clip21_keeps_each_workers_state_and_all_its_noise(noise, added_noise):
    """m_i − g_i is the noise of worker i added up, times β̂: zero without noise. Their mean is Clip21-SGD2M's g."""
    total = np.zeros((N, D))
    plain = watched(SGD2M | NOISE if noise else SGD2M)
    del added_noise[:]
    for k, (one, other) in enumerate(zip(watched(BYZ | NOISE if noise else BYZ), plain, strict=True)):
        total += 0.6 * added_noise[k]
        np.testing.assert_allclose(one.m - one.g_i, total, atol=1e-12)
        np.testing.assert_allclose(one.m.mean(0), other.g, atol=1e-12)
        np.testing.assert_allclose(one.x, other.x, rtol=1e-12, atol=1e-12)
    assert total.any() == noise


def test_safe_dshb_sends_momentum_of_noisy_messages(added_noise):
    """m_i ← (1 − β) m_i + β (clip_τ(∇f_i(x)) + z_i): the noise is in the state, and shrinks with it."""
    m = np.zeros((N, D))
    for k, one in enumerate(watched(SAFE | NOISE)):
        c = np.array([reference.clip(g, 2.0) for g in gradients(one.at)])
        m = 0.7 * m + 0.3 * (c + added_noise[k])
        np.testing.assert_allclose(one.m_i, m, atol=1e-12)
        np.testing.assert_allclose(one.sent, m, atol=1e-12)


def test_a_noisy_state_takes_in_what_was_sent():
    before = np.zeros((N, D))
    seen = watched(CLIP21 | NOISE | {"noisy_state": True})
    for one in seen:
        np.testing.assert_allclose(one.v_i - before, one.sent, atol=1e-12)
        np.testing.assert_allclose(one.v, one.v_i.mean(0), atol=1e-12)
        before = one.v_i
    assert (lengths(seen[0].sent) > 1.0 * 1.1).all(), "noise included"


@kept
def test_the_noise_in_the_server_is_a_random_walk(method, of_worker, of_server, share):
    """Its expected squared norm after k rounds is k σ² d/n, times β̂² in Clip21-SGD2M; so is that of every step of it.
    With d = 20 000 the relative standard deviation of what is measured is 1 %."""
    d, n, sigma, K = 20_000, 3, 0.7, 6
    seen = watched(method | NOISE | {"sigma": sigma}, K, curvature=np.ones((n, d)), centre=np.zeros((n, d)))
    walk = [getattr(one, of_server) - getattr(one, of_worker).mean(0) for one in seen]
    step = share**2 * sigma**2 * d / n
    for k in range(K):
        assert np.sum(walk[k] ** 2) == pytest.approx((k + 1) * step, rel=0.06)
        assert np.sum((walk[k] - (walk[k - 1] if k else 0)) ** 2) == pytest.approx(step, rel=0.06)


@pytest.mark.parametrize("noisy, grows", [(False, True), (True, False)])
def test_a_noisy_state_ends_the_walk(noisy, grows):
    """At the minimum of the mean the workers correct what the noise has done: the error no longer grows."""
    d, K = 400, 120
    method = CLIP21 | NOISE | {"tau": 100.0, "stepsize": 0.5, "noisy_state": noisy}
    seen = watched(method, K, curvature=np.ones((2, d)), centre=np.zeros((2, d)), start=0.0)
    errors = [np.linalg.norm(one.v - gradients(one.at, 1, 0)) for one in seen]
    assert (np.mean(errors[-20:]) > 3 * np.mean(errors[:10])) == grows


# ---- Clip21


def test_v_i_grows_by_no_more_than_tau_a_round():
    for k, one in enumerate(watched(CLIP21)):
        assert (lengths(one.v_i) <= (k + 1) * 1.0 + 1e-12).all()


def test_without_a_threshold_the_server_has_the_gradient_from_the_first_round_on():
    for one in watched(CLIP21 | {"tau": np.inf}):
        np.testing.assert_allclose(one.v, gradients(one.at).mean(0), atol=1e-12)
    everywhere = path(CLIP21 | {"tau": np.inf})
    np.testing.assert_allclose(everywhere, reference.gd(GRADS, X0, 30, 0.2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau, stepsize", [(0.3, 0.2), (1.0, 0.5), (3.0, 1.0), (1.0, 1.6)])
def test_error_recursion(tau, stepsize):
    """‖∇f_i(x^{k+1}) − v_i^{k+1}‖ ≤ max(0, ‖∇f_i(x^k) − v_i^k‖ + γ L_i ‖v^k‖ − τ), for every worker and round, also
    with a step that is too long."""
    seen = watched(CLIP21 | {"tau": tau, "stepsize": stepsize}, 60)
    for now, then in pairwise(seen):
        before, after = (lengths(gradients(one.at) - one.v_i) for one in (now, then))
        np.testing.assert_array_less(after, np.maximum(0, before + stepsize * L_I * np.linalg.norm(now.v) - tau) + 1e-9)


def test_who_does_not_clip_has_its_gradient_and_then_nobody_clips_again():
    """γ L_max ‖∇f(x^k)‖ ≤ τ keeps all of them inactive; γ ≤ 1/L on a convex f makes that last."""
    seen = watched(CLIP21 | {"stepsize": 1 / L}, 100)
    quiet = [k for k, one in enumerate(seen) if not one.clipped_i.any()
             and L_I.max() / L * np.linalg.norm(gradients(one.at).mean(0)) <= 1.0]
    assert 0 < quiet[0] < 90 and quiet == list(range(quiet[0], 100))
    for one in seen:
        still = one.clipped_i == 0
        np.testing.assert_allclose(one.v_i[still], gradients(one.at)[still], atol=1e-12)
        assert (lengths(gradients(one.at) - one.v_i)[~still] > 0).all()


def bounds_of_theory(gradients_of, first, F0, method, seen, L, L_max):
    """With γ = "theory", in every round k: max_i ‖∇f_i(x^k) − v_i^k‖ ≤ max(0, D − kτ/2) and γ L_max ‖v^k‖ ≤ τ/2; nobody
    clips after round ⌈2D/τ⌉; and min_k ‖∇f(x^k)‖² ≤ (2 F_0/γ + S)/K. γ follows from L and L_max, or 1 % less. Returns
    how many rounds had somebody clip."""
    tau = method["tau"]
    D_ = max(0.0, lengths(first).max() - tau)
    S = D_**2 + 2 * D_**3 / (3 * tau)
    V = np.sqrt(2 * L * F0 + S) + D_
    exact = min(1 / L, tau / (2 * L_max * V))
    stepsize = np.linalg.norm(seen[0].x - seen[0].at) / np.linalg.norm(seen[0].v)
    assert 0.98 * exact <= stepsize <= exact * (1 + 1e-6)
    squares = []
    for k, one in enumerate(seen):
        g_i = gradients_of(one.at)
        assert lengths(g_i - one.v_i).max() <= max(0.0, D_ - k * tau / 2) + 1e-9
        assert stepsize * L_max * np.linalg.norm(one.v) <= tau / 2 * (1 + 1e-9)
        assert not (k > np.ceil(2 * D_ / tau) and one.clipped_i.any())
        squares.append(np.sum(g_i.mean(0) ** 2))
        assert min(squares) <= (2 * F0 / stepsize + S) / (k + 1) * (1 + 1e-9)
    return sum(one.clipped_i.any() for one in seen)


@pytest.mark.parametrize("seed", range(10))
def test_theory_on_random_quadratics(seed):
    random = np.random.default_rng(seed)
    n, d, tau = random.integers(2, 8), random.integers(1, 15), 10 ** random.uniform(-0.5, 1)
    a, c = random.uniform(0, 3, (n, d)) * 10 ** random.uniform(-1, 1, (n, 1)), random.normal(0, 2, (n, d))
    method = {"name": "clip21", "tau": float(tau), "stepsize": "theory"}
    first, F0 = gradients(0.5, a, c), np.mean(np.sum(a * (0.5 - c) ** 2, 1)) / 2
    rounds = int(min(400, 2 * lengths(first).max() / tau + 20))
    seen = watched(method, rounds, curvature=a, centre=c, start=0.5)
    clipping = bounds_of_theory(lambda x: gradients(x, a, c), first, F0, method, seen, a.mean(0).max(), a.max())
    assert clipping > 0


# ---- Clip21 where f is not convex


def nodes(seed, n=10, m=40, d=12):
    """Heterogeneous nodes: features N(0, 1) scaled by 1 + i with an offset, labels ±1 with a bias of alternating sign.
    Returns A (n, m, d), b (n, m)."""
    random = np.random.default_rng(seed)
    A = random.normal(size=(n, m, d)) * np.arange(1, n + 1)[:, None, None] + random.normal(size=(n, 1, d))
    bias = 2.0 * (-1) ** np.arange(n)[:, None]
    return A, np.where(A @ random.normal(size=d) / np.arange(1, n + 1)[:, None] + bias > 0, 1.0, -1.0)


@pytest.fixture(params=[0, 1, 2])
def logistic(request, tmp_path):
    """Non-convex regularised logistic regression with λ = 0.1: what a config needs, ∇f_i, f and bounds of L and L_i."""
    A, b = nodes(request.param)
    n, m, d = A.shape
    np.savez(tmp_path / "nodes.npz", X=A.reshape(-1, d), y=b.ravel())
    import_file([str(tmp_path / "nodes.npz")], str(tmp_path / "nodes.h5"))

    def gradients_of(x):
        weights = -b / (1 + np.exp(b * (A @ x)))
        return np.einsum("im,imd->id", weights, A) / m + 0.1 * 2 * x / (1 + x**2) ** 2

    def loss(x):
        return np.mean(np.log1p(np.exp(-b * (A @ x)))) + 0.1 * np.sum(x**2 / (1 + x**2))

    H = np.einsum("imd,ime->ide", A, A) / (4 * m) + 0.2 * np.eye(d)
    config = {"data": {"file": str(tmp_path / "nodes.h5"), "split": "contiguous"},
              "problem": {"name": "logistic", "regularizer": "nonconvex", "lam": 0.1},
              "run": {"workers": n, "dtype": "float64"}}

    def run(method, rounds):
        return {**config, "method": method, "run": {**config["run"], "rounds": rounds, "eval_every": rounds}}
    return SimpleNamespace(run=run, gradients=gradients_of, loss=loss, L=np.linalg.eigvalsh(H.mean(0))[-1],
                           L_max=np.linalg.eigvalsh(H)[:, -1].max(), zero=np.zeros(d))


@pytest.mark.parametrize("tau", [0.2, 1.0, 50.0])
def test_theory_where_f_is_not_convex(logistic, tau):
    method, first = {"name": "clip21", "tau": tau, "stepsize": "theory"}, logistic.gradients(logistic.zero)
    rounds = int(2 * lengths(first).max() / tau) + 20
    seen = watched(method, rounds, logistic.run(method, rounds))
    clipping = bounds_of_theory(logistic.gradients, first, logistic.loss(logistic.zero), method, seen, logistic.L,
                                logistic.L_max)
    assert (clipping > 0) == (tau < lengths(first).max())


@pytest.mark.parametrize("tau", [0.05, 0.2, 1.0])
def test_clip_gd_stalls_where_clip21_goes_on_to_a_stationary_point(logistic, tau):
    end = {name: mpiclip.train(logistic.run({"name": name, "tau": tau, "stepsize": "1/L"}, 3000)).x
           for name in ("clip_gd", "clip21")}
    assert np.linalg.norm(logistic.gradients(end["clip_gd"]).mean(0)) > 1e-3
    assert np.linalg.norm(logistic.gradients(end["clip21"]).mean(0)) < 1e-9


# ---- Clip21-SGD2M and client momentum


def test_without_momentum_clip21_sgd2m_is_clip21():
    """To the last bit. (The paper's round begins with a step that is null the first time; ours ends with it.)"""
    plain = SGD2M | {"beta": 1.0, "beta_server": 1.0}
    assert path(plain).tobytes() == path(CLIP21).tobytes()
    assert path(plain | NOISE).tobytes() == path(CLIP21 | NOISE).tobytes()
    np.testing.assert_allclose(reference.clip21_sgd2m(GRADS, X0, 10, 1.0, 0.2, 1.0, 1.0),
                               reference.clip21(GRADS, X0, 10, 1.0, 0.2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", [SGD2M | {"beta_server": 1.0, "tau": np.inf}, MOMENTUM | {"tau": np.inf}])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_without_a_threshold_they_are_client_momentum(method, beta):
    x, v, expected = X0, np.zeros((N, D)), [X0]
    for _ in range(30):
        v = (1 - beta) * v + beta * gradients(x)
        x = x - 0.2 * v.mean(0)
        expected.append(x)
    np.testing.assert_allclose(path(method | {"beta": beta}), expected, rtol=1e-12, atol=1e-12)
    if beta == 1:
        np.testing.assert_allclose(path(method | {"beta": beta}), reference.gd(GRADS, X0, 30, 0.2), atol=1e-12)
    for one in watched(method | {"beta": beta}) if "beta_server" in method else []:
        np.testing.assert_allclose(one.g_i, one.v_i, atol=1e-12)


def test_bounds_of_clip21_sgd2m():
    """‖q_i‖ ≤ τ; ‖g_i^{t+1} − g_i^t‖ ≤ β̂τ; ‖g_i^t‖ ≤ tβ̂τ"""
    before = np.zeros((N, D))
    for t, one in enumerate(watched(SGD2M), 1):
        assert (lengths(one.sent) <= 1.0 + 1e-12).all()
        assert (lengths(one.g_i - before) <= 0.6 + 1e-12).all()
        assert (lengths(one.g_i) <= 0.6 * t + 1e-12).all()
        before = one.g_i


FROZEN = 1e-300         # a step size that moves nothing


def test_error_of_clip21_sgd2m_at_a_fixed_x():
    """β = 1: it falls by β̂τ a round as long as it is above τ, then by the factor 1 − β̂."""
    seen = watched(SGD2M | {"beta": 1.0, "stepsize": FROZEN}, 40)
    errors = [lengths(gradients(X0)), *(lengths(gradients(X0) - one.g_i) for one in seen)]
    for before, after in pairwise(errors):
        np.testing.assert_allclose(after, np.where(before > 1.0, before - 0.6 * 1.0, 0.4 * before), atol=1e-11)
    assert (errors[0] > 1).all() and (errors[-1] < 1e-3).all()


@pytest.mark.parametrize("plain, beta, state", [
    (CLIP_GD, {"beta": 1.0}, "v_i"), (SAFE | {"beta": 1.0}, {"beta": 1.0}, "m_i"), (ROBUST, {"beta": 0.0}, "m_i")],
    ids=["clip_gd", "safe_dshb", "robust_dshb"])
def test_a_state_is_kept_for_momentum_only(plain, beta, state):
    assert not hasattr(watched(plain, 1)[0], state)
    assert getattr(watched(plain | {"beta": 0.3}, 1)[0], state).shape == (N, D)
    assert path(plain | beta).tobytes() == path(plain).tobytes()


def test_without_momentum_they_are_what_they_are_called():
    """To the last bit: Safe-DSHB is Byz-Clip-SGD, Robust-DSHB is gradient descent."""
    for noise in ({}, NOISE):
        assert path(SAFE | {"beta": 1.0} | noise).tobytes() == path(CLIP_GD | noise).tobytes()
    assert path(ROBUST).tobytes() == path({"name": "gd", "stepsize": 0.2}).tobytes()


def test_messages_of_robust_dshb_are_momenta():
    """Those of clip_gd without a threshold, whose β weighs the new gradient; and averaged, the server's momentum of SGD
    with the step (1 − β) γ."""
    for one, other in zip(watched(ROBUST | {"beta": 0.7}), watched(MOMENTUM | {"tau": np.inf}), strict=True):
        np.testing.assert_allclose(one.sent, other.sent, atol=1e-12)
        np.testing.assert_allclose(one.sent, one.m_i)
    np.testing.assert_allclose(path(ROBUST | {"beta": 0.7}), reference.sgd(GRADS, X0, 30, 0.3 * 0.2, 0.7), rtol=1e-11)


@pytest.mark.parametrize("start", [0.25, 1e6])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_celgc_sends_how_far_it_went(start, momentum):
    """However far x is from 0: no message is longer than I γ, or I γ/(1 − μ) with momentum."""
    method = {"name": "celgc", "eta": 0.1, "gamma": 0.2, "interval": 3, "momentum": momentum}
    for one in watched(method, start=start):
        assert 0.3 < lengths(one.sent).max() <= 3 * 0.2 / (1 - momentum) + 1e-9
        np.testing.assert_allclose(one.x, one.at + one.sent.mean(0), rtol=1e-12)


# ---- α-NormEC


def test_error_of_alpha_normec_at_a_fixed_x():
    """e ← |1 − β/(α + e)| e: by almost β where e is much more than α, by the factor 1 − β/α where it is much less."""
    seen = watched(NORMEC | {"alpha": 3.0, "stepsize": FROZEN}, 60)
    errors = [lengths(gradients(X0)), *(lengths(gradients(X0) - one.g_i) for one in seen)]
    for before, after in pairwise(errors):
        np.testing.assert_allclose(after, abs(1 - 1 / (3 + before)) * before, atol=1e-11)
    np.testing.assert_allclose(errors[-1], errors[-2] * 2 / 3, rtol=1e-3)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_alpha_normec_with_a_large_alpha_tracks_the_gradients(share):
    """α → ∞ with β = α β̂: g_i takes in the share β̂ of what is missing, as EF21 without a compressor would for β̂ = 1."""
    alpha = 1e9
    found = path(NORMEC | {"alpha": alpha, "beta": share * alpha})
    np.testing.assert_allclose(found, reference.damped_tracking(GRADS, X0, 30, 0.2, share), rtol=1e-6, atol=1e-6)
    if share == 1:
        np.testing.assert_allclose(found, reference.gd(GRADS, X0, 30, 0.2), rtol=1e-6, atol=1e-6)


def test_normalized_steps_are_of_one_length():
    seen = watched(NORMEC | {"normalized": True, "stepsize": 0.07})
    for one in seen:
        assert np.linalg.norm(one.x - one.at) == pytest.approx(0.07, rel=1e-12)
        assert np.dot(one.at - one.x, one.g) == pytest.approx(0.07 * np.linalg.norm(one.g), rel=1e-9), "along −g"


def test_normalized_steps_stay_at_a_minimum():
    """g = 0 is not divided by."""
    assert not path(NORMEC | {"normalized": True}, 5, curvature=[[1.0]], centre=[[0.0]], start=0.0).any()


# ---- bad input


@pytest.mark.parametrize("method, message", [
    (CLIP_GD | {"beta": 0.0}, "method.beta = 0.0: input should be greater than 0"),
    (CLIP_GD | {"beta": 1.01}, "method.beta = 1.01: input should be less than or equal to 1"),
    (SGD2M | {"beta": -0.5}, "method.beta = -0.5: input should be greater than 0"),
    (SGD2M | {"beta": 1.5}, "method.beta = 1.5: input should be less than or equal to 1"),
    (SGD2M | {"beta_server": 2}, "method.beta_server = 2: input should be less than or equal to 1"),
    (SGD2M | {"tau": -1.0}, "method.tau = -1.0"), (SGD2M | {"stepsize": 0.0}, "method.stepsize = 0.0"),
    (SGD2M | {"beta_servr": 0.5}, "did you mean 'beta_server'"),
    ({key: value for key, value in SGD2M.items() if key != "beta"}, "method.beta: missing"),
    (BYZ | {"beta_server": 0.0}, "method.beta_server = 0.0: input should be greater than 0"),
    (SAFE | {"beta": 0.0}, "method.beta = 0.0: input should be greater than 0"),
    (ROBUST | {"beta": 1.0}, "method.beta = 1.0: input should be less than 1"),
    (ROBUST | {"sigma": 1.0, "delta": 1e-5}, "'robust_dshb': nothing bounds what a worker sends"),
    (NORMEC | {"alpha": 0}, "method.alpha = 0: input should be greater than 0"),
    (NORMEC | {"alpha": np.inf}, "method.alpha = inf: input should be a finite number"),
    (NORMEC | {"beta": -1.0}, "method.beta = -1.0: input should be greater than 0"),
    (NORMEC | {"beta": np.nan}, "method.beta = nan: input should be"),
    (NORMEC | {"normalized": 3}, "method.normalized = 3: input should be a valid boolean"),
    (CLIP21 | {"noisy_state": "yes"}, "method.noisy_state = 'yes'"),
    (NORMEC | {"stepsize": "theory"}, "method.stepsize = 'theory'")])
def test_constants_are_checked(method, message):
    with pytest.raises(mpiclip.InputError) as error:
        mpiclip.train(tables(method, 1))
    assert message in str(error.value) and "\n" not in str(error.value)
