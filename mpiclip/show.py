"""What a run was and what became of it, in words: one run, or several in a table."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ledger, record

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η", "lam": "λ", "sigma": "σ",
         "tau": "τ"}
LEGIBLE = 48            # characters of a run's name
PARTS = ("grad", "clip", "comm", "rules", "eval")
SUSPECTS = 3            # workers that are named, of those that are farthest from the aggregate


def show(dirs: Sequence[str | Path], as_json: bool = False) -> str:
    """The text that `mpiclip show` prints. JSON: an object with the keys config, rounds, workers, ranks, final,
    seconds, bytes_sent, or a list of them for several runs; what is not a finite number is null. Raises InputError for
    a folder without a readable run."""
    dirs = folders(dirs)
    runs = [summary(dir) for dir in dirs]
    if as_json:
        return json.dumps(runs[0] if len(runs) == 1 else runs, indent=2, ensure_ascii=False)
    return _one(runs[0], dirs[0]) if len(runs) == 1 else _several(runs, dirs)


def summary(dir: str | Path) -> dict[str, Any]:
    """The facts about a run, as DESIGN's JSON keys name them: rounds are those done, seconds and bytes_sent (per rank)
    the whole run's, final the last line of the metrics, but for epsilon, which is what has been spent since, too."""
    header, lines = record.read(dir)
    final = {name: lines[name][-1].tolist() for name in lines.dtype.names or ()} if len(lines) else {}
    private = header.get("privacy")
    if private is not None:
        private, final = _spent(Path(dir), private, final)
    return finite({
        "config": record.config(header), "rounds": int(final.get("round", 0)),
        "workers": header.get("workers"), "ranks": header.get("ranks"), "version": header.get("version"),
        "dimension": header.get("dimension"), "constants": header.get("constants", {}),
        "privacy": private,
        "final": final, "seconds": final.get("seconds"), "bytes_sent": final.get("bytes")})


