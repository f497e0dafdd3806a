"""Private runs: whose noise, how much, how it is accounted for round by round, and what a crash costs."""

import json
import os
import signal
import stat
import time

import numpy as np
import pytest

import mpiclip as package
from launch import finish, start
from mpiclip import methods, privacy, problems, record
from mpiclip.config import Privacy
from mpiclip.errors import InputError
from mpiclip.ledger import Ledger
from mpiclip.show import summary
from mpiclip.workers import Examples
from test_workers import COUNTS, OFFSETS, X0, A, Y, party

N, D = 5, 7
CURVATURE = np.random.default_rng(7).uniform(0.5, 2, (N, D))
CENTRE = np.random.default_rng(8).normal(0, 3, (N, D))


def config(method, rounds=20, **tables):
    return {"problem": {"name": "quadratic", "centre": CENTRE.tolist(), "curvature": CURVATURE.tolist()},
            "method": method, "run": {"workers": N, "rounds": rounds, "dtype": "float64", "eval_every": 5}, **tables}


CLIP21 = {"name": "clip21", "tau": 1.0, "stepsize": 0.05, "delta": 1e-5}


# ---- what is spent


def test_epsilon_of_every_line_is_the_accountants():
    run = package.train(config(CLIP21 | {"sigma": 9.0}))
    told = privacy.Mechanism(sigma=9.0, bound=1.0, delta=1e-5)
    assert run.metrics["epsilon"].tolist() == [privacy.epsilon(told, k) for k in (0, 5, 10, 15, 20)]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("adjacency, sensitivity", [("replace", 2.0), ("add_remove", 1.0)])
def test_sigma_is_calculated_from_epsilon(accountant, adjacency, sensitivity):
    table = {"accountant": accountant, "adjacency": adjacency}
    run = package.train(config(CLIP21 | {"epsilon": 3.0}, privacy=table))
    assert 2.99 < run.metrics["epsilon"][-1] <= 3.0
    zcdp = (np.sqrt(np.log(1e5) + 3) - np.sqrt(np.log(1e5)))**2
    sigma = privacy.sigma_for(3.0, 20, privacy.Mechanism(1.0, 1.0, 1e-5, adjacency=adjacency, accountant=accountant))
    assert 0.5 < sigma / (sensitivity * np.sqrt(20 / (2 * zcdp))) <= 1       # a little better than the simple bound


def test_the_papers_scaling_reports_what_it_is_worth():
    run = package.train(config(CLIP21 | {"epsilon": 3.0}, privacy={"scaling": "paper"}))
    scaled = privacy.Mechanism(1.0 / 3.0 * np.sqrt(20 * np.log(1e5)), 1.0, 1e-5)
    assert run.metrics["epsilon"][-1] == privacy.epsilon(scaled, 20) > 3.0


def test_the_noise_of_all_workers_protects_what_the_model_shows():
    server, model = (package.train(config(CLIP21 | {"sigma": 9.0}, privacy={"against": against})).metrics["epsilon"][-1]
                     for against in ("server", "model"))
    assert model == privacy.epsilon(privacy.Mechanism(9.0 * np.sqrt(N), 1.0, 1e-5), 20) < server


def test_local_steps_use_the_examples_once_each(tmp_path):
    np.savez(tmp_path / "rows.npz", X=A, y=Y)
    from mpiclip.importers import import_file
    import_file([str(tmp_path / "rows.npz")], str(tmp_path / "rows.h5"))
    spent = {}
    for name, interval, rounds in (("celgc", 1, 8), ("celgc", 4, 2), ("episode", 3, 2), ("episode_pp", 4, 1)):
        run = package.train({
            "data": {"file": str(tmp_path / "rows.h5"), "split": "contiguous"}, "problem": {"name": "logistic"},
            "method": {"name": name, "eta": 0.1, "gamma": 1.0, "interval": interval, "sigma": 0.2, "delta": 1e-5},
            "privacy": {"level": "example", "clip": 1.0}, "run": {"workers": 4, "rounds": rounds, "batch": 5}})
        spent[name, interval] = run.metrics["epsilon"][-1]
    assert set(spent.values()) == {privacy.epsilon(
        privacy.Mechanism(0.2, 1 / 5, 1e-5, "example", "add_remove", rate=5 / 25), 8)}


# ---- whose noise


