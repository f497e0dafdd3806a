"""Curves of several runs on one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import disk, record
from .errors import InputError
from .show import about, labels

AXES = {"round": "round", "seconds": "time (s)", "bytes": "bytes sent per rank", "loss": "f(x)",
        "grad_norm": "‖∇f(x)‖", "accuracy": "test accuracy", "clipped": "share of workers clipped",
        "epsilon": "privacy spent, ε"}
# Okabe & Ito, "Color universal design" (2008): told apart by all, in print too; with the line styles 28 curves
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*"


def plot(dirs: Sequence[str | Path], x: str = "round", y: str = "loss", out: str | Path | None = None) -> Path:
    """Draw metric y over metric x of the runs in dirs; the picture's format is that of the file's name, .png, .svg or
    .pdf; out=None: Y.png here. Returns the file. The y axis is logarithmic where all values are positive and more than
    a factor of ten apart. Raises InputError for a folder without a run, a metric that a run does not have, a file that
    cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
    path = Path(out or f"{y}.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: expected a name that ends in .png, .svg or .pdf")
    configs, curves = [], []
    for dir in dirs:
        header, lines = record.read(dir)
        configs.append(record.config(header))
        curves.append(_curve(dir, lines, x, y))

    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, ((xs, ys), label) in enumerate(zip(curves, labels(configs, dirs), strict=True)):
        axes.plot(xs, ys, color=COLORS[i % len(COLORS)], linestyle=LINES[i // len(COLORS) % len(LINES)], linewidth=1.6,
                  marker=MARKERS[i % len(MARKERS)] if len(xs) <= 25 else "", markersize=4, label=label)
    values = np.concatenate([ys for _, ys in curves])
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
    if x == "bytes":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    if x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    axes.set_xlabel(AXES.get(x, x.replace("_", " ")))
    axes.set_ylabel(AXES.get(y, y.replace("_", " ")))
    titles = {about(config) for config in configs}
    if len(titles) == 1:
        axes.set_title(titles.pop(), fontsize="medium")
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) <= 7:
        axes.legend(frameon=False, fontsize="small")
    else:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mpiclip"}):         # the same bytes for the same runs
        figure.savefig(picture, format=path.suffix[1:],
                       metadata={".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix))
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        disk.replace(temporary, path)
    except OSError as error:
        disk.remove(temporary)
        raise InputError(f"{path}: cannot be written: {disk.reason(error)}") from None
    return path


def _curve(dir: str | Path, lines: np.ndarray, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The points of one run at which both metrics are finite numbers."""
    known = [name for name in lines.dtype.names or () if np.isfinite(lines[name]).any()]
    for name in (x, y):
        if name not in known:
            raise InputError(f"{dir}: no metric '{name}'; this run has {', '.join(known) or 'none yet'}")
    both = np.isfinite(lines[x]) & np.isfinite(lines[y])
    return lines[x][both], lines[y][both]