def _spent(dir: Path, told: dict[str, Any], final: dict[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
    """What run.h5 tells of a private run with the number of its releases, and the metrics with their ε: also of rounds
    that a run which was stopped, or killed, has released after the last line of metrics."""
    recorded = int(final.get("round", 0)) + told["repeated"]
    rounds = max(recorded, ledger.released(dir) or 0)
    releases = rounds * told["releases_per_round"]
    if rounds > recorded:
        from .privacy import Mechanism, epsilon
        final = final | {"epsilon": epsilon(Mechanism(**told["mechanism"]), releases)}
    return told | {"releases": releases}, final


def folders(dirs: Sequence[str | Path]) -> list[Path]:
    """The folders of the runs that dirs stand for: a folder of runs, as a sweep leaves it, stands for all below it, in
    the order of their names, numbers by their size."""
    found: list[Path] = []
    for dir in map(Path, dirs):
        below = [] if (dir / "run.h5").exists() else [path.parent for path in dir.rglob("run.h5")]
        found += sorted(below, key=lambda path: by_number(str(path))) or [dir]
    return found


def by_number(text: str) -> list[str | float]:
    """For sorting: the text, with the numbers in it as numbers."""
    parts = re.split(r"(\d+\.?\d*(?:e[+-]?\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def labels(configs: Sequence[dict[str, Any]], dirs: Sequence[str | Path]) -> list[str]:
    """Names that tell runs apart: the method, and the keys whose values differ between the runs. Where that is too much
    to read, no method if it is the same in all; and then the folder, behind the rules, or the method."""
    flat = [flatten(config) for config in configs]
    keys = [key for key in varying(flat) if key != "method.name"]
    methods = [str(f.get("method.name", Path(dir).name)) for f, dir in zip(flat, dirs, strict=True)]
    said = [{key: setting(key, f[key]) for key in keys if key in f} for f in flat]
    names = [", ".join([method, *values.values()]) for method, values in zip(methods, said, strict=True)]
    if any(len(name) > LEGIBLE for name in names) and len(set(methods)) == 1:
        names = [", ".join(values.values()) or methods[0] for values in said]
    names = [name if len(name) <= LEGIBLE else f"{values.get('aggregate.rules', method)} ({Path(dir).name})"
             for name, values, method, dir in zip(names, said, methods, dirs, strict=True)]
    apart = len({Path(dir).name for dir in dirs}) == len(dirs)
    return [name if names.count(name) == 1 else f"{name} ({Path(dir).name if apart else dir})"
            for name, dir in zip(names, dirs, strict=True)]


def varying(flat: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which flat configs differ; not those that some methods do not have, and the others leave alone."""
    def differ(key: str) -> bool:
        there = [f for f in flat if key in f]
        return len({str(f[key]) for f in there}) > 1 or (
            len(there) < len(flat) and not all(_is_default(f, key) for f in there))
    keys = [key for key in dict.fromkeys(key for f in flat for key in f) if differ(key)]
    # of those that come together with another and never change, the first of them says it all: ε, and with it δ
    where = {key: tuple(key in f for f in flat) for key in keys}
    moving = {where[key] for key in keys if len({str(f[key]) for f in flat if key in f}) > 1}
    first = {where[key]: key for key in reversed(keys)}
    return [key for key in keys if all(where[key]) or len({str(f[key]) for f in flat if key in f}) > 1
            or (where[key] not in moving and first[where[key]] == key)]


def _is_default(f: dict[str, Any], key: str) -> bool:
    """Whether a key of a method, a problem or [privacy] has the value that it has where it is not given."""
    from . import config, methods, problems
    table, _, name = key.partition(".")
    known: Any = config.Privacy if table == "privacy" else None
    for module in (methods, problems):
        if module.__name__.endswith(f".{table}s") and f.get(f"{table}.name") in module.names():
            known = module.load(f[f"{table}.name"])
    return known is not None and name in known.model_fields and known.model_fields[name].default == f[key]


def about(config: dict[str, Any]) -> str:
    """The experiment without the method, in a few words: logistic (nonconvex, λ = 0.1) on a9a.h5"""
    problem = config.get("problem", {})
    details = [problem.get("regularizer", "none")]
    if details == ["none"]:
        details = []
    elif "lam" in problem:
        details.append(setting("lam", problem["lam"]))
    file = config.get("data", {}).get("file")
    return (problem.get("name", "?") + (f" ({', '.join(details)})" if details else "")
            + (f" on {Path(file).name}" if file else ""))


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": {"tau": 1}} → {"method.tau": 1}"""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def setting(key: str, value: Any) -> str:
    """τ = 0.1; of a name or a file only the value"""
    *_, table, name = ["", *key.split(".")]
    if name == "file":
        return Path(str(value)).name
    if name == "name":
        return f"{table} {value}" if table == "attack" else str(value)
    if name == "rules":
        return " → ".join(_rule(entry) for entry in value) or "mean"
    said = f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else value
    return f"{GREEK.get(name, name.replace('_', ' '))} = {said}"


def _rule(entry: Any) -> str:
    """A rule of a chain: arc; of one with constants: clipping (threshold 2)"""
    if not isinstance(entry, dict):
        return entry
    constants = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key != "name")
    return entry["name"] + (f" ({constants})" if constants else "")


def _constant(key: str, value: Any, resolved: Any) -> str:
    """stepsize = 0.5; of one that the config left to a rule, the rule as well: stepsize = 0.0213 (theory); a table in
    words: compressor = top_k, k 100"""
    rule = value
    if isinstance(value, dict):
        rule = ", ".join(str(v) if k == "name" else k if v is True else f"{k} {v:g}" for k, v in value.items()
                         if v is not False)
    return setting(key, rule if resolved == value else resolved) + ("" if resolved == value else f" ({rule})")


def finite(value: Any) -> Any:
    """The value with None for NaN and the infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Four digits are enough for a person; – where there is no number."""
    return "–" if value is None else f"{value:.4g}"


def size(count: float | None) -> str:
    """Bytes with a decimal prefix: 12.3 MB"""
    if count is None:
        return "–"
    power = min(int(math.log10(max(count, 1)) / 3), 5)
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {' kMGTP'[power].strip()}B"


def _one(run: dict[str, Any], dir: str | Path) -> str:
    from rich.table import Table

    from .privacy import rounded_up
    config, final = run["config"], run["final"]
    settings, asked = config.get("run", {}), config.get("run", {}).get("rounds", run["rounds"])
    method = [_constant(key, value, run["constants"].get(key, value))
              for key, value in config.get("method", {}).items() if key != "name"]
    if "epsilon" in config.get("method", {}):
        method.append(setting("sigma", run["constants"].get("sigma")))         # calculated from ε
    problem = about(config) + (f", d = {run['dimension']}" if run["dimension"] else "")
    facts = [
        ("run", f"{dir} (mpiclip {run['version']})" if run["version"] else str(dir)),
        ("method", ", ".join([config.get("method", {}).get("name", "?"), *method])),
        ("problem", problem),
        ("workers", f"{run['workers']} on {run['ranks']} rank{'s' * (run['ranks'] != 1)}"),
        ("rounds", f"{run['rounds']}" if run["rounds"] == asked else f"{run['rounds']} of {asked}")]
    if "seed" in settings:
        facts.append(("seed", f"{settings['seed']}"))
    results = [(name, number(value)) for name, value in final.items() if value is not None
               and not name.startswith("seconds") and name not in ("round", "bytes", "epsilon", "suspicion")]
    if run["rounds"] and "suspicion" in final:
        results.append(("suspicion", _suspicion(final["suspicion"])))
    if final.get("epsilon") is not None:
        delta = config.get("method", {}).get("delta")
        at = f" at δ = {number(delta)}" if delta else ""
        results.append(("privacy spent", f"ε = {rounded_up(final['epsilon'])}{at}"))
    if run["bytes_sent"] is not None:
        results.append(("sent per rank", size(run["bytes_sent"])))
    parts = [_statement(run)] if run["privacy"] else []
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact in [*facts, ("", ""), *results]:
        table.add_row(*fact)
    return _text(table, *parts, *([_seconds(run)] if run["seconds"] else []))


def _suspicion(distance: list[float | None]) -> str:
    """How far the workers are from the aggregate: the one in the middle, and those that are farthest."""
    far = [math.inf if value is None else value for value in distance]
    order = sorted(range(len(far)), key=lambda i: -far[i])
    named = ", ".join(f"{i}: {'not finite' if far[i] == math.inf else number(far[i])}" for i in order[:SUSPECTS])
    return f"median {number(far[order[len(far) // 2]])}; workers {named}"


def _statement(run: dict[str, Any]) -> str:
    """What is guaranteed so far, against whom, and under which assumption."""
    from .privacy import Mechanism, statement
    told, table = run["privacy"], run["config"].get("privacy", {})
    spent = run["final"].get("epsilon")
    return "\n" + statement(Mechanism(**told["mechanism"]), told["releases"], math.inf if spent is None else spent,
                            table["noise"], table["scaling"])


def _seconds(run: dict[str, Any]):
    """Where the time went."""
    from rich import box
    from rich.table import Table
    total = run["seconds"]
    parts = [(part, run["final"].get(f"seconds_{part}")) for part in PARTS]
    parts = [(part, seconds) for part, seconds in parts if seconds is not None]
    parts += [("other", max(0.0, total - sum(seconds for _, seconds in parts))), ("all", total)]
    if run["final"].get("seconds_hidden"):
        parts.append(("exchanges behind these", run["final"]["seconds_hidden"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in parts:
        table.add_row(part, f"{seconds:.2f}", f"{100 * seconds / total:.0f} %")
    return table


def _several(runs: Sequence[dict[str, Any]], dirs: Sequence[str | Path]) -> str:
    from rich import box
    from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    metrics = [name for name in ("loss", "grad_norm", "accuracy", "perplexity", "epsilon")
               if any(run["final"].get(name) is not None for run in runs)]
    within = {os.path.dirname(dir) for dir in dirs}
    shown = [os.path.basename(dir) if len(within) == 1 else str(dir) for dir in dirs]
    table.add_column("run", overflow="fold", min_width=min(18, max(map(len, shown))))
    table.add_column("method", min_width=12)
    columns = {"rounds": [str(run["rounds"]) for run in runs],
               **{name: [number(run["final"].get(name)) for run in runs] for name in metrics},
               "seconds": [number(run["seconds"]) for run in runs]}
    if len(metrics) <= 3:                                   # what 80 columns have room for
        columns["sent"] = [size(run["bytes_sent"]) for run in runs]
    for name, cells in columns.items():
        table.add_column(name, justify="right", min_width=max(len(cell) for cell in [name, *cells]))
    names = labels([run["config"] for run in runs], dirs)
    for dir, name, *cells in zip(shown, names, *columns.values(), strict=True):
        table.add_row(dir, name, *cells)
    return (f"{folder}:\n" if len(within) == 1 and (folder := within.pop()) else "") + _text(table)


def _text(*parts) -> str:
    """Plain text, as wide as the terminal; 80 columns in a pipe; wider if numbers would have to be cut."""
    from rich.console import Console
    out = io.StringIO()
    console = Console(file=out, width=1000, color_system=None, markup=False)
    needed = max(console.measure(part).minimum for part in parts)
    console.width = max(shutil.get_terminal_size().columns, needed)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
