"""Attacks against plain loops, what happens to rows that are not finite, and who is caught."""

from types import SimpleNamespace

import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import data as data_file
from mpiclip.aggregation import Aggregation
from mpiclip.attacks import ATTACKS, worst
from mpiclip.comm import Comm
from mpiclip.device import Device
from mpiclip.importers import import_file
from mpiclip.rows import Rows
from mpiclip.server import Server

N, F, D = 9, 2, 31
BYZANTINE = np.array([0, 0, 1, 0, 0, 0, 0, 1, 0], bool)
ORDER = [0, 1, 3, 4, 5, 6, 8, 2, 7]         # the reference has them last
ROBUST = ["arc", "nnm", "trimmed_mean"]


def data(seed=0, spread=1.0):
    """Rows that have something in common."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=D) + spread * rng.normal(size=(N, D))


def arc_median(X, f):
    return reference.median(reference.arc(X, f), f)


# attack → constants, and the same by definition: (X, f, scene, the rules in use) → X
CASES = {
    "sign_flip": ({}, lambda X, f, scene, rules: reference.ipm(X, f, 1.0)),
    "label_flip": ({}, lambda X, f, scene, rules: reference.sent_by_all(X, f, scene.flipped())),
    "ipm": ({"factor": 0.7}, lambda X, f, scene, rules: reference.ipm(X, f, 0.7)),
    "alie": ({"factor": 0.9}, lambda X, f, scene, rules: reference.alie(X, f, 0.9)),
    "opt_ipm": ({}, lambda X, f, scene, rules: reference.optimised(reference.ipm, X, f, rules)),
    "opt_alie": ({}, lambda X, f, scene, rules: reference.optimised(reference.alie, X, f, rules)),
    "mimic": ({"worker": 1}, lambda X, f, scene, rules: reference.sent_by_all(X, f, X[1])),
    "gaussian": ({"sigma": 3.0}, lambda X, f, scene, rules: reference.sent_by_all(X, f, 3 * scene.normal())),
    "huge": ({"size": -1e30}, lambda X, f, scene, rules: reference.sent_by_all(X, f, -1e30)),
    "nan": ({}, lambda X, f, scene, rules: reference.sent_by_all(X, f, np.nan)),
    "inf": ({}, lambda X, f, scene, rules: reference.sent_by_all(X, f, np.inf)),
    "zeros": ({}, lambda X, f, scene, rules: reference.sent_by_all(X, f, 0)),
    "stale": ({"every": 3}, lambda X, f, scene, rules: reference.sent_by_all(X, f, scene.due)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_by_their_definitions(name):
    X = data()
    before = X.copy()
    constants, definition = CASES[name]
    vectors = np.random.default_rng(1).normal(size=(2, D))
    scene = SimpleNamespace(
        round=2, due=np.ones(D), normal=lambda: vectors[0].copy(), flipped=lambda: vectors[1].copy(),
        harm=lambda rows: np.linalg.norm(arc_median(rows.columns(), F) - X[~BYZANTINE].mean(0)))
    memory = {"memory": scene.due} if name == "stale" else {}
    found = ATTACKS[name](Rows(X), BYZANTINE, scene, **constants, **memory)
    expected = definition(X[ORDER], F, scene, arc_median)
    np.testing.assert_allclose(np.array([found.combine(w) for w in np.eye(N)[ORDER]]), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(X, before)
    assert found.finite()[BYZANTINE].all() == (name not in ("nan", "inf")) and found.finite()[~BYZANTINE].all()


def test_a_little_is_enough():
    """The documentation of ByzFL has this example."""
    X = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]])
    found = ATTACKS["alie"](Rows(X), np.arange(4) == 3, None).combine(np.eye(4)[3])
    np.testing.assert_allclose(found, [8.5, 9.5, 10.5], rtol=1e-15)


def test_stale_vectors_are_those_of_the_last_round_that_was_due():
    X, memory, sent = data(), np.zeros(D), []
    for k in range(7):
        rows = ATTACKS["stale"](Rows(X * (k + 1)), BYZANTINE, SimpleNamespace(round=k), memory=memory, every=3)
        sent.append(rows.combine(BYZANTINE / F))
    np.testing.assert_allclose(sent, X[~BYZANTINE].mean(0) * np.array([1, 1, 1, 4, 4, 4, 7])[:, None], rtol=1e-13)


def test_the_line_search():
    asked = []

    def harm(factor):
        asked.append(factor)
        return 1e4 - (factor - 37) ** 2
    assert worst(harm) == pytest.approx(30 + 40 * 0.8 ** 5)             # the first that is nearer to 37 than 30
    assert asked[:5] == [0, 10, 30, 70, 30 + 40 * 0.8] and len(asked) == 20
    assert asked[-1] == pytest.approx(30 + 40 * 0.8 ** 5 + 40 * 0.8 ** 16)
    assert worst(lambda factor: factor) == 10 * (2 ** 19 - 1)
    assert worst(lambda factor: 1 + 1e-9 * factor / 1e7) == 0           # rounding is no harm


def test_the_optimised_factor_does_more_harm():
    def distance(name):
        aggregation = robust({"name": name}, ["median"])
        X = data()
        return np.linalg.norm(aggregation(X) - X[:N - F].mean(0))
    assert distance("opt_alie") >= distance("alie") and distance("opt_ipm") >= distance("ipm")
    assert distance("opt_alie") > 1.05 * distance("zeros")


def test_a_search_leaves_no_traces():
    """Neither in what a rule remembers nor in what is counted."""
    def centered_clipping(X, f):
        return np.mean([reference.clip(x, 3.0) for x in reference.arc(X, f)], axis=0)
    aggregation, X = robust({"name": "opt_ipm"}, ["arc", {"name": "centered_clipping", "threshold": 3.0}]), data()
    aggregation.init(SimpleNamespace(x=np.zeros(D)))
    sent = reference.optimised(reference.ipm, X, F, centered_clipping)
    np.testing.assert_allclose(aggregation(X), centered_clipping(sent, F), rtol=1e-12)
    longer = np.linalg.norm(reference.arc(sent, F), axis=1) > 3
    assert aggregation.tally.means()["shortened"] == 2 * F * (N - F) // N + longer.sum()


def test_noise_is_normal_and_new_in_every_round():
    aggregation, sent = robust({"name": "gaussian", "sigma": 4.0}, ["mean"], d=4000), []
    zeros = np.zeros((N, 4000))
    for k in range(2):
        aggregation.begin(k)
        sent.append(aggregation(zeros) * N / F)
    for z in sent:
        assert abs(z.mean()) < 5 * 4 / 4000 ** 0.5 and z.std() == pytest.approx(4, rel=0.1)
    assert abs(np.corrcoef(sent)[0, 1]) < 0.1


# ---- in an aggregation


def robust(attack, rules=ROBUST, f=F, d=D, dtype="float64", **options):
    server = Server(Comm(), d, N, N, Device("cpu"), dtype, means_only=False)
    return Aggregation(server, rules, f, attack, np.arange(N) >= N - F if attack else None, **options)


@pytest.mark.parametrize("name, also, f", [("nan", 0, 2), ("inf", 1, 3), ("huge", 1, 1)])
def test_every_worker_that_is_not_finite_counts_once(name, also, f):
    """`also`: honest workers whose vectors are not finite. What a Byzantine worker would have sent does not count."""
    X = data().astype("float32")
    X[:also], X[N - 1] = np.inf, np.nan
    attack = {"name": name} | ({"size": 1e39} if name == "huge" else {})      # beyond float32
    aggregation = robust(attack, ["arc", "trimmed_mean"], f, dtype="float32")
    if f < also + F:
        with pytest.raises(mpiclip.InputError, match=f"workers 0, 7, 8 are not finite, more than aggregate.f = {f}"):
            aggregation(X)
        return
    zeroed = data()
    zeroed[:also], zeroed[N - F:] = 0, 0
    expected = reference.trimmed_mean(reference.arc(zeroed, f), f)
    np.testing.assert_allclose(aggregation(X), expected, rtol=1e-4, atol=1e-5)
    assert aggregation.tally.means()["replaced"] == also + F


def test_a_mean_tolerates_no_row_that_is_not_finite():
    with pytest.raises(mpiclip.InputError, match="workers 7, 8 are not finite, more than a mean"):
        robust({"name": "nan"}, [])(data())


def test_suspicion_is_the_mean_distance_to_the_aggregate():
    aggregation, expected = robust({"name": "ipm"}, ["arc", "median"], suspect=True), np.zeros(N)
    before = aggregation.tally.means(N)
    assert np.isnan([*before["suspicion"], before["shortened"]]).all()
    for k in range(3):
        X = data(k)
        aggregation.begin(k)
        result = aggregation(X)
        expected += np.linalg.norm(reference.ipm(X, F) - result, axis=1) / 3
    np.testing.assert_allclose(aggregation.tally.means(N)["suspicion"], expected, rtol=1e-9)
    assert aggregation.tally.means()["shortened"] == 2 * F * (N - F) // N
    aggregation = robust({"name": "nan"}, suspect=True)
    aggregation(data())
    assert np.isinf(aggregation.tally.means(N)["suspicion"]).tolist() == [False] * 7 + [True] * 2


def test_harm_is_that_of_what_the_server_keeps():
    """With vectors that the server keeps for all workers, it is these that the rules see."""
    kept, X = data(1, 3.0), data(2)
    before = kept.copy()

    def rules(X, f):
        return arc_median(before + 0.4 * X, f) - before[:N - F].mean(0)    # 0.4 times the honest mean is the ideal

    def scaled(X, f, factor):
        return reference.ipm(X, f, factor)

    def distance(factor):
        return np.linalg.norm(rules(scaled(X, F, factor), F) - 0.4 * X[:N - F].mean(0))
    expected = arc_median(before + 0.4 * scaled(X, F, worst(distance)), F)
    found = robust({"name": "opt_ipm"}, ["arc", "median"])(X, onto=kept, scale=0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "label_flip"])
def test_a_robust_chain_holds_out(name):
    centre = data(3, 0.1)[:N - F]
    run = mpiclip.train({
        "problem": {"name": "quadratic", "curvature": np.ones((N - F, D)).tolist(), "centre": centre.tolist()},
        "method": {"name": "gd", "stepsize": 0.3}, "run": {"workers": N, "rounds": 25, "dtype": "float64"},
        "aggregate": {"rules": ROBUST, "f": F, "attack": {"name": name}}})
    assert np.linalg.norm(run.x - centre.mean(0)) < 0.5 * np.linalg.norm(centre - centre.mean(0), axis=1).mean()


def test_flipped_labels(tmp_path):
    """Softmax regression, written out: the last two workers send the mean gradient of labels C − 1 − c."""
    m, p, classes, honest = 40, 3, 4, 4
    rng = np.random.default_rng(5)
    A, y = rng.normal(size=(m, p)), rng.permutation(np.arange(m) % classes)
    np.savez(tmp_path / "set.npz", X=A, y=y)
    import_file([str(tmp_path / "set.npz")], str(tmp_path / "set.h5"))
    job = {"data": {"file": str(tmp_path / "set.h5"), "split": "contiguous"}, "problem": {"name": "softmax"},
           "method": {"name": "gd", "stepsize": 0.5}, "run": {"workers": 6, "rounds": 4, "dtype": "float64"},
           "aggregate": {"rules": ["median"], "f": 2, "attack": {"name": "label_flip"}}}
    W = np.zeros((classes, p))
    for _ in range(4):
        G = [[], []]
        for rows in np.array_split(np.arange(m), honest):
            for flip in (0, 1):
                scores = np.exp(A[rows] @ W.T)
                slopes = scores / scores.sum(1, keepdims=True)
                slopes[np.arange(len(rows)), classes - 1 - y[rows] if flip else y[rows]] -= 1
                G[flip].append(slopes.T @ A[rows] / len(rows))
        sent = np.array(G[0] + [np.mean(G[1], axis=0)] * 2).reshape(6, -1)
        W = W - 0.5 * reference.median(sent, 2).reshape(W.shape)
    np.testing.assert_allclose(mpiclip.train(job).x, W.ravel(), rtol=1e-10, atol=1e-12)
    with pytest.raises(mpiclip.InputError, match="label_flip: sends a gradient, but workers of 'clip21' send"):
        mpiclip.train(job | {"method": {"name": "clip21", "tau": 1, "stepsize": 0.5}})
    with pytest.raises(mpiclip.InputError, match="label_flip: sends a gradient of the honest workers' rows without"):
        mpiclip.train(job | {"method": {"name": "clip_gd", "tau": 1, "stepsize": 0.5, "sigma": 1, "delta": 1e-5}})


def test_nobody_is_left(tmp_path):
    """More liars than workers are refused before any rows are dealt out to the honest ones."""
    data_file.write(tmp_path / "data.h5", ["made"], (np.eye(6), np.arange(6.0)))
    for f in (4, 9):
        with pytest.raises(mpiclip.InputError, match=f"^aggregate.f: {f} of 4 workers"):
            mpiclip.train({"data": {"file": str(tmp_path / "data.h5")}, "problem": {"name": "softmax"},
                           "method": {"name": "gd", "stepsize": 0.5}, "run": {"workers": 4},
                           "aggregate": {"f": f, "attack": {"name": "zeros"}}})


@pytest.mark.parametrize("attack, f, message", [
    ({"name": "alei"}, 2, "aggregate.attack: there is no 'alei'; did you mean 'alie'?"),
    ({"name": "ipm", "tau": 1}, 2, "aggregate.attack.ipm.tau: there is no 'tau'; known: factor"),
    ({"name": "ipm", "factor": "2"}, 2, "aggregate.attack.ipm.factor = '2'"),
    ({"name": "gaussian", "sigma": -1.0}, 2, "aggregate.attack.gaussian.sigma = -1.0"),
    ({"name": "stale", "every": 0}, 2, "aggregate.attack.stale.every = 0"),
    ({"name": "mimic", "worker": 7}, 2, "aggregate.attack.mimic: worker = 7, with n = 9 workers and f = 2; expected"),
    ({"name": "label_flip"}, 2, "aggregate.attack = label_flip: 'quadratic' has no classes"),
    ({"name": "zeros"}, 0, "aggregate.f = 0: an attack needs at least one Byzantine worker"),
    ({"factor": 2.0}, 2, "expected a name")])
def test_attacks_that_cannot_be(attack, f, message):
    with pytest.raises(mpiclip.InputError) as caught:
        mpiclip.train({"problem": {"name": "quadratic", "curvature": [[1]] * (N - f), "centre": [[1]] * (N - f)},
                       "method": {"name": "gd", "stepsize": 0.3}, "run": {"workers": N, "rounds": 1},
                       "aggregate": {"rules": ["median"], "f": f, "attack": attack}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- rows whose mixtures need care


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_times_what_is_not_finite_is_nothing(dtype):
    X = data().astype(dtype)
    X[3], X[5, 2] = np.nan, -np.inf
    W = np.random.default_rng(0).normal(size=(4, N)) * (np.arange(N) != 3) * (np.arange(N) != 5)
    W[2, 5] = 1e-30
    rows = Rows(X).mix(W)
    assert rows.finite().tolist() == [True, True, False, True]
    clean, zeroed = rows.without(~rows.finite()), np.nan_to_num(X, nan=0, neginf=0)
    W[2] = 0
    np.testing.assert_allclose(clean.columns(), (W @ zeroed).astype(dtype), rtol=1e-5)
    np.testing.assert_allclose(clean.norms(), np.linalg.norm(W @ zeroed, axis=1), rtol=1e-5)
    np.testing.assert_allclose(clean.distances(), ((W @ zeroed)[:, None] - W @ zeroed) ** 2 @ np.ones(D), rtol=1e-5)


def test_a_mixture_can_overflow():
    X = data().astype("float32")
    W = np.eye(N)
    W[0] *= 1e39                    # no float32, though the product is one
    X[0] *= 1e-10
    W[1, 1] = 1e39 / float(np.abs(X[1]).max())
    W[2, 2] = 1e38 / float(np.abs(X[2]).max())
    W[3, 3] = np.nan
    assert Rows(X).mix(W).finite().tolist() == [False, False, True, False] + [True] * 5
    assert Rows(X.astype(float)).mix(W).finite().tolist() == [True, True, True, False] + [True] * 5
    assert not Rows(X.astype(float)).mix(1e200 * W).finite()[0]             # its square is no number


@pytest.mark.parametrize("name", ["zeros", "sign_flip", "huge"])
def test_honest_rows_that_are_nearly_equal_keep_their_distances(name):
    X = data(spread=1e-8)
    rows = ATTACKS[name](Rows(X), BYZANTINE, None)
    exact = ((X[:, None] - X) ** 2).sum(-1)[~BYZANTINE][:, ~BYZANTINE]
    np.testing.assert_allclose(rows.distances()[~BYZANTINE][:, ~BYZANTINE], exact, rtol=1e-7)
