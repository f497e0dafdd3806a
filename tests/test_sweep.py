"""A family of runs: all of them, each once, whatever happens in between."""

import json
import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from launch import MPI_ENVIRONMENT, finish, ranks_of, start
from mpiclip.__main__ import main
from mpiclip.config import load
from mpiclip.errors import InputError
from mpiclip.sweep import Training, family, sweep
from mpiclip.training import train

QUADRATIC = """
[problem]
name = "quadratic"
dimension = 20
[method]
name = "clip21"
stepsize = 0.5
tau = 1.0
[run]
workers = 6
rounds = 30
dtype = "float64"
eval_every = 10
"""
TABLES = {"problem": {"name": "quadratic", "dimension": 20}, "method": {"name": "clip21", "stepsize": 0.5, "tau": 1.0},
          "run": {"workers": 6, "rounds": 30, "dtype": "float64"}}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A folder with a config, job.toml; job("…") appends to it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.toml"
    path.write_text(QUADRATIC)

    def more(text):
        path.write_text(path.read_text() + text)
        return path
    return more


def result(folder) -> dict[str, bytes]:
    """What a run computed: its state, and all metrics but the seconds."""
    with h5py.File(max(Path(folder, "checkpoints").glob("round-*.h5"))) as f, h5py.File(Path(folder, "run.h5")) as g:
        lines = g["metrics"][:]
        return {name: f["arrays"][name][()].tobytes() for name in f["arrays"]} | {
            name: lines[name].tobytes() for name in lines.dtype.names if not name.startswith("seconds")}


def untouched(folder) -> dict[str, tuple[int, bytes]]:
    """Every file's time and bytes."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*.h5")}


# ---- which runs, and their names


def named(grid, *options, **more):
    return list(family([TABLES | {"grid": grid} | more], options))


def test_every_combination():
    runs = family([TABLES | {"grid": {"method.tau": [0.1, 1, 10.0], "run.seed": [0, 1]}}], settings=["run.rounds=5"])
    assert list(runs) == ["tau=0.1-seed=0", "tau=0.1-seed=1", "tau=1-seed=0", "tau=1-seed=1", "tau=10-seed=0",
                          "tau=10-seed=1"]
    for tau in (0.1, 1.0, 10.0):
        for seed in (0, 1):
            tables = {name: dict(table) for name, table in TABLES.items()}
            tables["method"]["tau"] = tau
            tables["run"] |= {"seed": seed, "rounds": 5}
            assert runs[f"tau={tau:g}-seed={seed}"] == load(tables)


def test_keys_that_change_together():
    """One axis: the first of them names it. In a file's grid or as an option."""
    wanted = [(0.1, 5, 0), (0.1, 5, 1), (1.0, 9, 0), (1.0, 9, 1)]
    for grid, options in (({"method.tau, run.rounds": [[0.1, 5], [1.0, 9]], "run.seed": [0, 1]}, ()),
                          ({"run.seed": [7]}, ["method.tau,run.rounds=[0.1, 5],[1.0, 9]", "run.seed=0,1"])):
        runs = family([TABLES | {"grid": grid}], options)
        assert sorted((run.method.tau, run.run.rounds, run.run.seed) for run in runs.values()) == wanted
        assert {frozenset(name.split("-")) for name in runs} == {
            frozenset({f"tau={tau:g}", f"seed={seed}"}) for tau, _, seed in wanted}


@pytest.mark.parametrize("grid, names", [
    ({}, ["run"]),
    ({"method.tau": [1e-5, 0.25]}, ["tau=1e-05", "tau=0.25"]),
    ({"method": {"tau": [1.0], "stepsize": [0.5, "1/L"]}}, ["tau=1-stepsize=0.5", "tau=1-stepsize=1-L"]),   # no quotes
    ({"method.name": ["clip21", "clip_gd"]}, ["clip21", "clip_gd"]),
    ({"method": [{"name": "clip21"}, {"name": "clip_gd"}]}, ["clip21", "clip_gd"]),
    ({"method": [{"name": "clip_gd", "tau": 1.0}, {"name": "clip21", "tau": 1.0}, {"name": "clip21", "tau": 0.5}]},
     ["clip_gd", "clip21,tau=1", "clip21,tau=0.5"]),
    ({"method": [{"tau": 1.0}, {"tau": 2.0, "stepsize": 0.1}]}, ["tau=1", "tau=2,stepsize=0.1"]),
    ({"method": [{"name": "clip21"}, {"name": "clip_gd"}], "method.tau": [1.0, {"quantile": 0.5}]},
     ["clip21-tau=1", "clip21-tau=quantile=0.5", "clip_gd-tau=1", "clip_gd-tau=quantile=0.5"]),
    ({"aggregate.rules": [[], ["arc", "median"]]}, ["rules=none", "rules=arc+median"]),
])
def test_names(grid, names):
    assert named(grid) == names


