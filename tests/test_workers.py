"""Workers: gradients, minibatches, evaluation; and the constants that a rule gives, from the smoothness of the problem
and from the first gradients."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from mpiclip import constants, methods, problems
from mpiclip.comm import Comm
from mpiclip.compressors import RandK
from mpiclip.data import Csr, Shard
from mpiclip.device import Device
from mpiclip.errors import InputError
from mpiclip.server import Server
from mpiclip.streams import stream
from mpiclip.workers import CHECKPOINT, GO, NOT_FINITE, STOP, Workers

COUNTS = np.array([30, 7, 50, 13])          # rows of each worker
OFFSETS = np.concatenate([[0], np.cumsum(COUNTS)])
P = 5


def rng(seed=0):
    return np.random.default_rng(seed)


A = rng(1).standard_normal((100, P)) * [1, 3, 0.2, 1, 2]
Y = rng(2).choice([-1.0, 1.0], 100)


def party(problem=None, ids=range(4), batch=None, seed=0, dtype="float64", honest=4, tolerant=False, a=A, y=Y,
          n=4, classes=(-1, 1), eval_rows=None):
    """(Workers, Server) that host `ids` of n workers; the last n − honest have no rows. Alone, so of one rank."""
    problem, ids, comm = problem or problems.Linear(), np.array(ids), Comm()
    rows = [np.arange(OFFSETS[i], OFFSETS[i + 1]) if i < honest else np.empty(0, int) for i in ids]
    offsets, chosen = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
    shard = Shard(a[chosen], y[chosen], offsets, ids, honest, len(a), np.array(classes, float), a.shape[1])
    data = problem.prepare(shard, ids, honest, seed, dtype)
    d = len(problem.x0(data, seed, dtype))
    server = Server(comm, d, n, len(ids), Device("cpu"), dtype)
    return Workers(problem, data, offsets, ids, d, dtype, Device("cpu"), comm, server.mine, seed, batch, honest,
                   tolerant, eval_rows), server


def least_squares(x, rows):
    """loss and gradient of linear regression over these rows"""
    difference = A[rows] @ x - Y[rows]
    return (difference**2).mean() / 2, A[rows].T @ difference / len(difference)


X0 = rng(3).standard_normal(P)
GRADIENTS = np.array([least_squares(X0, slice(*OFFSETS[i:i + 2]))[1] for i in range(4)])


# ---- gradients


def test_full_gradients():
    workers, server = party()
    before = X0.copy()
    found = workers.grad(X0)
    np.testing.assert_allclose(found, GRADIENTS, rtol=1e-12)
    assert found is server.mine, "written where the exchange reads them"
    points = rng(4).standard_normal((4, P))
    expected = [least_squares(x, slice(*OFFSETS[i:i + 2]))[1] for i, x in enumerate(points)]
    np.testing.assert_allclose(workers.grad(points), expected, rtol=1e-12)
    np.testing.assert_array_equal(X0, before)


def test_a_gradient_may_be_overwritten():
    """Also the one that an evaluation has left: it is used once, and only for the same x."""
    workers, server = party()
    for _ in range(2):
        workers.grad(X0)[:] = np.nan
        np.testing.assert_allclose(workers.grad(X0), GRADIENTS, rtol=1e-12)
    for round in range(2):
        workers.evaluate(X0, server)
        workers.begin(round)
        workers.grad(X0)[:] = np.nan
        np.testing.assert_allclose(workers.grad(X0), GRADIENTS, rtol=1e-12)
    workers.evaluate(X0, server)
    workers.grad(2 * X0)
    np.testing.assert_allclose(workers.grad(X0), GRADIENTS, rtol=1e-12)


class Counted:
    """Linear regression that counts how often it is asked."""

    def __init__(self):
        self.problem, self.calls = problems.Linear(), 0

    def loss_grad(self, *arguments, **options):
        self.calls += 1
        return self.problem.loss_grad(*arguments, **options)

    def views(self, data):
        return self.problem.views(data)


@pytest.mark.parametrize("batch", [None, 3])
def test_an_evaluation_aside_leaves_a_rounds_gradients_alone(batch):
    """Those that are under way must not change. Of all rows it leaves them where the round looks for them."""
    workers, server = party(batch=batch)
    loss, found = workers.look(X0, aside=True)
    np.testing.assert_allclose(found, GRADIENTS, rtol=1e-12)
    assert loss == workers.evaluate(X0, server)["loss"]
    workers.begin(0)
    sent = workers.grad(X0)
    before = sent.copy()
    assert (sent == found).all() == (batch is None)
    if batch is not None:
        workers.look(2 * X0, aside=True)
    np.testing.assert_array_equal(sent, before)
    sent[:] = np.nan
    assert np.isfinite(found).all()


def test_an_evaluation_spares_the_round_its_gradients_but_not_its_minibatch():
    for batch, calls in ((None, 1), (3, 2)):
        workers, server = party(batch=batch)
        counted = workers.problem = Counted()
        workers.evaluate(X0, server)
        workers.begin(0)
        workers.grad(X0)
        assert counted.calls == calls


class Mirrored(problems.Linear):
    """Linear regression that knows its rows in three versions: times 1, 2 and 3. Notes the rows of its minibatches."""

    drawn: ClassVar[list] = []

    def views(self, data):
        return 3

    def loss_grad(self, x, data, batch=None, **options):
        rows, offsets, denominators = batch
        self.drawn.append(rows)
        return super().loss_grad(x, data, (rows % 100, offsets, denominators), **options)


def test_minibatches_of_rows_in_several_versions():
    workers, _ = party(Mirrored(), batch=200)
    workers.begin(0)
    workers.grad(X0)
    rows, versions = Mirrored.drawn[-1] % 100, Mirrored.drawn[-1] // 100
    for i, own in enumerate(np.split(rows, 4)):
        assert OFFSETS[i] <= own.min() and own.max() < OFFSETS[i + 1]
    assert (np.bincount(versions, minlength=3) > 200).all() and versions.max() == 2
    plain, _ = party(batch=200)             # versions change nothing of which rows are drawn
    np.testing.assert_array_equal(rows, plain._draw()[0])


class Counting(problems.Linear):
    """A problem on sequences: a worker's k-th minibatch is its row k, and it carries the sum of those numbers."""

    def carried(self, data, batch):
        return (1,)

    def follow(self, data, batch, ids, taken_i, carried_i, seed):
        return taken_i, carried_i

    def loss_grad(self, x, data, batch=None, out=None, loss=True, clip=None):
        if batch is not None:
            taken_i, carried_i = batch
            carried_i[taken_i >= 0, 0] += taken_i[taken_i >= 0]
            out[:] = np.nan if taken_i.max() == 5 else taken_i[:, None]
        return np.zeros(4), out


