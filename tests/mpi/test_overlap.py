"""Work that is done while an exchange is under way, as between hosts: it changes no byte, and hides the exchange."""

from time import perf_counter, sleep

import h5py
import numpy as np
import pytest
from test_methods import ROWS, rows  # noqa: F401

import mpiclip
from mpiclip import record
from mpiclip.comm import Comm
from mpiclip.device import Device
from mpiclip.errors import InputError
from mpiclip.server import Server
from mpiclip.training import Training

ROUNDS, FAILS = 5, 3
CELGC = {"name": "celgc", "eta": 1.0, "gamma": 0.1, "interval": 3}
CASES = {
    "local steps": (CELGC, {}, {}),
    "some take part": (CELGC, {}, {"participation": 4}),
    "the gradient itself is sent": ({"name": "gd", "stepsize": 0.5}, {"at": "rank0"}, {}),
    "evaluations leave the gradient": ({"name": "clip21", "tau": 0.1, "stepsize": 1.0}, {}, {"batch": "full"}),
    "messages": ({"name": "ef21", "stepsize": 0.5, "compressor": {"name": "top_k", "k": 2}}, {}, {}),
    "rules": (CELGC, {"rules": ["arc", "median"], "f": 1, "attack": {"name": "sign_flip"}, "suspect": True}, {})}


@pytest.fixture
def hosts(monkeypatch):
    """hosts(overlap): from here on ranks send, as those of several hosts do, and work meanwhile if they are to."""
    made = Server.__init__

    def several(overlap=True):
        def init(self, *args, **options):
            made(self, *args, **options)
            self.overlaps = self.overlaps and overlap
        monkeypatch.setattr(Server, "__init__", init)
        monkeypatch.setattr(Comm, "shared", lambda self, shape, dtype: None)
        monkeypatch.setattr("mpiclip.server.SMALL", 0)
    return several


@pytest.fixture
def folder(ranks, tmp_path_factory):
    """One new folder, the same on all ranks."""
    return ranks.same(tmp_path_factory.mktemp("run") if ranks.rank == 0 else None)


def job(rows, method=CELGC, aggregate=None, run=None):  # noqa: F811
    return {**ROWS, "data": {**ROWS["data"], "file": rows}, "method": method, "aggregate": aggregate or {},
            "run": {**ROWS["run"], "batch": 4, "rounds": ROUNDS, "eval_every": 1, "checkpoint_every": 2, **(run or {})}}