def test_names_tell_keys_of_the_same_name_apart():
    tables = {"method": {"name": "alpha_normec", "beta": 1.0, "stepsize": 0.1}, "data": {"file": "x.h5", "split":
              "dirichlet"}, "problem": {"name": "logistic"}}
    assert named({"method.alpha": [0.1], "data.alpha": [1, 10]}, **tables) == [
        "method.alpha=0.1-data.alpha=1", "method.alpha=0.1-data.alpha=10"]


def test_names_that_would_be_the_same_or_too_long_get_a_digest(tmp_path):
    long = [[["arc"] * 30], [["arc"] * 31]]
    first = named({"aggregate.rules": [value for values in long for value in values]})
    assert len(set(first)) == 2 and all(len(name) < 100 for name in first)
    assert first == named({"aggregate.rules": [value for values in long for value in values]}), "the same every time"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, tau in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder / "Job.toml").write_text(QUADRATIC.replace("tau = 1.0", f"tau = {tau}"))
    names = list(family([tmp_path / "a" / "Job.toml", tmp_path / "b" / "Job.toml"]))
    assert len({name.casefold() for name in names}) == 2 and all(name.startswith("Job-") for name in names)
    (tmp_path / "lock.toml").write_text(QUADRATIC)
    name, = family([tmp_path / "lock.toml"])
    assert name.startswith("lock-")


def test_several_configs_and_options(job, tmp_path):
    job('[grid]\n"method.tau" = [1.0, 2.0]\n')
    (tmp_path / "other.toml").write_text(QUADRATIC.replace("clip21", "clip_gd"))
    assert list(family(["job.toml", "other.toml"])) == ["job-tau=1", "job-tau=2", "other"]
    assert list(family(["job.toml"], ["method.tau=0.5,0.25", "method.stepsize=0.1,1/L"])) == [  # not the file's values
        "tau=0.5-stepsize=0.1", "tau=0.5-stepsize=1-L", "tau=0.25-stepsize=0.1", "tau=0.25-stepsize=1-L"]
    assert list(family(["job.toml"], ['method.tau={quantile = 0.5},1'])) == ["tau=quantile=0.5", "tau=1"]


@pytest.mark.parametrize("grid, words", [
    ({"method.tao": [1.0]}, ["tao=1: method.tao", "did you mean 'tau'"]),
    ({"metod.tau": [1.0]}, ["metod.tau", "did you mean 'method'"]),
    ({"method.tau": []}, ["method.tau = []", "expected a list"]),
    ({"method.tau": 1.0}, ["method.tau = 1.0", "expected a list"]),
    ({"method": []}, ["method = []"]),
    ({"method": {}}, ["method = {}"]),
    ({"method": ["clip21"]}, ["method", "'clip21'", "expected tables"]),
    ({"method.tau": [1.0, -1.0]}, ["tau=-1: method.tau = -1.0", "greater than or equal"]),
    ({"method.tau": [1.0, 2.0], "run.rounds": [5, -5]}, ["tau=1-rounds=-5: run.rounds = -5"]),
    ({"method.tau": [1.0, 1]}, ["the same run as"]),
    ({"method.tau": [1.0, 1.0]}, ["tau=1", "twice"]),
    ({"method.tau": [1.0, 2.0], "method": [{"tau": 3.0}, {"tau": 4.0}]}, ["the same run as"]),
    ({"method.tau,run.rounds": [[1.0, 5], [2.0]]}, ["method.tau,run.rounds", "[2.0]", "2 values, one for each key"]),
    ({"method.tau,runs.rounds": [[1.0, 5]]}, ["runs.rounds", "did you mean 'run'"]),
    ({"method.tau.quantile": [0.5]}, ["method.tau is no table"]),
    ({"method.tau.quantile.of": [0.5]}, ["no table"]),
])
def test_refuses_a_bad_grid(grid, words, tmp_path):
    with pytest.raises(InputError) as refused:
        sweep([TABLES | {"grid": grid}], out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, words", [
    ("method.tau", ["--grid method.tau", "table.key=value,value"]), ("=1", ["--grid"]),
    ("method.tau=", ["method.tau = []", "one value or more"]), ("tau=1", ["tau", "there is no 'tau'"])])
