"""How long does it take from `mpirun` to the end of a first round, with its checkpoint? A round on a9a, with a mean and
with robust rules, against an MPI program that does nothing. In turn, medians of seconds.

    mpiclip data import a9a a9a.h5 --test a9a.t --features 123
    python benchmarks/start_up.py a9a.h5 [TURNS]"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

BIN, ROOT = Path(sys.executable).parent, Path(__file__).parents[1]
ROBUST = ["--set", 'aggregate.rules=["arc","nnm","trimmed_mean"]', "--set", "aggregate.f=4"]


def seconds(ranks: int, program: list) -> float:
    """From the start of mpirun to its end."""
    start = perf_counter()
    done = subprocess.run([BIN / "mpirun", "-n", str(ranks), *program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return perf_counter() - start


def main() -> None:
    data, turns = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 11
    train = [BIN / "mpiclip", "train", ROOT / "jobs/clip21/a9a.toml", "--set", "run.rounds=1", "--set",
             f"data.file={data}"]
    programs = {"nothing": [sys.executable, "-c", "from mpi4py import MPI"], "a round": train,
                "a robust round": [*train, *ROBUST]}
    for ranks in (2, 4):
        spent: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(turns):
            for name, program in programs.items():
                with tempfile.TemporaryDirectory() as out:
                    spent[name].append(seconds(ranks, [*program, *(["--out", out] if "round" in name else [])]))
        line = {"ranks": ranks, **{name: round(median(times), 3) for name, times in spent.items()}}
        for name in ("a round", "a robust round"):
            line[f"{name}, beyond"] = round(line[name] - line["nothing"], 3)
        print(json.dumps(line), flush=True)


main()
