"""How much sooner does CELGC reach a loss than NaiveParallelGC, which communicates in every step, on a slow network?
And does `mpiclip plan` know it beforehand? Ranks on hosts of their own (hosts.py: needs root), links of 1 Gbit/s, 5 ms
from one to another, 10 ms there and back; a convolutional network of 431,080 parameters on MNIST (jobs/arc/data.sh).

    python benchmarks/slow_network.py losses mnist.h5               once: the iterations to the loss, in one process
    python benchmarks/slow_network.py rounds mnist.h5 [TURNS]       on the hosts: plans, and seconds a round
    python benchmarks/slow_network.py draw                          prints the tables, draws the picture
    python benchmarks/slow_network.py ranks                         prints what the model says of 8 to 4096 ranks

The time to the loss is the iterations to it times what a round takes: evaluations are not counted. All take turns;
medians. Results: benchmarks/results/slow-network.json, docs/figures/slow-network.png."""

import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from math import log, nan
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from hosts import hosts

from mpiclip import config
from mpiclip.comm import Comm, world
from mpiclip.plan import INTERVALS as PLANNED
from mpiclip.plan import Call, Round, plan, recommended, table
from mpiclip.training import Training
from mpiclip.version import __version__

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "benchmarks/results/slow-network.json", ROOT / "docs/figures/slow-network.png"
RATE, DELAY = 1e9, 0.005            # bit/s; seconds, one way
TARGET = 0.25                       # the training loss to be reached
INTERVALS = (1, 2, 4, 8, 16, 32)
LOOK, MOST = 16, 256                # iterations between two evaluations, and of a run
HOSTS = (2, 4)                      # numbers of hosts
RANKS = (8, 32, 128, 512, 1024, 4096)
NETWORKS = {"1 Gbit/s, 5 ms": (0.005, 1e9), "10 Gbit/s, 50 µs": (5e-5, 1e10), "100 Gbit/s, 5 µs": (5e-6, 1e11)}