def test_refuses_a_bad_option(option, words):
    with pytest.raises(InputError) as refused:
        family([TABLES], [option])
    for word in words:
        assert word in str(refused.value)


def test_set_does_not_fight_the_grid():
    with pytest.raises(InputError, match=r"--set method\.tau=2: the grid varies method\.tau"):
        family([TABLES | {"grid": {"method.tau": [1.0]}}], settings=["method.tau=2"])


def test_train_names_sweep(job, capsys):
    job('[grid]\n"method.tau" = [1.0]\n')
    assert main(["train", "job.toml"]) == 2
    assert capsys.readouterr().err == "mpiclip: job.toml: [grid] makes it a family of runs; expected `mpiclip sweep " \
                                      "job.toml`\n"


# ---- running them


def test_each_run_is_what_train_makes_of_it_and_is_done_once(job, capsys):
    job('[grid]\n"method" = [{name = "clip_gd"}, {name = "clip21"}]\n"method.tau" = [0.1, 1.0]\n')
    assert main(["sweep", "job.toml"]) == 0
    out, err = capsys.readouterr()
    names = ["clip_gd-tau=0.1", "clip_gd-tau=1", "clip21-tau=0.1", "clip21-tau=1"]
    assert [line.split(": ")[1] for line in err.splitlines() if line.startswith("run ")] == names
    assert [line.split()[0] for line in out.splitlines() if "=" in line] == names
    for name, tau in zip(names, (0.1, 1.0, 0.1, 1.0), strict=True):
        tables = load({**TABLES, "run": {**TABLES["run"], "eval_every": 10},
                       "method": {"name": name.split("-")[0], "stepsize": 0.5, "tau": tau}}).as_dict()
        train(tables, out=f"alone/{name}")
        assert result(f"runs/job/{name}") == result(f"alone/{name}")
    before = untouched("runs/job")
    assert main(["sweep", "job.toml"]) == 0
    assert untouched("runs/job") == before
    assert "4 of 4 runs are done already" in capsys.readouterr().err
    assert main(["sweep", "job.toml", "--grid", "method.tau=0.1,0.5,1.0"]) == 0         # the new ones only
    now = untouched("runs/job")
    assert len(now) == len(before) * 6 // 4 and {name: now[name] for name in before} == before
    assert len(json.loads(_out(capsys, "show", "runs", "--json"))) == 6
    assert main(["plot", "runs", "--x", "round,seconds", "--y", "grad_norm", "-o", "p.png"]) == 0


def _out(capsys, *words) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_bytes_are_counted_for_each_run(mpiclip, job):
    assert mpiclip(2, "sweep", "job.toml", "--grid", "method.tau=0.1,1,10", "--out", "out").returncode == 0
    sent = [result(folder)["bytes"] for folder in sorted(Path("out").glob("tau*"))]
    assert len(sent) == 3 and sent[0] == sent[1] == sent[2] and np.frombuffer(sent[0])[-1] > 0


@pytest.mark.parametrize("setting, words", [
    ("method.stepsize=0.25", ["tau=2: method.stepsize = 0.25", "was started with 0.5"]),
    ("run.rounds=60", ["run.rounds = 60", "was started with 30"]),
    ("run.eval_every=1", ["run.eval_every = 1"]),
    ("method.name=clip_gd", ["method.name = 'clip_gd'", "'clip21'"]),
    ("run.workers=5", ["run.workers = 5"])])
def test_refuses_other_settings_for_a_folder_before_anything_runs(job, capsys, setting, words):
    assert main(["sweep", "job.toml", "--grid", "method.tau=2", "--out", "out"]) == 0
    capsys.readouterr()
    before = untouched("out")
    assert main(["sweep", "job.toml", "--grid", "method.tau=1,2", "--out", "out", "--set", setting]) == 2
    assert untouched("out") == before and not Path("out", "tau=1").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_settings_that_change_no_result_may_change(job):
    assert main(["sweep", "job.toml", "--out", "out"]) == 0
    before = untouched("out")
    assert main(["sweep", "job.toml", "--out", "out", "--set", "run.threads=1", "--set", "run.keep=1"]) == 0
    assert untouched("out") == before