def test_minibatches_that_follow_each_other():
    """Each worker goes on where it was, whoever else took part; a round that fails takes nothing."""
    workers, _ = party(Counting(), batch=1)
    s = SimpleNamespace()
    workers.init(s)
    workers.begin(0)
    assert workers.grad(X0)[:, 0].tolist() == [0, 0, 0, 0]
    assert workers.grad(X0)[:, 0].tolist() == [1, 1, 1, 1]
    rows = np.empty((2, P))
    with workers.only(np.array([1, 3]), 2, rows):
        workers.begin(1)
        assert workers.grad(np.zeros((2, P))) is rows
        assert rows[:, 0].tolist() == [2, 2] and workers.zeros().shape == workers.copies(X0).shape == (2, P)
    for round in range(2, 4):
        workers.begin(round)
        workers.grad(X0)
    assert s.taken_i.tolist() == [4, 5, 4, 5] and s.carried_i[:, 0].tolist() == [6, 10, 6, 10]
    workers.begin(4)
    with pytest.raises(InputError, match="not finite"):
        workers.grad(X0)
    assert s.taken_i.tolist() == [4, 5, 4, 5] and s.carried_i[:, 0].tolist() == [6, 10, 6, 10]


@pytest.mark.parametrize("most", [1, 7, 10, 50])
def test_an_evaluation_of_some_rows(most):
    """Evenly spaced over each worker's, all of those that have fewer; the round's own gradients are of all rows."""
    workers, server = party(eval_rows=most, honest=3)
    expected = []
    for i in range(3):
        have = COUNTS[i]
        rows = [OFFSETS[i] + int(k * have / most) for k in range(most)] if most < have else range(*OFFSETS[i:i + 2])
        expected.append(least_squares(X0, list(rows)))
    metrics = workers.evaluate(X0, server)
    assert metrics["loss"] == pytest.approx(np.mean([loss for loss, _ in expected]), rel=1e-12)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(np.mean([g for _, g in expected], 0)), rel=1e-12)
    workers.begin(0)
    np.testing.assert_allclose(workers.grad(X0)[:3], GRADIENTS[:3], rtol=1e-12)


