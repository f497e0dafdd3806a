"""What a rehearsal says that a round will ask of MPI is what it asks, between hosts; and the network is measured."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpiclip import config, server
from mpiclip import plan as planning
from mpiclip.comm import Comm
from mpiclip.plan import EAGER, Call, plan
from mpiclip.training import Training

WORKERS, D = 4, 50
random = np.random.default_rng(3)
PROBLEM = {"name": "quadratic", "curvature": random.uniform(1, 2, (WORKERS, D)).tolist(),
           "centre": random.normal(0, 1, (WORKERS, D)).tolist()}
CASES = {
    "local steps": {"method": {"name": "celgc", "eta": 0.1, "gamma": 0.1, "interval": 2}},
    "a norm": {"method": {"name": "naive_parallel", "eta": 0.1, "gamma": 0.1}},
    "rules": {"method": {"name": "gd", "stepsize": 0.1}, "aggregate": {"rules": ["arc", "trimmed_mean"], "f": 1}},
    "rank 0": {"method": {"name": "gd", "stepsize": 0.1}, "aggregate": {"at": "rank0"}},
    "messages": {"method": {"name": "press_clip21", "tau": 1.0, "stepsize": 0.1,
                            "compressor": {"name": "top_k", "k": 0.2}}},
}


class Spy:
    """An mpi4py communicator that notes the collective calls."""

    def __init__(self, mpi):
        self.mpi, self.calls = mpi, []

    def __getattr__(self, name):
        value = getattr(self.mpi, name)
        if name not in ("Allreduce", "Ialltoallv", "Ialltoallw", "Iallgatherv", "Ibcast"):
            return value

        def call(*buffers):
            arrays = [spec[0] if isinstance(spec, list | tuple) else spec for spec in buffers]
            self.calls.append(Call(name, max(a.nbytes for a in arrays if isinstance(a, np.ndarray))))
            return value(*buffers)
        return call


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """What is timed does not matter here."""
    monkeypatch.setattr(planning, "WARM_UP", 0)
    monkeypatch.setattr(planning, "TURNS", 1)
    monkeypatch.setattr(planning, "PROBE", 2**16)


@pytest.mark.parametrize("case", CASES)
def test_a_round_asks_for_what_was_rehearsed(ranks, monkeypatch, case):
    if ranks.size == 1:
        pytest.skip("one rank sends nothing")
    monkeypatch.setattr(server, "SMALL", 0)             # exchange columns, short as they are
    job = CASES[case] | {"problem": PROBLEM, "run": {"workers": WORKERS}}
    planned = plan(job, 0.0, 1e9, ranks.size, here=ranks)["calls"]
    apart = Comm(Spy(ranks.mpi))
    apart.hosts, apart._notes = ranks.size, None        # as if each rank had a host of its own
    training = Training(config.load(job), apart, None)
    x = training._whole_x()
    apart.mpi.calls.clear()
    training.workers.begin(0)
    training.aggregate.begin(0)
    training._round(x)
    training._whole_x()
    if ranks.rank == 0:                                 # which hosts most workers
        assert [Call(o["what"], o["bytes"]) for o in planned if o["what"] != "bcast"] == apart.mpi.calls


def test_the_network_between_the_ranks_is_measured(ranks):
    if ranks.size == 1:
        pytest.skip("one rank has no network")
    job = {"problem": PROBLEM, "method": {"name": "celgc", "eta": 0.1, "gamma": 0.1}, "run": {"workers": WORKERS}}
    found = SimpleNamespace(**plan(job, here=ranks))
    assert found.measured == ["latency", "bandwidth"] and found.ranks == ranks.size
    assert 0 < found.latency < 1 and 1e6 < found.bandwidth < 1e13
    assert len(set(ranks.all(repr(vars(found))))) == 1
    assert 4 * D <= EAGER and found.calls[-1]["what"] == "Allreduce"
