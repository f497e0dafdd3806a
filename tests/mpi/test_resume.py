"""A run that was interrupted ends with the same bytes as one that was not: every method, wherever the server's columns
are, also where some ranks serve none."""

import numpy as np
import pytest
from test_methods import CASES, config

import mpiclip
from mpiclip.comm import Comm

K, STOP = 12, 7


@pytest.fixture
def folder(ranks, tmp_path_factory):
    """One new folder, the same on all ranks."""
    return ranks.same(tmp_path_factory.mktemp("run") if ranks.rank == 0 else None)


@pytest.mark.parametrize("at, small", [("sharded", 64 * 1024), ("sharded", 0), ("rank0", 0)])
@pytest.mark.parametrize("name", CASES)
def test_resume(ranks, folder, name, at, small, monkeypatch):
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    job = config(name, CASES[name][0], K) | {"aggregate": {"at": at}}
    whole = mpiclip.train(job, ranks)
    mpiclip.train({**job, "run": {**job["run"], "rounds": STOP}}, ranks, folder)
    resumed = mpiclip.resume(folder, [f"run.rounds={K}"], ranks)
    assert resumed.x.tobytes() == whole.x.tobytes()
    for metric in ("round", "loss", "grad_norm"):
        np.testing.assert_array_equal(resumed.metrics[metric], whole.metrics[metric])


@pytest.mark.parametrize("at", ["sharded", "rank0"])
def test_rows_that_the_server_keeps_on_any_number_of_ranks(ranks, folder, at):
    """Byz-Clip21-SGD2M under attack, begun on all ranks and ended by one, and the other way round: the same bytes."""
    name, f = "byz_clip21_sgd2m", 1
    job = config(name, CASES[name][0], K)
    job |= {"aggregate": {"rules": ["trimmed_mean"], "f": f, "at": at, "attack": {"name": "sign_flip"}},
            "run": {**job["run"], "workers": job["run"]["workers"] + f}}
    begun = {**job, "run": {**job["run"], "rounds": STOP}}
    whole = mpiclip.train(job, ranks).x
    mpiclip.train(begun, ranks, folder / "together")
    if ranks.rank == 0:
        mpiclip.train(begun, Comm(), folder / "alone")
        alone = mpiclip.resume(folder / "together", [f"run.rounds={K}"], Comm()).x
        assert alone.tobytes() == whole.tobytes()
    ranks.barrier()
    assert mpiclip.resume(folder / "alone", [f"run.rounds={K}"], ranks).x.tobytes() == whole.tobytes()


def test_fewer_coordinates_than_ranks(ranks, folder, monkeypatch):
    monkeypatch.setattr("mpiclip.server.SMALL", 0)
    job = {"problem": {"name": "quadratic", "curvature": [[1.0]] * 4, "centre": [[1.0], [2.0], [3.0], [6.0]]},
           "method": {"name": "clip21", "tau": 1, "stepsize": 0.5}, "run": {"workers": 4, "rounds": 30}}
    mpiclip.train(job, ranks, folder)
    assert mpiclip.resume(folder, ["run.rounds=60"], ranks).x == pytest.approx([3.0], abs=1e-5)
