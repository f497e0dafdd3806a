"""Rounds in which only some of the workers take part: the papers' loops over those, on any number of ranks."""

import numpy as np
import pytest

import mpiclip
from mpiclip import methods
from mpiclip.errors import InputError
from mpiclip.streams import stream
from reference import clip, top_k

N, S, D, K, SEED = 7, 3, 5, 9, 4
rng = np.random.default_rng(5)
CURVATURE, CENTRE = rng.uniform(0.5, 2, (N, D)), rng.normal(0, 3, (N, D))
X0 = np.full(D, 0.25)


def grad(i, x):
    return CURVATURE[i] * (x - CENTRE[i])


def parts():
    """Who takes part in each round."""
    return [np.sort(stream(SEED, "participation", round=k).permutation(N)[:S]) for k in range(K)]


def gd():
    x = X0
    for part in parts():
        x = x - 0.3 * sum(grad(i, x) for i in part) / S
    return x


def clip_gd():
    x, v = X0, np.zeros((N, D))
    for part in parts():
        for i in part:
            v[i] = 0.6 * v[i] + 0.4 * grad(i, x)
        x = x - 0.3 * sum(clip(v[i], 2.0) for i in part) / S
    return x


def clip21():
    x, v_i, v = X0, np.zeros((N, D)), np.zeros(D)
    for part in parts():
        c = {i: clip(grad(i, x) - v_i[i], 1.0) for i in part}
        for i in part:
            v_i[i] += c[i]
        v = v + sum(c.values()) / N
        assert np.allclose(v, v_i.mean(0))          # why these are divided by n
        x = x - 0.1 * v
    return x


def press_clip21():
    x, v_i, v = X0, np.zeros((N, D)), np.zeros(D)
    for part in parts():
        c = {i: top_k(clip(grad(i, x) - v_i[i], 1.0), 2) for i in part}
        for i in part:
            v_i[i] += c[i]
        v = v + sum(c.values()) / N
        x = x - 0.1 * v
    return x


def celgc():
    x = X0
    for part in parts():
        ends = []
        for i in part:
            x_i = x
            for _ in range(3):
                x_i = x_i - 0.1 * clip(grad(i, x_i), 2.0)
            ends.append(x_i)
        x = sum(ends) / S
    return x


CASES = {gd: {"stepsize": 0.3}, clip_gd: {"tau": 2.0, "stepsize": 0.3, "beta": 0.4},
         clip21: {"tau": 1.0, "stepsize": 0.1},
         press_clip21: {"tau": 1.0, "stepsize": 0.1, "compressor": {"name": "top_k", "k": 2}},
         celgc: {"eta": 0.1, "gamma": 0.2, "interval": 3}}


@pytest.fixture
def folder(ranks, tmp_path_factory):
    """One new folder, the same on all ranks."""
    return ranks.same(tmp_path_factory.mktemp("run") if ranks.rank == 0 else None)


def config(name, constants, rounds=K, participation=S, **run):
    return {"problem": {"name": "quadratic", "curvature": CURVATURE.tolist(), "centre": CENTRE.tolist(), "start": 0.25},
            "method": {"name": name, **constants},
            "run": {"workers": N, "participation": participation, "rounds": rounds, "dtype": "float64", "seed": SEED,
                    "eval_every": 4, **run}}


@pytest.mark.parametrize("loop", CASES, ids=lambda loop: loop.__name__)
def test_only_those_drawn_step_and_count(loop, ranks):
    run = mpiclip.train(config(loop.__name__, CASES[loop]), ranks)
    assert np.allclose(run.x, loop(), rtol=1e-12, atol=1e-13)
    if "clipped" in run.metrics:                        # a share of those who took part
        steps = S * CASES[loop].get("interval", 1)
        shares = run.metrics["clipped"][1:] * steps
        assert np.allclose(shares, shares.round()) and shares.max() > 0


def test_all_taking_part_is_what_there_is_without_the_key(ranks):
    wanted = mpiclip.train(config("clip21", CASES[clip21], participation=N), ranks)
    plain = config("clip21", CASES[clip21])
    del plain["run"]["participation"]
    run = mpiclip.train(plain, ranks)
    assert run.x.tobytes() == wanted.x.tobytes()


@pytest.mark.parametrize("loop", [clip21, celgc], ids=lambda loop: loop.__name__)
def test_resumed_runs_draw_the_same_workers(loop, ranks, folder):
    whole = mpiclip.train(config(loop.__name__, CASES[loop]), ranks)
    mpiclip.train(config(loop.__name__, CASES[loop], rounds=4), ranks, folder / "run")
    run = mpiclip.resume(folder / "run", [f"run.rounds={K}"], ranks)
    assert run.x.tobytes() == whole.x.tobytes()
    assert np.array_equal(run.metrics["clipped"][1:], whole.metrics["clipped"][1:])


def test_more_than_there_are_is_refused(ranks):
    with pytest.raises(InputError, match=r"run.participation = 8: expected at most run.workers = 7"):
        mpiclip.train(config("gd", CASES[gd], participation=8), ranks)


@pytest.mark.parametrize("name, constants, more, words", [
    ("byz_clip21_sgd2m", {"tau": 1.0, "stepsize": 0.2, "beta": 0.3, "beta_server": 0.6}, {}, "wants all workers"),
    ("gd", CASES[gd], {"aggregate": {"rules": ["median"], "f": 1}}, "no aggregate.rules"),
    ("clip21", CASES[clip21] | {"sigma": 1.0, "delta": 1e-5}, {}, "no method.sigma")])
def test_what_needs_all_workers_is_refused(name, constants, more, words, ranks):
    with pytest.raises(InputError, match=words):
        mpiclip.train(config(name, constants) | more, ranks)


def test_start_is_called_once_before_round_0_with_all(ranks, monkeypatch, folder):
    calls = []
    monkeypatch.setattr(methods.load("gd"), "start", lambda self, x, s, workers, aggregate: calls.append(
        (workers.round, len(workers.grad(x)), workers.taking_part)))
    mpiclip.train(config("gd", CASES[gd], rounds=3), ranks, folder / "run")
    mpiclip.resume(folder / "run", ["run.rounds=5"], ranks)
    assert calls == [(0, len(np.array_split(np.arange(N), ranks.size)[ranks.rank]), N)]