def test_zeros_and_copies():
    workers, _ = party(ids=[1, 2], dtype="float32")
    for array, shape, dtype in ((workers.zeros(), (2, P), "float32"), (workers.zeros(()), (2,), "float64"),
                                (workers.zeros((3, 4)), (2, 3, 4), "float32")):
        assert array.shape == shape and array.dtype == dtype and not array.any()
    x = X0.astype("float32")
    copies = workers.copies(x)
    assert copies.dtype == "float32" and (copies == x).all() and copies.shape == (2, P)
    copies[0] = 0
    assert (copies[1] == x).all() and x.any(), "not one array twice"


# ---- minibatches


def drawn(seed=0, ids=range(4), round=0, step=0, batch=6, honest=4):
    """The rows of the whole data set that each of these workers draws: {worker: rows}"""
    workers, _ = party(ids=ids, batch=batch, seed=seed, honest=honest)
    workers.begin(round)
    for _ in range(step):
        workers.grad(X0)
    rows, offsets, denominators = workers._draw()
    assert offsets[-1] == len(rows) and len(denominators) == len(offsets) - 1
    result = {}
    for k, i in enumerate(ids):
        own = rows[offsets[k]:offsets[k + 1]]
        assert denominators[k] == (len(own) or 1)
        result[i] = own - workers.offsets[k] + OFFSETS[i]
    return result


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_draw_does_not_depend_on_the_number_of_ranks(ranks):
    whole = drawn(round=3, step=2)
    for ids in np.array_split(np.arange(4), ranks):
        for worker, rows in drawn(ids=ids.tolist(), round=3, step=2).items():
            np.testing.assert_array_equal(rows, whole[worker])


def test_a_draw_is_another_for_another_worker_round_step_and_seed():
    def places(worker=0, **what):       # within the worker's rows
        return tuple(drawn(batch=40, **what)[worker] - OFFSETS[worker])
    draws = [places(seed=seed, round=round, step=step)
             for seed in (0, 1) for round in (0, 1, 2) for step in (0, 1, 2)]
    assert len(set(draws)) == len(draws)
    assert places() == places()
    twins = np.array([0, 50, 50, 100, 100])                 # two workers with equally many rows
    workers, _ = party(batch=40)
    workers.offsets = twins
    rows, offsets, _ = workers._draw()
    assert (offsets == [0, 40, 40, 80, 80]).all()
    assert not np.array_equal(rows[:40], rows[40:] - 50)


def test_a_worker_draws_from_its_own_rows_and_reaches_all():
    seen = {i: set() for i in range(4)}
    for round in range(60):
        for worker, rows in drawn(round=round, batch=8).items():
            assert len(rows) == 8
            seen[worker] |= set(rows.tolist())
    assert seen == {i: set(range(OFFSETS[i], OFFSETS[i + 1])) for i in range(4)}


def test_the_mean_of_many_minibatches_is_the_gradient():
    """3000 draws of 4 rows: within five standard errors in every coordinate; and one has its own rows' mean."""
    workers, _ = party(batch=4)
    samples = []
    for round in range(3000):
        workers.begin(round)
        samples.append(workers.grad(X0).copy())
        if round == 7:
            expected = [least_squares(X0, rows)[1] for rows in drawn(round=7, batch=4).values()]
            np.testing.assert_allclose(samples[-1], expected, rtol=1e-12)
    error = np.std(samples, axis=0) / np.sqrt(len(samples))
    assert (np.abs(np.mean(samples, axis=0) - GRADIENTS) < 5 * error).all()


