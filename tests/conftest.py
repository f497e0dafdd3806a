"""What all tests share: the data sets, and the command line."""

import os
from pathlib import Path

import hypothesis
import pytest

from launch import finish, start

# The same examples everywhere and every time: what passes on one machine passes on the next.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that start MPI programs want the machine for themselves."""
    for item in items:
        if "mpiclip" in item.fixturenames or getattr(item.module, "start", None) is start:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The folder of the real data sets; without it, tests that want it are skipped."""
    folder = os.environ.get("MPICLIP_DATA")
    if not folder:
        pytest.skip("needs the data sets: set MPICLIP_DATA to their folder")
    return Path(folder)


@pytest.fixture
def added_noise(monkeypatch) -> list:
    """What `workers.noise` adds from here on, call by call, (w, d) each."""
    from mpiclip.workers import Workers
    added, noise = [], Workers.noise

    def recorded(workers, u_i, sigma):
        added.append(noise(workers, workers.zeros(), sigma))
        u_i += added[-1]
        return u_i
    monkeypatch.setattr(Workers, "noise", recorded)
    return added


@pytest.fixture
def mpiclip(tmp_path):
    """mpiclip(n, "train", …): the command line under `mpirun -n N` (n = 0: alone), in a folder of its own."""
    def run(n, *words, timeout=60, cwd=tmp_path):
        return finish(start(n, "-m", "mpiclip", *words, cwd=cwd), timeout)
    return run
