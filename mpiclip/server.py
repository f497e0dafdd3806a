"""The exchange: from every worker's vector to the server's columns, and from these to a whole vector on every rank."""

from __future__ import annotations

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
    Several hosts, or GPUs (board = False), send columns by MPI's all-to-all and all-gather.
    Compressed messages, rows of `message` bytes, are posted on a board of their own, or all-gathered. Every rank adds
    up all n of them, in the workers' order: a mean has the same bytes for any number of ranks."""

    def __init__(self, comm: Comm, d: int, workers: int, here: int, device: Device, dtype: str, at: str = "sharded",
                 means_only: bool = True, gpu_aware: bool = False, board: bool = True, message: int = 0):
        self.comm, self.d, self.n, self.device, self.dtype = comm, d, workers, device, np.dtype(dtype)
        self.hosted = np.array(comm.all(here))                  # workers on each rank
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
        above = int(self.hosted[:comm.rank].sum())
        self._here = slice(above, above + here)                 # this rank's workers
        self.mine = device.xp.empty((here, d), dtype) if self._board is None else self._board[self._here]
        self.mine[:] = 0        # the rank that is the first to touch a page has it near

    # ---- the three movements

    def mean(self, u_i):
        """(1/n) Σ_i u_i over all workers, this rank's columns of it. u_i: (w, d), this rank's workers, or their
        compressed messages."""
        start = perf_counter()
        if isinstance(u_i, Message):
            result = self._mean_of_messages(u_i)
        elif self.comm.size == 1:
            result = ops.row_sum(u_i, 1 / self.n, out=self._buffer("mean", self.d, like=u_i))
        elif self._board is not None:
            mean = self._buffer("mean", self.own.stop - self.own.start, like=u_i)
            result = ops.row_sum(self._posted(u_i), 1 / self.n, out=mean)
            self.release()
        else:
            result = self._reduce(u_i[0] if len(u_i) == 1 else ops.row_sum(u_i, out=self._buffer("local", self.d, u_i)))
        self.comm.seconds += perf_counter() - start
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
            self.comm.mpi.Bcast(whole)
            self.comm.sent += whole.nbytes if self.comm.rank == 0 else 0
        else:
            self.comm.mpi.Allgatherv(self._to_mpi(part), [whole, (self.counts, self.starts)])
            self.comm.sent += (self.comm.size - 1) * part.nbytes
        result = self._from_mpi(whole)
        self.comm.seconds += perf_counter() - start
        return result

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
        return self._board[:, self.own]

    def _mean_of_messages(self, own: Message):
        """(1/n) Σ_i C(u_i), whole. own: the messages of this rank's workers."""
        mean = self._buffer("mean", self.d, like=self.mine)
        mean[:] = 0
        own.with_others(self._everybodys(own.rows)).add_to(mean)
        mean *= mean.dtype.type(1 / self.n)
        return mean

    def _everybodys(self, rows: np.ndarray) -> np.ndarray:
        """All workers' messages (n, bytes), in host memory, until the next call. Posts alternate between two boards:
        whoever writes on one again has met all ranks at the barrier of the call between, so all have read it."""
        comm = self.comm
        if comm.size == 1:
            return rows
        if self._posts is not None:
            self._turn = 1 - self._turn
            everybodys = self._posts[self._turn]
            everybodys[self._here] = rows
            comm.barrier()
        else:
            everybodys = self._buffer("messages", (self.n, rows.shape[1]), like=rows)
            row = comm.number(rows.dtype).Create_contiguous(rows.shape[1]).Commit()
            comm.mpi.Allgatherv([rows, row], [everybodys, (self.hosted, None), row])
            row.Free()
        comm.sent += (comm.size - 1) * rows.nbytes
        return everybodys

    def _reduce(self, local):
        """The mean's columns from each rank's sum: one small all-reduce, or an all-to-all and local sums."""
        comm, send = self.comm, self._to_mpi(local)
        if self.at == "replicated":
            total = self._mpi_buffer("total", self.d, like=local)
            comm.mpi.Allreduce(send, total)
            comm.sent += 2 * (comm.size - 1) * send.nbytes // comm.size
            return ops.row_sum(self._from_mpi(total)[None], 1 / self.n, out=self._buffer("mean", self.d, like=local))
        own = int(self.counts[comm.rank])
        parts = self._mpi_buffer("parts", (comm.size, own), like=local)
        comm.mpi.Alltoallv([send, (self.counts, self.starts)], [parts, ([own] * comm.size, None)])
        comm.sent += send.nbytes - own * send.itemsize
        return ops.row_sum(self._from_mpi(parts), 1 / self.n, out=self._buffer("mean", own, like=local))

    def _transpose(self, u_i):
        """(w, d) of each rank → (n, columns) of each rank. MPI's vector types pick the columns: nothing is packed."""
        comm, w = self.comm, len(u_i)
        send = self._to_mpi(u_i)
        own = int(self.counts[comm.rank])
        rows = self._mpi_buffer("rows", (self.n, own), like=u_i)
        number, size = comm.number(send.dtype), send.itemsize
        blocks = [number.Create_vector(w, int(c), self.d).Commit() for c in self.counts]
        above = np.cumsum(self.hosted) - self.hosted
        comm.mpi.Alltoallw(
            [send, ([1 if w and c else 0 for c in self.counts], (self.starts * size).tolist()), blocks],
            [rows, ((self.hosted * own).tolist(), (above * own * size).tolist()), [number] * comm.size])
        for block in blocks:
            block.Free()
        comm.sent += w * (int(self.counts.sum()) - own) * size
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

    def _to_mpi(self, array):
        """The array where MPI may read it, complete: the stream is synchronised here and nowhere else."""
        if self.gpu_aware:
            self.device.synchronize()
            return array
        staged = self._mpi_buffer(f"stage {array.shape}", array.shape, like=array)
        array.get(out=staged)
        return staged

    def _from_mpi(self, buffer):
        return buffer if self.gpu_aware else self.device.put(buffer)
