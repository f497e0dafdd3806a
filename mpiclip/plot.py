"""Curves of several runs on one picture: one panel, or a panel for each pair of metrics and each value of a key."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import disk, record
from .errors import InputError, unknown
from .show import about, by_number, flatten, folders, labels, setting, varying

AXES = {"round": "round", "epochs": "passes over the data", "seconds": "time (s)", "bytes": "bytes sent per rank",
        "loss": "f(x)", "grad_norm": "‖∇f(x)‖", "accuracy": "test accuracy", "perplexity": "test perplexity",
        "clipped": "share of workers clipped",
        "epsilon": "privacy spent, ε", "shortened": "rows shortened a round", "left_out": "rows left out a round",
        "replaced": "rows not finite a round", "suspicion": "distance to the aggregate"}
LINEAR = {"accuracy", "clipped", "shortened", "left_out", "replaced"}       # shares and counts: never logarithmic
# Okabe & Ito, "Color universal design" (2008): told apart by all, in print too; with the line styles 28 curves
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*"
FEW = 7                 # curves that have a colour each and a legend inside
MOST = 3                # workers that are named where nobody is known to attack
PANELS = 12             # runs of which all workers are drawn
NOISE = 1e-12           # of the largest first value: what is below is rounding, and gets no room on a logarithmic axis

Style = dict[str, Any]                  # what Axes.plot takes
Legend = list[list[tuple[str, Style]]]  # groups of entries; each starts a line


@dataclass(frozen=True)
class Curve:
    """One metric over another, of one run."""

    x: np.ndarray
    y: np.ndarray
    style: Style


def plot(dirs: Sequence[str | Path], x: str = "round", y: str = "loss", out: str | Path | None = None,
         rows: str | None = None) -> Path:
    """Draw metric y over metric x of the runs in dirs; the picture's format is that of the file's name, .png, .svg or
    .pdf; out=None: Y.png here. Returns the file. A folder of runs stands for all below it.

    x, y: a metric, or several with commas between: a column of panels for each x, a row for each y. rows: a key of the
    config, "method.tau": such rows for each of its values; runs without the key are in all of them. Where there are
    several panels, or many runs, the colour is the method, and the line's style is what else differs.

    y = "suspicion", with one x, is a panel for each run and in it a curve for each worker: how far what it sent was
    from the aggregate. Byzantine workers are set apart, or else the most suspicious ones.

    An axis is logarithmic where that shows more: y where nothing is negative and values are more than a factor of ten
    apart, x where the runs end so far apart. A run without finite numbers for a panel is left out of it, and the panel
    says so. Raises InputError for a folder without a run, a metric that no run has, a file that cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    xs, ys = _names("--x", x), _names("--y", y)
    path = Path(out or f"{'-'.join(ys)}.png")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: expected a name that ends in .png, .svg or .pdf")
    dirs = folders(dirs)
    records = [record.read(dir) for dir in dirs]
    configs = [record.config(header) for header, _ in records]
    keys = [flatten(config) for config in configs]
    if "suspicion" in (*xs, *ys):
        if ys != ["suspicion"] or len(xs) > 1 or rows or len(dirs) > PANELS:
            raise InputError("--y suspicion: draws all workers of a run, and every run in a panel of its own; expected "
                             f"no other metric, one --x, no --rows, and at most {PANELS} runs")
        return _suspicion(dirs, [lines for _, lines in records], configs, xs[0], path)
    blocks = _blocks(keys, rows)
    panels = [(block, y_name, x_name) for block in blocks for y_name in ys for x_name in xs]
    alone = len(panels) == 1
    few = alone and len(dirs) <= FEW
    if few:
        styles: list[Style] = [{"label": label, "color": COLORS[i], "marker": MARKERS[i]}
                               for i, label in enumerate(labels(configs, dirs))]
        legend: Legend = []
    else:
        styles, legend = _family(keys, dirs, rows)

    figure = Figure(figsize=(6.4, 4.2) if alone else (max(6.4, 3.2 * len(xs)), 1.2 + 2.2 * len(panels) / len(xs)),
                    dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.04 if alone else 0.1))
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels) // len(xs), len(xs), squeeze=False, sharex="col")
    runs = [(dir, lines, style) for dir, (_, lines), style in zip(dirs, records, styles, strict=True)]
    every = {(y_name, x_name): _curves(runs, x_name, y_name) for _, y_name, x_name in panels}
    curves = [[every[y_name, x_name][i] for i in blocks[block] if i in every[y_name, x_name]]
              for block, y_name, x_name in panels]
    for j, x_name in enumerate(xs):
        _scale_x(grid[-1, j], x_name, [curve for y_name in ys for curve in every[y_name, x_name].values()], keys,
                 len(xs))
    for i, y_name in enumerate(ys):
        for axes in grid[i::len(ys)].ravel():
            if axes is not grid[i, 0]:
                axes.sharey(grid[i, 0])
        _scale_y(grid[i, 0], y_name, [curve for x_name in xs for curve in every[y_name, x_name].values()])
    for axes, (block, y_name, _), there in zip(grid.ravel(), panels, curves, strict=True):
        for curve in there:
            axes.plot(curve.x, curve.y, **_with_markers(curve.style, len(curve.x), few))
        _plain(axes)
        axes.label_outer()
        if axes in grid[:, 0]:
            axes.set_ylabel(AXES.get(y_name, y_name.replace("_", " ")))
            if y_name == ys[0]:
                axes.set_title(block, loc="left", fontsize="medium")
        if len(there) < len(blocks[block]):
            axes.set_title(f"{len(there)} of {len(blocks[block])} runs", loc="right", fontsize="small", color="0.4")
    titles = {about(config) for config in configs}
    names = {str(key.get("method.name")) for key in keys}
    if len(titles) == 1:
        title = titles.pop() if few or len(names) > 1 else f"{names.pop()}: {titles.pop()}"
        figure.suptitle(title, fontsize="medium") if not alone else grid[0, 0].set_title(title, fontsize="medium")
    if few:
        grid[0, 0].legend(frameon=False, fontsize="small")
    else:
        _legend_below(figure, legend)
    _write(figure, path)
    return path


