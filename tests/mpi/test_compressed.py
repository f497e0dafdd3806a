"""Methods that compress, and the exchange of their messages: on any number of ranks the paper's loop, the same bytes,
and nothing sent but the messages."""

from time import sleep

import numpy as np
import pytest
from test_methods import CASES, GRADS, NOISE, X0, D, K, N, config

import mpiclip
import reference
from mpiclip import compressors, methods
from mpiclip.comm import Comm
from mpiclip.compressors import Natural, Quantize, RandK, TopK
from mpiclip.device import Device
from mpiclip.errors import InputError
from mpiclip.server import Server
from mpiclip.streams import stream

ALL = [TopK(k=3), TopK(k=0.3), RandK(k=2), RandK(k=5, unbiased=True), Natural(), Quantize(bits=2), Quantize(bits=5),
       Quantize(bits=8, unbiased=True)]
every = pytest.mark.parametrize("C", ALL, ids=str)


def draws(i, k):
    return stream(0, "compress", i, k)


def C_of(C, dtype=np.float64):
    """The reference's compressor (u, i, k) → C(u) with the draws of this run."""
    return {"top_k": lambda u, i, k: reference.top_k(u, C.count(len(u))),
            "rand_k": lambda u, i, k: reference.rand_k(
                u, draws(i, k).choice(len(u), C.count(len(u)), replace=False, shuffle=False), C.unbiased),
            "natural": lambda u, i, k: reference.natural(
                u, 1 - np.floor(draws(i, k).random(len(u)) * 2.0**52) / 2.0**52),
            "quantize": lambda u, i, k: reference.quantize(u, draws(i, k).random(len(u)), C.bits, C.unbiased)}[C.name]


def loops(C):
    """method → (constants in the config, the reference's trajectory)"""
    return {"ef21": ({"stepsize": 0.05}, lambda: reference.ef21(GRADS, X0, K, 0.05, C_of(C))),
            "press_clip21": ({"stepsize": 0.05, "tau": 1.0},
                             lambda: reference.press_clip21(GRADS, X0, K, 1.0, 0.05, C_of(C))),
            "dcgd": ({"stepsize": 0.05}, lambda: reference.dcgd(GRADS, X0, K, 0.05, C_of(C)))}


def job(name, constants, C, rounds=K, **run):
    return config(name, constants | {"compressor": C.model_dump()}, rounds, **run)


def test_every_method_that_compresses_is_here():
    assert set(loops(TopK(k=1))) == {name for name in methods.names()
                                     if "compressor" in methods.load(name).model_fields}


# ---- the exchange


def hosted(ranks, X):
    """This rank's rows of X, and their numbers."""
    ids = np.array_split(np.arange(len(X)), ranks.size)[ranks.rank]
    return X[ids], ids


def server(ranks, X, C, board=True):
    return Server(ranks, X.shape[1], len(X), len(hosted(ranks, X)[0]), Device("cpu"), X.dtype, board=board,
                  message=C.bytes(X.shape[1], X.dtype))


def message(ranks, X, C, round=0):
    mine, ids = hosted(ranks, X)
    return C.compress(mine, ids, lambda worker: stream(1, "compress", worker, round))


def alone(X, C, round=0):
    """The mean of what is decompressed worker by worker."""
    total = np.zeros(X.shape[1], X.dtype)
    for i in range(len(X)):
        c = np.zeros((1, X.shape[1]), X.dtype)
        C.compress(X[i:i + 1], [i], lambda worker: stream(1, "compress", worker, round)).add_to(c)
        total += c[0]
    return total * X.dtype.type(1 / len(X))


def data(n, d, dtype):
    return np.random.default_rng(n * 1000 + d).normal(size=(n, d)).astype(dtype)


