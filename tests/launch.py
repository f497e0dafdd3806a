"""MPI programs as subprocesses that cannot hang the tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_btl": "^ofi",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMP_NUM_THREADS": "1",
}


def start(n: int, *words, **options) -> subprocess.Popen:
    """`mpirun -n N python …` in a process group of its own; n = 0 starts no mpirun."""
    launcher = Path(sys.executable).parent / "mpirun"
    command = ([str(launcher), "-n", str(n)] if n else []) + [sys.executable, *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    return subprocess.Popen(command, env=environment | MPI_ENVIRONMENT, start_new_session=True, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen, timeout: float = 60) -> subprocess.CompletedProcess:
    """Wait for it; a program that does not end is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hung for {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks_of(process) -> list[int]:
    """The process numbers of the ranks under an mpirun."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = (path.parent / "cmdline").read_bytes()
            if b"OMPI_COMM_WORLD_RANK=" in path.read_bytes() and b"mpiclip" in command and os.getpgid(
                    int(path.parent.name)) and str(process.pid).encode() in parents(path.parent):
                found.append(int(path.parent.name))
        except (OSError, ProcessLookupError):
            continue
    return sorted(found)


def parents(path: Path) -> list[bytes]:
    """The numbers of a process's ancestors."""
    line = []
    while (number := (path / "stat").read_text().rpartition(")")[2].split()[1]) != "0":
        line.append(number.encode())
        path = Path("/proc", number)
    return line
