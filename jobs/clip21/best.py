"""A table of a sweep's runs: the best of each setting, what tuning some keys comes to with the others as they are.

    python best.py runs/private --over method.stepsize method.tau method.beta --columns method.epsilon

--over: the keys that were tuned; the cells give their values. --columns: the key whose values are the table's columns.
--by: the metric, its last value. --min, --max: rather its least, its greatest value. --highest: more is better. --dirs:
only the folders of the best runs, for `mpiclip plot $(…)`. Runs that differ in run.seed alone are taken together: their
mean decides, and is printed with the lowest and the highest. What is not a number in one of them is never the best."""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from mpiclip import record
from mpiclip.show import by_number, flatten, setting, varying

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("sweep", type=Path)
options.add_argument("--over", nargs="+", default=[], metavar="TABLE.KEY")
options.add_argument("--columns", metavar="TABLE.KEY")
options.add_argument("--by", default="grad_norm", metavar="METRIC")
options.add_argument("--min", dest="of", action="store_const", const=np.min)
options.add_argument("--max", dest="of", action="store_const", const=np.max)
options.add_argument("--highest", action="store_true")
options.add_argument("--dirs", action="store_true")
args = options.parse_args()

values, configs = {}, {}
for file in sorted(args.sweep.rglob("run.h5")):
    header, lines = record.read(file.parent)
    if len(lines):
        configs[file.parent] = flatten(record.config(header))
        values[file.parent] = float(lines[args.by][-1] if args.of is None else args.of(lines[args.by]))
fixed = [key for key in varying(list(configs.values())) if key not in (*args.over, args.columns, "run.seed")]
alike = defaultdict(list)                                   # setting → folders that differ in the seed alone
for folder, config in configs.items():
    alike[tuple(tuple(config.get(key) for key in keys) for keys in (fixed, [args.columns], args.over))].append(folder)
best: dict[tuple, tuple[float, list[Path]]] = {}            # (row, column) → (score, folders)
for (row, column, _), folders in alike.items():
    score = float(np.mean([values[folder] for folder in folders])) * (-1 if args.highest else 1)
    if score < best.get((row, column), (math.inf,))[0]:
        best[row, column] = score, folders


def told(keys, of) -> str:
    return ", ".join(setting(key, value) for key, value in zip(keys, of, strict=True) if value is not None)


def cell(row, column) -> str:
    if (row, column) not in best:
        return "–"
    score, folders = best[row, column]
    each = [values[folder] for folder in folders]
    spread = f" ({min(each):.3g} … {max(each):.3g})" if len(each) > 1 else ""
    tuned = told(args.over, [configs[folders[0]].get(key) for key in args.over])
    return f"{abs(score):.3g}{spread}" + (f", {tuned}" if tuned else "")


if args.dirs:
    print(*(folder for _, folders in best.values() for folder in folders), sep="\n")
else:
    rows = sorted({row for row, _ in best}, key=lambda row: [by_number(str(value)) for value in row])
    columns = sorted({column for _, column in best}, key=lambda column: by_number(str(column)))
    heads = [told([args.columns], column) if args.columns else args.by for column in columns]
    print("|", " | ".join(["", *heads]), "|")
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        print("|", " | ".join([told(fixed, row), *(cell(row, column) for column in columns)]), "|")
