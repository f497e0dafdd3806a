"""The command line: `mpiclip VERB …`, alone or under mpirun or srun."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")     # to look for them takes longer than to check a config

from .errors import InputError
from .version import __version__

DONE, BAD_INPUT, AGAIN = 0, 2, 75       # 75: EX_TEMPFAIL, stopped by a signal after a checkpoint: run me again


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0 done, 2 bad input (one line on stderr), 75 stopped by a signal after a
    checkpoint. Anything else is a bug, and shows a traceback."""
    from .comm import started_rank
    try:
        if started_rank() > 0:                          # a mistake in the command is said once
            with contextlib.redirect_stderr(io.StringIO()):
                args = parser().parse_args(argv)
            if args.verb not in (train, resume, sweep, plan, bench, doctor):
                return DONE                             # one rank is enough
        else:
            args = parser().parse_args(argv)
        return args.verb(args) or DONE
    except InputError as error:
        return _end(str(error), error.agreed, BAD_INPUT)
    except KeyboardInterrupt:
        return _end("interrupted", False, 130)
    except BrokenPipeError:                             # mpiclip show … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _end(message: str, agreed: bool, status: int) -> int:
    """Say why in one line, once. What one rank alone has met, the others must not wait for: they are aborted."""
    mpi = sys.modules.get("mpi4py.MPI")
    world = mpi.COMM_WORLD if mpi and mpi.Is_initialized() else None
    if world is None or world.rank == 0 or not agreed:
        sys.stderr.write(f"mpiclip: {message}\n")
        sys.stderr.flush()
    if world is not None and world.size > 1 and not agreed:
        world.Abort(status)
    return status


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(prog="mpiclip", description="Distributed learning with clipped gradients on MPI.")
    top.add_argument("--version", action="version", version=f"mpiclip {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(function, *names: str, within=verbs):
        new = within.add_parser(names[-1], help=function.__doc__.splitlines()[0], description=function.__doc__)
        new.set_defaults(verb=function)
        return new

    setting = {"action": "append", "default": [], "metavar": "TABLE.KEY=VALUE", "help": "override a key of the config"}
    new = verb(train, "train")
    new.add_argument("config", help="a TOML file")
    new.add_argument("--set", dest="settings", **setting)
    new.add_argument("--out", help="folder for run.h5 and checkpoints/ (default: runs/NAME-OF-CONFIG)")
    new = verb(resume, "resume")
    new.add_argument("out", metavar="DIR", help="the folder of the run")
    new.add_argument("--set", dest="settings", **setting)
    new = verb(sweep, "sweep")
    new.add_argument("configs", nargs="+", metavar="CONFIG", help="TOML files, with a table [grid] or without")
    new.add_argument("--grid", action="append", default=[], metavar="TABLE.KEY=VALUE,VALUE…",
                     help="a run for each of these values, and each combination with the others")
    new.add_argument("--set", dest="settings", **setting)
    new.add_argument("--out", help="folder of the runs' folders (default: runs/NAME-OF-CONFIG)")
    new.add_argument("--ranks", type=int, metavar="R", help="R ranks for each run, as many runs at the same time as "
                                                            "there are ranks for (default: all ranks, one run)")
    new = verb(show, "show")
    new.add_argument("dirs", nargs="+", metavar="DIR", help="folders of runs")
    new.add_argument("--json", action="store_true", help="for programs")
    new = verb(plot, "plot")
    new.add_argument("dirs", nargs="+", metavar="DIR", help="folders of runs, or of folders of runs")
    new.add_argument("--x", default="round", help="round, epochs, seconds, bytes or epsilon (default: round); "
                                                  "with commas a column of panels for each")
    new.add_argument("--y", default="loss", help="a metric: loss, grad_norm, accuracy … (default: loss); "
                                                 "with commas a row of panels for each")
    new.add_argument("--rows", metavar="TABLE.KEY", help="a row of panels for each value of a key")
    new.add_argument("-o", dest="out", metavar="FILE", help="PNG, SVG or PDF (default: METRIC.png)")

    data = verbs.add_parser("data", help="Import and describe data sets.").add_subparsers(required=True, metavar="VERB")
    new = verb(data_import, "import", within=data)
    new.add_argument("sources", nargs="+", metavar="SOURCE", help="LIBSVM, npz, csv, idx, cifar, text; also .gz, "
                                                                  ".bz2, .xz")
    new.add_argument("dest", metavar="DEST.h5")
    new.add_argument("--format", help="default: guessed from the name, then from the content")
    new.add_argument("--test", nargs="+", default=[], metavar="SOURCE", help="the test rows, or text")
    new.add_argument("--features", type=int, metavar="N", help="the number of features, if the rows do not show all")
    new.add_argument("--label", metavar="COLUMN", help="csv: the label's column, name or number (default: the last)")
    new.add_argument("--level", choices=["word", "char"], help="text: what its tokens are (default: word)")
    new = verb(data_info, "info", within=data)
    new.add_argument("file")

    new = verb(privacy, "privacy")
    new.add_argument("config", nargs="?", help="a TOML file; or none, and the numbers:")
    new.add_argument("--set", dest="settings", **setting)
    new.add_argument("--sigma", type=float, metavar="σ", help="standard deviation of a coordinate's noise; asks for ε")
    new.add_argument("--epsilon", type=float, metavar="ε", dest="target", help="asks for σ")
    new.add_argument("--delta", type=float, metavar="δ")
    new.add_argument("--rounds", type=int, metavar="T", help="how often there is a message, or a gradient")
    new.add_argument("--tau", type=float, metavar="τ", help="the longest message: workers are protected")
    new.add_argument("--clip", type=float, metavar="C", help="the longest gradient of a row: rows are protected")
    new.add_argument("--batch", type=float, metavar="B", help="expected rows in a gradient, by which their sum is "
                                                              "divided (default: 1)")
    new.add_argument("--rate", type=float, metavar="q", help="the probability of each row to be in it (default: 1)")
    new.add_argument("--workers", type=int, metavar="N", help="whose noise adds up, with --against model (default: 1)")
    new.add_argument("--against", choices=["server", "model"], help="who looks: at all messages (the default), or at "
                                                                    "the models only")
    new.add_argument("--json", action="store_true", help="for programs")
    new = verb(plan, "plan")
    new.add_argument("config", help="a TOML file")
    new.add_argument("--set", dest="settings", **setting)
    new.add_argument("--latency", type=float, metavar="SECONDS", help="from one rank to another, one way: half of "
                                                                      "ping's time (default: measured, under mpirun)")
    new.add_argument("--bandwidth", type=float, metavar="BITS/S", help="of a rank's link (default: measured, under "
                                                                       "mpirun)")
    new.add_argument("--ranks", type=int, metavar="N", help="how many there will be, each on a host of its own "
                                                            "(default: as many as are started)")
    new.add_argument("--json", action="store_true", help="for programs")
    new = verb(bench, "bench")
    new.add_argument("what", choices=["kernels", "exchange", "rules"])
    new.add_argument("--json", action="store_true", help="for programs")
    verb(doctor, "doctor")
    return top


def train(args) -> int:
    """Run an experiment."""
    from .comm import world
    from .training import train
    ranks = world()
    out = args.out or ranks.same(_free_folder(Path("runs") / Path(args.config).stem))
    return AGAIN if train(args.config, ranks, out, args.settings, progress=True).stopped else DONE


def _free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 … that holds no run."""
    number = 1
    while (free := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def resume(args) -> int:
    """Go on with a run from its newest checkpoint, on any number of ranks."""
    from .training import resume
    return AGAIN if resume(args.out, args.settings, progress=True).stopped else DONE


def sweep(args) -> int:
    """Run a family of experiments: every combination of configs and values. The same command goes on with it."""
    from .comm import world
    from .show import show
    from .sweep import sweep
    ranks = world()
    family = sweep(args.configs, args.grid, args.settings, args.out, ranks, args.ranks, progress=True)
    there = [folder for folder in family.folders.values() if (folder / "run.h5").exists()]
    if ranks.rank == 0 and there and not family.stopped:
        print(show(there))
    if ranks.rank == 0 and family.failed:
        sys.stderr.write(f"mpiclip: {len(family.failed)} of {len(family.folders)} runs failed\n"
                         + "".join(f"  {name}: {reason}\n" for name, reason in family.failed.items()))
    if ranks.rank == 0 and family.stopped:
        sys.stderr.write("stopped; the same command goes on\n")
    return AGAIN if family.stopped else BAD_INPUT if family.failed else DONE


def show(args) -> None:
    """What ran, its last metrics, the seconds by part; several runs side by side."""
    from .show import show
    print(show(args.dirs, args.json))


def plot(args) -> None:
    """Draw a metric of several runs on one picture."""
    from .plot import plot
    print(plot(args.dirs, args.x, args.y, args.out, args.rows))


def data_import(args) -> None:
    """Convert data files to HDF5."""
    from .data import info
    from .importers import import_file
    import_file(args.sources, args.dest, args.format, args.test, args.features, args.label,
                args.level)
    print(info(args.dest))


def data_info(args) -> None:
    """What is in an HDF5 data file."""
    from .data import info
    print(info(args.file))


def privacy(args) -> None:
    """ε for σ, or σ for ε: of a config's experiment, or of numbers."""
    import dataclasses
    import json

    from .privacy import epsilon, report, report_text, statement
    from .show import finite
    names = ("sigma", "target", "delta", "rounds", "tau", "clip", "batch", "rate", "workers", "against")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.config is None:
        if args.settings:
            raise InputError(f"--set {args.settings[0]}: expected a config that it changes")
        found, asked = report(**given), "epsilon" if args.target is None else "sigma"
        print(json.dumps(finite(found)) if args.json else report_text(found, asked))
        return
    if given:
        name = next(iter(given)).replace("target", "epsilon")
        raise InputError(f"--{name}: not with a config; expected --set, e.g. --set method.epsilon=8")
    from .comm import Comm
    from .config import load
    from .training import Training
    run = Training(load(args.config, args.settings), Comm(), None)
    if run.mechanism is None:
        raise InputError(f"{args.config}: there is no noise; expected method.sigma, or method.epsilon and method.delta")
    table, releases = run.config.privacy, run.releases(run.rounds)
    spent = epsilon(run.mechanism, releases)
    text = statement(run.mechanism, releases, spent, table.noise, table.scaling)
    print(json.dumps(finite({"mechanism": dataclasses.asdict(run.mechanism), "releases": releases, "epsilon": spent,
                             "statement": text})) if args.json else text)


def plan(args) -> None:
    """How long a round will take on a network, and which interval it calls for."""
    from .comm import world
    from .plan import plan, shown
    ranks = world()
    found = plan(args.config, args.latency, args.bandwidth, args.ranks, args.settings, ranks)
    if ranks.rank == 0:
        print(shown(found, args.json))


def bench(args) -> None:
    """Check the compiled kernels, the exchange or the robust rules, then time them against this machine's limits."""
    from .bench import bench
    bench(args.what, args.json)


def doctor(args) -> None:
    """What this machine offers: MPI, ranks, threads, GPUs, HDF5, compiled kernels; and what will be slow."""
    from .doctor import doctor
    doctor()


if __name__ == "__main__":
    sys.exit(main())
