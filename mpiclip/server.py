"""The exchange: from every worker's vector to the server's columns, and from these to a whole vector on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from . import ops
from .comm import Comm
from .compressors import Message
from .device import Device, host, xp
from .rows import Rows

# A vector of at most this many bytes, of which only means are taken, is summed whole by every rank: to split it would
# cost more in latency than it saves in bandwidth (`mpiclip bench exchange`).
SMALL = 64 * 1024


class Server:
    """The server of the papers: it receives a vector from each of n workers and keeps d coordinates of its own.

    Which rank is the server of which coordinates (columns):
      sharded      each rank owns an equal share: the traffic of an all-reduce, and no rank ever holds n·d numbers;
      rank0        rank 0 owns them all (a Gather and a Bcast): only rank 0 need be trusted;
      replicated   every rank owns all: a short vector, of which only means are taken (one small all-reduce); and what
                   compressed messages add up to, which all ranks receive from all workers.

    `own` is the slice of this rank's columns. Server vectors have the length of `own`; `join` makes them whole.

    How vectors travel: ranks of one host write theirs on a board, an (n, d) array in shared memory, and read the
    columns that they own from where they are: nothing is copied, and a mean is summed in the same order, so has the
    same bytes, for any number of ranks. `mine` is this rank's part of the board: a vector made there is posted already.
    Several hosts, or GPUs (board = False), send columns by MPI's all-to-all and all-gather. These take their time, so
    they do not block: while one is under way, its rank does the work that was left for it (`meanwhile`).
    Compressed messages, rows of `message` bytes, are posted on a board of their own, or all-gathered. Every rank adds
    up all n of them, in the workers' order: a mean has the same bytes for any number of ranks.

    overlaps    whether there are exchanges to do something else meanwhile; never on a board
    worked      seconds of work that was done while an exchange was under way"""

    def __init__(self, comm: Comm, d: int, workers: int, here: int, device: Device, dtype: str, at: str = "sharded",
                 means_only: bool = True, gpu_aware: bool = False, board: bool = True, message: int = 0):
        self.comm, self.d, self.n, self.device, self.dtype = comm, d, workers, device, np.dtype(dtype)
        self.hosted = np.array(comm.all(here))                  # workers on each rank
        self.divisor = self._most = workers                     # divisor: of a mean
        size = comm.size
        if message or (at == "sharded" and means_only and d * self.dtype.itemsize <= SMALL):
            at = "replicated"
        self.at = at
        shares = {"sharded": [d // size + (r < d % size) for r in range(size)],
                  "rank0": [d] + [0] * (size - 1),
                  "replicated": [d] * size}[at]
        self.counts = np.array(shares)
        self.starts = np.zeros(size, int) if at == "replicated" else np.cumsum(self.counts) - self.counts
        first = int(self.starts[comm.rank])
        self.own = slice(first, first + int(self.counts[comm.rank]))
        self.gpu_aware = gpu_aware or device.xp is np
        self._buffers: dict[str, Any] = {}
        self._board = comm.shared((workers, d), dtype) if board and device.xp is np and not message else None
        self._joined = comm.shared((d,), dtype) if self._board is not None else None
        self._posts = comm.shared((2, workers, message), np.uint8) if board and message else None
        self._turn = 0
        self.overlaps = bool(size > 1 and self._board is None and self._posts is None and
                             (message or at != "replicated"))
        self.worked = 0.0
        self._work: list[Callable[[], Any]] = []
        self._rows: Any = device.xp.empty((here, d), dtype) if self._board is None else None
        self._take(self.hosted)
        self.mine[:] = 0        # the rank that is the first to touch a page has it near

    def _take(self, hosted: np.ndarray) -> None:
        """From now on, so many workers of each rank send vectors."""
        self.hosted, self.n = hosted, int(hosted.sum())
        above, here = int(hosted[:self.comm.rank].sum()), int(hosted[self.comm.rank])
        self._here = slice(above, above + here)                 # this rank's workers
        self.mine = self._rows[:here] if self._board is None else self._board[self._here]

    @contextmanager
    def only(self, hosted: np.ndarray, divisor: int) -> Iterator[None]:
        """Only so many workers of each rank take part, and a mean is what they send divided by `divisor`."""
        before = self.hosted, self.divisor
        self._take(hosted)
        self.divisor = divisor
        try:
            yield
        finally:
            self._take(before[0])
            self.divisor = before[1]

    # ---- the three movements

    def mean(self, u_i):
        """(1/n) Σ_i u_i over all workers, this rank's columns of it. u_i: (w, d), this rank's workers, or their
        compressed messages."""
        start = perf_counter()
        if isinstance(u_i, Message):
            result = self._mean_of_messages(u_i)
        elif self.comm.size == 1:
            result = ops.row_sum(u_i, 1 / self.divisor, out=self._buffer("mean", self.d, like=u_i))
        elif self._board is not None:
            mean = self._buffer("mean", self.own.stop - self.own.start, like=u_i)
            result = ops.row_sum(self._posted(u_i), 1 / self.divisor, out=mean)
            self.release()
        else:
            result = self._reduce(u_i)
        self.comm.seconds += perf_counter() - start
        return result

    def mean_to_come(self, u_i) -> Callable[[], Any]:
        """mean(u_i) that is not needed yet: call what is returned to have it. It travels behind whatever is done until
        then, other exchanges too; u_i (w, d) must stay as it is."""
        if not self.overlaps:
            return lambda: self.mean(u_i)
        if self.at == "replicated":
            mean = self.mean(u_i).copy()
            return lambda: mean
        request, parts = self._scatter(u_i, "to come")
        travel, divisor = self.comm.travel(request, self._pokes), self.divisor

        def result():
            travel.finish()
            return self._sum(parts, divisor, "to come")
        return result

    def rows(self, u_i) -> Rows:
        """All n workers' vectors, this rank's columns of them, until `release`. u_i: (w, d), this rank's workers."""
        start = perf_counter()
        X = u_i if self.comm.size == 1 else self._posted(u_i) if self._board is not None else self._transpose(u_i)
        result = Rows(X, self.total)
        self.comm.seconds += perf_counter() - start
        return result

    def release(self) -> None:
        """This rank has done with the others' vectors; they may be overwritten once all ranks say so."""
        if self._board is not None:
            self.comm.barrier()

    def join(self, part):
        """The whole vector (d,), on every rank, from the columns that each rank owns; valid until the next call."""
        if self.comm.size == 1 or self.at == "replicated":
            return part
        start = perf_counter()
        if self._joined is not None:
            self.comm.barrier()                             # nobody reads the vector of before any more
            self._joined[self.own] = part
            self.comm.barrier()
            self.comm.sent += (self.comm.size - 1) * part.nbytes
            self.comm.seconds += perf_counter() - start
            return self._joined
        whole = self._mpi_buffer("whole", self.d, like=part)
        if self.at == "rank0":
            if self.comm.rank == 0:
                whole[:] = self._to_mpi(part)
            request = self.comm.mpi.Ibcast(whole)
            self.comm.sent += whole.nbytes if self.comm.rank == 0 else 0
        else:
            request = self.comm.mpi.Iallgatherv(self._to_mpi(part), [whole, (self.counts, self.starts)])
            self.comm.sent += (self.comm.size - 1) * part.nbytes
        self._arrive(request)
        result = self._from_mpi(whole)
        self.comm.seconds += perf_counter() - start
        return result

    def meanwhile(self, work: Callable[[], Any]) -> None:
        """Work for the time in which the next exchange is under way: it needs nothing of its result, and changes
        nothing of what is sent. Done at once where no exchange is waited for."""
        if self.overlaps:
            self._work.append(work)
        else:
            work()

    def catch_up(self) -> None:
        """Do what is left of such work."""
        while self._work:
            self._work.pop(0)()

    def dot(self, part, other) -> float:
        """⟨u, v⟩ of two server vectors, the same on every rank. part, other: this rank's columns of them."""
        product = float(host(xp(part).dot(part.astype(np.float64), other.astype(np.float64))))
        return float(self.total(product))

    def norm(self, part) -> float:
        """‖u‖₂ of a server vector, the same on every rank. part: this rank's columns of it."""
        square = float(host(ops.norms(part))) ** 2
        return float(self.total(square)) ** 0.5

    def total(self, values) -> np.ndarray:
        """The sum of a small float64 array over all columns, the same on every rank. values: of this rank's columns.
        Where only rank 0 is trusted, nobody else has a say in it."""
        return {"sharded": self.comm.total, "rank0": self.comm.same, "replicated": lambda own: own}[self.at](
            np.asarray(values, np.float64))

    # ---- how they are made

    def _posted(self, u_i):
        """All workers' vectors on the board, this rank's columns (n, columns)."""
        assert self._board is not None
        if u_i is not self.mine:
            self.mine[:] = u_i
        self.comm.barrier()
        others = int(self.counts.sum()) - int(self.counts[self.comm.rank])      # columns that other ranks read here
        self.comm.sent += len(u_i) * others * u_i.itemsize
        return self._board[:self.n, self.own]

    def _mean_of_messages(self, own: Message):
        """(1/n) Σ_i C(u_i), whole. own: the messages of this rank's workers."""
        mean = self._buffer("mean", self.d, like=self.mine)
        mean[:] = 0
        own.with_others(self._everybodys(own.rows)).add_to(mean)
        mean *= mean.dtype.type(1 / self.divisor)
        return mean

    def _everybodys(self, rows: np.ndarray) -> np.ndarray:
        """All workers' messages (n, bytes), in host memory, until the next call. Posts alternate between two boards:
        whoever writes on one again has met all ranks at the barrier of the call between, so all have read it."""
        comm = self.comm
        if comm.size == 1:
            return rows
        if self._posts is not None:
            self._turn = 1 - self._turn
            everybodys = self._posts[self._turn][:self.n]
            everybodys[self._here] = rows
            comm.barrier()
        else:
            everybodys = self._buffer("messages", (self._most, rows.shape[1]), like=rows)[:self.n]
            row = comm.number(rows.dtype).Create_contiguous(rows.shape[1]).Commit()
            self._arrive(comm.mpi.Iallgatherv([rows, row], [everybodys, (self.hosted, None), row]))
            row.Free()
        comm.sent += (comm.size - 1) * rows.nbytes
        return everybodys

    def _arrive(self, request) -> None:
        """Wait for an exchange that was begun, and do meanwhile what there is to be done. Its time is no exchange's."""
        if not self._work:
            request.Wait()
            return
        travel = self.comm.travel(request, self._pokes)
        start, exchanged = perf_counter(), self.comm.seconds
        try:
            self.catch_up()
        finally:                # also where work failed: the other ranks are sending
            worked = perf_counter() - start
            self.worked += worked
            self.comm.seconds = exchanged - worked      # of the whole exchange, which is still to be added
            travel.finish()

    @property
    def _pokes(self) -> bool:
        """Whether a thread may call MPI: not where that has to do with the GPU, of which each thread has its own."""
        return self.device.xp is np or not self.gpu_aware

    def _reduce(self, u_i):
        """The mean's columns: a small all-reduce of each rank's sum, or an all-to-all and local sums."""
        comm = self.comm
        if self.at != "replicated":
            request, parts = self._scatter(u_i)
            self._arrive(request)
            return self._sum(parts, self.divisor)
        send = self._to_mpi(self._local(u_i))
        total = self._mpi_buffer("total", self.d, like=u_i)
        comm.mpi.Allreduce(send, total)
        comm.sent += 2 * (comm.size - 1) * send.nbytes // comm.size
        return self._sum(total[None], self.divisor)

    def _local(self, u_i, name: str = ""):
        """Σ u_i over this rank's workers, (d,)."""
        return u_i[0] if len(u_i) == 1 else ops.row_sum(u_i, out=self._buffer(f"local {name}", self.d, like=u_i))

    def _scatter(self, u_i, name: str = ""):
        """Begin the all-to-all: (the request, where each rank's sum of this rank's columns will be, (ranks, columns)).
        name: of its buffers."""
        comm, send = self.comm, self._to_mpi(self._local(u_i, name), name)
        own = int(self.counts[comm.rank])
        parts = self._mpi_buffer(f"parts {name}", (comm.size, own), like=u_i)
        comm.sent += send.nbytes - own * send.itemsize
        return comm.mpi.Ialltoallv([send, (self.counts, self.starts)], [parts, ([own] * comm.size, None)]), parts

    def _sum(self, parts, divisor: int, name: str = ""):
        """The mean's columns from what has arrived, (k, columns)."""
        parts = self._from_mpi(parts)
        return ops.row_sum(parts, 1 / divisor, out=self._buffer(f"mean {name}", parts.shape[1], like=parts))

    def _transpose(self, u_i):
        """(w, d) of each rank → (n, columns) of each rank. MPI's types of parts of a matrix pick the columns: nothing
        is packed, and no offset in bytes has to fit an int."""
        comm, w = self.comm, len(u_i)
        send = self._to_mpi(u_i)
        own = int(self.counts[comm.rank])
        rows = self._mpi_buffer("rows", (self._most, own), like=u_i)[:self.n]
        above = np.cumsum(self.hosted) - self.hosted
        number = comm.number(send.dtype)
        out = [_part(number, send.shape, (w, count), (0, start))
               for count, start in zip(self.counts, self.starts, strict=True)]
        into = [_part(number, rows.shape, (count, own), (start, 0))
                for count, start in zip(self.hosted, above, strict=True)]
        places = [0] * comm.size
        self._arrive(comm.mpi.Ialltoallw([send, ([some for some, _ in out], places), [kind for _, kind in out]],
                                         [rows, ([some for some, _ in into], places), [kind for _, kind in into]]))
        for some, kind in out + into:
            if some:
                kind.Free()
        comm.sent += w * (int(self.counts.sum()) - own) * send.itemsize
        return self._from_mpi(rows)

    # ---- buffers: allocated once, since a fresh page costs more than what is written on it

    def _buffer(self, name: str, shape, like):
        key = f"{name} {xp(like).__name__}"
        if key not in self._buffers:
            self._buffers[key] = xp(like).empty(shape, like.dtype)
        return self._buffers[key]

    def _mpi_buffer(self, name: str, shape, like):
        """Where MPI may write: on the GPU only if MPI was said to be GPU-aware, else page-locked host memory."""
        if self.gpu_aware:
            return self._buffer(name, shape, like)
        key = f"{name} host"
        if key not in self._buffers:
            self._buffers[key] = self.device.pinned(shape, like.dtype)
        return self._buffers[key]

    def _to_mpi(self, array, name: str = ""):
        """The array where MPI may read it, complete: the stream is synchronised here and nowhere else."""
        if self.gpu_aware:
            self.device.synchronize()
            return array
        staged = self._mpi_buffer(f"stage {array.shape} {name}", array.shape, like=array)
        array.get(out=staged)
        return staged

    def _from_mpi(self, buffer):
        return buffer if self.gpu_aware else self.device.put(buffer)


def _part(number, shape, part, start) -> tuple[int, Any]:
    """(1, the MPI type of a part of a matrix of numbers); of nothing (0, the number's type)."""
    if 0 in part:
        return 0, number
    sizes = [list(map(int, side)) for side in (shape, part, start)]
    return 1, number.Create_subarray(*sizes).Commit()
