"""An attack on the code that runs: who knows everything but one worker's data, or one row, and chooses all models, must
not tell two neighbours apart better than the claimed ε allows; and must, once the noise is half of what was claimed.

Every worker is one trial. Half of them hold one data set, half its worst neighbour: gradients far beyond every
threshold, in opposite directions. The attacker asks whether the likelihood ratio of all that a worker has sent is above
a threshold. If the runs are (ε, δ)-private, P(yes | D) ≤ e^ε P(yes | D') + δ, so that ln((P − δ)/P') bounds ε from
below; Clopper and Pearson's bounds (1934) for P and P', which fail with a probability of 1e-7 each, take the place of
the two. With the claimed σ the bound comes out at 0.4 to 0.6 ε, with half of it at about 1.7 ε.
Jagielski, Ullman, Oprea (2020), "Auditing differentially private machine learning", arXiv:2006.07709."""

from dataclasses import replace
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import beta

from mpiclip import methods, privacy, problems
from mpiclip.comm import Comm
from mpiclip.compressors import Message
from mpiclip.data import Shard
from mpiclip.device import Device
from mpiclip.problems.quadratic import Curves
from mpiclip.workers import Examples, Workers

TRIALS = 20_000             # of each of the two neighbours
DELTA, EPSILON = 0.01, 1.5
HUGE = 1e6
E1 = np.array([1.0, 0.0])   # the direction of the attack


def lower_bound(loss: np.ndarray) -> float:
    """The ε, at least, of runs whose log-likelihood ratios are these: first those of D, then as many of D'."""
    def bound(yes, yes_for_neighbour):
        n, k, other = len(yes), yes.sum(), yes_for_neighbour.sum()
        p, p_neighbour = beta.ppf(1e-7, k, n - k + 1) if k else 0.0, beta.isf(1e-7, other + 1, n - other)
        return log((p - DELTA) / p_neighbour) if p > DELTA else 0.0
    d, neighbour = np.split(loss, 2)
    return max(max(bound(d > t, neighbour > t), bound(neighbour < -t, d < -t))
               for t in (EPSILON, 1.5 * EPSILON, 2 * EPSILON))


def judge(loss: np.ndarray, halved: bool) -> None:
    found = lower_bound(loss)
    if halved:
        assert found > 1.2 * EPSILON
    else:
        assert 0.3 * EPSILON < found <= EPSILON


def table(**keys):
    return SimpleNamespace(**{"level": "worker", "clip": None, "adjacency": "replace", "against": "server",
                              "accountant": "pld"} | keys)


def party(problem, data, offsets, w, batch=None):
    workers = Workers(problem, data, offsets, np.arange(w), 2, "float64", Device("cpu"), Comm(), np.empty((w, 2)), 0,
                      batch, w, tolerant=False)
    workers.secret = b"an audit must come out the same"
    return workers


def messages(method, signs, rounds):
    """What `method` makes workers send, (rounds, workers, 2), whose gradients are ±HUGE in the direction E1. The sign 0
    stands for a worker without data: its gradients are 0."""
    w = len(signs)
    curves = Curves(np.abs(signs)[:, None] * np.ones(2), -HUGE * signs[:, None] * E1, np.ones(w, bool))
    workers = party(problems.load("quadratic")(dimension=2), curves, None, w)
    s, sent = SimpleNamespace(x=np.zeros(2)), []
    def aggregate(u_i, **kept):
        sent.append(np.zeros((w, 2)) if isinstance(u_i, Message) else u_i.copy())
        if isinstance(u_i, Message):
            u_i.add_to(sent[-1])
        return np.array([3.0, -5.0])                        # the attacker's server answers what it likes
    aggregate.norm = np.linalg.norm
    method.init(s, workers)
    for k in range(rounds):
        workers.begin(k)
        method.round(s.x.copy(), s, workers, aggregate)
    return np.array(sent)


METHODS = {"clip_gd": {"tau": 0.3, "stepsize": 0.1}, "clip21": {"tau": 0.3, "stepsize": 0.1},
           "clip21 noisy_state": {"tau": 0.3, "stepsize": 0.1, "noisy_state": True},
           "clip21_sgd2m": {"tau": 0.3, "stepsize": 0.1, "beta": 0.5, "beta_server": 0.7},
           "byz_clip21_sgd2m": {"tau": 0.3, "stepsize": 0.1, "beta": 0.5, "beta_server": 0.7},
           "safe_dshb": {"tau": 0.3, "stepsize": 0.1, "beta": 0.4},
           "press_clip21": {"tau": 0.3, "stepsize": 0.1, "compressor": {"name": "top_k", "k": 2}},
           "alpha_normec": {"alpha": 0.1, "beta": 0.3, "stepsize": 0.1}}


@pytest.mark.parametrize("halved", [False, True], ids=["claimed", "halved"])
@pytest.mark.parametrize("name, adjacency", [*((name, "replace") for name in METHODS), ("clip21", "add_remove"),
                                             ("clip_gd", "add_remove")])