def _suspicion(dirs: list[Path], runs: list[np.ndarray], configs: list[dict[str, Any]], x: str, path: Path) -> Path:
    """The picture of suspicion over x; returns its file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    wide = min(3, len(dirs))
    high = -(-len(dirs) // wide)
    figure = Figure(figsize=(6.4, 4.2) if len(dirs) == 1 else (4.2 * wide, 3.2 * high), dpi=160,
                    layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    grid = figure.subplots(high, wide, squeeze=False).ravel()
    for axes in grid[len(dirs):]:
        axes.remove()
    titles = labels(configs, dirs) if len(dirs) > 1 else [about(configs[0])]
    for axes, dir, lines, config, title in zip(grid, dirs, runs, configs, titles, strict=False):
        names = lines.dtype.names or ()
        if "suspicion" not in names or np.isnan(lines["suspicion"]).all():
            raise InputError(f"{dir}: no metric 'suspicion' yet; expected a run with aggregate.suspect = true")
        if x not in names or lines[x].ndim > 1:
            raise unknown("--x", x, [name for name in names if lines[name].ndim == 1])
        lines = lines[np.isfinite(lines[x]) & ~np.isnan(lines["suspicion"]).any(1)]
        curves, outside = [], False
        for label, workers, style in _suspects(lines["suspicion"], config.get("aggregate", {})):
            for i in workers:
                y = lines["suspicion"][:, i]
                finite = np.isfinite(y)
                curves.append(Curve(lines[x][finite], y[finite], style))
                axes.plot(curves[-1].x, curves[-1].y, **_with_markers(style, len(lines), True),
                          label=label if i == workers[0] else None)
                if not finite.all():
                    axes.plot(lines[x][~finite], np.ones(len(y) - finite.sum()), linestyle="", marker="^", markersize=4,
                              color=style["color"], clip_on=False, transform=axes.get_xaxis_transform(),
                              label=None if outside else "not finite")
                    outside = True
        _scale_x(axes, x, curves, [flatten(config)], wide)
        _scale_y(axes, "suspicion", curves)
        _plain(axes)
        if axes in grid[::wide]:
            axes.set_ylabel(AXES["suspicion"])
        axes.set_title(title, fontsize="medium")
        axes.legend(edgecolor="none", framealpha=0.8, fontsize="small")
    _write(figure, path)
    return path


def _suspects(distance: np.ndarray, aggregate: dict[str, Any]) -> list[tuple[str, list[int], Style]]:
    """(label, workers, style) of each group of workers, the most suspicious ones on top. distance: (lines, n)"""
    n = distance.shape[1]
    f = aggregate["f"] if aggregate.get("attack") else 0
    if f:
        many = f"workers {n - f} to {n - 1}" if f > 1 else f"worker {n - 1}"
        return [("honest workers", list(range(n - f)), {"color": COLORS[0], "linewidth": 1, "marker": ""}),
                (f"Byzantine: {many}", list(range(n - f, n)), {"color": COLORS[1], "marker": "s"})]
    order = np.argsort(-distance[-1], kind="stable").tolist()
    named, others = order[:MOST], order[MOST:]
    return ([("other workers", others, {"color": "0.7", "linewidth": 1, "marker": ""})] if others else []) + [
        (f"worker {i}", [i], {"color": COLORS[j], "marker": MARKERS[j]}) for j, i in enumerate(named)]


def _names(option: str, text: str) -> list[str]:
    """metric,metric"""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option} '{text}': expected a metric, or several with commas between")
    return names


def _blocks(keys: list[dict[str, Any]], name: str | None) -> dict[str, list[int]]:
    """The runs of each row of panels: title → their numbers. A row for each value of a key; where a method never has
    it, its runs are in all rows."""
    if name is None:
        return {"": list(range(len(keys)))}
    if not any(name in key for key in keys):
        raise unknown("--rows", name, {known for key in keys for known in key})
    titles = _said(keys, [name])
    return {title: [i for i, of in enumerate(titles) if of in (title, "")]
            for title in sorted(set(titles) - {""}, key=by_number)}


# ---- numbers


def _curves(runs: list[tuple[Path, np.ndarray, Style]], x: str, y: str) -> dict[int, Curve]:
    """The curves of those runs that have both metrics, by their numbers; InputError if none has."""
    curves, reasons = {}, []
    for i, (dir, lines, style) in enumerate(runs):
        known = [name for name in lines.dtype.names or () if np.isfinite(lines[name]).any()]
        missing = [name for name in (x, y) if name not in known]
        if missing:
            reasons.append(f"{dir}: no metric '{missing[0]}'; this run has {', '.join(known) or 'none yet'}")
        elif x == "bytes" and not lines[x].any():
            reasons.append(f"{dir}: sent no bytes, it ran on one rank; expected another --x than bytes, or runs on "
                           "several ranks")
        else:
            both = np.isfinite(lines[x]) & np.isfinite(lines[y])
            curves[i] = Curve(lines[x][both], lines[y][both], style)
    if not curves:
        raise InputError(reasons[0])
    return curves


def _plain(axes) -> None:
    """A panel without a box, with a light grid."""
    axes.margins(x=0.02)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_x(axes, name: str, curves: list[Curve], keys: list[dict[str, Any]], panels: int) -> None:
    """The x axis of a column: its label, its units, whether it is logarithmic."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator
    ends = [curve.x.max() for curve in curves if len(curve.x)]
    label = AXES.get(name, name.replace("_", " "))
    deltas = {key["method.delta"] for key in keys if "method.delta" in key}
    if name == "epsilon" and len(deltas) == 1:
        label += f" ({setting('method.delta', deltas.pop())})"
    axes.set_xlabel(label)
    if name == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    elif ends and min(ends) > 0 and max(ends) > 10 * min(ends):
        axes.set_xscale("log", nonpositive="mask")
        first = min(curve.x[curve.x > 0].min() for curve in curves if len(curve.x))
        if max(ends) < 300 * first:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if name == "bytes":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    if panels > 1 and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=name == "round", steps=[1, 2, 5, 10]))


