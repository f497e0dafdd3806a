"""Training PyTorch models: what is shared and what is copied, several workers at once, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

import mpiclip
from mpiclip import methods
from mpiclip.comm import Comm
from mpiclip.errors import InputError
from mpiclip.importers import import_file

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpiclip[torch]'")

from torch.nn.functional import cross_entropy  # noqa: E402

from mpiclip.torch import Distributed  # noqa: E402

GD, CELGC = methods.load("gd")(stepsize=0.1), methods.load("celgc")(eta=0.5, gamma=0.2, interval=3)
P, C, M, N = 6, 3, 60, 4        # features, classes, rows, workers
rng = np.random.default_rng(5)
X, LABELS = rng.normal(size=(M, P)), rng.integers(0, C, M)
SHARES = np.array_split(np.arange(M), N)


def net(*extra, hidden=9):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(P, hidden), torch.nn.Tanh(), *extra, torch.nn.Linear(hidden, C)).double()


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def batches(trainer, size=7):
    """Rows of a worker's own, drawn as a function of (seed, worker, round)."""
    def draw(worker):
        rows = trainer.random(worker).integers(SHARES[worker][0], SHARES[worker][-1] + 1, size)
        return torch.tensor(X[rows]), torch.tensor(LABELS[rows])
    return draw


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


def train(model, method, rounds, draw=None, loss=loss, workers=N, **options):
    """The trainer, after so many rounds."""
    trainer = Distributed(model, method, Comm(), workers, seed=3, threads=1, **options)
    for _ in range(rounds):
        trainer.round(loss, draw or batches(trainer))
    return trainer


def test_nobody_needs_pytorch():
    code = ("import sys; sys.modules['torch'] = None; import mpiclip, mpiclip.training, mpiclip.__main__\n"
            "try: mpiclip.torch\nexcept ImportError as error: print(error)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "mpiclip.torch needs PyTorch: pip install 'mpiclip[torch]'\n"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("method", [{"name": "sgd", "stepsize": 0.2, "beta": 0.5},
                                    {"name": "celgc", "eta": 0.5, "gamma": 0.2, "interval": 3}])
def test_the_same_network_as_problems_mlp(tmp_path, method, together):
    """The same batches, float64: the same trajectory, whether the gradients come one by one or by one vmap."""
    np.savez(tmp_path / "rows.npz", x=X, y=LABELS)
    import_file([tmp_path / "rows.npz"], tmp_path / "rows.h5")
    run = mpiclip.train({"data": {"file": str(tmp_path / "rows.h5"), "split": "contiguous"},
                         "problem": {"name": "mlp", "hidden": [9]}, "method": method,
                         "run": {"workers": N, "rounds": 6, "batch": 7, "seed": 3, "dtype": "float64"}}, Comm())
    start = mpiclip.train({**run.config.as_dict(), "run": {"workers": N, "rounds": 0, "seed": 3, "batch": 7,
                                                           "dtype": "float64"}}, Comm()).x
    model = net()
    torch.nn.utils.vector_to_parameters(torch.tensor(start), model.parameters())
    trainer = train(model, run.config.method, 6, together=together)
    np.testing.assert_allclose(vector(model), run.x, rtol=1e-10, atol=1e-12)
    assert trainer.clipped() == pytest.approx(run.metrics.get("clipped", [np.nan])[-1], nan_ok=True)


def test_the_model_is_the_servers_vector_and_a_gradient_is_copied_once(monkeypatch):
    model, copied = net(), []
    trainer = Distributed(model, GD, Comm(), 2, together=False)
    assert np.shares_memory(model[0].weight.detach().numpy(), trainer.s.x)
    assert np.shares_memory(model[-1].bias.detach().numpy(), trainer.s.x)
    copy, before = torch._foreach_copy_, vector(model)

    def recorded(to, of):
        copied.append([t.data_ptr() for t in to])
        copy(to, of)
    monkeypatch.setattr(torch, "_foreach_copy_", recorded)
    trainer.round(loss, batches(trainer))
    sizes = np.cumsum([0, *[p.numel() for p in model.parameters()][:-1]]) * 8
    board = trainer._server.mine
    assert copied == [(row.ctypes.data + sizes).tolist() for row in board], "gradients go straight to the exchange"
    np.testing.assert_allclose(vector(model), before - 0.1 * board.mean(0), rtol=1e-14)
    assert np.shares_memory(model[0].weight.detach().numpy(), trainer.s.x)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_depends_on_neither_the_ranks_nor_the_past():
    """What torch would draw next is left as it was, and what it draws for a worker is the same in any company."""
    model = net(torch.nn.Dropout(0.5))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train(model, CELGC, 3)
    assert torch.equal(torch.get_rng_state(), state)
    again = net(torch.nn.Dropout(0.5))
    torch.manual_seed(8)
    train(again, CELGC, 3)
    assert vector(again).tobytes() == vector(model).tobytes()
    alone = net()
    train(alone, CELGC, 3)
    assert not np.allclose(vector(alone), vector(model)), "nothing was dropped"