def experiment(file: str, interval: int | None, rounds: int, look: int = 10**9) -> dict:
    """The config of CELGC with so many local steps; None: that of NaiveParallelGC. look: iterations between two
    evaluations."""
    method = {"name": "celgc", "interval": interval} if interval else {"name": "naive_parallel"}
    return {"data": {"file": file, "standardize": True}, "problem": {"name": "cnn"},
            "method": method | {"eta": 0.1, "gamma": 0.2},
            "run": {"batch": 25, "threads": 1, "rounds": rounds, "eval_rows": 100,
                    "eval_every": max(1, look // (interval or 1))}}


class Timed(Training):
    """A run that ends at the target. begins: when each round began."""

    _accuracy_of = None                 # nobody asks for the accuracy: it would take longer than the rounds

    def run(self):
        self.begins = []
        return super().run()

    def _round(self, x):
        self.begins.append(perf_counter())
        if self.lines and self.lines[-1]["loss"] <= TARGET:
            self.stop()
        super()._round(x)


def losses(file: str) -> None:
    """Add the losses of each run that RESULTS lacks: a function of the number of workers, not of where they are."""
    found = results()
    for n in HOSTS:
        for interval in (None, *INTERVALS):
            if f"{n} {interval}" in found["losses"]:
                continue
            tables = experiment(file, interval, MOST // (interval or 1), LOOK)
            run = Timed(config.load(tables | {"run": tables["run"] | {"workers": n}}), Comm(), None).run()
            curve = np.stack([run.metrics["round"] * (interval or 1), run.metrics["loss"]], 1)
            found["losses"][f"{n} {interval}"] = curve.tolist()
            print(n, interval, reached(curve), flush=True)
            save(found)


def reached(curve) -> float:
    """The iterations to the target, interpolated by the logarithm of the loss; NaN where it was not reached."""
    for (k, loss), (later, lower) in pairwise(curve):
        if lower <= TARGET:
            return k + log(loss / TARGET) / log(loss / lower) * (later - k)
    return nan


def inner(file: str) -> None:
    """On every rank: each run after its plan, a line for each."""
    comm = world()
    for interval in (None, *INTERVALS):
        planned = plan(experiment(file, interval, 1), here=comm)
        expected = next(line for line in planned["rounds"] if line["interval"] == interval)
        rounds = max(8, 40 // (interval or 1))
        training = Timed(config.load(experiment(file, interval, rounds)), comm, None)
        training.run()
        line = {"hosts": comm.size, "interval": interval, "exchange": training.seconds["comm"] / rounds,
                "round": float(np.median(np.diff(training.begins[2:]))), "rounds": rounds,
                "planned": expected["seconds"], "planned_exchange": expected["communicating"],
                "latency": planned["latency"], "bandwidth": planned["bandwidth"]}
        if comm.rank == 0:
            print(json.dumps(line), flush=True)


def rounds(file: str, turns: int) -> None:
    """Add what rounds take on the hosts to RESULTS, in place of what was there."""
    lines: list[dict] = []
    for turn in range(turns):
        for n in HOSTS:
            with hosts(n, RATE, DELAY) as (before, environment):
                mpirun = str(Path(sys.executable).with_name("mpirun"))
                words = [*before, mpirun, "-n", str(n), sys.executable, "-m", "mpi4py", __file__, "inner", file]
                with subprocess.Popen(words, env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                      text=True) as ranks:
                    assert ranks.stdout is not None
                    for text in ranks.stdout:
                        lines.append(rounded(json.loads(text) | {"turn": turn}))
                        print("  ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
            if ranks.returncode:
                sys.exit(ranks.returncode)
        save(results() | {"lines": lines})


def results() -> dict:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    return {"losses": {}, "lines": []}


def save(found: dict) -> None:
    facts = {"machine": platform.platform(), "processors": os.cpu_count(), "version": __version__, "rate": RATE,
             "delay": DELAY, "target": TARGET}
    text = json.dumps(facts | {name: rounded(found[name]) for name in ("losses", "lines")})
    RESULTS.write_text(text.replace('{"hosts"', '\n{"hosts"').replace(', "losses"', ',\n"losses"') + "\n")


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def middle(lines: list[dict], interval: int | None) -> dict[str, float]:
    """Medians over the turns."""
    of = [line for line in lines if line["interval"] == interval]
    return {name: median(line[name] for line in of) for name in ("round", "exchange", "planned")} | {
        "off": median(line["planned"] / line["round"] for line in of)}


def name_of(interval: int | None) -> str:
    return f"CELGC, I = {interval}" if interval else "NaiveParallelGC"


def tables(found: dict) -> None:
    """Print, for each number of hosts, how much sooner and faster; then what was planned against what was measured."""
    checks: dict[int | None, list[str]] = {i: [] for i in (None, *INTERVALS)}
    for n in HOSTS:
        lines = [line for line in found["lines"] if line["hosts"] == n]
        naive = middle(lines, None)
        first = reached(found["losses"][f"{n} None"]) * naive["round"]
        print(f"\n| {n} hosts | iterations to the loss | seconds | sooner | ms an iteration | faster | ideal | of it |"
              "\n" + "|---" * 8 + "|")
        for i, check in checks.items():
            o, steps, iterations = middle(lines, i), i or 1, reached(found["losses"][f"{n} {i}"])
            iteration = o["round"] / steps
            ideal = naive["round"] / (naive["round"] - naive["exchange"] + naive["exchange"] / steps)
            print(f"| {name_of(i)} | {iterations:.0f} | {iterations * iteration:.3g} | "
                  f"{first / (iterations * iteration):.2f} | {1e3 * iteration:.1f} | "
                  f"{naive['round'] / iteration:.2f} | {ideal:.2f} | {naive['round'] / iteration / ideal:.0%} |")
            check += [f"{1e3 * o['round']:.0f}", f"{1e3 * o['planned']:.0f}", f"{100 * (o['off'] - 1):+.0f} %"]
        print(f"\n{n} hosts, by plan: {1e3 * median(line['latency'] for line in lines):.3g} ms one way, "
              f"{1e-6 * median(line['bandwidth'] for line in lines):.4g} Mbit/s")
    print("\n| ms a round | " + " | ".join(f"{n} hosts | planned | off" for n in HOSTS) + " |\n"
          + "|---" * (3 * len(HOSTS) + 1) + "|")
    for i, check in checks.items():
        print(f"| {name_of(i)} | " + " | ".join(check) + " |")


def draw() -> None:
    """Print the tables, and draw the picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    found = results()
    tables(found)
    figure, panels = pyplot.subplots(1, len(HOSTS) + 1, figsize=(4.5 * (len(HOSTS) + 1), 4), layout="constrained")
    for number, (n, panel) in enumerate(zip(HOSTS, panels, strict=False)):
        lines = [line for line in found["lines"] if line["hosts"] == n]
        for i in (None, *INTERVALS):
            o, curve = middle(lines, i), np.array(found["losses"][f"{n} {i}"])
            panel.plot(curve[1:, 0] * o["round"] / (i or 1), curve[1:, 1], ".-", label=name_of(i), lw=1,
                       color=pyplot.cm.viridis(0.95 * log(i) / log(INTERVALS[-1])) if i else "tab:red")
            panels[-1].plot(1e3 * o["round"], 1e3 * o["planned"], "s" if i else "D", color=f"C{number}",
                            label=None if i else f"{n} hosts")
        panel.axhline(TARGET, color="0.7", lw=0.8)
        panel.set(xlabel="seconds", ylabel="training loss", yscale="log", xscale="log", title=f"{n} hosts")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    ends = np.array([20, 2000])
    panels[-1].fill_between(ends, 0.75 * ends, 1.25 * ends, color="0.9", label="within 25 %")
    panels[-1].set(xlabel="ms a round, measured", ylabel="ms a round, planned", xscale="log", yscale="log")
    panels[-1].legend(fontsize=7)
    figure.savefig(FIGURE, dpi=120)


def ranks() -> None:
    """Print the tables of 8 to 4096 ranks: of models of this many bytes and seconds a step."""
    for size, step in ((1_724_320, 0.01), (10**8, 0.1)):
        sent = (Call("Allreduce", 8), Call("Ialltoallv", size), Call("Iallgatherv", size))      # as plan notes them
        rounds = [Round(i, i * step, (Call("Allreduce", 8),) * (i > 1) + sent) for i in PLANNED]
        print(f"\n| {size / 1e6:.3g} MB, {1e3 * step:.0f} ms a step | " + " | ".join(f"{n} ranks" for n in RANKS)
              + " |\n" + "|---" * (len(RANKS) + 1) + "|")
        for network, (latency, bandwidth) in NETWORKS.items():
            cells = []
            for n in RANKS:
                lines = table(rounds, n, latency, bandwidth)
                best = recommended(lines)
                gain = next((f"{o['speed_up']:.3g}" for o in lines if o["interval"] == best), "–")
                cells.append(f"{significant(1e3 * lines[1]['communicating'])} ms, {lines[0]['share']:.0%}; "
                             f"{best or '–'}, {gain}")
            print(f"| {network} | " + " | ".join(cells) + " |")


def significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def main() -> None:
    match sys.argv[1:]:
        case ["inner", file]:
            inner(file)
        case ["losses", file]:
            losses(file)
        case ["rounds", file, *turns]:
            rounds(str(Path(file).resolve()), int(turns[0]) if turns else 5)
        case ["draw"]:
            draw()
        case ["ranks"]:
            ranks()
        case _:
            sys.exit(__doc__)


main()