def left(folder):
    """What a run left on the disk, but for times: its lines, and the arrays of its checkpoints."""
    _, lines = record.read(folder)
    found = {name: lines[name].tobytes() for name in lines.dtype.names if not name.startswith("seconds")}
    for path in sorted(folder.glob("checkpoints/*.h5")):
        with h5py.File(path) as f:
            found |= {f"{path.name} {name}": array[:].tobytes() for name, array in f["arrays"].items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes(ranks, rows, folder, hosts, case):  # noqa: F811
    tables, saves = job(rows, *CASES[case]), case in ("local steps", "rules")
    hosts(overlap=False)
    waited = mpiclip.train(tables, ranks, folder / "waited" if saves else None)
    hosts(overlap=True)
    overlapped = mpiclip.train(tables, ranks, folder / "overlapped" if saves else None)
    assert overlapped.x.tobytes() == waited.x.tobytes()
    assert overlapped.metrics["round"].tolist() == list(range(ROUNDS + 1))
    for name, values in waited.metrics.items():
        if not name.startswith("seconds"):
            assert values.tobytes() == overlapped.metrics[name].tobytes(), name
    ranks.barrier()
    assert not saves or left(folder / "overlapped") == left(folder / "waited")
    assert not waited.metrics["seconds_hidden"].any()
    assert (overlapped.metrics["seconds_hidden"][-1] > 0) == (ranks.size > 1)


def test_what_is_hidden(ranks, hosts):
    """The last rank is late; the others do their work while they wait for it. Work is no exchange."""
    hosts()
    X = np.random.default_rng(0).normal(size=(ranks.size, 1000))
    server = Server(ranks, 1000, ranks.size, 1, Device("cpu"), "float64")
    late = ranks.size > 1 and ranks.rank == ranks.size - 1
    for movement in (lambda: server.join(server.mean(X[ranks.rank:][:1])), lambda: server.rows(X[ranks.rank:][:1])):
        done, before = [], (ranks.hidden, ranks.seconds)
        ranks.barrier()
        server.meanwhile(lambda done=done: (sleep(0.03), done.append(1)))
        if late:
            sleep(0.06)
        start = perf_counter()
        movement()
        elapsed = perf_counter() - start
        hidden, exchanged = ranks.hidden - before[0], ranks.seconds - before[1]
        assert done == [1]
        if ranks.size > 1:
            assert late or hidden >= 0.029
            assert exchanged + 0.029 <= elapsed
    coming = server.mean_to_come(X[ranks.rank:][:1])
    other = server.mean(2 * X[ranks.rank:][:1]).copy()
    np.testing.assert_array_equal(2 * coming(), other)


def test_work_that_fails_on_one_rank_leaves_no_exchange_open(ranks, hosts):
    hosts()
    X = np.random.default_rng(0).normal(size=(ranks.size, 100))
    server = Server(ranks, 100, ranks.size, 1, Device("cpu"), "float64")

    def fail():
        raise InputError("a full disk")
    for _ in range(2):
        if ranks.rank == 0:
            with pytest.raises(InputError, match="a full disk"):
                server.meanwhile(fail)
                server.mean(X[:1])
        else:
            server.mean(X[ranks.rank:][:1])
    np.testing.assert_allclose(server.join(server.mean(X[ranks.rank:][:1])), X.mean(0), atol=1e-15)


def test_a_signal_while_an_exchange_is_under_way(ranks, rows, folder, hosts, monkeypatch):  # noqa: F811
    hosts()
    whole = mpiclip.train(job(rows), ranks)
    evaluation = Training._evaluation

    def signalled(self, k, x):
        steps = evaluation(self, k, x)
        yield next(steps)
        if k == FAILS and ranks.rank == ranks.size - 1:
            self.stop()
        yield from steps
    monkeypatch.setattr(Training, "_evaluation", signalled)
    stopped = mpiclip.train(job(rows), ranks, folder)
    assert stopped.stopped
    rounds = stopped.metrics["round"].tolist()
    assert rounds == list(range(FAILS + 1 + (ranks.size > 1))), "when it came, its round had agreed to go on"
    monkeypatch.setattr(Training, "_evaluation", evaluation)
    resumed = mpiclip.resume(folder, (), ranks)
    assert resumed.x.tobytes() == whole.x.tobytes()
    assert resumed.metrics["loss"].tobytes() == whole.metrics["loss"].tobytes()


@pytest.mark.parametrize("step", [1, 3])
def test_a_gradient_that_is_not_finite(ranks, rows, folder, hosts, monkeypatch, step):  # noqa: F811
    """At the first local step of a round, or a later one: all lines up to its own are there, and a checkpoint."""
    from mpiclip.workers import Workers
    hosts()
    draw = Workers._draw

    def broken(self):
        if (self.round, self._step) == (FAILS, step - 1) and ranks.rank == 0:
            monkeypatch.setattr("mpiclip.workers.isfinite", lambda norm: False)
        return draw(self)
    monkeypatch.setattr(Workers, "_draw", broken)
    with pytest.raises(InputError, match="not finite"):
        mpiclip.train(job(rows), ranks, folder)
    ranks.barrier()
    lines = record.read(folder)[1]
    assert lines["round"].tolist() == list(range(FAILS + 1))
    assert np.isfinite(lines["grad_norm"]).all()
    saved = sorted(int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/*.h5"))
    assert saved[-1] == (FAILS if step == 1 else 2)


def test_columns_that_begin_beyond_2_gib(ranks, hosts):
    """The last columns of a vector that is longer than what 32 bits can count. Pages of zeros that nobody writes on
    take no room."""
    hosts()
    server = Server(ranks, ranks.size, ranks.size, 1, Device("cpu"), "float32", means_only=False)
    server.d = 2**29 + ranks.size
    server.starts = server.starts + 2**29
    x = np.zeros((1, server.d), np.float32)
    x[0, 2**29:] = 10 * ranks.rank + np.arange(ranks.size)
    if ranks.size > 1:
        assert server._transpose(x)[:, 0].tolist() == [10 * r + ranks.rank for r in range(ranks.size)]
