"""What does it save to evaluate and to write checkpoints while exchanges are under way? The same run, with and without,
on hosts with slow links; the ranks of one host exchange nothing by MPI, so there is nothing to see there.

    python benchmarks/hosts.py -n 2 --rate 1e9 --delay 0.005 mpirun -n 2 python benchmarks/overlap.py [TURNS]

CELGC with four local steps on a perceptron of two hidden layers, d = 1.9·10⁶, and random rows; every round is
evaluated, with 250 rows of each worker. Seconds a round, medians over the turns: `round`, of which in exchanges
(`comm`) and in evaluations (`eval`), and how long exchanges travelled behind other work (`hidden`)."""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

import mpiclip.training
from mpiclip import config
from mpiclip.comm import Comm, world
from mpiclip.importers import import_file
from mpiclip.server import Server
from mpiclip.training import Training

ROUNDS = 6


class Waiting(Server):
    """A server that does nothing while it waits."""

    overlaps = property(lambda self: False, lambda self, value: None)


def rows(folder: str) -> str:
    """A file of random rows."""
    random, path = np.random.default_rng(0), Path(folder, "rows.npz")
    np.savez(path, X=random.random((2000, 784), np.float32), y=random.integers(0, 10, 2000))
    import_file([str(path)], str(path.with_suffix(".h5")))
    return str(path.with_suffix(".h5"))


def main() -> None:
    ranks, turns = world(), int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        compare(ranks, turns, ranks.same(rows(folder) if ranks.rank == 0 else ""))
        ranks.barrier()


def compare(ranks: Comm, turns: int, file: str) -> None:
    tables = {"data": {"file": file}, "problem": {"name": "mlp", "hidden": [1024, 1024]},
              "method": {"name": "celgc", "eta": 0.1, "gamma": 0.1, "interval": 4},
              "run": {"workers": ranks.size, "rounds": ROUNDS, "batch": 32, "eval_rows": 250, "eval_every": 1,
                      "threads": 1}}
    for every in (ROUNDS + 1, 1):
        tables["run"]["checkpoint_every"] = every
        found: dict[str, list[list[float]]] = {"waiting": [], "overlapping": []}
        for _ in range(turns):
            for name, server in (("waiting", Waiting), ("overlapping", Server)):
                mpiclip.training.Server = server
                with tempfile.TemporaryDirectory() as folder:
                    training = Training(config.load(tables), ranks, ranks.same(folder))
                    ranks.barrier()
                    start = perf_counter()
                    training.run()
                    found[name].append([perf_counter() - start, training.seconds["comm"], training.seconds["eval"],
                                        ranks.hidden])
                    ranks.barrier()
        line = {"ranks": ranks.size, "d": training.server.d, "checkpoints": every == 1}
        for name, times in found.items():
            line[name] = {what: round(median(column) / ROUNDS, 4) for what, column in
                          zip(("round", "comm", "eval", "hidden"), zip(*times, strict=True), strict=True)}
        pairs = zip(found["waiting"], found["overlapping"], strict=True)
        line["overlapping / waiting"] = round(median(after[0] / before[0] for before, after in pairs), 3)
        if ranks.rank == 0:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
