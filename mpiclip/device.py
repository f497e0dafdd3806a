"""This rank's processor: its array module, and the compiled twin of a NumPy definition. The only importer of CuPy."""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

from .errors import InputError


@functools.cache
def cupy() -> ModuleType | None:
    """CuPy where it is installed and sees a device, else None."""
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")     # no driver: spare CuPy's long import
        module = importlib.import_module("cupy")
        return module if module.cuda.is_available() else None
    except Exception:           # not installed, or installed against a driver that is not there
        return None


def xp(array: Any) -> ModuleType:
    """The module an array belongs to: numpy, or cupy. No import: whoever holds a CuPy array has imported CuPy."""
    gpu = sys.modules.get("cupy")
    return gpu if gpu is not None and isinstance(array, gpu.ndarray) else np


@functools.cache
def _kernels(name: str) -> ModuleType | None:
    """The launchers of mpiclip.kernels.cpu or mpiclip.kernels.cuda; None where the C kernels were not compiled."""
    try:
        return importlib.import_module(f"mpiclip.kernels.{name}")
    except OSError:
        return None


def compiled() -> bool:
    """Whether the C kernels were built when the package was installed."""
    return _kernels("cpu") is not None


def accelerated(definition):
    """The decorated body is the definition. A call goes to the compiled function of the same name in
    mpiclip.kernels.cpu (NumPy arrays) or mpiclip.kernels.cuda (CuPy arrays), unless there is none or it declines by
    returning NotImplemented (a dtype or a memory layout that it does not know). `.definition` is the body."""

    @functools.cache
    def twin(processor: str):
        return getattr(_kernels(processor), definition.__name__, None)

    @functools.wraps(definition)
    def call(array, *args, **kwargs):
        compiled = twin("cpu" if type(array) is np.ndarray or xp(array) is np else "cuda")
        result = NotImplemented if compiled is None else compiled(array, *args, **kwargs)
        return definition(array, *args, **kwargs) if result is NotImplemented else result

    call.definition = definition        # type: ignore[attr-defined]
    return call


class Device:
    """Where a rank computes: `Device("cpu")`, or `Device("cuda", i)` for the i-th GPU of the host."""

    def __init__(self, name: str, index: int = 0):
        self.name, self.index = name, index
        self.xp: ModuleType = np
        if name == "cuda":
            module = cupy()
            assert module is not None
            self.xp = module
            module.cuda.Device(index).use()

    def put(self, array: np.ndarray):
        """The array on this device (a copy only if it is elsewhere)."""
        return self.xp.asarray(array)

    def put_all(self, record: Any):
        """A record of arrays (a dataclass or a namespace, perhaps of others) with all of them on this device."""
        if self.xp is np:
            return record
        if isinstance(record, np.ndarray):
            return self.put(record)
        if not hasattr(record, "__dict__"):
            return record
        moved = copy.copy(record)
        for name, value in vars(record).items():
            object.__setattr__(moved, name, self.put_all(value))        # also where the record is frozen
        return moved

    def pinned(self, shape, dtype) -> np.ndarray:
        """Uninitialised host memory, page-locked where there is a GPU to copy from."""
        if self.xp is np:
            return np.empty(shape, dtype)
        cupyx = importlib.import_module("cupyx")
        return cupyx.empty_pinned(shape, dtype)

    def synchronize(self) -> None:
        """Wait for this device's work: the one place, before MPI or a person's clock sees a result."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()


def select(name: str, local_rank: int = 0) -> Device:
    """run.device = auto | cpu | cuda: GPUs go round the ranks of a host. Raises InputError for cuda without a GPU."""
    if name == "cpu":
        return Device("cpu")
    module = cupy()
    if module is None:
        if name == "cuda":
            raise InputError("run.device: 'cuda' was asked for, but CuPy finds no usable GPU (see `mpiclip doctor`)")
        return Device("cpu")
    return Device("cuda", local_rank % module.cuda.runtime.getDeviceCount())


def host(array) -> np.ndarray:
    """The array in host memory (itself, if it is there)."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def set_threads(threads: int) -> None:
    """Threads of this process for the compiled kernels (OpenMP) and BLAS."""
    from threadpoolctl import threadpool_limits
    _kernels("cpu")              # load our library first, so that its OpenMP is among those limited
    threadpool_limits(threads)


def cores() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))         # a system without affinities