def _scale_y(axes, name: str, curves: list[Curve]) -> None:
    """The y axis of a metric: whether it is logarithmic, and down to where."""
    values = np.concatenate([curve.y for curve in curves])
    positive = values[values > 0]
    if name in LINEAR or not len(positive) or values.min() < 0:
        return
    apart = 10 if len(positive) == len(values) else 1e3         # zeros have no place on a logarithmic axis
    if positive.max() > apart * positive.min():
        axes.set_yscale("log")
        floor = NOISE * max(curve.y[0] for curve in curves if len(curve.y))
        if positive.min() < floor:
            axes.set_ylim(floor, positive.max() * (positive.max() / floor) ** 0.05)


# ---- styles


def _family(keys: list[dict[str, Any]], dirs: list[Path], rows: str | None) -> tuple[list[Style], Legend]:
    """A style for each run, and the legend that explains them: a colour for each method, lines and markers for the keys
    that differ beside it. If there is one method, colours are for the first such key; if that is all, lines too."""
    if len({str(key) for key in keys}) < len(keys):             # the same runs in several folders
        keys = [key | {"folder": str(dir.parent)} for key, dir in zip(keys, dirs, strict=True)]
    methods = [str(key.get("method.name", "?")) for key in keys]
    differ = [name for name in varying(keys) if name not in ("method.name", rows)]
    within = [name for name in differ
              if any(len({str(key.get(name)) for key, m in zip(keys, methods, strict=True) if m == method}) > 1
                     for method in set(methods))]
    beside = [name for name in differ if name not in within]    # what differs with the method alone
    dashes: dict[str, str] = {}
    if len(set(methods)) > 1 or not within:
        hues = [", ".join([method, *(setting(name, key[name]) for name in beside if name in key)])
                for method, key in zip(methods, keys, strict=True)]
    else:
        hues, within = _said(keys, within[:1]), within[1:]
        dashes = {} if within else _cycle(hues, LINES)
    lines, marks = _said(keys, within[:1]), _said(keys, within[1:])
    if len(_cycle(marks, MARKERS)) <= 1 or len(_cycle(lines, LINES)) > len(LINES):      # shown in both ways
        lines = marks = _said(keys, within)
    colors, line, mark = _cycle(hues, COLORS), _cycle(lines, LINES), _cycle(marks, MARKERS)
    several = len(line) > 1 or len(mark) > 1
    styles = [{"color": colors[hue], "linestyle": line.get(a, dashes.get(hue, "-")),
               "marker": mark.get(b, "") if several else "o",
               **({"markevery": (0.03 + 0.02 * (number % 5), 0.14)} if several else {})}
              for number, (hue, a, b) in enumerate(zip(hues, lines, marks, strict=True))]
    legend: Legend = [[(text, {"color": color, "linestyle": dashes.get(text, "-")}) for text, color in colors.items()]]
    if several and lines is marks:
        legend += [[(text, {"color": "0.35", "linestyle": line[text], "marker": mark[text]}) for text in line]]
    elif several:
        legend += [[(text, {"color": "0.35", "linestyle": line[text]}) for text in line],
                   [(text, {"color": "0.35", "linestyle": "", "marker": mark[text]}) for text in mark]]
    return styles, legend