@every
@pytest.mark.parametrize("n, d, dtype", [(5, 7, "float64"), (7, 1003, "float32"), (11, 20_001, "float64")])
@pytest.mark.parametrize("board", [True, False])
def test_the_mean_of_messages(ranks, C, n, d, dtype, board):
    """The same bytes as in one process; again and again; and each rank has sent its messages to all others."""
    X = data(n, d, dtype)
    server_ = server(ranks, X, C, board)
    assert server_.at == "replicated" and server_._board is None, "no dense vector is posted"
    for round in range(3):
        own = message(ranks, X, C, round)
        before, sent = own.rows.copy(), ranks.sent
        mean = server_.mean(own)
        assert ranks.sent - sent == (ranks.size - 1) * len(hosted(ranks, X)[0]) * C.bytes(d, dtype)
        assert server_.join(mean).tobytes() == alone(X, C, round).tobytes()
        np.testing.assert_array_equal(own.rows, before)


@pytest.mark.parametrize("board", [True, False])
def test_a_slow_rank_still_reads_the_messages_of_its_round(ranks, board, monkeypatch):
    C, X = TopK(k=50), data(6, 5000, "float64")
    server_ = server(ranks, X, C, board)
    add = compressors.add_sparse

    def late(*arguments):               # after the messages have been exchanged, before they are read
        if late.on:
            sleep(0.02)
        add(*arguments)
    monkeypatch.setattr(compressors, "add_sparse", late)
    for k in range(1, 7):
        late.on = False
        expected = alone(k * X, C)
        own = message(ranks, k * X, C)
        late.on = ranks.rank == k % ranks.size
        np.testing.assert_array_equal(server_.mean(own), expected)


class Counted:
    """An MPI communicator that counts what this rank sends to the others, as the standard describes each call."""

    def __init__(self, mpi):
        self._mpi, self.bytes, self.calls = mpi, 0, []

    def __getattr__(self, name):
        def call(send, *rest, **options):
            self.calls.append(name)
            if name == "Allgatherv":
                rows, row = send
                assert row.Get_size() == rows.shape[1]
                self.bytes += (self._mpi.size - 1) * rows.nbytes
            return getattr(self._mpi, name)(send, *rest, **options)
        found = getattr(self._mpi, name)
        return call if name[0].isupper() and name != "Barrier" else found


@pytest.mark.parametrize("board", [True, False])
@pytest.mark.parametrize("C", ALL[::2], ids=str)
def test_nothing_but_the_messages_is_sent(ranks, C, board):
    if ranks.size == 1:
        pytest.skip("nobody to send to")
    X = data(7, 1000, "float32")
    server_ = server(ranks, X, C, board)
    own = message(ranks, X, C)
    mpi, sent = ranks.mpi, ranks.sent
    ranks.mpi = counted = Counted(mpi)
    try:
        server_.mean(own)
    finally:
        ranks.mpi = mpi
    assert counted.calls == ([] if board and ranks.hosts == 1 else ["Iallgatherv"])
    assert ranks.sent - sent == (ranks.size - 1) * own.rows.nbytes
    assert counted.bytes in (0, ranks.sent - sent)


def test_a_vector_that_is_not_compressed_still_has_a_mean(ranks):
    """Of an evaluation."""
    X = data(5, 3000, "float64")
    server_ = server(ranks, X, TopK(k=2))
    np.testing.assert_allclose(server_.mean(hosted(ranks, X)[0]), X.mean(0), rtol=1e-12, atol=1e-15)
    assert server_.norm(server_.mean(hosted(ranks, X)[0])) == pytest.approx(np.linalg.norm(X.mean(0)))


# ---- the methods


@every
@pytest.mark.parametrize("name", loops(TopK(k=1)))
def test_equals_the_papers_loop(ranks, name, C):
    """And the ranks hold the same bytes, those of a run in one process."""
    constants, expected = loops(C)[name]
    for rounds in (1, K):
        run = mpiclip.train(job(name, constants, C, rounds), ranks)
        np.testing.assert_allclose(run.x, expected()[rounds], rtol=1e-10, atol=1e-11)
    assert len({x.tobytes() for x in ranks.all(run.x)}) == 1, "the ranks hold different models"
    assert mpiclip.train(job(name, constants, C), Comm()).x.tobytes() == run.x.tobytes()


