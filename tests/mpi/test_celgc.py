"""EPISODE and EPISODE++ of which some workers take part, what CELGC sends, and what its second exchange is of."""

import numpy as np
import pytest

import mpiclip
import reference
from mpiclip import config as configs
from mpiclip.comm import Comm
from mpiclip.streams import stream
from mpiclip.training import Training

N, S, D, K, SEED = 7, 3, 5, 8, 4
rng = np.random.default_rng(5)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
GRADS = [lambda x, a=a, c=c: a * (x - c) for a, c in zip(CURVATURE, CENTRE, strict=True)]
X0 = np.full(D, 0.25)
PARTS = [np.sort(stream(SEED, "participation", round=k).permutation(N)[:S]) for k in range(K)]


def config(name, rounds=K, participation=S, **constants):
    return {"problem": {"name": "quadratic", "curvature": CURVATURE.tolist(), "centre": CENTRE.tolist(), "start": 0.25},
            "method": {"name": name, "eta": 0.1, "gamma": 0.25, **constants},
            "run": {"workers": N, "participation": participation, "rounds": rounds, "dtype": "float64", "seed": SEED,
                    "eval_every": rounds}}


def episode():
    x = X0
    for part in PARTS:
        x = reference.episode([GRADS[i] for i in part], x, 1, 0.1, 0.25, 3)[1]
    return x


def celgc():
    """With momentum, which a worker keeps while others take part."""
    x, m = X0, np.zeros((N, D))
    for part in PARTS:
        ends = []
        for i in part:
            x_i = x
            for _ in range(3):
                m[i] = 0.5 * m[i] + reference.clip(GRADS[i](x_i), 2.5)
                x_i = x_i - 0.1 * m[i]
            ends.append(x_i)
        x = sum(ends) / S
    return x


@pytest.mark.parametrize("board, small", [(True, 64 * 1024), (True, 0), (False, 0)])
@pytest.mark.parametrize("name, constants, expected", [
    ("celgc", {"momentum": 0.5}, celgc), ("episode", {}, episode),
    ("episode_pp", {}, lambda: reference.episode_pp(GRADS, X0, K, 0.1, 0.25, 3, parts=PARTS)[K])])
def test_some_take_part(ranks, name, constants, expected, board, small, monkeypatch):
    """board: vectors are exchanged in shared memory; otherwise as between hosts. small: up to this many bytes every
    rank has all columns."""
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    if not board:
        monkeypatch.setattr(Comm, "shared", lambda self, shape, dtype: None)
    training = Training(configs.load(config(name, interval=3, **constants)), ranks, None)
    np.testing.assert_allclose(training.run().x, expected(), rtol=1e-11, atol=1e-12)
    if name == "episode_pp":                # whatever is left out, G is the mean of all
        everyones = np.concatenate(ranks.all(training.s.G_i))
        np.testing.assert_allclose(training.server.join(training.s.G), everyones.mean(0), rtol=1e-11, atol=1e-12)


def test_what_is_sent_for_a_local_step(ranks):
    """Of 12 local steps each: NaiveParallelGC sends 12 vectors; CELGC a quarter with I = 4, and a second vector a round
    for the norm of the mean."""
    sent = {}
    for name, interval, constants in (("naive_parallel", 1, {}), ("celgc", 4, {}), ("celgc", 4, {"threshold": "max"}),
                                      ("celgc", 12, {})):
        more = {"interval": interval, **constants} if name == "celgc" else {}
        run = mpiclip.train(config(name, 12 // interval, None, **more), ranks)
        sent[name, interval, *constants] = run.metrics["bytes"][-1]
    every = sent["naive_parallel", 1]
    assert (every > 0) == (ranks.size > 1)
    assert sent["celgc", 4] == every / 4 and sent["celgc", 12] == every / 12
    assert sent["celgc", 4, "threshold"] == every / 2


@pytest.mark.parametrize("name", ["celgc", "episode", "episode_pp"])
def test_resumed_while_some_take_part(ranks, name, tmp_path_factory):
    folder = ranks.same(tmp_path_factory.mktemp("run") if ranks.rank == 0 else None)
    constants = {"interval": 2, **({"momentum": 0.5} if name == "celgc" else {})}
    whole = mpiclip.train(config(name, **constants), ranks).x
    mpiclip.train(config(name, 5, **constants), ranks, folder)
    assert mpiclip.resume(folder, [f"run.rounds={K}"], ranks).x.tobytes() == whole.tobytes()
