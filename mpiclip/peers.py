"""Other libraries' robust aggregation, where they are installed: ours is compared with it, by `mpiclip bench rules` and
by the tests. Beside PyTorch: `pip install --no-deps byzfl byzpy scipy cloudpickle`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from math import comb
from types import SimpleNamespace
from typing import Any

import numpy as np

BYZFL, BYZPY = ("byzfl", "torch", "scipy"), ("byzpy", "torch", "cloudpickle")     # what they import
SUBSETS = 10_000        # ByzFL and byzpy try all subsets of n − f rows one by one for MDA and SMEA: not more than these


def installed(*names: str) -> bool:
    """Whether all these modules can be imported."""
    return all(importlib.util.find_spec(name) for name in names)


def byzfl() -> Any:
    """ByzFL's rules and attacks in one namespace, or None where it is not installed. The rest of the package, which
    trains models and asks for torchvision and more, is not imported."""
    if not installed(*BYZFL):
        return None
    if "byzfl" not in sys.modules:
        spec: Any = importlib.util.find_spec("byzfl")
        sys.modules["byzfl"] = importlib.util.module_from_spec(spec)        # the package, but nothing in it yet
    parts = [importlib.import_module(f"byzfl.{part}") for part in ("aggregators", "attacks")]
    return SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


class Peer:
    """A library's rules by our names, on n rows of which f may be anything.

    rules    name → the rows (of its own kind) → its result
    prepare  (n, d) array → a copy of the rows as the library takes them: some write into what they are handed"""

    def __init__(self, rules: dict[str, Callable], prepare: Callable, n: int, f: int):
        if comb(n, f) > SUBSETS:
            rules = {name: rule for name, rule in rules.items() if name not in ("mda", "smea")}
        self.rules, self.prepare = rules, prepare

    def chain(self, names: list[str]) -> Callable | None:
        """rows → what the rules make of them, applied from left to right; None if one of them is not there."""
        if not set(names) <= set(self.rules):
            return None

        def apply(rows):
            for name in names:
                rows = self.rules[name](rows)
            return rows
        return apply


def byzfl_numpy(n: int, f: int) -> Peer:
    """ByzFL on NumPy arrays"""
    b = byzfl()
    return Peer({"mean": b.Average(), "median": b.Median(), "trimmed_mean": b.TrMean(f),
                 "mean_around_median": b.Meamed(f), "geometric_median": b.GeometricMedian(), "krum": b.Krum(f),
                 "multi_krum": b.MultiKrum(f), "mda": b.MDA(f), "monna": b.MoNNA(f), "caf": b.CAF(f),
                 "smea": b.SMEA(f), "centered_clipping": lambda rows: b.CenteredClipping()(rows),
                 "arc": b.ARC(f), "nnm": b.NNM(f)}, np.copy, n, f)


def byzfl_torch(n: int, f: int) -> Peer:
    """ByzFL on PyTorch tensors"""
    import torch
    peer = byzfl_numpy(n, f)
    peer.prepare = lambda X: torch.from_numpy(X.copy())
    return peer


def byzpy(n: int, f: int) -> Peer:
    """byzpy on lists of PyTorch tensors"""
    import torch
    from byzpy import pre_aggregators
    from byzpy.aggregators import coordinate_wise, geometric_wise, norm_wise
    rules = {"mean": SimpleNamespace(aggregate=lambda rows: torch.stack(rows).mean(0)),      # it has none of its own
             "median": coordinate_wise.CoordinateWiseMedian(),
             "trimmed_mean": coordinate_wise.CoordinateWiseTrimmedMean(f),
             "mean_around_median": coordinate_wise.MeanOfMedians(f),
             "geometric_median": geometric_wise.GeometricMedian(), "krum": geometric_wise.Krum(f),
             "multi_krum": geometric_wise.MultiKrum(f, n - f), "mda": geometric_wise.MinimumDiameterAveraging(f),
             "monna": geometric_wise.MoNNA(f), "caf": norm_wise.CAF(f), "smea": geometric_wise.SMEA(f),
             "centered_clipping": norm_wise.CenteredClipping(c_tau=100.0, M=1)}
    before = {"arc": pre_aggregators.ARC(f), "nnm": pre_aggregators.NearestNeighborMixing(f)}
    return Peer({name: rule.aggregate for name, rule in rules.items()}
                | {name: rule.pre_aggregate for name, rule in before.items()},
                lambda X: list(torch.from_numpy(X.copy())), n, f)


PEERS: dict[str, Callable[[int, int], Peer]] = {}         # those that are installed here, by name: (n, f) → Peer
if installed(*BYZFL):
    PEERS |= {"ByzFL": byzfl_numpy, "ByzFL, torch": byzfl_torch}
if installed(*BYZPY):
    PEERS |= {"byzpy": byzpy}
