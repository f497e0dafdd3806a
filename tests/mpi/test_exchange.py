"""The exchange: means, transposition and joining on any number of ranks, with uneven workers and columns."""

import os
from pathlib import Path
from time import sleep

import numpy as np
import pytest

import reference
from mpiclip import rules
from mpiclip.aggregation import Aggregation, aggregate
from mpiclip.comm import Comm
from mpiclip.device import Device
from mpiclip.errors import InputError
from mpiclip.server import Server


def hosted(ranks, X):
    """This rank's rows of X."""
    return X[np.array_split(np.arange(len(X)), ranks.size)[ranks.rank]].copy()


def server(ranks, X, at="sharded", means_only=False, board=True):
    here = len(hosted(ranks, X))
    return Server(ranks, X.shape[1], len(X), here, Device("cpu"), X.dtype, at, means_only, board=board)


def data(n, d, dtype):
    return np.random.default_rng(n * 1000 + d).normal(size=(n, d)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, d", [(4, 1), (4, 7), (5, 1001), (11, 50_003)])
@pytest.mark.parametrize("at, means_only", [("sharded", True), ("sharded", False), ("rank0", True)])
@pytest.mark.parametrize("board", [True, False])
def test_mean_and_join(ranks, n, d, dtype, at, means_only, board):
    X = data(n, d, dtype)
    server_ = server(ranks, X, at, means_only, board)
    mine = hosted(ranks, X)
    part = server_.mean(mine)
    assert part.shape == (server_.own.stop - server_.own.start,)
    whole = server_.join(part)
    np.testing.assert_allclose(whole, X.astype(np.float64).mean(0), rtol=0, atol=20 * np.finfo(dtype).eps)
    assert len({w.tobytes() for w in ranks.all(np.asarray(whole))}) == 1, "the ranks hold different bytes"
    np.testing.assert_array_equal(mine, hosted(ranks, X))


@pytest.mark.parametrize("at", ["sharded", "rank0"])
@pytest.mark.parametrize("n, d", [(4, 3), (5, 1001), (7, 20_011)])
@pytest.mark.parametrize("board", [True, False])
def test_rows_are_all_workers_columns(ranks, at, n, d, board):
    X = data(n, d, "float32")
    server_ = server(ranks, X, at, board=board)
    rows = server_.rows(hosted(ranks, X))
    np.testing.assert_array_equal(rows.columns(), X[:, server_.own])
    owned = ranks.all((server_.own.start, server_.own.stop))
    assert sorted(j for start, stop in owned for j in range(start, stop)) == list(range(d))
    np.testing.assert_allclose(rows.norms(), np.linalg.norm(X.astype(np.float64), axis=1), rtol=1e-12)
    server_.release()


def test_norm_of_a_server_vector(ranks):
    for d, means_only in ((1000, True), (1000, False), (100_000, True)):
        X = data(4, d, "float64")
        server_ = server(ranks, X, means_only=means_only)
        assert server_.norm(server_.mean(hosted(ranks, X))) == pytest.approx(np.linalg.norm(X.mean(0)), rel=1e-12)


def test_only_rank_0_has_a_say_where_only_rank_0_is_trusted(ranks):
    X = data(5, 300, "float64")
    assert server(ranks, X, "rank0").total([1.0 + ranks.rank]).tolist() == [1.0]
    assert server(ranks, X, means_only=False).total([1.0 + ranks.rank]) == sum(range(1, ranks.size + 1))


def test_all_reduce_and_exchange_agree(ranks):
    X = data(6, 999, "float64")
    small, exchanged = (server(ranks, X, means_only=means_only, board=False) for means_only in (True, False))
    assert (small.at, exchanged.at) == ("replicated", "sharded")
    np.testing.assert_allclose(small.mean(hosted(ranks, X)), exchanged.join(exchanged.mean(hosted(ranks, X))),
                               rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("board", [True, False])
def test_bytes_sent(ranks, board):
    """An exchange moves what an all-reduce must: about 2 (R−1)/R of the vector a rank."""
    d = 100_000
    X = data(ranks.size, d, "float32")
    server_ = server(ranks, X, board=board)
    before = ranks.sent
    server_.join(server_.mean(hosted(ranks, X)))
    assert ranks.sent - before == pytest.approx(2 * (ranks.size - 1) / ranks.size * d * 4, rel=1e-3, abs=1)


@pytest.mark.parametrize("at", ["sharded", "rank0"])
def test_on_the_board_a_mean_has_the_same_bytes_for_any_number_of_ranks(ranks, at):
    if ranks.hosts > 1:
        pytest.skip("one host's ranks share a board")
    X = data(9, 30_011, "float32")
    alone = Server(Comm(), 30_011, 9, 9, Device("cpu"), "float32").mean(X)
    server_ = server(ranks, X, at)
    assert server_.join(server_.mean(hosted(ranks, X))).tobytes() == alone.tobytes()


def test_the_board_may_be_overwritten_as_soon_as_a_mean_is_back(ranks):
    X = data(8, 200_003, "float64")
    server_ = server(ranks, X)
    for k in range(20):
        server_.mine[:] = hosted(ranks, X) * k
        part = server_.mean(server_.mine)
        server_.mine[:] = np.nan
        whole = server_.join(part)
        np.testing.assert_allclose(whole, X.mean(0) * k, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", ["sharded", "rank0"])
@pytest.mark.parametrize("board", [True, False])
@pytest.mark.parametrize("slow", ["first", "last"])
def test_nobody_runs_ahead_of_a_slow_rank(ranks, at, board, slow):
    """A rank that posts late is waited for; one that reads late still finds the model and the rows of its own round."""
    X = data(6, 5000, "float64")
    server_ = server(ranks, X, at, board=board)
    late = ranks.rank == (0 if slow == "first" else ranks.size - 1)
    for k in range(1, 4):
        if late:
            sleep(0.02)
        part = server_.mean(hosted(ranks, k * X))
        whole = server_.join(part)
        if late:
            sleep(0.02)
        np.testing.assert_allclose(whole, k * X.mean(0), rtol=1e-12, atol=1e-12)
        rows = server_.rows(hosted(ranks, k * X))
        if late:
            sleep(0.02)
        np.testing.assert_array_equal(rows.columns(), k * X[:, server_.own])
        server_.release()


def test_rules_of_a_slow_rank_still_see_the_rows_of_their_round(ranks, monkeypatch):
    def late(rows, f):
        if ranks.rank == ranks.size - 1:
            sleep(0.02)
        return rows.mean()
    monkeypatch.setitem(rules.RULES, "late", None)
    rules.rule(late)
    X = data(6, 5000, "float64")
    aggregation = Aggregation(server(ranks, X), ["late"], 1)
    mine = aggregation.server.mine
    for k in range(1, 4):
        mine[:] = k * hosted(ranks, X)
        part = aggregation(mine)
        mine[:] = np.nan                    # the next gradient
        np.testing.assert_allclose(part, k * X.mean(0)[aggregation.server.own], rtol=1e-12, atol=1e-12)
        ranks.barrier()


def test_notes_are_read_before_they_are_written_again(ranks):
    """One agreement after the other, with a rank that is late before or after each."""
    for k in range(12):
        if ranks.rank == k % ranks.size:
            sleep(0.005)
        assert ranks.highest(k * 10 + ranks.rank) == k * 10 + ranks.size - 1


def test_dot_of_server_vectors(ranks):
    for d, means_only in ((1000, True), (1000, False), (100_000, True)):
        X = data(4, d, "float32")
        server_ = server(ranks, X, means_only=means_only)
        assert server_.dot(X[0, server_.own], X[1, server_.own]) == pytest.approx(
            X[0].astype(float) @ X[1], rel=1e-10, abs=1e-10)


def test_without_shared_memory_vectors_are_sent(ranks, monkeypatch):
    """No room: MPI takes over. Nothing is left behind."""
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.posix_fallocate", full)
    X = data(5, 1000, "float64")
    server_ = server(ranks, X)
    assert server_._board is None
    np.testing.assert_allclose(server_.join(server_.mean(hosted(ranks, X))), X.mean(0), rtol=1e-12, atol=1e-15)
    assert not list(Path("/dev/shm").glob("mpiclip-*"))


@pytest.mark.parametrize("at", ["sharded", "rank0"])
@pytest.mark.parametrize("names", [[], ["arc", "trimmed_mean"], ["arc", "nnm", "median"], ["nnm"], ["arc", "mean"]])
def test_robust_aggregation(ranks, at, names):
    f, X = 2, data(9, 503, "float64") * np.arange(1, 10)[:, None]
    aggregation = Aggregation(server(ranks, X, at), names, f, {"name": "sign_flip"}, np.arange(9) >= 7)
    expected = reference.sign_flip(X, f)
    for name in names:
        expected = getattr(reference, name)(expected, f)
    if expected.ndim == 2:
        expected = expected.mean(0)
    part = aggregation(hosted(ranks, X))
    np.testing.assert_allclose(aggregation.server.join(part), expected, rtol=1e-10, atol=1e-12)


def test_non_finite_rows_count_as_byzantine(ranks):
    X = data(7, 40, "float64")
    clean = X.copy()
    X[2, 5], X[6, :] = np.nan, np.inf
    clean[[2, 6]] = 0
    aggregation = Aggregation(server(ranks, X), ["arc", "trimmed_mean"], 2)
    result = aggregation.server.join(aggregation(hosted(ranks, X)))
    np.testing.assert_allclose(result, reference.trimmed_mean(reference.arc(clean, 2), 2), rtol=1e-10, atol=1e-12)
    assert aggregation.tally.means()["replaced"] == 2
    with pytest.raises(InputError, match="workers 2, 6 are not finite"):
        Aggregation(server(ranks, X), ["arc", "trimmed_mean"], 1)(hosted(ranks, X))


def test_aggregate_with_comm(ranks):
    X = data(8, 300, "float32")
    result = aggregate(hosted(ranks, X), ["arc", "trimmed_mean"], 2, comm=ranks.mpi)
    np.testing.assert_allclose(result, aggregate(X, ["arc", "trimmed_mean"], 2), rtol=1e-5, atol=1e-6)


def test_aggregate_with_comm_is_the_callers(ranks):
    """Not memory that the ranks share: what one writes on its result, others do not see."""
    X = data(8, 300, "float64")
    result = aggregate(hosted(ranks, X), ["median"], 2, comm=ranks.mpi)
    ranks.barrier()
    result[:] = ranks.rank
    ranks.barrier()
    assert (result == ranks.rank).all()


def test_shared_memory_is_one_for_all_ranks(ranks):
    memory = ranks.shared((ranks.size, 3), np.float64)
    if ranks.size == 1:
        assert memory is None
        return
    assert not memory.any()
    ranks.barrier()
    memory[ranks.rank] = ranks.rank + 1
    ranks.barrier()
    np.testing.assert_array_equal(memory, np.arange(1.0, ranks.size + 1)[:, None] * np.ones(3))
    ranks.barrier()


def test_shared_memory_that_one_rank_cannot_see_is_not_used(ranks, monkeypatch):
    """Another container on the same host: all ranks send then."""
    if ranks.size > 1 and ranks.rank == ranks.size - 1:
        monkeypatch.setattr("mpiclip.comm._map", lambda path, size: None)
    assert ranks.shared((10,), np.float64) is None
    X = data(5, 100, "float64")
    server_ = server(ranks, X)
    np.testing.assert_allclose(server_.join(server_.mean(hosted(ranks, X))), X.mean(0), rtol=1e-12, atol=1e-15)


def test_ranks_share_the_cores(ranks):
    """Ranks that float over the same cores do not start as many threads each."""
    mine = len(os.sched_getaffinity(0))
    same = sum(other == os.sched_getaffinity(0) for other in ranks.all(os.sched_getaffinity(0)))
    assert ranks.threads == max(1, mine // same)


def test_agree_raises_everywhere(ranks):
    with pytest.raises(InputError, match="only the last") as caught, ranks.agree():
        if ranks.rank == ranks.size - 1:
            raise InputError("only the last")
    assert caught.value.agreed
    assert ("rank" in str(caught.value)) == (ranks.size > 1)


def test_small_agreements(ranks):
    assert ranks.highest(ranks.rank) == ranks.size - 1
    np.testing.assert_array_equal(ranks.total([ranks.rank, 1.0]), [ranks.size * (ranks.size - 1) / 2, ranks.size])
    assert ranks.same(ranks.rank) == 0
    assert ranks.gather(ranks.rank) == (list(range(ranks.size)) if ranks.rank == 0 else None)