def test_messages_tell_as_much_as_claimed_and_no_more(name, adjacency, halved):
    rounds = 4
    method = methods.load(name.split()[0])(**METHODS[name], epsilon=EPSILON, delta=DELTA)
    mechanism = privacy.mechanism_of(method, table(adjacency=adjacency), 2 * TRIALS, [], "full")
    sigma = privacy.sigma_for(EPSILON, rounds, mechanism) / (2 if halved else 1)
    signs = np.repeat([1.0, -1.0 if adjacency == "replace" else 0.0], TRIALS)
    sent = messages(method.model_copy(update={"sigma": sigma}), signs, rounds) @ E1
    if name == "safe_dshb":         # a momentum: the attacker sees what has gone into it
        sent = (sent - 0.6 * np.concatenate([np.zeros((1, len(signs))), sent[:-1]])) / 0.4
    centre = 0.0 if adjacency == "replace" else method.bound() / 2
    loss = (mechanism.sensitivity / sigma**2 * (sent - centre)).sum(0)      # ln p/q of N(+bound) and its neighbour
    judge(loss, halved)


@pytest.mark.parametrize("halved", [False, True], ids=["claimed", "halved"])
def test_models_tell_as_much_as_claimed_and_no_more(halved):
    """n = 4 workers, one of them attacked; all that is seen is the mean of their messages, in every round."""
    rounds, n = 4, 4
    method = methods.load("clip21")(tau=0.3, stepsize=0.1, epsilon=EPSILON, delta=DELTA)
    mechanism = privacy.mechanism_of(method, table(against="model"), n, [], "full")
    sigma = privacy.sigma_for(EPSILON, rounds, mechanism) / (2 if halved else 1)
    assert sigma < 0.6 * privacy.sigma_for(EPSILON, rounds, replace(mechanism, against="server"))
    trials = TRIALS // 2
    signs = np.ones((2 * trials, n))
    signs[trials:, 0] = -1
    sent = messages(method.model_copy(update={"sigma": sigma}), signs.ravel(), rounds) @ E1
    seen = sent.reshape(rounds, 2 * trials, n).mean(2) - 0.3 * (n - 1) / n             # the others' data are known
    loss = (2 * 0.3 / n / (sigma**2 / n) * seen).sum(0)
    judge(loss, halved)


@pytest.mark.parametrize("halved", [False, True], ids=["claimed", "halved"])
@pytest.mark.parametrize("adjacency, batch", [("replace", 1), ("add_remove", 1), ("replace", "full")])
def test_gradients_of_sampled_rows_tell_as_much_as_claimed_and_no_more(adjacency, batch, halved):
    """Each worker has one row whose gradient is huge, and one that tells nothing. A row that is not there is one whose
    gradient is 0: the sum is the same."""
    rounds, trials, clip, m = 2, TRIALS // 2, 2.0, 2
    method = methods.load("gd")(stepsize=0.1, epsilon=EPSILON, delta=DELTA)
    mechanism = privacy.mechanism_of(method, table(level="example", clip=clip, adjacency=adjacency), 2 * trials,
                                     [m] * 2 * trials, batch)
    sigma = privacy.sigma_for(EPSILON, rounds, mechanism) / (2 if halved else 1)
    other = -1.0 if adjacency == "replace" else 0.0
    y = np.zeros((2 * trials, m))
    y[:, 0] = -HUGE * np.repeat([1.0, other], trials)       # at x = 0 row (a, y) of least squares has the gradient −y a
    ids, offsets = np.arange(2 * trials), m * np.arange(2 * trials + 1)
    problem = problems.load("linear")()
    shard = Shard(np.tile(E1, (y.size, 1)), y.ravel(), offsets, ids, len(ids), y.size, None, 2)
    workers = party(problem, problem.prepare(shard, ids, len(ids), 0, "float64"), offsets, len(ids),
                    None if batch == "full" else batch)
    workers.examples = Examples(clip, sigma)
    seen = []
    for k in range(rounds):
        workers.begin(k)
        seen.append(workers.grad(np.zeros(2)) @ E1)
    seen, rate, step = np.array(seen), mechanism.rate, mechanism.bound
    assert (rate, step) == ((0.5, 2.0) if batch == 1 else (1.0, 1.0))

    def log_density(shift):
        used = np.log(rate) - (seen - shift)**2 / (2 * sigma**2)
        return np.logaddexp(used, np.log1p(-rate) - seen**2 / (2 * sigma**2)) if rate < 1 else used

    judge((log_density(step) - log_density(other * step)).sum(0), halved)


def test_the_attack_would_find_a_missing_bound():
    """A method that sends more than it declares is caught by the same attack."""
    rounds = 4
    method = methods.load("clip_gd")(tau=0.3, stepsize=0.1, epsilon=EPSILON, delta=DELTA)
    mechanism = privacy.mechanism_of(method, table(), 2 * TRIALS, [], "full")
    sigma = privacy.sigma_for(EPSILON, rounds, mechanism)
    sent = messages(method.model_copy(update={"sigma": sigma, "tau": 0.6}), np.repeat([1.0, -1.0], TRIALS), rounds) @ E1
    loss = (mechanism.sensitivity / sigma**2 * sent).sum(0)
    assert lower_bound(loss) > 1.2 * EPSILON