@pytest.mark.parametrize("small", [64 * 1024, 0])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_seed_draws(ranks, seed, small, monkeypatch):
    monkeypatch.setattr("mpiclip.server.SMALL", small)
    runs = [mpiclip.train(job("ef21", {"stepsize": 0.05}, RandK(k=2), seed=s), ranks).x for s in (seed, seed, 6)]
    assert runs[0].tobytes() == runs[1].tobytes() != runs[2].tobytes()


@pytest.mark.parametrize("C", [TopK(k=D), TopK(k=0.999), RandK(k=D), RandK(k=D, unbiased=True)], ids=str)
def test_with_all_coordinates_nothing_is_compressed(ranks, C):
    """Press-Clip21 is Clip21, EF21 and DCGD are gradient descent; the former without any rounding."""
    clip21 = mpiclip.train(config("clip21", CASES["clip21"][0], K), Comm())
    press = mpiclip.train(job("press_clip21", CASES["clip21"][0], C), ranks)
    assert press.x.tobytes() == clip21.x.tobytes()
    np.testing.assert_array_equal(press.metrics["clipped"], clip21.metrics["clipped"])
    for name in ("ef21", "dcgd"):
        run = mpiclip.train(job(name, CASES["gd"][0], C), ranks)
        np.testing.assert_allclose(run.x, CASES["gd"][1]()[K], rtol=1e-12, atol=1e-12)


@every
def test_without_a_threshold_press_clip21_is_ef21(ranks, C):
    press, ef21 = (mpiclip.train(job(name, {"stepsize": 0.05, **tau}, C, dtype="float32"), ranks)
                   for name, tau in (("press_clip21", {"tau": np.inf}), ("ef21", {})))
    assert press.x.tobytes() == ef21.x.tobytes() and not press.metrics["clipped"][1:].any()


def test_clipped_is_the_share_of_workers_that_clipped(ranks):
    C, k = TopK(k=3), 2
    run = mpiclip.train(job("press_clip21", {"stepsize": 0.05, "tau": 1.0}, C), ranks)
    xs, v_i = reference.press_clip21(GRADS, X0, K, 1.0, 0.05, C_of(C)), [np.zeros(D) for _ in GRADS]
    for x in xs[:k]:
        v_i = [v + reference.top_k(reference.clip(g(x) - v, 1.0), 3) for g, v in zip(GRADS, v_i, strict=True)]
    norms = [np.linalg.norm(g(xs[k]) - v) for g, v in zip(GRADS, v_i, strict=True)]
    assert run.metrics["clipped"][k + 1] == np.mean(np.array(norms) > 1)


@pytest.mark.parametrize("C", [TopK(k=3), Quantize(bits=5)], ids=str)
def test_error_feedback_finds_the_minimum(ranks, C):
    """Where compressed gradients alone do not."""
    minimum = sum(g(X0 * 0) for g in GRADS) / -sum(g(X0 * 0 + 1) - g(X0 * 0) for g in GRADS)
    for name, tau in (("ef21", {}), ("press_clip21", {"tau": 2.0})):
        run = mpiclip.train(job(name, {"stepsize": 0.2, **tau}, C, 200, eval_every=200), ranks)
        np.testing.assert_allclose(run.x, minimum, rtol=1e-6, atol=1e-6)
    run = mpiclip.train(job("dcgd", {"stepsize": 0.2}, C, 200, eval_every=200), ranks)
    assert np.abs(run.x - minimum).max() > 1e-3