def noise_of(secret_or_not):
    workers, _ = party()
    workers.secret = secret_or_not
    return workers


def test_noise_is_a_function_of_secret_worker_round_and_call():
    both, one = noise_of(b"k"), party(ids=[2])[0]
    one.secret = b"k"
    seen = []
    for round in (0, 1):
        both.begin(round)
        one.begin(round)
        for _ in range(2):
            z_i = both.noise(np.zeros((4, P_ := A.shape[1])), 1.0)
            np.testing.assert_array_equal(one.noise(np.zeros((1, P_)), 1.0)[0], z_i[2])     # wherever it is hosted
            seen += [z.tobytes() for z in z_i]
    other = noise_of(b"l")
    seen += [z.tobytes() for z in other.noise(np.zeros((4, P_)), 1.0)]
    assert len(set(seen)) == len(seen) == 20


@pytest.mark.parametrize("sigma", [None, 0.0])
def test_no_noise_keeps_the_bytes(sigma):
    u_i = np.full((4, 3), -0.0)
    assert noise_of(b"k").noise(u_i, sigma) is u_i and np.signbit(u_i).all()


def test_secret_noise_is_another_one_in_every_run_and_reproducible_noise_is_not():
    reproducible = {"noise": "reproducible"}
    runs = [package.train(config(CLIP21 | {"sigma": 0.1}, privacy=table)).x.tobytes()
            for table in ({}, {}, reproducible, reproducible)]
    assert len(set(runs[:3])) == 3 and runs[2] == runs[3]


def test_the_key_is_its_owners(tmp_path):
    package.train(config(CLIP21 | {"sigma": 0.1}), out=tmp_path / "run")
    key = tmp_path / "run" / "noise.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32
    assert stat.S_IMODE((tmp_path / "run" / "checkpoints").stat().st_mode) == 0o700     # the workers' state is theirs
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and file != key:
            assert key.read_bytes() not in file.read_bytes(), f"{file} holds the key"


@pytest.mark.parametrize("sigma, replaced", [({}, 1), ({"sigma": 9.0, "delta": 1e-5}, 0)])
def test_no_message_shows_that_a_gradient_was_not_finite(sigma, replaced):
    """Where it does not stop the run: robust rules see the last worker's noise, and no NaN."""
    tables = config({"name": "clip21", "tau": 1.0, "stepsize": 0.05} | sigma, aggregate={"rules": ["median"], "f": 1})
    tables["problem"] = tables["problem"] | {"centre": [*CENTRE[:-1].tolist(), [1e200] * D]}
    with np.errstate(over="ignore"):
        run = package.train(tables)
    assert run.metrics["replaced"][1:].tolist() == [replaced] * 4


def test_divergence_is_not_hidden():
    workers, _ = party(tolerant=True)
    workers.secret = b"k"
    with np.errstate(invalid="ignore"):
        assert np.isnan(workers.grad(np.full(A.shape[1], np.nan))).all()


# ---- examples


def per_row(x, i):
    """∇ℓ_r(x) of worker i's rows, least squares"""
    rows = slice(*OFFSETS[i:i + 2])
    return (A[rows] @ x - Y[rows])[:, None] * A[rows]


def shortened(rows, C):
    return rows * np.minimum(1, C / np.linalg.norm(rows, axis=1))[:, None]


def test_full_batch_example_level_gradients():
    workers, _ = party(problems.Linear(regularizer="l2", lam=0.5))
    workers.secret, workers.examples = b"k", Examples(clip=0.7, sigma=0.3)
    found = workers.grad(X0).copy()
    without, _ = party(problems.Linear(regularizer="l2", lam=0.5))
    without.secret, without.examples = b"k", Examples(clip=0.7, sigma=1e-300)
    clean = without.grad(X0)
    expected = [shortened(per_row(X0, i), 0.7).mean(0) + 0.5 * X0 for i in range(4)]
    np.testing.assert_allclose(clean, expected, rtol=1e-12)
    noise = (found - clean) / 0.3
    assert 0.5 < noise.std() < 1.6 and len(np.unique(noise)) == noise.size