def test_workers_without_rows_draw_none():
    assert [len(rows) for rows in drawn(honest=3).values()] == [6, 6, 6, 0]
    workers, _ = party(batch=6, honest=3)
    assert not workers.grad(X0)[3].any() and workers._g_i[:3].any()
    nobody, _ = party(ids=[3], batch=6, honest=3)
    assert not nobody.grad(X0).any()


# ---- messages


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_message_is_drawn_for_its_worker_round_and_call(ranks):
    C, u = RandK(k=30), np.ones((4, 60))
    found = {}
    for ids in np.array_split(np.arange(4), ranks):
        workers, _ = party(ids=ids.tolist(), seed=3)
        for round in (0, 1):
            workers.begin(round)
            for call in (0, 1):
                message = workers.compress(u[ids], C)
                assert np.array_equal(message.workers, workers.ids) and message.rows.shape == (len(ids), 30 * 8)
                for i, kept in zip(ids, message.indices, strict=True):
                    expected = stream(3, "compress", int(i), round, call).choice(60, 30, replace=False, shuffle=False)
                    np.testing.assert_array_equal(kept, expected)
                    found[int(i), round, call] = tuple(kept.tolist())
    assert len(set(found.values())) == len(found) == 16


# ---- evaluation


@pytest.mark.parametrize("honest", [4, 3])
@pytest.mark.parametrize("batch", [None, 5])
def test_an_evaluation_is_the_mean_over_the_honest_workers_and_all_their_rows(honest, batch):
    workers, server = party(honest=honest, batch=batch)
    losses, gradients = zip(*(least_squares(X0, slice(*OFFSETS[i:i + 2])) for i in range(honest)), strict=True)
    found = workers.evaluate(X0, server)
    assert found == {"loss": pytest.approx(np.mean(losses), rel=1e-12),
                     "grad_norm": pytest.approx(np.linalg.norm(np.mean(gradients, 0)), rel=1e-12)}
    np.testing.assert_allclose(workers.first_norms(X0), np.linalg.norm(gradients, axis=1), rtol=1e-12)


# ---- what is not finite, and agreements


def test_a_gradient_that_is_not_finite_stops_the_round_before_anything_has_changed():
    workers, _ = party()
    bad = workers.copies(X0)
    bad[2] = np.nan
    workers.begin(5)
    with pytest.raises(InputError, match=r"^round 5: the gradient of worker 2 is not finite \(its loss is nan\)") as e:
        workers.grad(bad)
    assert e.value.agreed and workers.agreed == NOT_FINITE
    steps = {"eta": 0.1, "gamma": 0.1, "interval": 3}
    step, sparse = {"stepsize": 0.1}, {"compressor": {"name": "top_k", "k": 2}}
    constants_of = {"gd": step, "sgd": step, "clip21_avg": {"tau": 1.0}, "clip21": step | {"tau": 1.0},
                    "clip21_sgd2m": step | {"tau": 1.0, "beta": 0.5, "beta_server": 0.5},
                    "clip_gd": step | {"tau": 1.0, "beta": 0.5}, "alpha_normec": step | {"alpha": 1.0, "beta": 1.0},
                    "press_clip21": step | sparse | {"tau": 1.0}, "ef21": step | sparse, "dcgd": step | sparse,
                    "byz_clip21_sgd2m": step | {"tau": 1.0, "beta": 0.5, "beta_server": 0.5},
                    "safe_dshb": step | {"tau": 1.0, "beta": 0.5}, "robust_dshb": step | {"beta": 0.5},
                    "celgc": steps | {"momentum": 0.5}, "episode": steps, "episode_pp": steps,
                    "naive_parallel": {"eta": 0.1, "gamma": 0.1, "momentum": 0.5}}
    for name in methods.names():
        workers, _ = party(tolerant=False)
        method = methods.load(name)(**constants_of[name])
        s = type("State", (), {})()
        s.x = np.full(P, np.nan)
        method.init(s, workers)
        if name == "clip21_avg":                # whose points are v_i
            s.v_i[1] = np.nan
        before = {key: value.copy() for key, value in vars(s).items() if key not in ("clipped_i", "norm_i")}
        workers.begin(0)
        with pytest.raises(InputError, match="not finite"):
            method.round(s.x, s, workers, SimpleNamespace(norm=np.linalg.norm, join=np.copy))
        for key, value in before.items():
            np.testing.assert_array_equal(getattr(s, key), value)