def test_refuses_a_folder_that_is_a_run(job, capsys):
    assert main(["train", "job.toml", "--out", "out"]) == 0
    assert main(["sweep", "job.toml", "--out", "out"]) == 2
    assert "out: holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 2])
def test_a_run_that_fails_is_named_and_the_others_go_on(mpiclip, job, n):
    words = ["sweep", "job.toml", "--grid", "method.stepsize=0.5,1e200,0.25", "--out", "out"]
    done = mpiclip(n, *words)
    assert done.returncode == 2, done.stderr
    assert "mpiclip: 1 of 3 runs failed\n  stepsize=1e+200: round " in done.stderr and "not finite" in done.stderr
    for name in ("stepsize=0.5", "stepsize=0.25"):
        assert Path("out", name, "checkpoints", "round-00000030.h5").exists()
        assert name in done.stdout
    before = untouched("out/stepsize=0.25")
    again = mpiclip(n, *words)
    assert again.returncode == 2 and "1 of 3 runs failed\n  stepsize=1e+200: round " in again.stderr
    assert untouched("out/stepsize=0.25") == before


def test_data_that_are_not_there_are_said_before_anything_runs(tmp_path):
    tables = TABLES | {"problem": {"name": "logistic"}, "data": {"file": str(tmp_path / "nowhere.h5")}}
    with pytest.raises(InputError, match=r"^tau=1: .*nowhere\.h5"):
        sweep([tables], ["method.tau=1,2"], out=tmp_path / "out")
    assert not Path("out").exists()


# ---- stopping and going on


SECOND = {0: "rounds=10000", 2: "rounds=20000"}          # long enough to be met in the middle, on so many ranks


def three(n) -> list[str]:
    """The options of a sweep of three runs, of which the second is long."""
    return ["--grid", f"run.rounds=20,{SECOND[n].partition('=')[2]},40", "--set", "run.eval_every=2000"]


@pytest.fixture
def patient(monkeypatch):
    """Open MPI's mpirun kills what it was told to stop a second later, unless it is told to wait."""
    monkeypatch.setitem(MPI_ENVIRONMENT, "PRTE_MCA_odls_base_sigkill_timeout", "60")


def interrupted(n, *words, what=signal.SIGTERM):
    """A sweep that is sent a signal in the middle of its second run."""
    process = start(n, "-m", "mpiclip", "sweep", "job.toml", *three(n), "--out", "parts", *words)
    deadline = time.monotonic() + 30
    while not Path("parts", SECOND[n], "run.h5").exists():
        assert time.monotonic() < deadline and process.poll() is None, finish(process).stderr
        time.sleep(0.002)
    if what == signal.SIGKILL:                  # a killed mpirun's ranks live on for a while
        for rank in ranks_of(process):
            os.kill(rank, what)
    os.killpg(process.pid, what)
    return finish(process)