def test_poisson_samples():
    """Every row is used with its probability, whatever the others do; the sum is divided by the expected number."""
    workers, _ = party(batch=5)
    workers.secret, workers.examples = b"k", Examples(clip=0.7, sigma=1e-300)
    trials, used = 4000, np.zeros((4000, 100))
    for k in range(trials):
        workers.begin(k)
        rows, offsets, expected = workers._draw()
        assert len(set(rows.tolist())) == len(rows) and (expected == 5).all()
        assert (np.searchsorted(OFFSETS, rows, side="right") - 1 == np.repeat(range(4), np.diff(offsets))).all()
        used[k, rows] = 1
    q = np.repeat(5 / COUNTS, COUNTS)
    assert np.abs(used.mean(0) - q).max() < 5 * np.sqrt(0.25 / trials)
    sizes = np.array([used[:, OFFSETS[i]:OFFSETS[i + 1]].sum(1) for i in range(4)])
    np.testing.assert_allclose(sizes.var(1), 5 * (1 - 5 / COUNTS), rtol=0.15)       # binomial: rows are independent
    assert sizes[0].min() == 0                                                      # an empty sample is legal
    workers.begin(7)
    rows, offsets, _ = workers._draw()
    g_i = workers.grad(X0)
    for i in range(4):
        mine = rows[offsets[i]:offsets[i + 1]] - OFFSETS[i]
        np.testing.assert_allclose(g_i[i], shortened(per_row(X0, i), 0.7)[mine].sum(0) / 5, rtol=1e-9, atol=1e-12)


def test_samples_follow_from_the_secret_not_from_the_seed():
    drawn = []
    for secret, seed in ((b"k", 0), (b"k", 1), (b"l", 0)):
        workers, _ = party(batch=5, seed=seed)
        workers.secret, workers.examples = secret, Examples(clip=0.7, sigma=1.0)
        drawn.append(workers._draw()[0].tobytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_evaluation_is_of_plain_gradients():
    """… and does not lend them to the next round."""
    workers, server = party()
    workers.secret, workers.examples = b"k", Examples(clip=1e-6, sigma=1e-300)
    plain, _ = party()
    _, other = party()
    assert workers.evaluate(X0, server) == plain.evaluate(X0, other)
    assert np.linalg.norm(workers.grad(X0), axis=1).max() <= 1e-6 * (1 + 1e-12)


# ---- interruptions


JOB = """
[problem]
name = "quadratic"
dimension = 40
[method]
name = "clip21"
tau = 1.0
stepsize = 0.05
epsilon = 3.0
delta = 1e-5
[run]
workers = 4
rounds = 700
dtype = "float64"
eval_every = 1
checkpoint_every = 100
"""


def test_rounds_that_a_crash_repeats_count_again_and_get_other_noise(tmp_path, mpiclip):
    (tmp_path / "job.toml").write_text(JOB)
    process = start(0, "-m", "mpiclip", "train", "job.toml", "--out", "run", cwd=tmp_path)
    checkpoints, released, deadline = tmp_path / "run" / "checkpoints", tmp_path / "run" / "released", time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if any(checkpoints.glob("*.h5")) and int(released.read_text().split()[0]) % 100 > 20:
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process).returncode == -signal.SIGKILL
    done = int(released.read_text().split()[0])
    repeated = done % 100
    assert 20 < repeated < done < 700

    ended = mpiclip(0, "resume", "run")
    assert ended.returncode == 0, ended.stderr
    header, lines = record.read(tmp_path / "run")
    assert header["privacy"]["repeated"] == repeated
    last = 700 - repeated                                       # ε pays for 700 releases, however they come about
    assert lines["round"][-1] == last and f"round {last} will be the last one" in ended.stderr
    told = privacy.Mechanism(**header["privacy"]["mechanism"])
    assert lines["epsilon"][-1] == privacy.epsilon(told, 700) <= 3.0
    assert "700 releases" in mpiclip(0, "show", "run").stdout


def test_another_attempt_has_another_key(tmp_path):
    first = Ledger(tmp_path)
    first.release(7)
    again, clean = Ledger(tmp_path, 4), Ledger(tmp_path, 4)
    assert (again.repeated, clean.repeated) == (3, 3) and again.secret == clean.secret != first.secret
    again.release(6)
    assert Ledger(tmp_path, 6).repeated == 3 and Ledger(tmp_path, 5).repeated == 4


