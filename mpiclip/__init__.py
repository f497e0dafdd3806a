"""mpiclip: distributed learning with clipped gradients on MPI: Clip21, CELGC, ARC."""

from typing import Any

from .version import __version__

__all__ = ["InputError", "Run", "__version__", "aggregate", "clip", "methods", "ops", "problems", "resume", "train"]

# Where the public names live. They are imported when they are used: `mpiclip show` needs no MPI, `clip` no HDF5.
_HOMES = {"train": "training", "resume": "training", "Run": "training", "aggregate": "aggregation", "clip": "ops",
          "InputError": "errors", "ops": "ops", "methods": "methods", "problems": "problems", "torch": "torch"}


def __getattr__(name: str) -> Any:
    from importlib import import_module
    if name not in _HOMES:
        raise AttributeError(f"module 'mpiclip' has no attribute {name!r}")
    module = import_module(f"mpiclip.{_HOMES[name]}")
    value = module if name in ("ops", "methods", "problems", "torch") else getattr(module, name)
    globals()[name] = value
    return value
