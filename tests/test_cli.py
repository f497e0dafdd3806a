"""The command line as a person uses it, alone and under mpirun: what it prints, how it ends, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from launch import finish, ranks_of, start
from mpiclip.__main__ import main

CONFIG = """
[data]
file = "train.h5"
split = "label"
[problem]
name = "logistic"
regularizer = "nonconvex"
lam = 0.01
[method]
name = "clip21"
tau = 0.05
stepsize = 0.5
[run]
workers = 6
rounds = 40
dtype = "float64"
eval_every = 5
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a small data set, train.h5, and a config, job.toml."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 5))
    y = np.where(X @ rng.normal(size=5) + rng.normal(size=120) > 0, 1, -1)
    np.savez(tmp_path / "train.npz", X=X, y=y)
    (tmp_path / "job.toml").write_text(CONFIG)
    from mpiclip.importers import import_file
    import_file([str(tmp_path / "train.npz")], str(tmp_path / "train.h5"))
    return tmp_path


def model(out) -> np.ndarray:
    """x in the newest checkpoint."""
    newest = max(Path(out, "checkpoints").glob("*.h5"))
    with h5py.File(newest) as f:
        found = []
        f.visititems(lambda name, item: found.append(item[()]) if name.split("/")[-1] == "x" else None)
    return found[0]


