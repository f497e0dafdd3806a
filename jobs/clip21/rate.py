"""What the theory of Clip21-GD says of the runs of a sweep (stepsize = "theory"), and what they did.

    python rate.py runs/theory

D = max(0, max_i ‖∇f_i(x⁰)‖ − τ). No worker should clip after ⌈2D/τ⌉ rounds, and min_{k<K} ‖∇f(x^k)‖² should stay below
2F₀/(γK) + S/K with S = D² + 2D³/(3τ); F₀ = f(x⁰) − inf f is bounded by f(x⁰), for these losses are not negative.
"slope" is that of log min ‖∇f‖² over log K, over the last decade of the rounds."""

import argparse
from math import ceil, log
from pathlib import Path

import numpy as np

from mpiclip import config, record, training

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("sweep", type=Path)
args = options.parse_args()

print("| data | τ | γ | D | bound ⌈2D/τ⌉ | rounds with clipping | min ‖∇f‖² over its bound | slope |")
print("|---|---|---|---|---|---|---|---|")
norms: dict[tuple, float] = {}
rows = []
for file in args.sweep.rglob("run.h5"):
    header, lines = record.read(file.parent)
    tables, constants = record.config(header), header["constants"]
    key = tables["data"]["file"], header["workers"]
    if key not in norms:                                        # max_i ‖∇f_i(x⁰)‖
        start = training.Training(config.load(tables), training.ranks_of(None), None)
        norms[key] = float(start.workers.first_norms(start.s.x).max())
    tau, gamma = constants["tau"], constants["stepsize"]
    D = max(0.0, norms[key] - tau)
    S = D**2 + 2 * D**3 / (3 * tau)
    clipped = lines["round"][lines["clipped"] > 0]              # a line tells of the round before it
    K = lines["round"][:-1] + 1
    least = np.minimum.accumulate(lines["grad_norm"][:-1] ** 2)
    bound = (2 * lines["loss"][0] / gamma + S) / K
    slope = log(least[-1] / least[len(K) // 10]) / log(K[-1] / K[len(K) // 10])
    rows.append((Path(key[0]).stem, tau, f"{gamma:.3g}", f"{D:.3g}", ceil(2 * D / tau),
                 int(clipped.max()) if len(clipped) else 0, f"{(least / bound).max():.2g}", f"{slope:.2f}"))
for row in sorted(rows):
    print("|", " | ".join(map(str, row)), "|")
