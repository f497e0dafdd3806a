"""PyTorch models trained by every method, on any number of ranks: the papers' loops, DistributedDataParallel's means,
the same bytes after a checkpoint."""

from copy import deepcopy

import numpy as np
import pytest
from test_compressed import loops
from test_methods import CASES, CENTRE, CURVATURE, X0, D, N
from test_resume import folder  # noqa: F401

import mpiclip
from mpiclip import methods
from mpiclip.comm import Comm
from mpiclip.compressors import TopK
from mpiclip.errors import InputError

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpiclip[torch]'")

from torch.nn.functional import cross_entropy  # noqa: E402

from mpiclip.torch import Distributed  # noqa: E402

COMPRESSING = {f"{name}, compressed": ({**constants, "compressor": {"name": "top_k", "k": 3}}, expected)
               for name, (constants, expected) in loops(TopK(k=3)).items()}
EVERY = CASES | COMPRESSING


def record(case, constants):
    """The method of a case in the tests' tables."""
    return methods.load(case.partition(",")[0])(**constants)


class Point(torch.nn.Module):
    """x (7,) in two parameters"""

    def __init__(self, x):
        super().__init__()
        x = torch.tensor(x)
        self.first, self.rest = torch.nn.Parameter(x[:4].reshape(2, 2)), torch.nn.Parameter(x[4:])

    def forward(self):
        return torch.cat([self.first.reshape(-1), self.rest])


def vector(model):
    """The parameters, and what else the model keeps, in one array."""
    return torch.cat([t.detach().double().reshape(-1) for t in model.state_dict().values()]).numpy().copy()


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """The server's columns are split over the ranks, however few there are."""
    monkeypatch.setattr("mpiclip.server.SMALL", 0)


@pytest.mark.parametrize("case", EVERY)
def test_every_method_equals_the_papers_loop(ranks, case):
    constants, expected = EVERY[case]
    average = case == "clip21_avg"      # of ½‖x − a_i‖², from 0
    model = Point((0 if average else 1) * X0)
    trainer = Distributed(model, record(case, constants), ranks, workers=N, together=False, threads=1)
    parts = [(torch.tensor(np.ones(D) if average else a), torch.tensor(c))
             for a, c in zip(CURVATURE, CENTRE, strict=True)]
    for _ in range(8):
        trainer.round(lambda model, part: (part[0] * (model() - part[1]) ** 2).sum() / 2, lambda worker: parts[worker])
    np.testing.assert_allclose(vector(model), expected()[8], rtol=1e-11, atol=1e-11)
    assert len({x.tobytes() for x in ranks.all(vector(model))}) == 1, "the ranks hold different models"


def net(seed=0, dropout=0.0):
    """A perceptron with BatchNorm, float64."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.Dropout(dropout),
                               torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()


rng = np.random.default_rng(5)
X = torch.tensor(rng.normal(size=(60, 6)) * np.linspace(1, 3, 60)[:, None])
LABELS = torch.tensor(rng.integers(0, 3, 60))
SHARES = np.array_split(np.arange(60), N)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def batches(trainer):
    """Seven rows of a worker's own, drawn as a function of (seed, worker, round)."""
    def draw(worker):
        rows = trainer.random(worker).choice(SHARES[worker], 7)
        return X[rows], LABELS[rows]
    return draw


CELGC = methods.load("celgc")(eta=0.5, gamma=0.2, interval=3)


def train(comm, rounds, model=None, method=CELGC, **options):
    """(the trainer, the model) after so many rounds."""
    model = net(comm.rank, 0.3) if model is None else model       # the ranks begin with different ones: rank 0's counts
    trainer = Distributed(model, method, comm, workers=N, seed=3, threads=1, **options)
    for _ in range(rounds):
        trainer.round(loss, batches(trainer))
    return trainer, model


def test_batch_norm_and_local_steps_equal_copies_of_the_model(ranks):
    """CELGC by PyTorch's own means, in one process: a copy of the model for each worker, then averages."""
    drawn: list = []

    def recorded(worker):
        drawn.append((worker, batches(trainer)(worker)))
        return drawn[-1][1]
    model = net()
    trainer = Distributed(model, CELGC, ranks, workers=N, seed=3, threads=1)
    common = deepcopy(model)
    for _ in range(4):
        drawn.clear()
        trainer.round(loss, recorded)
        copies = [deepcopy(common) for _ in range(N)]
        for worker, batch in sorted((item for rank in ranks.all(drawn) for item in rank), key=lambda item: item[0]):
            slopes = torch.autograd.grad(loss(copies[worker], batch), list(copies[worker].parameters()))
            length = torch.cat([slope.reshape(-1) for slope in slopes]).norm()
            with torch.no_grad():
                for p, slope in zip(copies[worker].parameters(), slopes, strict=True):
                    p -= min(CELGC.eta, CELGC.gamma / length) * slope
        common.load_state_dict({name: sum(copy.state_dict()[name] for copy in copies) / N
                                for name in common.state_dict()})
    assert len({x.tobytes() for x in ranks.all(vector(model))}) == 1, "buffers or parameters differ between ranks"
    np.testing.assert_allclose(vector(model), vector(common), rtol=1e-11, atol=1e-12)
    assert int(model[1].num_batches_tracked) == 12


