"""How do time and memory of robust aggregation grow with the number of workers and with d, if rank 0 is the server, and
if every rank is the server of its share of the columns? Vectors of n workers on the ranks → ARC, NNM, trimmed mean →
the aggregate on every rank; float32, f = n/5. On the board: ranks of one host, which read each other's vectors where
they are. Through MPI: as between hosts.

    for n in 1 2 4; do mpirun -n $n python benchmarks/rules_growth.py; done > benchmarks/results/rules-growth.jsonl
    python benchmarks/rules_growth.py draw          # the table as text, and docs/figures/rules-growth.png

ms: medians; all take turns. MB: of the rank that needs most, its workers' vectors included: the most that was in memory
at any time beside what was there before there was a server."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from mpiclip.aggregation import Aggregation
from mpiclip.bench import race, resident
from mpiclip.comm import world
from mpiclip.device import Device, set_threads
from mpiclip.server import Server
from mpiclip.streams import stream

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "benchmarks/results/rules-growth.jsonl", ROOT / "docs/figures/rules-growth.png"
RULES = ["arc", "nnm", "trimmed_mean"]
BY_N = [(n, 10**6) for n in (10, 20, 40, 80)]
BY_D = [(10, d) for d in (10**4, 10**5, 10**6, 10**7)]


def measure(comm, n: int, d: int) -> list[dict]:
    """A line for each server and each way."""
    here = n // comm.size + (comm.rank < n % comm.size)
    rounds, memory = {}, {}
    for at in ("rank0", "sharded") if comm.size > 1 else ("sharded",):
        for through in ("board", "MPI") if comm.size > 1 else ("board",):
            before = resident("VmRSS", settle=True)
            server = Server(comm, d, n, here, Device("cpu"), "float32", at, means_only=False, board=through == "board")
            random = stream(0, "bench", comm.rank)
            for u in server.mine:
                random.standard_normal(dtype=np.float32, out=u)
            aggregation = Aggregation(server, RULES, n // 5)
            round = rounds[at, through] = partial(lambda a: a.server.join(a(a.server.mine)), aggregation)
            round()
            memory[at, through] = max(comm.all(resident("VmHWM") - before)) / 1e6
    if comm.size > 1:
        u, total = np.ones(d, np.float32), np.empty(d, np.float32)
        rounds["MPI_Allreduce", ""] = lambda: comm.mpi.Allreduce(u, total)
    return [{"ranks": comm.size, "threads": comm.threads, "n": n, "d": d, "at": at, "through": through,
             "ms": round_to(ms), "MB": round_to(memory.get((at, through), 8 * d / 1e6))}
            for (at, through), ms in race(rounds, comm, 1.0).items()]


def round_to(value: float) -> float:
    return float(f"{value:.3g}")


def draw() -> None:
    """Print the table and draw the picture, from the results."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found = {(o["ranks"], o["at"], o["through"], o["n"], o["d"]): o for o in lines}
    for what, sizes in (("n, d = 10⁶", BY_N), ("d, n = 10", BY_D)):
        print(f"| ms (MB), {what} | " + " | ".join(f"{n if sizes is BY_N else d:,}" for n, d in sizes) + " |")
        print("|---" * (len(sizes) + 1) + "|")
        for ranks, at, through in dict.fromkeys((o["ranks"], o["at"], o["through"]) for o in lines):
            cells = [found[ranks, at, through, *size] for size in sizes]
            print(f"| {ranks} rank{'s' * (ranks > 1)}: {at} {through} | "
                  + " | ".join(f"{o['ms']:g} ({o['MB']:g})" for o in cells) + " |")
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 7), sharex="col", layout="constrained")
    for column, sizes in enumerate((BY_N, BY_D)):
        x = [n if sizes is BY_N else d for n, d in sizes]
        for row, (what, through) in enumerate((("ms", "board"), ("MB", "MPI"))):
            panel = panels[row, column]
            for ranks, colour in ((1, "0.4"), (2, "tab:blue"), (4, "tab:orange")):
                for at, style in (("rank0", "--"), ("sharded", "-")):
                    key = ranks, at, "board" if ranks == 1 else through
                    if (*key, *sizes[0]) in found:
                        label = "one process" if ranks == 1 else f"{ranks} ranks, {at.replace('k0', 'k 0')}"
                        panel.plot(x, [found[*key, *size][what] for size in sizes], style, color=colour, marker=".",
                                   label=label)
            panel.set(xscale="log", yscale="log")
            panel.grid(alpha=0.3)
            if sizes is BY_N:
                panel.set_xticks(x, [str(n) for n in x])
                panel.set_xticks([], minor=True)
        panels[1, column].set_xlabel("workers n, at d = 10⁶" if sizes is BY_N else "coordinates d, at n = 10")
    panels[0, 0].set_ylabel("milliseconds, ranks of one host")
    panels[1, 0].set_ylabel("MB of the neediest rank, several hosts")
    panels[0, 0].legend()
    figure.suptitle("ARC, NNM, trimmed mean: from the workers' vectors to the aggregate on every rank")
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    if sys.argv[1:] == ["draw"]:
        return draw()
    comm = world()
    set_threads(comm.threads)
    for n, d in dict.fromkeys(BY_N + BY_D):
        for line in measure(comm, n, d):
            if comm.rank == 0:
                print(json.dumps(line), flush=True)


main()