def test_parameters_that_are_frozen_unused_sparse_or_shared():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, P, sparse=True)
            self.unused, self.frozen = torch.nn.Linear(2, 2), torch.nn.Linear(P, P).requires_grad_(False)
            self.again, self.head = torch.nn.Linear(P, P), torch.nn.Linear(P, C)
            self.other = self.again                                             # one module under two names

        def forward(self, words):
            return self.head(self.other(self.frozen(self.again(self.embedding(words)))))
    torch.manual_seed(1)
    model = Words().double()
    before, frozen = vector(model.unused), vector(model.frozen)
    reference = Words().double()
    reference.load_state_dict(model.state_dict())
    batch = torch.arange(7), torch.tensor(LABELS[:7])
    for together in (True, False):
        trainer = train(model, GD, 1, lambda worker: batch, together=together, workers=2)
        slopes = torch.autograd.grad(loss(reference, batch), [p for p in reference.parameters() if p.requires_grad],
                                     allow_unused=True)
        with torch.no_grad():
            for p, slope in zip((p for p in reference.parameters() if p.requires_grad), slopes, strict=True):
                if slope is not None:
                    p -= 0.1 * (slope.to_dense() if slope.is_sparse else slope)
        np.testing.assert_allclose(vector(model), vector(reference), rtol=1e-12, atol=1e-15)
    assert trainer.s.x.size == sum(p.numel() for p in model.parameters()) - frozen.size
    assert vector(model.unused).tobytes() == before.tobytes() and vector(model.frozen).tobytes() == frozen.tobytes()


def test_rules_protect_the_statistics_of_batch_norm_too():
    """One worker's data are a million times too large."""
    def poisoned(trainer):
        def draw(worker):
            rows, labels = batches(trainer)(worker)
            return rows * (1e6 if worker == 1 else 1), labels
        return draw
    for rules, bound in (({}, 1e10), ({"rules": ["trimmed_mean"], "f": 1}, 10.0)):
        model = torch.nn.Sequential(torch.nn.Linear(P, 9), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, C)).double()
        trainer = Distributed(model, CELGC, Comm(), N, threads=1, **rules)
        for _ in range(3):
            trainer.round(loss, poisoned(trainer))
        assert (model[1].running_var.max() < bound) == bool(rules)


def test_the_method_may_be_replaced_by_one_with_other_constants():
    models = [net(), net()]
    for model, steps in zip(models, [(0.1, 0.1, 0.3), (0.1, 0.1, 0.1)], strict=True):
        trainer = Distributed(model, GD, Comm(), 1, seed=3, threads=1)
        for step in steps:
            trainer.method = trainer.method.model_copy(update={"stepsize": step})
            trainer.round(loss, batches(trainer))
    g = trainer._server.mine[0]
    np.testing.assert_allclose(vector(models[0]) - vector(models[1]), -0.2 * g, atol=1e-14)


