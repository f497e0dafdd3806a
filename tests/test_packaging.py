"""The wheel, installed elsewhere: compiled kernels and CUDA sources are in it; without the former all still works."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

import mpiclip
from mpiclip.importers import import_file

ROOT = Path(__file__).parents[1]
UNREACHABLE = ("Could not find a version", "No matching distribution", "Failed to establish", "Could not fetch")

# Trains on sparse and on dense rows; prints where the package is, whether it is compiled, and the models.
PROGRAM = """
import json, mpiclip
from mpiclip import device
models = []
for file in ("sparse.h5", "dense.h5"):
    for method in ({"name": "clip21", "tau": 0.05, "stepsize": "1/L"}, {"name": "celgc", "eta": 1.0, "gamma": 0.02}):
        models.append(mpiclip.train({
            "data": {"file": file}, "problem": {"name": "logistic", "regularizer": "nonconvex", "lam": 0.01},
            "method": method, "aggregate": {"rules": ["arc", "trimmed_mean"], "f": 1},
            "run": {"workers": 5, "rounds": 30, "dtype": "float64", "device": "cpu"}}, out=None).x.tolist())
print(json.dumps([mpiclip.__file__, device.compiled(), models]))
"""


def pip(*words):
    return subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from the sources alone, with the setuptools at hand if they are new enough."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("mpiclip", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-build-isolation"] if int(version("setuptools").split(".")[0]) >= 77 else []
    done = pip("wheel", "--no-deps", *offline, "-w", folder, source)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip("pip can reach no index for the build's requirements")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel was installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    done = pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with sparse.h5 and dense.h5."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    X = rng.normal(size=(200, 12)) * (rng.random((200, 12)) < 0.5)
    y = np.where(X.sum(1) + rng.normal(size=200) > 0, 1, -1)
    lines = [f"{b} " + " ".join(f"{j + 1}:{v}" for j, v in enumerate(row) if v) for b, row in zip(y, X, strict=True)]
    (folder / "rows.svm").write_text("\n".join(lines) + "\n")
    np.savez(folder / "rows.npz", X=X, y=y)
    import_file([str(folder / "rows.svm")], str(folder / "sparse.h5"))
    import_file([str(folder / "rows.npz")], str(folder / "dense.h5"))
    return folder


def trained(package, data):
    """(the package's file, whether it is compiled, the models), of a Python that finds the package in this folder."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=data, env=os.environ | {"PYTHONPATH": str(package)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    file, compiled, models = json.loads(done.stdout)
    assert Path(file).is_relative_to(package), "another installation answered"
    return compiled, models


def test_what_is_in_the_wheel(wheel):
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points, = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    expected = {str(Path("mpiclip", path.relative_to(ROOT / "mpiclip"))) for path in ROOT.glob("mpiclip/**/*.py")}
    expected |= {f"mpiclip/kernels/{path.name}" for path in ROOT.glob("kernels/*") if path.suffix in
                 (".py", ".c", ".h", ".cu", ".cuh")}
    assert expected <= names and any(name.endswith(".cu") for name in expected)
    assert all(name.startswith(("mpiclip/", f"mpiclip-{mpiclip.__version__}.dist-info/")) for name in names)
    assert "mpiclip = mpiclip.__main__:main" in entry_points


def test_an_installed_wheel_trains_anywhere(installed, data):
    compiled, models = trained(installed, data)
    assert compiled, "no C compiler?"
    assert np.isfinite(models).all() and np.abs(models).max() > 0.01
    done = subprocess.run([sys.executable, "-m", "mpiclip", "--version"], cwd=data, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(installed)})
    assert done.stdout.strip() == f"mpiclip {mpiclip.__version__}"


def test_without_the_compiled_library_the_results_are_the_same(installed, data, tmp_path):
    shutil.copytree(installed, tmp_path / "plain", ignore=shutil.ignore_patterns("*.so"))
    compiled, models = trained(tmp_path / "plain", data)
    assert not compiled
    np.testing.assert_allclose(models, trained(installed, data)[1], rtol=1e-12, atol=1e-12)