@pytest.mark.parametrize("n, what", [(0, signal.SIGTERM), (0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_stops_after_a_checkpoint_and_the_same_command_goes_on(mpiclip, job, patient, n, what):
    done = interrupted(n, what=what)
    assert done.returncode == 75 or n, done.stderr              # mpirun's own status, where it was told to stop
    assert "Traceback" not in done.stderr
    reached = max(Path("parts", SECOND[n], "checkpoints").glob("round-*.h5")).stem
    assert 0 < int(reached.split("-")[1]) < int(SECOND[n].partition("=")[2]), "the test needs a run that lasts longer"
    assert not Path("parts/rounds=40").exists()
    before = untouched("parts/rounds=20")
    assert mpiclip(n, "sweep", "job.toml", *three(n), "--out", "parts").returncode == 0
    assert untouched("parts/rounds=20") == before
    assert mpiclip(n, "sweep", "job.toml", *three(n), "--out", "whole").returncode == 0
    for name in ("rounds=20", SECOND[n], "rounds=40"):
        assert result(f"parts/{name}") == result(f"whole/{name}")


@pytest.mark.parametrize("n", [0, 2])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(mpiclip, job, n):
    assert interrupted(n, what=signal.SIGKILL).returncode != 0
    _wait_for_free("parts")
    assert not list(Path("parts", SECOND[n]).glob("checkpoints/*.h5"))
    before = untouched("parts/rounds=20")
    done = mpiclip(n, "sweep", "job.toml", *three(n), "--out", "parts")
    assert done.returncode == 0, done.stderr
    assert untouched("parts/rounds=20") == before
    assert Path("parts", SECOND[n], "run.h5.old").exists(), "nothing is thrown away"
    assert mpiclip(n, "sweep", "job.toml", *three(n), "--out", "whole").returncode == 0
    for name in ("rounds=20", SECOND[n], "rounds=40"):
        assert result(f"parts/{name}") == result(f"whole/{name}")


def _wait_for_free(folder):
    """Until the ranks of a killed mpirun are gone, too."""
    from mpiclip.record import lock
    deadline = time.monotonic() + 20
    while True:
        try:
            return lock(folder).close()
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_half_made_folder_of_another_run_is_not_touched(job, capsys):
    assert main(["train", "job.toml", "--out", "out/tau=2", "--set", "method.tau=3"]) == 0
    for path in Path("out/tau=2/checkpoints").iterdir():
        path.unlink()
    before = untouched("out")
    assert main(["sweep", "job.toml", "--out", "out", "--grid", "method.tau=1,2"]) == 2
    assert "tau=2: method.tau = 2.0: out/tau=2 was started with 3.0" in capsys.readouterr().err
    assert untouched("out") == before
    Path("out/tau=2/run.h5").write_bytes(b"not HDF5")
    assert main(["sweep", "job.toml", "--out", "out", "--grid", "method.tau=1,2"]) == 2
    assert "tau=2: out/tau=2/run.h5: not a readable record" in capsys.readouterr().err


@pytest.mark.parametrize("rounds, status", [(0, 0), (5, 2)])
def test_released_private_messages_are_not_forgotten(job, capsys, rounds, status):
    """A private run that was killed before its first checkpoint, but after it had sent something."""
    assert main(["train", "job.toml", "--out", "out/tau=1"]) == 0
    for path in Path("out/tau=1/checkpoints").iterdir():
        path.unlink()
    Path("out/tau=1/released").write_text(f"{rounds:20d} {0:20d}\n")
    before = untouched("out")
    assert main(["sweep", "job.toml", "--out", "out", "--grid", "method.tau=1"]) == status
    assert ("has released private messages" in capsys.readouterr().err) == (status == 2)
    assert status == 0 or untouched("out") == before


@pytest.mark.parametrize("moment", ["setting up", "last round", "in the end"])
def test_a_signal_at_any_moment_is_heard(job, monkeypatch, moment):
    """While a run is set up, in its very last round, and between two runs."""
    class Signalled(Training):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if moment == "setting up":
                os.kill(os.getpid(), signal.SIGTERM)

        def _evaluate(self, k, x):
            super()._evaluate(k, x)
            if moment == "last round" and k == 30:
                os.kill(os.getpid(), signal.SIGTERM)

        def _finish(self, x, stopped):
            if moment == "in the end":
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._finish(x, stopped)

    monkeypatch.setattr("mpiclip.sweep.Training", Signalled)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", "job.toml", "--grid", "method.tau=1,2", "--out", "out"]) == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    saved = int(max(Path("out/tau=1/checkpoints").glob("*.h5")).stem.split("-")[1])
    assert saved == (1 if moment == "setting up" else 30)
    assert not Path("out/tau=2").exists()
    monkeypatch.undo()
    os.chdir(Path(job("")).parent)
    assert main(["sweep", "job.toml", "--grid", "method.tau=1,2", "--out", "out"]) == 0


def test_two_sweeps_do_not_share_a_folder(mpiclip, job):
    process = start(0, "-m", "mpiclip", "sweep", "job.toml", "--set", "run.rounds=100000000", "--out", "out")
    deadline = time.monotonic() + 30
    while not Path("out/job/run.h5").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    other = mpiclip(0, "sweep", "job.toml", "--grid", "method.tau=1,2", "--out", "out")
    assert other.returncode == 2 and "out: another mpiclip is running in this folder" in other.stderr
    process.send_signal(signal.SIGTERM)
    assert finish(process, 20).returncode == 75


# ---- disks


@pytest.mark.parametrize("n", [0, 2])
def test_an_output_that_cannot_be_written(mpiclip, job, n):
    Path("file").write_text("")
    done = mpiclip(n, "sweep", "job.toml", "--out", "file/out")
    assert done.returncode == 2 and done.stderr.count("mpiclip: ") == 1 and "file/out" in done.stderr, done.stderr


def test_a_run_that_does_not_fit_on_the_disk_does_not_stop_the_others(mpiclip, job):
    Path("limited.py").write_text(
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mpiclip.__main__ import main; sys.exit(main(sys.argv[1:]))\n")
    words = ["sweep", "job.toml", "--grid", "problem.dimension=20,20000,30", "--out", "out"]
    done = finish(start(0, "limited.py", *words), 30)
    assert done.returncode == 2, done.stderr
    assert "1 of 3 runs failed\n  dimension=20000: " in done.stderr and "cannot be written" in done.stderr
    assert mpiclip(0, *words).returncode == 0, "with room for it, it is done"
    assert result("out/dimension=20000") and result("out/dimension=30")


# ---- several runs at the same time


def test_groups_of_ranks(mpiclip, job):
    words = ["sweep", "job.toml", "--grid", "method.tau=0.1,0.2,0.3,0.4,0.5,0.6,0.7"]
    done = mpiclip(4, *words, "--ranks", "2", "--out", "groups")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run ") == 7, "each run once"
    assert done.stdout.count("clip21, τ") == 7, "one table"
    assert mpiclip(2, *words, "--out", "ranks").returncode == 0
    for folder in Path("ranks").glob("tau*"):
        assert result(Path("groups", folder.name)) == result(folder)
    assert sorted(path.name for path in Path("groups").iterdir()) == sorted(path.name for path in
                                                                             Path("ranks").iterdir())
    assert json.loads(mpiclip(0, "show", "groups/tau=0.1", "--json").stdout)["ranks"] == 2
    refused = mpiclip(3, *words, "--ranks", "2", "--out", "other")
    assert refused.returncode == 2 and "--ranks 2: expected a divisor of 3" in refused.stderr


def test_groups_share_the_work_as_it_comes(mpiclip, job):
    """One long run, and five short ones that the other group does in the meantime."""
    done = mpiclip(2, "sweep", "job.toml", "--grid", "run.rounds=30000,20,21,22,23,24", "--set", "run.eval_every=10000",
                   "--ranks", "1", "--out", "out")
    assert done.returncode == 0, done.stderr
    ends = {folder.name: max(folder.glob("checkpoints/*.h5")).stat().st_mtime_ns for folder in Path("out").glob("r*")}
    assert len(ends) == 6 and all(ends[f"rounds={k}"] < ends["rounds=30000"] for k in (20, 21, 22, 23))


def test_groups_stop_and_go_on(mpiclip, job, patient):
    interrupted(2, "--ranks", "1")
    assert mpiclip(2, "sweep", "job.toml", *three(2), "--ranks", "1", "--out", "parts").returncode == 0
    assert mpiclip(2, "sweep", "job.toml", *three(2), "--ranks", "1", "--out", "whole").returncode == 0
    for name in ("rounds=20", SECOND[2], "rounds=40"):
        assert result(f"parts/{name}") == result(f"whole/{name}")
    assert not list(Path("parts").glob(".claims-*"))


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_bug_in_one_group_ends_all(job, ranks):
    Path("program.py").write_text(
        "import sys, os\n"
        "from mpiclip.workers import Workers\n"
        "grad = Workers.grad\n"
        "def failing(self, x):\n"
        "    if os.environ['OMPI_COMM_WORLD_RANK'] == '3' and self.round == 7:\n"
        "        raise RuntimeError('the seventh round of rank three')\n"
        "    return grad(self, x)\n"
        "Workers.grad = failing\n"
        "from mpiclip.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n")
    done = finish(start(4, "program.py", "sweep", "job.toml", "--grid", "run.seed=0,1,2,3,4,5,6,7", "--set",
                        "run.rounds=3000000", "--ranks", ranks, "--out", "out"), 30)
    assert done.returncode == 1 and "the seventh round of rank three" in done.stderr