def test_after_a_clean_stop_nothing_is_repeated(tmp_path, mpiclip):
    tables = config(CLIP21 | {"sigma": 0.5})
    whole = package.train(tables | {"privacy": {"noise": "reproducible"}}, out=tmp_path / "whole")
    tables["run"]["rounds"] = 8
    package.train(tables, out=tmp_path / "parts")
    package.resume(tmp_path / "parts", ["run.rounds=20"])
    header, lines = record.read(tmp_path / "parts")
    assert header["privacy"]["repeated"] == 0
    assert lines["epsilon"].tolist() == whole.metrics["epsilon"].tolist()


def test_more_rounds_than_epsilon_pays_for_are_not_run(tmp_path, capsys):
    package.train(config(CLIP21 | {"epsilon": 3.0}), out=tmp_path / "run")
    run = package.resume(tmp_path / "run", ["run.rounds=500"])
    assert run.metrics["round"][-1] == 20 and run.metrics["epsilon"][-1] <= 3.0
    assert "round 20 will be the last one, instead of round 500: then ε = 3 is spent" in capsys.readouterr().err


def test_rounds_that_can_no_longer_be_paid_for_are_not_promised(tmp_path, capsys):
    package.train(config(CLIP21 | {"epsilon": 3.0}), out=tmp_path / "run")
    (tmp_path / "run" / "released").write_text(f"{40:20d} {0:20d}\n")       # killed in round 40, after this checkpoint
    run = package.resume(tmp_path / "run", ["run.rounds=50"])
    assert run.metrics["round"][-1] == 20 and "round 20 will be the last one" in capsys.readouterr().err