def test_a_later_step_that_is_not_finite_is_told_before_anything_is_aggregated():
    workers, _ = party()
    workers.begin(0)
    workers.grad(X0)
    workers.confirm()
    workers.grad(np.full(P, np.nan))
    workers.grad(X0)
    with pytest.raises(InputError, match="^round 0: a local step gave gradients that are not finite"):
        workers.confirm()
    workers.begin(1)
    workers.grad(X0)
    workers.grad(X0)
    workers.confirm()


def test_tolerant_rules_get_what_is_not_finite():
    workers, _ = party(tolerant=True)
    points = workers.copies(X0)
    points[1] = np.nan
    assert np.isnan(workers.grad(points)[1]).all() and workers.agreed == GO
    workers.grad(points)
    workers.begin(1)
    workers.grad(points)


def test_a_wish_is_agreed_on_in_the_first_gradient_of_a_round():
    workers, _ = party()
    for wish in (CHECKPOINT, STOP, GO):
        workers.begin(0)
        workers.wish = wish
        workers.grad(X0)
        assert workers.agreed == wish
        workers.wish = STOP
        workers.grad(X0)
        assert workers.agreed == wish, "later steps agree on nothing"
    assert GO < CHECKPOINT < STOP < NOT_FINITE, "the highest counts"


# ---- random streams


def test_a_stream_is_a_function_of_its_arguments():
    keys = [(0, "a"), (1, "a"), (0, "b"), (2**64 - 1, "a"), (0, "a", 1), (0, "a", 0, 1), (0, "a", 0, 0, 1),
            (0, "a", 10**6, 10**9, 7)]
    draws = [tuple(stream(*key).integers(0, 2**63, 50)) for key in keys]
    assert len(set(draws)) == len(keys) and len({v for draw in draws for v in draw}) == 50 * len(keys)
    assert draws == [tuple(stream(*key).integers(0, 2**63, 50)) for key in keys]
    long, other = (set(stream(0, "a", 0, 0, step).integers(0, 2**63, 100_000).tolist()) for step in (0, 1))
    assert not long & other, "a long draw does not run into the next step's"


# ---- constants


def curvature_of(problem, a, C):
    """The bound of the Hessian of one worker's loss that its problem promises, (d, d), dense."""
    gram = a.T @ a / len(a)
    if problem.name == "softmax":
        gram = np.kron((np.eye(C) - np.ones((C, C)) / C) / 2, gram)
    elif problem.name == "logistic":
        gram = gram / 4
    penalty = {"none": 0, "l2": problem.lam, "nonconvex": 2 * problem.lam}[problem.regularizer]
    return gram + penalty * np.eye(len(gram))


