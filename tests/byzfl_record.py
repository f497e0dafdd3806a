"""What ByzFL 0.0.11 makes of some inputs: `python tests/byzfl_record.py` writes tests/byzfl_outputs.npz, with which
test_byzfl.py compares our rules and attacks. It needs ByzFL (pip install --no-deps byzfl==0.0.11), PyTorch and SciPy.

Left out, because ByzFL gives no answer that can be compared:
- SMEA takes one power iteration from a random start for the largest eigenvalue. With d = 1 that is exact from any
  start, so there it is compared, and nowhere else.
- CAF does the same, and reduces weights in relation to the farthest row even where that has no weight left: then the
  weights hardly fall, or for ever. Ours is the farthest of the rows that have one: not the same means on the way.
- Bucketing draws lots: with one bucket for all rows it need not. The Gaussian attack is nothing but lots.
- On ties, which rows Krum, multi-Krum, MDA, MoNNA, NNM and mean-around-median take is up to the order in which its sort
  happens to leave equal values: tied rows go to the other rules only."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mpiclip.peers import byzfl

OUTPUTS = Path(__file__).with_suffix("").with_name("byzfl_outputs.npz")


def cases(seed: int = 0) -> dict[str, tuple[np.ndarray, int]]:
    """name: (X (n, d) float64, f)"""
    random = np.random.RandomState(seed)        # its stream is the same in every version of NumPy
    normal = random.standard_normal
    spread = normal((10, 1)) * 3
    found = {
        "five": (normal((5, 7)), 1),
        "most": (normal((9, 11)) + 1, 4),
        "ten": (np.vstack([normal((8, 17)), 4 * normal((2, 17)) + 3])[random.permutation(10)], 2),
        "twenty": (np.vstack([normal((16, 23)), 5 + normal((4, 23))])[random.permutation(20)], 4),
        "heterogeneous": (np.exp(normal((10, 1))) * (spread + normal((10, 13))), 3),
        "near": (10 + normal(12) + 1e-6 * normal((10, 12)), 3),
        "tied": (random.randint(-2, 3, (8, 21)).astype(float), 2),
        "huge": (np.vstack([normal((7, 9)), 1e30 * normal((1, 9)), 30 + normal((1, 9))])[random.permutation(9)], 2),
        "line": (np.vstack([normal((9, 1)), [[7.0]], [[-3.0]]])[random.permutation(11)], 3),
    }
    return found


def chains(b, f: int, n: int) -> dict[str, list]:
    """label: the objects of ByzFL that are applied in turn. b: byzfl()"""
    return {
        "mean": [b.Average()],
        "median": [b.Median()],
        "trimmed_mean": [b.TrMean(f)],
        "geometric_median": [b.GeometricMedian(nu=0.1, T=3)],
        "geometric_median, 8 steps": [b.GeometricMedian(nu=1e-9, T=8)],
        "geometric_median, converged": [b.GeometricMedian(nu=1e-12, T=1000)],
        "centered_clipping": [b.CenteredClipping(L=3, tau=2.0)],
        "clipping": [b.Clipping(2.0)],
        "arc": [b.ARC(f)],
        "arc, trimmed_mean": [b.ARC(f), b.TrMean(f)],
        "clipping, geometric_median": [b.Clipping(2.0), b.GeometricMedian(nu=0.1, T=3)],
        "bucketing": [b.Bucketing(n)],
        "krum": [b.Krum(f)],
        "multi_krum": [b.MultiKrum(f)],
        "mda": [b.MDA(f)],
        "monna": [b.MoNNA(f, idx=1)],
        "mean_around_median": [b.Meamed(f)],
        "nnm": [b.NNM(f)],
        "nnm, median": [b.NNM(f), b.Median()],
        "nnm, geometric_median": [b.NNM(f), b.GeometricMedian(nu=0.1, T=3)],
        "arc, nnm, trimmed_mean": [b.ARC(f), b.NNM(f), b.TrMean(f)],
        "nnm, arc, multi_krum": [b.NNM(f), b.ARC(f), b.MultiKrum(f)],
        "smea": [b.SMEA(f)],
    }


TIES_OFF = {"krum", "multi_krum", "mda", "monna", "mean_around_median", "nnm"}


def answered(case: str, label: str) -> bool:
    """Whether ByzFL has one answer to give."""
    names = set(label.split(", "))
    if label == "smea":
        return case == "line"
    if label == "geometric_median, converged":
        return case in ("five", "ten", "twenty", "heterogeneous")       # elsewhere 1000 steps are not enough
    return case != "tied" or not names & TIES_OFF


def attacks(b, f: int) -> dict[str, object]:
    """label: an attack of ByzFL. The optimised ones look for the factor that does most harm to a rule."""
    rules = {"trimmed_mean": (b.TrMean(f), []), "nnm, median": (b.Median(), [b.NNM(f)])}
    return {
        "sign_flip": b.SignFlipping(),
        "ipm": b.InnerProductManipulation(2.0),
        "alie": b.ALittleIsEnough(1.5),
        "mimic": b.Mimic(2),
        **{f"opt_ipm: {label}": b.Optimal_InnerProductManipulation(agg, before, f)
           for label, (agg, before) in rules.items()},
        **{f"opt_alie: {label}": b.Optimal_ALittleIsEnough(agg, before, f) for label, (agg, before) in rules.items()},
    }


ATTACKED = ("five", "ten", "twenty", "heterogeneous")      # the last f rows are the attackers'


def outputs(b, seed: int = 0) -> dict[str, np.ndarray]:
    """"case: label" → ByzFL's output: (d,), of a pre-aggregation (rows, d); for attacks "case, attacked: label"."""
    found = {}
    for case, (X, f) in cases(seed).items():
        for label, objects in chains(b, f, len(X)).items():
            if not answered(case, label):
                continue
            rows = X.copy()                     # ByzFL's clipping writes into what it is handed
            for step in objects:
                rows = step(rows)
            found[f"{case}: {label}"] = rows
            if label == "centered_clipping":    # which remembers where it was
                found[f"{case}: {label}, again"] = objects[0](2 - X)
        if case in ATTACKED:
            for label, attack in attacks(b, f).items():
                found[f"{case}, attacked: {label}"] = attack(X[:len(X) - f].copy())
    return found


def main() -> None:
    b = byzfl()
    if b is None:
        sys.exit("ByzFL or PyTorch is not installed here")
    found = outputs(b)
    np.savez_compressed(OUTPUTS, **found)
    print(f"{OUTPUTS}: {len(found)} outputs, {OUTPUTS.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