def test_what_cannot_be_accounted_for_is_refused_before_it_starts(tmp_path):
    np.savez(tmp_path / "rows.npz", X=A, y=Y)
    from mpiclip.importers import import_file
    import_file([str(tmp_path / "rows.npz")], str(tmp_path / "rows.h5"))
    with pytest.raises(InputError, match="delta = 2e-11: expected at least 3e-11"):
        package.train({"data": {"file": str(tmp_path / "rows.h5")}, "problem": {"name": "logistic"},
                       "method": {"name": "gd", "stepsize": 0.1, "sigma": 0.2, "delta": 2e-11},
                       "privacy": {"level": "example", "clip": 1.0},
                       "run": {"workers": 4, "rounds": 2000, "batch": 5}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_leave_no_file_open(tmp_path):
    counts = []
    for k in range(3):
        package.train(config(CLIP21 | {"sigma": 0.5}, rounds=1), out=tmp_path / str(k))
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("file, damage", [("noise.key", None), ("noise.key", b"short"), ("released", None),
                                          ("released", b"three rounds")])
def test_a_run_whose_book_is_lost_does_not_go_on(tmp_path, file, damage):
    package.train(config(CLIP21 | {"sigma": 0.5}), out=tmp_path / "run")
    path = tmp_path / "run" / file
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(InputError, match="noise.key and released") as error:
        package.resume(tmp_path / "run", ["run.rounds=30"])
    assert "\n" not in str(error.value)


# ---- what is said


def test_show_says_what_is_guaranteed(tmp_path, mpiclip):
    package.train(config(CLIP21 | {"epsilon": 3.0}), out=tmp_path / "run")
    package.train(config(CLIP21 | {"sigma": 0.5}, privacy={"noise": "reproducible"}), out=tmp_path / "open")
    text = mpiclip(0, "show", "run").stdout
    assert "one worker's whole data set" in text and "20 releases" in text and "NOT PRIVATE" not in text
    assert "NOT PRIVATE" in mpiclip(0, "show", "open").stdout
    found = json.loads(mpiclip(0, "show", "run", "--json").stdout)
    assert found["final"]["epsilon"] <= 3.0 and found["privacy"]["repeated"] == 0


def test_show_counts_rounds_that_were_released_but_not_evaluated(tmp_path, mpiclip):
    """Those of a run that was stopped, or killed, between two lines of metrics."""
    package.train(config(CLIP21 | {"sigma": 9.0}), out=tmp_path / "run")
    (tmp_path / "run" / "released").write_text(f"{23:20d} {4:20d}\n")
    found, spent = summary(tmp_path / "run"), privacy.epsilon(privacy.Mechanism(9.0, 1.0, 1e-5), 27)
    assert found["rounds"] == 20 and found["privacy"]["releases"] == 27 and found["final"]["epsilon"] == spent
    text = " ".join(mpiclip(0, "show", "run").stdout.split())
    assert "all 27 releases" in text and text.count(f"ε = {privacy.rounded_up(spent)}") == 2


def test_train_says_it_before_the_first_round(tmp_path, mpiclip):
    (tmp_path / "job.toml").write_text(JOB.replace("rounds = 700", "rounds = 4"))
    text = mpiclip(2, "train", "job.toml", "--out", "run").stderr
    assert text.count("differential privacy of one worker's whole data set") == 1


ROWS = {"data": {"file": "rows.h5"}, "problem": {"name": "logistic"}}


@pytest.mark.parametrize("method, tables, line", [
    (CLIP21 | {"sigma": 1.0, "epsilon": 2.0}, {}, "method.sigma = 1 and method.epsilon = 2: expected one of them"),
    (CLIP21 | {"epsilon": -1.0}, {}, "method.epsilon = -1.0"),
    (CLIP21 | {"epsilon": 0.0}, {}, "method.epsilon = 0.0"),
    (CLIP21 | {"epsilon": 1.0, "delta": 1.0}, {}, "method.delta = 1.0"),
    (CLIP21 | {"epsilon": 1.0, "delta": 0.0}, {}, "method.delta = 0.0"),
    ({"name": "clip21", "tau": 1.0, "stepsize": 0.05, "sigma": 1.0}, {}, "method.delta: missing"),
    (CLIP21, {}, "method.delta is given, but there is no noise"),
    ({"name": "clip21", "tau": 1.0, "stepsize": 0.05}, {"privacy": {"level": "worker", "against": "model"}},
     "privacy is given, but there is no noise"),
    ({"name": "gd", "stepsize": 0.1, "sigma": 1.0, "delta": 1e-5}, {}, "method.name = 'gd': nothing bounds"),
    ({"name": "celgc", "eta": 0.1, "gamma": 0.1, "epsilon": 1.0, "delta": 1e-5}, {}, "method.name = 'celgc'"),
    ({"name": "ef21", "compressor": {"name": "top_k", "k": 2}, "stepsize": 0.1, "sigma": 1.0, "delta": 1e-5}, {},
     "method.name = 'ef21'"),
    (CLIP21 | {"sigma": 1.0, "tau": {"quantile": 0.5}}, {}, "method.tau = {'quantile': 0.5}: is calculated from"),
    (CLIP21 | {"sigma": 1.0, "stepsize": "1/L"}, {}, "method.stepsize = 1/L: is calculated from the data"),
    (CLIP21 | {"sigma": 1.0, "tau": float("inf")}, {}, "method.tau = inf: bounds nothing"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"clip": 1.0}}, "privacy.clip: workers' messages are clipped at"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"level": "example"}}, "privacy.clip: missing"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"level": "example", "clip": 1.0}}, "'quadratic' has no rows to protect"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"scaling": "paper"}}, "privacy.scaling = 'paper': expected with"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"against": "model"}, "aggregate": {"rules": ["median"], "f": 1}},
     "privacy.against = 'model'"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"levle": "worker"}}, "level"),
    (CLIP21 | {"sigma": 1.0}, {"privacy": {"level": "example", "clip": 1.0},
                               "data": {"file": "rows.h5", "split": "dirichlet_worker", "alpha": 1.0}},
     "data.split = 'dirichlet_worker': gives a row to several workers"),
    (CLIP21 | {"sigma": 1e39}, {"run": {"workers": N, "dtype": "float32"}},
     "method.sigma = 1e+39: expected 0, or what run.dtype = 'float32' can hold"),
    (CLIP21 | {"sigma": 1e-39, "tau": 1e-39}, {"run": {"workers": N, "dtype": "float32"}}, "method.sigma = 1e-39"),
])
def test_refused_with_one_line(method, tables, line):
    with pytest.raises(InputError) as error:
        package.train(config(method, **tables))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_batch_larger_than_a_workers_data_is_no_poisson_sample():
    table = Privacy(level="example", clip=1.0)
    with pytest.raises(InputError, match=r"run.batch = 8: expected at most 7, the rows of the smallest worker"):
        privacy.mechanism_of(methods.load("gd")(stepsize=0.1, sigma=1.0, delta=1e-5), table, 4, COUNTS.tolist(), 8)