@every
def test_noise_is_added_between_the_clip_and_the_compressor(ranks, C, added_noise):
    """And both the worker and the server add what was sent, noise and all."""
    tables = job("press_clip21", {"stepsize": 0.05, "tau": 1.0, **NOISE}, C) | {"privacy": {"noise": "reproducible"}}
    run = mpiclip.train(tables, ranks)
    z = np.concatenate(ranks.all(np.array(added_noise)), axis=1)              # (rounds, workers, d)
    assert z.shape == (K, N, D) and 0.6 < z.std() < 0.8
    expected = reference.press_clip21(GRADS, X0, K, 1.0, 0.05, C_of(C), list(z))
    np.testing.assert_allclose(run.x, expected[K], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("C", [TopK(k=3), RandK(k=2), Quantize(bits=5)], ids=str)
def test_bytes_of_a_run(ranks, C):
    """The messages, and nothing else; what evaluations send is not counted."""
    here = len(np.array_split(np.arange(N), ranks.size)[ranks.rank])
    for name in loops(C):
        for eval_every in (1, 100):
            run = mpiclip.train(job(name, loops(C)[name][0], C, 5, eval_every=eval_every), ranks)
            assert ranks.sent == 5 * (ranks.size - 1) * here * C.bytes(D, "float64")
            assert run.metrics["bytes"][-1] == max(ranks.all(ranks.sent))


@pytest.mark.parametrize("name, C", [("ef21", RandK(k=2)), ("press_clip21", TopK(k=0.3)), ("dcgd", Quantize(bits=5)),
                                     ("press_clip21", Natural())], ids=str)
def test_resume(ranks, name, C, tmp_path_factory):
    """An interrupted run ends with the same bytes."""
    folder = ranks.same(tmp_path_factory.mktemp("run") if ranks.rank == 0 else None)
    constants = loops(C)[name][0]
    whole = mpiclip.train(job(name, constants, C), ranks)
    mpiclip.train(job(name, constants, C, 11), ranks, folder)
    resumed = mpiclip.resume(folder, [f"run.rounds={K}"], ranks)
    assert resumed.x.tobytes() == whole.x.tobytes()
    for metric in ("round", "loss", "grad_norm"):
        np.testing.assert_array_equal(resumed.metrics[metric], whole.metrics[metric])
    with pytest.raises(InputError, match=r"method.compressor = .*: a resumed run may change only|was started with"):
        mpiclip.resume(folder, ["method.compressor={name='top_k', k=1}"], ranks)


@pytest.mark.parametrize("method, aggregate, told", [
    ({"name": "ef21", "compressor": {"name": "top_k", "k": D + 1}}, {}, "k = 8: the model has only d = 7 coordinates"),
    ({"name": "dcgd", "compressor": {"name": "rand_k", "k": 100}}, {}, "k = 100: the model has only d = 7 coordinates"),
    ({"name": "ef21", "compressor": {"name": "rand_k", "k": 2, "unbiased": True}}, {}, "'rand_k' is not contractive"),
    ({"name": "press_clip21", "tau": 1.0, "compressor": {"name": "rand_k", "k": 1, "unbiased": True}}, {},
     "'rand_k' is not contractive"),
    ({"name": "press_clip21", "tau": 1.0, "compressor": {"name": "top", "k": 1}}, {}, "did you mean 'top_k'?"),
    ({"name": "ef21"}, {}, "method.compressor: missing"),
    ({"name": "gd", "compressor": {"name": "natural"}}, {}, "method.compressor: there is no 'compressor'"),
    ({"name": "ef21", "compressor": {"name": "natural"}}, {"rules": ["median"], "f": 1}, "aggregate.rules = "),
    ({"name": "ef21", "compressor": {"name": "natural"}}, {"attack": {"name": "sign_flip"}, "f": 1},
     "aggregate.attack = "),
    ({"name": "dcgd", "compressor": {"name": "natural"}}, {"at": "rank0"}, "aggregate.at = 'rank0': not with "
                                                                           "method.compressor")])
def test_bad_input_is_told_by_all_ranks(ranks, method, aggregate, told):
    tables = config("gd", {}, 3) | {"method": {"stepsize": 0.1, **method}, "aggregate": aggregate}
    with pytest.raises(InputError) as error:
        mpiclip.train(tables, ranks)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert error.value.agreed
