"""Who may import whom: arrows point down, and each outside world has one door (see README, "Where things are")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Floors of the house, from the top. A module may import modules of its own package that stand on lower floors, and
# those of its own floor that are named beside it.
FLOORS = [
    {"__main__": set()},
    {"bench": {"peers"}, "peers": set(), "doctor": set(), "plot": {"show"}, "show": set(), "importers": {"text"},
     "text": set(), "sweep": set(), "plan": {"show"}},
    {"training": set(), "torch": set()},
    {"constants": {"workers"}, "aggregation": set(), "workers": set(), "checkpoint": set(), "record": set(),
     "ledger": set(), "config": set()},
    {"methods": set(), "problems": set(), "server": set(), "rules": set(), "attacks": set(), "data": set()},
    {"ops": set(), "columns": set(), "rows": {"ops", "columns"}, "splits": set(), "disk": set(), "comm": set(),
     "cells": set(), "compressors": {"ops"}, "noise": {"ops"}, "privacy": set(), "records": set()},
    {"kernels": set()},
    {"device": set()},
    {"errors": set(), "streams": set(), "version": set()},
]
DOORS = {"mpi4py": {"comm", "doctor", "__main__"}, "cupy": {"device"}, "cupyx": {"device"},
         "h5py": {"data", "checkpoint", "record", "doctor"}, "torch": {"torch", "peers", "bench"}}
LEVEL = {name: floor for floor, names in enumerate(FLOORS) for name in names}
BESIDE = {name: beside for names in FLOORS for name, beside in names.items()}


def module_of(path: Path) -> str:
    """The floor plan's name of a file: mpiclip/methods/clip21.py is `methods`, kernels/cpu.py is `kernels`."""
    within = path.relative_to(ROOT)
    if within.parts[0] == "kernels":
        return "kernels"
    return within.parts[1] if len(within.parts) > 2 else within.stem


def imports(path: Path):
    """Absolute names of what a file imports, wherever the import stands."""
    package = ["mpiclip", *path.relative_to(ROOT).parent.parts[1:]]
    if path.relative_to(ROOT).parts[0] == "kernels":
        package = ["mpiclip", "kernels"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{origin}.{alias.name}" if origin == "mpiclip" else origin


FILES = sorted([*ROOT.glob("mpiclip/**/*.py"), *ROOT.glob("kernels/*.py")])


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent.name not in ("mpiclip",)],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path):
    here = module_of(path)
    assert here in LEVEL, f"{here} has no floor: give it one in this test's table"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "mpiclip" or len(parts) < 2 or parts[1] == here:
            continue
        there = parts[1]
        assert there in LEVEL, f"{path.name} imports {name}, which has no floor"
        down = LEVEL[there] > LEVEL[here] or there in BESIDE[here]
        assert down, f"{here} (floor {LEVEL[here]}) imports {there} (floor {LEVEL[there]})"


@pytest.mark.parametrize("outside, doors", DOORS.items())
def test_one_door_for_each_outside_world(outside, doors):
    users = {module_of(path) for path in FILES if any(name.split(".")[0] == outside for name in imports(path))}
    assert users <= doors, f"{outside} is imported by {users - doors}"
    assert users or outside in ("cupy", "cupyx"), f"nobody imports {outside} any more"


def test_methods_know_neither_mpi_nor_cuda_nor_hdf5():
    for path in ROOT.glob("mpiclip/methods/*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"mpi4py", "cupy", "h5py", "os", "ctypes"}, path