@pytest.mark.parametrize("regularizer", ["none", "l2", "nonconvex"])
@pytest.mark.parametrize("name", ["linear", "logistic", "softmax"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("honest", [4, 3])
def test_smoothness_is_the_largest_eigenvalue(name, regularizer, dtype, sparse, honest):
    """Of the mean of the workers' bounds, and of the worst worker's: at most 1 % above, never below."""
    problem = problems.load(name)(regularizer=regularizer, lam=0.3)
    y = rng(5).integers(0, 3, 100).astype(float) if name == "softmax" else Y
    classes = (0, 1, 2) if name == "softmax" else (-1, 1)
    workers, server = party(problem, y=y, dtype=dtype, honest=honest, classes=classes)
    if sparse:
        m = OFFSETS[honest]
        x = Csr(np.arange(0, m * P + 1, P), np.tile(np.arange(P, dtype=np.int32), m), A[:m].ravel(), (m, P))
        shard = Shard(x, y[:m], workers.offsets, workers.ids, honest, m, np.array(classes, float), P)
        workers.data = problem.prepare(shard, workers.ids, honest, 0, dtype)
    H_i = [curvature_of(problem, A[OFFSETS[i]:OFFSETS[i + 1]], 3) for i in range(honest)]
    exact, worst = (np.linalg.eigvalsh(np.mean(H_i, 0))[-1], max(np.linalg.eigvalsh(H)[-1] for H in H_i))
    L, L_max = constants.smoothness(workers, server)
    rounding = 1e-6 if dtype == "float32" else 1e-12
    assert exact * (1 - rounding) <= L <= 1.01 * exact
    assert worst * (1 - rounding) <= L_max <= 1.01 * worst
    method = constants.resolve(methods.load("gd")(stepsize="1/L"), X0, workers, server)
    assert method.stepsize == 1 / L


def quadratic(curvature, seed=0, dtype="float64"):
    """(Workers, Server) of f_i = ½ xᵀ diag(curvature_i) x, curvature (n, d)"""
    n, d = np.shape(curvature)
    problem = problems.Quadratic(curvature=np.asarray(curvature).tolist(), centre=np.zeros((n, d)).tolist())
    data = problem.prepare(None, np.arange(n), n, seed, dtype)
    server = Server(Comm(), d, n, n, Device("cpu"), dtype)
    return Workers(problem, data, None, np.arange(n), d, dtype, Device("cpu"), Comm(), server.mine, seed, None, n,
                   False), server


@pytest.mark.parametrize("seed", range(5))
def test_smoothness_of_quadratics(seed):
    generator = rng(seed)
    for curvature in (generator.uniform(0, 1, (3, 8)), np.ones((2, 5)), [[0, 0, 2.0], [1, 1, 0]], [[4.0]],
                      np.tile(np.geomspace(1e-3, 1, 30), (4, 1)), [[1, 0.99999, 0.9]], [[0, 0], [0, 3.0]]):
        L, L_max = constants.smoothness(*quadratic(curvature, seed))
        exact, worst = np.mean(curvature, 0).max(), np.max(curvature)
        assert exact * (1 - 1e-3) <= L <= 1.01 * exact
        assert worst * (1 - 1e-3) <= L_max <= 1.01 * worst


@pytest.mark.parametrize("d, rest", [(10_000, 0.9), (100_000, 0.5)])
def test_smoothness_sees_one_steep_direction_among_many(d, rest):
    """From a random start its weight is 1/d: the first residual is small long before the eigenvalue is found."""
    curvature = np.full((1, d), rest)
    curvature[0, 3] = 1
    for seed in range(3):
        L, L_max = constants.smoothness(*quadratic(curvature, seed))
        assert L > 0.999 and L_max > 0.999


def test_no_step_size_without_curvature():
    with pytest.raises(InputError, match=r"method\.stepsize: the smoothness of the problem is 0"):
        constants.smoothness(*quadratic(np.zeros((2, 3))))


@pytest.mark.parametrize("q", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("honest", [4, 3])
def test_a_threshold_by_quantile(q, honest):
    workers, server = party(honest=honest)
    method = methods.load("clip21")(tau={"quantile": q}, stepsize=0.1)
    found = constants.resolve(method, X0, workers, server)
    assert found.tau == pytest.approx(np.quantile(np.linalg.norm(GRADIENTS[:honest], axis=1), q), rel=1e-12)
    assert found.stepsize == 0.1 and type(found) is type(method)
    assert method.tau.quantile == q, "the method in the config is as it was"


@pytest.mark.parametrize("tau", [0.3, 2.0, 1e9])
def test_the_step_size_of_theory(tau):
    """γ = min{1/L, τ/(2 L_max V)}, V = √(2 L f(x⁰) + D² + 2D³/(3τ)) + D, D = max(0, B − τ)"""
    workers, server = party(honest=3)
    L, L_max = constants.smoothness(workers, server)
    B = np.linalg.norm(GRADIENTS[:3], axis=1).max()
    f = np.mean([least_squares(X0, slice(*OFFSETS[i:i + 2]))[0] for i in range(3)])
    D = max(0, B - tau)
    V = np.sqrt(2 * L * f + D**2 + 2 * D**3 / (3 * tau)) + D
    method = constants.resolve(methods.load("clip21")(tau=tau, stepsize="theory"), X0, workers, server)
    assert method.stepsize == pytest.approx(min(1 / L, tau / (2 * L_max * V)), rel=1e-9)


def test_the_step_size_of_theory_needs_a_threshold():
    workers, server = party()
    with pytest.raises(InputError, match=r"method\.tau = 0"):
        constants.resolve(methods.load("clip21")(tau=0.0, stepsize="theory"), X0, workers, server)
