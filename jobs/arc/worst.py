"""A table of a sweep's runs: each chain of rules under each attack, and the worst of these.

    python worst.py runs/mnist --failed

A cell is the best test accuracy that a run reached. Runs that differ in run.seed alone are taken together: their
mean, with the lowest and the highest. The last column is the lowest cell of the row, once no attack is missing. Runs
that have not done all their rounds are left out; with --failed, once a sweep is through, they are those that diverged:
then they count with what they had reached, and have a ✗."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from mpiclip import InputError, record
from mpiclip.show import by_number, flatten, setting, varying

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("sweep", type=Path, nargs="+")
options.add_argument("--failed", action="store_true")
args = options.parse_args()

ATTACK = "aggregate.attack.name"
runs, unfinished = [], []                                   # (config, the best accuracy, whether it ended); configs
for file in sorted(file for folder in args.sweep for file in folder.rglob("run.h5")):
    try:
        header, lines = record.read(file.parent)
    except InputError as error:
        sys.exit(f"worst.py: {error}")
    config = flatten(record.config(header))
    if "accuracy" not in (lines.dtype.names or ()):
        sys.exit(f"worst.py: {file.parent}: no metric 'accuracy'; expected a problem that classifies")
    ended = len(lines) > 0 and lines["round"][-1] >= config["run.rounds"]
    if ended or (args.failed and len(lines)):
        runs.append((config, float(np.nanmax(lines["accuracy"])), ended))
    else:
        unfinished.append(config)
if unfinished:
    print(f"worst.py: {len(unfinished)} unfinished runs are left out", file=sys.stderr)
if not runs:
    sys.exit(f"worst.py: {', '.join(map(str, args.sweep))}: no finished runs there; expected a folder that `mpiclip "
             "sweep` wrote")
fixed = [key for key in varying([config for config, *_ in runs]) if key != "run.seed" and not key.startswith(
    "aggregate.attack")]
attacks = sorted({config.get(ATTACK, "none") for config in [*unfinished, *(config for config, *_ in runs)]})
cells: dict[tuple, list[float]] = defaultdict(list)
failed = set()
for config, best, ended in runs:
    row = tuple(setting(key, config[key]) for key in fixed if key in config)
    cells[row, config.get(ATTACK, "none")].append(best)
    if not ended:
        failed.add((row, config.get(ATTACK, "none")))

print("|", " | ".join(["", *attacks, "worst"]), "|")
print("|---" * (len(attacks) + 2) + "|")
for row in sorted({row for row, _ in cells}, key=lambda row: [by_number(text) for text in row]):
    means = [float(np.mean(cells[row, attack])) if (row, attack) in cells else np.nan for attack in attacks]
    texts = [f"{mean:.3f}" + (f" ({min(cells[row, attack]):.3f} … {max(cells[row, attack]):.3f})"
                              if len(cells[row, attack]) > 1 else "") + " ✗" * ((row, attack) in failed)
             if mean == mean else "–"
             for mean, attack in zip(means, attacks, strict=True)]
    worst = min(means) if all(mean == mean for mean in means) else np.nan
    print("|", " | ".join([", ".join(row), *texts, f"**{worst:.3f}**" if worst == worst else "–"]), "|")