def last_line(text: str) -> str:
    """The one line that mpiclip itself wrote; mpirun adds a notice of its own to a status other than 0."""
    lines = [line for line in text.splitlines() if line.startswith("mpiclip:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# ---- the way through


@pytest.mark.parametrize("n", [0, 1, 3])
def test_train_show_plot(mpiclip, folder, n):
    done = mpiclip(n, "train", "job.toml", "--out", "run", "--set", "run.rounds=10")
    assert done.returncode == 0, done.stderr
    shown = json.loads(mpiclip(0, "show", "run", "--json").stdout)
    assert set(shown) >= {"config", "rounds", "workers", "ranks", "final", "seconds", "bytes_sent"}
    assert (shown["rounds"], shown["workers"], shown["ranks"]) == (10, 6, max(n, 1))
    assert shown["final"]["loss"] < np.log(2)
    assert "clip21" in mpiclip(0, "show", "run").stdout
    assert mpiclip(0, "plot", "run", "-o", "loss.png").returncode == 0
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_console_script_from_another_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = Path(sys.executable).with_name("mpiclip")
    done = subprocess.run([script, "train", folder / "job.toml", "--set", f"data.file={folder / 'train.h5'}"],
                          cwd=elsewhere, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs" / "job" / "run.h5").exists()


def test_default_folder_is_never_one_that_holds_a_run(mpiclip, folder):
    for _ in range(2):
        assert mpiclip(0, "train", "job.toml", "--set", "run.rounds=1").returncode == 0
    assert (folder / "runs" / "job" / "run.h5").exists() and (folder / "runs" / "job-2" / "run.h5").exists()


def test_any_number_of_ranks_gives_the_same_model(mpiclip, folder):
    models = []
    for n in (0, 2, 4):
        assert mpiclip(n, "train", "job.toml", "--out", f"run{n}").returncode == 0
        models.append(model(folder / f"run{n}"))
    np.testing.assert_allclose(models[1], models[0], rtol=1e-12)
    np.testing.assert_allclose(models[2], models[0], rtol=1e-12)


def test_doctor(mpiclip):
    done = mpiclip(2, "doctor")
    assert done.returncode == 0
    for word in ("Open MPI", "2 ranks on 1 host", "HDF5", "kernels"):
        assert word in done.stdout


# ---- stopping and going on


def test_resume_gives_the_same_bytes(mpiclip, folder):
    assert mpiclip(2, "train", "job.toml", "--out", "whole").returncode == 0
    assert mpiclip(2, "train", "job.toml", "--out", "parts", "--set", "run.rounds=17").returncode == 0
    assert mpiclip(2, "resume", "parts", "--set", "run.rounds=40").returncode == 0
    assert model(folder / "parts").tobytes() == model(folder / "whole").tobytes()
    with h5py.File(folder / "whole" / "run.h5") as a, h5py.File(folder / "parts" / "run.h5") as b:
        for name in ("round", "loss", "grad_norm", "clipped", "accuracy"):
            np.testing.assert_array_equal(a["metrics"][name], b["metrics"][name])


@pytest.mark.parametrize("batch", ["full", "4"])
def test_resume_on_another_number_of_ranks(mpiclip, folder, batch):
    assert mpiclip(0, "train", "job.toml", "--out", "whole", "--set", f"run.batch={batch}").returncode == 0
    assert mpiclip(3, "train", "job.toml", "--out", "parts", "--set", "run.rounds=10",
                   "--set", f"run.batch={batch}").returncode == 0
    assert mpiclip(2, "resume", "parts", "--set", "run.rounds=25").returncode == 0
    assert mpiclip(0, "resume", "parts", "--set", "run.rounds=40").returncode == 0
    np.testing.assert_allclose(model(folder / "parts"), model(folder / "whole"), rtol=1e-12)


def test_a_trusted_server_saves_and_goes_on(mpiclip, folder):
    """With at = "rank0" the other ranks hold no part of the server's state."""
    at = ["--set", "aggregate.at=rank0"]
    assert mpiclip(2, "train", "job.toml", "--out", "whole", *at).returncode == 0
    assert mpiclip(2, "train", "job.toml", "--out", "parts", "--set", "run.rounds=17", *at).returncode == 0
    assert mpiclip(3, "resume", "parts", "--set", "run.rounds=40").returncode == 0
    np.testing.assert_allclose(model(folder / "parts"), model(folder / "whole"), rtol=1e-12)


def slow(folder, *more, n=3):
    """A run that would take very long, once it has started."""
    process = start(n, "-m", "mpiclip", "train", "job.toml", "--out", "run", "--set", "run.rounds=100000000",
                    "--set", "run.eval_every=1000", *more, cwd=folder)
    deadline = time.monotonic() + 30
    while not (folder / "run" / "run.h5").exists():
        assert time.monotonic() < deadline and process.poll() is None, finish(process).stderr
        time.sleep(0.05)
    time.sleep(0.5)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_a_checkpoint(mpiclip, folder, number):
    """Sent to one process alone: status 75, and the run goes on as if nothing had been."""
    process = slow(folder, n=0)
    process.send_signal(number)
    assert finish(process, 20).returncode == 75
    reached = int(max((folder / "run" / "checkpoints").glob("*.h5")).stem.split("-")[1])
    assert reached > 0
    assert mpiclip(0, "resume", "run", "--set", f"run.rounds={reached + 7}").returncode == 0
    assert mpiclip(0, "train", "job.toml", "--out", "whole", "--set", f"run.rounds={reached + 7}").returncode == 0
    assert model(folder / "run").tobytes() == model(folder / "whole").tobytes()


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(folder):
    process = slow(folder)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    done = finish(process, 20)
    assert done.returncode == 75, done.stderr
    assert list((folder / "run" / "checkpoints").glob("round-*.h5"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_mpirun_stops_after_a_checkpoint(folder, number):
    process = slow(folder)
    process.send_signal(number)
    finish(process, 20)
    assert list((folder / "run" / "checkpoints").glob("round-*.h5"))


def test_a_killed_rank_ends_all_and_the_run_goes_on_from_its_checkpoint(mpiclip, folder):
    process = slow(folder, "--set", "run.checkpoint_every=50")
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    assert finish(process, 20).returncode != 0
    saved = int(max((folder / "run" / "checkpoints").glob("round-*.h5")).stem.split("-")[1])
    assert saved % 50 == 0
    assert mpiclip(3, "resume", "run", "--set", f"run.rounds={saved + 9}").returncode == 0
    assert mpiclip(3, "train", "job.toml", "--out", "whole", "--set", f"run.rounds={saved + 9}").returncode == 0
    assert model(folder / "run").tobytes() == model(folder / "whole").tobytes()


@pytest.mark.parametrize("entry", ["main", "api"])
def test_an_exception_on_one_rank_ends_all(folder, entry):
    """Within seconds, with that rank's message: from the console script and from a program of one's own."""
    call = ("import mpiclip; mpiclip.train('job.toml')" if entry == "api" else
            "from mpiclip.__main__ import main; sys.exit(main(['train', 'job.toml', '--out', 'run']))")
    (folder / "program.py").write_text(
        "import sys\n"
        "from mpiclip.workers import Workers\n"
        "grad = Workers.grad\n"
        "def failing(self, x):\n"
        "    if self.comm.rank == 1 and self.round == 7:\n"
        "        raise RuntimeError('the seventh round of rank one')\n"
        "    return grad(self, x)\n"
        "Workers.grad = failing\n"
        f"{call}\n")
    begin = time.monotonic()
    done = finish(start(3, "program.py", cwd=folder), 30)
    assert done.returncode == 1
    assert "the seventh round of rank one" in done.stderr and "rank 1 of 3" in done.stderr
    assert time.monotonic() - begin < 15


# ---- bad input: status 2 and one line that says what to do. Alone, the verbs run in this process: they start faster.


@pytest.fixture
def here(folder, monkeypatch, capsys):
    """here("train", …): the command line alone, in the folder."""
    import mpiclip
    assert callable(mpiclip.train)          # named before the module of the same name is imported: see the next test
    monkeypatch.chdir(folder)

    def run(*words):
        status = main(list(map(str, words)))
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)
    return run


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    line = last_line(done.stderr)
    for word in words:
        assert word in line, line


def test_train_is_the_function_whoever_imported_the_module(tmp_path):
    program = "from mpiclip.training import Run\nimport mpiclip\nassert callable(mpiclip.train)\n"
    (tmp_path / "program.py").write_text(program)
    done = finish(start(0, "program.py", cwd=tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setting, words", [
    ("run.rouns=3", ["run.rouns", "rounds"]),
    ("rum.rounds=3", ["rum", "run"]),
    ("method.name=clip12", ["method.name", "clip12", "clip21"]),
    ("method.tau=-1", ["method.tau", "-1", "greater than or equal to 0"]),
    ("method.tao=1", ["method.tao", "tau"]),
    ("method.stepsize=fast", ["method.stepsize", "fast", "1/L"]),
    ("method.stepsize=0", ["method.stepsize", "greater than 0"]),
    ("problem.name=logistik", ["problem.name", "logistik", "logistic"]),
    ("problem.lam=-0.1", ["problem.lam", "-0.1"]),
    ("data.split=random", ["data.split", "random", "'iid'"]),
    ("data.split=dirichlet", ["data.alpha", "needs"]),
    ("data.file=nowhere.h5", ["nowhere.h5"]),
    ("data.file=train.npz", ["train.npz", "HDF5"]),
    ("run.workers=500", ["500", "120"]),
    ("run.workers=0", ["run.workers", "0"]),
    ("run.batch=0", ["run.batch", "0"]),
    ("run.dtype=float16", ["run.dtype", "float16", "float32"]),
    ("run.device=cuda", ["run.device", "cuda"]),
    ("aggregate.f=3", ["aggregate.f"]),
    ("aggregate.rules=[\"arcc\"]", ["aggregate.rules", "arcc", "arc"]),
    ("aggregate.attack={name=\"sign_flop\"}", ["sign_flop", "sign_flip"]),
    ("run.rounds", ["--set", "run.rounds", "table.key=value"]),
])
def test_refuses(here, folder, setting, words):
    refused(here("train", "job.toml", "--out", "run", "--set", setting), *words)
    assert not (folder / "run" / "run.h5").exists(), "a refused run leaves nothing"


@pytest.mark.parametrize("setting, words", [("data.file=nowhere.h5", ["nowhere.h5"]), ("method.tau=-1", ["method.tau"]),
                                            ("run.workers=2", ["run.workers", "3 ranks"])])
def test_refuses_on_all_ranks_together(mpiclip, folder, setting, words):
    refused(mpiclip(3, "train", "job.toml", "--set", setting), *words)


def test_refuses_data_that_is_not_whole(mpiclip, folder):
    whole = (folder / "train.h5").read_bytes()
    (folder / "train.h5").write_bytes(whole[:len(whole) // 2])
    refused(mpiclip(2, "train", "job.toml"), "train.h5")


def test_refuses_nan_in_the_data(mpiclip, folder):
    with h5py.File(folder / "train.h5", "r+") as f:
        f["train/x"][17, 3] = np.nan
    refused(mpiclip(2, "train", "job.toml"), "train.h5", "row 18", "feature 4")


def test_refuses_a_config_that_is_not_there_or_not_toml(mpiclip, folder):
    refused(mpiclip(0, "train", "jobs.toml"), "jobs.toml")
    (folder / "bad.toml").write_text("[run\nrounds = 3")
    refused(mpiclip(0, "train", "bad.toml"), "bad.toml", "TOML")


def test_refuses_an_output_that_cannot_be_written(mpiclip, folder):
    (folder / "file").write_text("")
    refused(mpiclip(2, "train", "job.toml", "--out", "file/run"), "file/run")


def test_refuses_to_overwrite_a_run(mpiclip, here, folder):
    assert here("train", "job.toml", "--out", "run", "--set", "run.rounds=1").returncode == 0
    refused(mpiclip(2, "train", "job.toml", "--out", "run"), "run", "resume")


@pytest.mark.parametrize("setting, words", [("method.tau=0.1", ["method.tau", "0.1", "0.05"]),
                                            ("run.seed=4", ["run.seed"]), ("method.name=clip_gd", ["method.name"])])
def test_refuses_to_resume_another_config(here, setting, words):
    assert here("train", "job.toml", "--out", "run", "--set", "run.rounds=3").returncode == 0
    refused(here("resume", "run", "--set", setting), *words)


def test_refuses_to_resume_on_other_data(mpiclip, here, folder):
    assert here("train", "job.toml", "--out", "run", "--set", "run.rounds=3").returncode == 0
    with h5py.File(folder / "train.h5", "r+") as f:
        f["train/y"][0] *= -1
    refused(mpiclip(2, "resume", "run", "--set", "run.rounds=9"), "train.h5", "not the data")


def test_refuses_to_resume_nothing(here):
    refused(here("resume", "nothing"), "nothing")


@pytest.mark.parametrize("n", [0, 3])
def test_a_diverging_run_stops_and_keeps_its_last_good_round(mpiclip, folder, n):
    """A step far too long: worker, round and loss are named; the checkpoint is the state before that round."""
    (folder / "job.toml").write_text("""
        [problem]
        name = "quadratic"
        curvature = [[1.0, 1.0], [1.0, 2.0], [1e30, 1.0]]
        centre = [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
        [method]
        name = "gd"
        stepsize = 10.0
        [run]
        workers = 3
        rounds = 1000
        dtype = "float32"
        eval_every = 1000""")
    done = mpiclip(n, "train", "job.toml", "--out", "run")
    refused(done, "round", "worker 2", "not finite", "loss")
    failed = int(last_line(done.stderr).split("round ")[1].split(":")[0])
    saved = int(max((folder / "run" / "checkpoints").glob("*.h5")).stem.split("-")[1])
    assert saved == failed
    assert np.isfinite(model(folder / "run")).all()


def test_a_local_step_that_diverges_spoils_no_checkpoint(mpiclip, folder):
    """Also in the last round: the model that is kept is finite, and the run can go on from it."""
    (folder / "job.toml").write_text("""
        [problem]
        name = "quadratic"
        curvature = [[1e30], [1.0]]
        centre = [[1.0], [1.0]]
        [method]
        name = "celgc"
        eta = 1e9
        gamma = 1e200
        interval = 4
        [run]
        workers = 2
        rounds = 1
        checkpoint_every = 1
        dtype = "float32\"""")
    refused(mpiclip(2, "train", "job.toml", "--out", "run"), "local step", "not finite")
    assert not list((folder / "run" / "checkpoints").glob("*.h5"))


def test_two_runs_do_not_share_a_folder(mpiclip, folder):
    process = slow(folder, "--set", "run.checkpoint_every=50", n=0)
    refused(mpiclip(2, "resume", "run"), "another mpiclip")
    process.send_signal(signal.SIGTERM)
    assert finish(process, 20).returncode == 75


def test_resume_keeps_the_number_of_workers(mpiclip, folder):
    """Also where it came from the number of ranks."""
    (folder / "job.toml").write_text(CONFIG.replace("workers = 6\n", ""))
    assert mpiclip(3, "train", "job.toml", "--out", "run", "--set", "run.rounds=5").returncode == 0
    assert mpiclip(2, "resume", "run", "--set", "run.rounds=9").returncode == 0
    assert json.loads(mpiclip(0, "show", "run", "--json").stdout)["workers"] == 3
    refused(mpiclip(0, "resume", "run", "--set", "run.rounds=4"), "run.rounds", "9")


def test_importing_under_mpirun_is_done_once(mpiclip, folder):
    done = mpiclip(3, "data", "import", "train.npz", "again.h5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("again.h5") == 1


@pytest.mark.parametrize("text, words", [
    ("run = 5", ["run = 5", "table"]), ("data = 'x.h5'", ["data", "table"]), ("method = 'gd'", ["method", "table"]),
    ("[[run]]\nrounds = 3", ["run", "table"]), ("[method]\nname = 3", ["method.name = 3"]),
    ("[run]\nrounds = true", ["run.rounds = True"]), ("[run]\nrounds = '10'", ["run.rounds", "10"]),
    ("[aggregate]\nf = 1\nattack = { name = 'sign_flip', tau = 3 }", ["aggregate.attack.sign_flip.tau"])])
def test_refuses_values_of_the_wrong_type(mpiclip, folder, text, words):
    tables = {"problem": "[problem]\nname = 'quadratic'\ndimension = 3", "method":
              "[method]\nname = 'gd'\nstepsize = 0.1"}
    named = text.split("]")[0].strip("[") if text.startswith("[") else text.split()[0]
    whole = "\n".join([text] + [t for name, t in tables.items() if name != named])
    (folder / "job.toml").write_text(whole if not text.startswith("[") else "\n".join(
        [t for name, t in tables.items() if name != named] + [text]))
    refused(mpiclip(0, "train", "job.toml", "--out", "run"), *words)


def test_a_full_disk_keeps_what_there_was(mpiclip, folder):
    """A checkpoint that does not fit: one line, all ranks end, the run can go on elsewhere from what is there."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from mpiclip.__main__ import main; sys.exit(main(sys.argv[1:]))\n")
    (folder / "limited.py").write_text(code)
    (folder / "job.toml").write_text("""
        [problem]
        name = "quadratic"
        dimension = 20000
        [method]
        name = "clip21"
        tau = 1.0
        stepsize = 0.1
        [run]
        workers = 4
        rounds = 3""")
    done = finish(start(2, "limited.py", "train", "job.toml", "--out", "run", cwd=folder), 30)
    refused(done, "checkpoint")
    assert not list((folder / "run" / "checkpoints").glob("*")), "no half checkpoint stays"
    assert mpiclip(0, "show", "run").returncode == 0
