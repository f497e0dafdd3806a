"""Tests that run on every rank of one mpirun: `mpirun -n 3 python -m mpi4py -m pytest --only-mpi tests/mpi`."""

import os
import sys

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/mpi/" in item.nodeid or item.nodeid.startswith("mpi/"):
            item.add_marker(pytest.mark.mpi)


def pytest_runtest_logreport(report):
    """A test that fails on one rank fails for all, now: the others would wait for it in a collective call."""
    mpi = sys.modules.get("mpi4py.MPI")
    if report.failed and mpi and mpi.COMM_WORLD.size > 1:
        sys.__stderr__.write(f"\nrank {mpi.COMM_WORLD.rank}: FAILED {report.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        mpi.COMM_WORLD.Abort(1)


@pytest.fixture(scope="session")
def ranks():
    """The ranks of this mpirun. A launcher of another MPI would give singletons, and tests that test nothing."""
    from mpiclip.comm import world
    ranks = world()
    assert ranks.size == int(os.environ["OMPI_COMM_WORLD_SIZE"])
    return ranks


@pytest.fixture(autouse=True)
def together(request):
    """No rank runs ahead into the next test."""
    yield
    if "ranks" in request.fixturenames:
        request.getfixturevalue("ranks").barrier()
