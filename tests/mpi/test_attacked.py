"""Attacks on any number of ranks, wherever the columns are: against plain loops, and resumed."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_exchange import data, hosted, server
from test_resume import folder  # noqa: F401

import mpiclip
import reference
from mpiclip.aggregation import Aggregation, Scene
from mpiclip.attacks import ATTACKS
from mpiclip.comm import Comm
from test_attacks import CASES

N, F, D = 9, 2, 101
CHAINS = {      # ARC last: rows that it has made equally long are equally far from zeros
    "median": reference.median,
    "nnm arc trimmed_mean": lambda X, f: reference.trimmed_mean(reference.arc(reference.nnm(X, f), f), f),
}


def attacked(ranks, attack, rules, X, at="sharded", **options):
    """An aggregation under this attack, in its first round."""
    aggregation = Aggregation(server(ranks, X, at), rules.split(), F, attack, np.arange(N) >= N - F, **options)
    aggregation.init(SimpleNamespace(x=np.zeros(aggregation.server.own.stop - aggregation.server.own.start)))
    aggregation.begin(0)
    return aggregation


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(ranks, name):
    X = data(N, D, "float64") * np.arange(1, N + 1)[:, None] + 3
    flipped = data(N, D + 1, "float64")[:, 1:]
    flipped[N - F:] = 0                                                     # they have no data
    constants, definition = CASES[name]
    alone = attacked(Comm(), {"name": "gaussian"}, "median", X)
    for at, rules in zip(("sharded", "rank0"), CHAINS, strict=True):
        aggregation = attacked(ranks, {"name": name} | constants, rules, X, at, suspect=True,
                               flipped=lambda: hosted(ranks, flipped))
        for k in range(2 if name in ("stale", "gaussian") else 1):
            aggregation.begin(k)
            alone.begin(k)
            scene = SimpleNamespace(due=X[:N - F].mean(0), normal=Scene(alone).normal,
                                    flipped=lambda: flipped[:N - F].mean(0))
            sent = np.nan_to_num(definition(X * (k + 1), F, scene, CHAINS[rules]), nan=0, posinf=0)
            expected = CHAINS[rules](sent, F)
            found = aggregation.server.join(aggregation(hosted(ranks, X * (k + 1))))
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
        replaced = np.isin(np.arange(N), [N - 2, N - 1] if name in ("nan", "inf") else [])
        suspicion = aggregation.tally.means(N)["suspicion"]
        assert (np.isinf(suspicion) == replaced).all() and aggregation.tally.means()["replaced"] == replaced.sum()
        assert len(set(map(str, ranks.all(suspicion.tolist())))) == 1


def test_noise_does_not_depend_on_the_ranks(ranks):
    X = data(N, D, "float32")
    found, alone = (Scene(attacked(comm, {"name": "gaussian"}, "median", X)) for comm in (ranks, Comm()))
    own = server(ranks, X).own
    assert found.normal().tobytes() == alone.normal()[own].tobytes()


@pytest.mark.parametrize("attack, rules, at, stop", [
    ("stale", ["arc", "centered_clipping"], "sharded", 7), ("gaussian", ["bucketing", "nnm"], "rank0", 8)])
def test_what_is_remembered_is_checkpointed(ranks, folder, attack, rules, at, stop):  # noqa: F811
    """The attack's memory, the rules', and what was counted since the last line of metrics."""
    centre = np.random.default_rng(2).normal(size=(N - F, 5)).tolist()
    job = {"problem": {"name": "quadratic", "curvature": np.ones((N - F, 5)).tolist(), "centre": centre},
           "method": {"name": "gd", "stepsize": 0.3}, "run": {"workers": N, "rounds": 12, "eval_every": 4},
           "aggregate": {"rules": rules, "f": F, "at": at, "suspect": True, "attack": {"name": attack}}}
    whole = mpiclip.train(job, ranks)
    mpiclip.train({**job, "run": {**job["run"], "rounds": stop}}, ranks, folder)
    resumed = mpiclip.resume(folder, ["run.rounds=12"], ranks)
    assert resumed.x.tobytes() == whole.x.tobytes()
    for metric in ("round", "loss", "shortened", "left_out", "replaced", "suspicion"):
        np.testing.assert_array_equal(resumed.metrics[metric], whole.metrics[metric], err_msg=metric)