def test_the_mean_gradient_is_that_of_distributed_data_parallel(ranks):
    """One process with all ranks' batches, clip_grad_norm_ and SGD, is what DDP computes; and naive_parallel."""
    ours, theirs = [torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
                    for _ in range(2)]
    theirs.load_state_dict(ours.state_dict())
    for p in ours.parameters() if ranks.rank else []:
        torch.nn.init.zeros_(p)                             # rank 0's counts
    for p in theirs.parameters():
        p.data = torch.from_numpy(ranks.same(p.detach().numpy().copy()))
    trainer = Distributed(ours, methods.load("naive_parallel")(eta=0.5, gamma=0.2), ranks, threads=1)
    shares = torch.arange(60 // ranks.size * ranks.size).reshape(ranks.size, -1)
    for _ in range(6):
        trainer.round(loss, lambda worker: (X[shares[worker]], LABELS[shares[worker]]))
        theirs.zero_grad()
        loss(theirs, (X[shares.ravel()], LABELS[shares.ravel()])).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.2 / 0.5)
        for p in theirs.parameters():
            p.data -= 0.5 * p.grad
    np.testing.assert_allclose(vector(ours), vector(theirs), rtol=1e-5)     # theirs adds 1e-6 to the norm


@pytest.mark.parametrize("at", ["sharded", "rank0"])
def test_resumed_with_the_same_bytes_on_any_number_of_ranks(ranks, folder, at):   # noqa: F811
    """BatchNorm, dropout, a state of workers and one of the server; begun on all ranks, ended by one, and reversed."""
    clip21 = methods.load("clip21_sgd2m")(tau={"quantile": 0.5}, stepsize=0.2, beta=0.3, beta_server=0.6)
    how = {"method": clip21, "at": at, "rules": ["trimmed_mean"], "f": 1}
    whole = vector(train(ranks, 5, **how)[1]).tobytes()
    train(ranks, 3, **how)[0].save(folder / "together")
    if ranks.rank == 0:
        train(Comm(), 3, **how)[0].save(folder / "alone")
    ranks.barrier()

    def ended(comm, where):
        trainer, model = train(comm, 0, **how)
        assert trainer.load(folder / where) == 3
        for _ in range(2):
            trainer.round(loss, batches(trainer))
        return vector(model).tobytes()
    assert ended(ranks, "together") == whole
    assert ended(ranks, "alone") == whole
    if ranks.rank == 0:
        assert ended(Comm(), "together") == whole
    ranks.barrier()


def test_a_gradient_that_is_not_finite_ends_on_all_ranks_and_changes_nothing(ranks):
    trainer, model = train(ranks, 1)
    before = vector(model)

    def bad(worker):
        rows, labels = batches(trainer)(worker)
        return (rows * (np.nan if worker == 3 else 1)), labels
    with pytest.raises(InputError, match=r"^round 1: the gradient of worker 3 is not finite \(its loss is nan\); a"):
        trainer.round(loss, bad)
    np.testing.assert_array_equal(vector(model), before)
    trainer.round(loss, batches(trainer))
    np.testing.assert_array_equal(vector(model), vector(train(ranks, 2)[1]))
    robust, model = train(ranks, 1, net(0), rules=["median"], f=1)
    robust.round(loss, bad)
    assert np.isfinite(vector(model)).all()


def test_attacks_and_rules_as_in_a_run_of_mpiclip(ranks):
    """The same quadratics: the last workers lie, have no batch, and the rules see what they see there."""
    aggregate = {"rules": ["arc", "nnm", "trimmed_mean"], "f": 1, "attack": {"name": "alie"}}
    run = mpiclip.train({"problem": {"name": "quadratic", "curvature": CURVATURE[:-1].tolist(),
                                     "centre": CENTRE[:-1].tolist(), "start": 0.25},
                         "method": {"name": "robust_dshb", "stepsize": 0.3, "beta": 0.6}, "aggregate": aggregate,
                         "run": {"workers": N, "rounds": 10, "dtype": "float64"}}, ranks)
    model, asked = Point(X0), set()
    method = methods.load("robust_dshb")(stepsize=0.3, beta=0.6)
    trainer = Distributed(model, method, ranks, N, **aggregate, together=False, threads=1)

    def draw(worker):
        asked.add(worker)
        return torch.tensor(CURVATURE[worker]), torch.tensor(CENTRE[worker])
    for _ in range(10):
        trainer.round(lambda model, part: (part[0] * (model() - part[1]) ** 2).sum() / 2, draw)
    np.testing.assert_allclose(vector(model), run.x, rtol=1e-11)
    assert N - 1 not in set().union(*ranks.all(asked))