def _said(keys: list[dict[str, Any]], names: list[str]) -> list[str]:
    """What the runs have for these keys, in words, in the order of the values where they are numbers; "" for methods
    that never have them. Of a table within a method, its compressor's, only what is there counts."""
    known = {(key.get("method.name"), name) for key in keys for name in names if name in key}
    return [", ".join(setting(name, key.get(name, "none")) for name in names
                      if (key.get("method.name"), name) in known and (name.count(".") == 1 or key.get(name)))
            for key in keys]


def _cycle(texts: list[str], styles: Sequence[str]) -> dict[str, str]:
    """A style for each text but the empty one, in the order of the numbers in it."""
    found = sorted(dict.fromkeys(filter(None, texts)), key=by_number)
    return {text: styles[i % len(styles)] for i, text in enumerate(found)}


def _with_markers(style: Style, points: int, few: bool) -> Style:
    """The style with as many markers as do no harm: on every point of a short curve; on long ones a few, if they mean
    something."""
    style = {"linewidth": 1.6 if few else 1.3, "markersize": 4} | style
    if points <= 25:
        return {key: value for key, value in style.items() if key != "markevery"}
    return style if "markevery" in style else style | {"marker": ""}


def _legend_below(figure, groups: Legend) -> None:
    """A legend under the panels, each group in lines of its own."""
    from matplotlib.lines import Line2D
    longest = max(len(text) for group in groups for text, _ in group)
    columns = max(1, int(figure.get_figwidth() / (0.07 * longest + 0.55)))
    lines = [group[i:i + columns] for group in groups for i in range(0, len(group), columns)]
    columns = max(map(len, lines))
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, len(lines) - 3))     # the panels keep their size
    blank: tuple[str, Style] = ("", {"linestyle": "", "marker": ""})
    entries = [line[column] if column < len(line) else blank for column in range(columns) for line in lines]
    figure.legend([Line2D([], [], linewidth=1.5, markersize=4, **style) for _, style in entries],
                  [text for text, _ in entries], ncols=columns, loc="outside lower center", frameon=False,
                  fontsize="small", handlelength=2.8)


def _write(figure, path: Path) -> None:
    """The picture as a file, whole or not at all; the same bytes for the same runs."""
    import matplotlib
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mpiclip"}):
        figure.savefig(picture, format=path.suffix[1:],
                       metadata={".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix))
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        disk.replace(temporary, path)
    except OSError as error:
        disk.remove(temporary)
        raise InputError(f"{path}: cannot be written: {disk.reason(error)}") from None