@pytest.mark.parametrize("arguments, message", [
    ({"model": torch.nn.Tanh()}, "model: it has no parameters to train"),
    ({"model": net().requires_grad_(False)}, "model: it has no parameters to train"),
    ({"model": "resnet"}, "model: found str; expected a torch.nn.Module"),
    ({"model": net(torch.nn.Linear(9, 9)).half()}, "model: '0.weight' is torch.float16 on cpu; expected float32 or"),
    ({"model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())},
     "model: '1.weight' is torch.float64 on cpu, but '0.weight' is torch.float32 on cpu; expected one dtype"),
    ({"model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))},
     "model: '1.weight' is torch.float32 on meta; expected float32 or float64 on cpu or cuda"),
    ({"model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False).double())},
     "model: '1.running_mean' is torch.float64 on cpu, but '0.weight' is torch.float32"),
    ({"model": torch.nn.LazyLinear(3)}, "model: 'weight' has no shape yet; call the model once"),
    ({"method": methods.load("clip21")(tau=1, stepsize=0.1, sigma=1, delta=1e-5)}, "method.sigma: 'clip21' with noise"),
    ({"workers": 0}, "workers = 0: fewer than the 1 ranks"),
    ({"at": "here"}, "at = 'here': expected 'sharded' or 'rank0'"),
    ({"rules": ["median"], "f": 2, "workers": 3}, "aggregate.f: 2 of 3 workers"),
    ({"rules": ["medium"]}, "did you mean 'median'?"),
    ({"rules": ["median"], "f": 1, "workers": 5, "attack": {"name": "label_flip"}}, "attack: 'label_flip' needs label"),
])
def test_what_does_not_fit_is_refused_at_once(arguments, message):
    with pytest.raises(InputError) as caught:
        Distributed(**{"model": net(), "method": GD, "comm": Comm(), **arguments})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def changes(what):
    """A model that was changed after its first round."""
    model = net(torch.nn.Linear(9, 9))
    trainer = train(model, GD, 1)
    what(model)
    return trainer


@pytest.mark.parametrize("what, message", [
    (lambda model: model.append(torch.nn.Linear(C, C)), "model: a parameter was added"),
    (lambda model: model[0].requires_grad_(False), "model: a parameter was added, removed, replaced, frozen"),
    (lambda model: torch.nn.init.zeros_(model[0].bias), "model: '0.bias' was changed since the last round"),
    (lambda model: [loss(model, (torch.tensor(X), torch.tensor(LABELS))).backward(),
                    torch.optim.SGD(model.parameters(), 0.1).step()], "model: '0.weight' was changed since the last r"),
    (lambda model: model.load_state_dict(model.state_dict()), "model: '0.weight' was changed since the last round"),
    (lambda model: model.float(), "model: '0.weight' was changed since the last round (by an optimizer, load_state"),
])
def test_nobody_else_changes_the_parameters(what, message):
    trainer = changes(what)
    with pytest.raises(InputError) as caught:
        trainer.round(loss, batches(trainer))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("wrong, message", [
    (lambda model, batch: model(batch[0]), "loss(model, batch): found shape (7, 3); expected a scalar tensor"),
    (lambda model, batch: loss(model, batch).item(), "loss(model, batch): found float; expected a scalar tensor"),
    (lambda model, batch: loss(model, batch).detach(), "loss(model, batch): the result depends on no parameter"),
    (lambda model, batch: (torch.ones(1, requires_grad=True) * 2).sum(), "the result depends on no parameter"),
])
@pytest.mark.parametrize("workers", [1, N])
def test_a_loss_must_be_a_number_that_depends_on_the_model(wrong, message, workers):
    batch = torch.tensor(X[:7]), torch.tensor(LABELS[:7])
    with pytest.raises(InputError) as caught:
        train(net(), GD, 1, lambda worker: batch, wrong, workers)
    assert message in str(caught.value)


def test_what_else_goes_wrong_in_a_round():
    trainer = Distributed(net(), GD, Comm(), 1)
    left = iter([(torch.tensor(X), torch.tensor(LABELS))])
    trainer.round(loss, lambda worker: next(left))
    with pytest.raises(InputError, match=r"^round 1: `draw` has no batch left"):
        trainer.round(loss, lambda worker: next(left))
    with pytest.raises(InputError, match="smoothness of a PyTorch model is not known; give a number"):
        train(net(), methods.load("gd")(stepsize="1/L"), 1)

    class Counting(torch.nn.Linear):
        def __init__(self):
            super().__init__(P, C)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, rows):
            self.calls += 1
            return super().forward(rows)
    with pytest.raises(InputError, match="the buffer 'calls' has changed"):
        train(Counting().double(), GD, 2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(net(), GD, 2).save(tmp_path)
    for model, method, n, message in [(net(hidden=8), GD, N, "model is "), (net(), GD, 3, "workers is 4, expected 3"),
                                      (net(), CELGC, N, "method is 'gd', expected 'celgc'")]:
        with pytest.raises(InputError, match=f"a checkpoint of another run: {message}"):
            train(model, method, 0, workers=n).load(tmp_path)
    with pytest.raises(InputError, match="no checkpoint to go on from"):
        train(net(), GD, 0).load(tmp_path / "elsewhere")
