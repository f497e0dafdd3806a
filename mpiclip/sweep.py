"""A family of runs: every combination of configs and values, each in a folder of its own below one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import config as configs
from . import data, disk, record
from .comm import Comm
from .config import Config
from .errors import InputError, unknown
from .training import MAY_CHANGE, Training, ranks_of, stop_signals

LONGEST = 80                            # characters of a run's name
TAKEN = {"lock", "run.h5", "checkpoints"}       # names that mean something in a folder
# What may differ from the settings with which a run was started: its results are the same.
MAY_DIFFER = MAY_CHANGE - {"run.rounds", "run.eval_every"}


@dataclass
class Family:
    """What a sweep leaves.

    folders  name → folder of every run, in the order of the grid
    failed   name → why that run has no end, one line
    stopped  whether a signal ended the sweep before all runs were done"""

    folders: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def sweep(sources: Sequence[str | os.PathLike | dict], grid: Sequence[str] = (), settings: Sequence[str] = (),
          out: str | os.PathLike | None = None, comm: Any = None, ranks: int | None = None,
          progress: bool = False) -> Family:
    """Run every combination of configs and of the values of their grids, on this rank and all the others.

    sources: configs as mpiclip.train takes them, which may have a table [grid]. grid: "table.key=v1,v2" strings that
    add to it, or override it; "method.interval,run.rounds" has lists of values, for keys that change together.
    settings: "table.key=value" strings for all runs. out: the folder of the runs' folders; default:
    runs/NAME-OF-CONFIG. ranks: groups of so many ranks run at the same time, each another run; default: all ranks do
    one run after the other. progress: say on stderr how it goes.

    Called again, it goes on: runs that are done stay as they are, others go on from their newest checkpoint, and those
    that have none start anew. Raises InputError, on all ranks, before anything runs: for a combination that cannot be,
    for two that are the same, and for a folder that holds another run. What fails later stops that run alone.

    >>> tau = {"method.tau": [0.1, 1.0, 10.0]}
    >>> sweep([{"problem": {"name": "quadratic", "dimension": 10}, "method": {"name": "clip21", "stepsize": 0.5},
    ...         "grid": tau}], out="runs/tau").folders["tau=0.1"]
    PosixPath('runs/tau/tau=0.1')
    """
    world = ranks_of(comm)
    with world.agree():
        if ranks is not None and (ranks < 1 or world.size % ranks):
            raise InputError(f"--ranks {ranks}: expected a divisor of {world.size}, the number of ranks there are")
        members = family(sources, grid, settings)
    folder = Path(out) if out is not None else Path("runs", _stem(sources[0]) if len(sources) == 1 else "sweep")
    group = world if ranks is None else world.split(ranks)
    return _Sweep(members, folder, world, group, progress).run()


# ---- which runs


def family(sources: Sequence[str | os.PathLike | dict], grid: Sequence[str] = (),
           settings: Sequence[str] = ()) -> dict[str, Config]:
    """All runs of a sweep, name → checked config; the arguments are those of `sweep`. A name is made of what differs:
    method names and key=value. Raises InputError for a combination that cannot be, or is there twice."""
    stems = [_stem(source) for source in sources]
    found: list[tuple[str, list, dict]] = []            # (name, what it is made of, tables)
    for source, stem in zip(sources, stems, strict=True):
        tables, own = configs.split_grid(source)
        where = "config" if isinstance(source, dict) else str(source)
        axes = _axes(own, where) | dict(map(_option, grid))
        for setting in settings:
            if (key := setting.partition("=")[0].strip()) in ",".join(axes).split(","):
                raise InputError(f"--set {setting}: the grid varies {key}; expected --grid {key}=… for other values")
        head = [stem] if len(sources) > 1 or not axes else []
        last = Counter(key.partition(",")[0].rpartition(".")[2] for key in axes)
        for values in product(*axes.values()):
            combined = deepcopy(tables)
            chosen = list(zip(axes, values, strict=True))
            pairs = [pair for key, value in chosen for pair in
                     (zip(key.split(","), value, strict=True) if "," in key else [(key, value)])]
            for key, value in sorted(pairs, key=lambda pair: pair[0].count(".")):       # whole tables first
                _put(combined, key, value)
            parts = []
            for key, value in chosen:
                if "," in key:                      # the first of keys that change together names them
                    key, value, among = key.partition(",")[0], value[0], [value[0] for value in axes[key]]
                else:
                    among = axes[key]
                parts.append(_part(key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2], value, among))
            found.append(("-".join(head + parts), [str(where), *pairs], combined))
    members: dict[str, Config] = {}
    names = _names([name for name, *_ in found], [origin for _, origin, _ in found])
    for name, (_, _, tables) in zip(names, found, strict=True):
        if name in members:
            raise InputError(f"{name}: this combination is there twice")
        try:
            members[name] = configs.load(tables, settings)
        except InputError as error:
            raise InputError(f"{name}: {str(error).removeprefix('config: ')}") from None
    seen: dict[str, str] = {}
    for name, config in members.items():
        other = seen.setdefault(json.dumps(config.as_dict(), sort_keys=True), name)
        if other != name:
            raise InputError(f"{name}: the same run as {other}; expected combinations that differ")
    return members


def _axes(grid: Any, where: str, prefix: str = "") -> dict[str, list]:
    """The table [grid], "table.key" → values; keys may be nested tables, too."""
    if not isinstance(grid, dict):
        raise InputError(f"{where}: grid = {grid!r}: expected a table, [grid], and \"table.key\" = [values] below it")
    axes: dict[str, list] = {}
    for name, values in grid.items():
        key = prefix + name
        axes |= _axes(values, where, key + ".") if isinstance(values, dict) and values else {
            _keys(key): _values(_keys(key), values, where)}
    return axes


def _keys(text: str) -> str:
    """A key, or several that change together, without blanks."""
    return ",".join(key.strip() for key in text.split(","))


def _values(key: str, values: Any, where: str) -> list:
    """The checked values of an axis."""
    keys = key.split(",")
    tables = [each.partition(".")[0] for each in keys]
    for table in tables:
        if table not in Config.model_fields:
            raise unknown(f"{where}: grid: {key}: table [{table}]", table, Config.model_fields)
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: grid: {key} = {values!r}: expected a list of one value or more")
    for value in values:
        if len(keys) > 1 and not (isinstance(value, list) and len(value) == len(keys)):
            raise InputError(f"{where}: grid: {key}: {value!r}: expected lists of {len(keys)} values, one for each key")
        if key == tables[0] and not isinstance(value, dict):
            raise InputError(f"{where}: grid: {key}: {value!r}: expected tables, {{ key = value, … }}")
    return values


def _option(text: str) -> tuple[str, list]:
    """--grid table.key=v1,v2: the key, the values. They are TOML; what is not, is a string, as in --set."""
    key, equals, values = text.partition("=")
    key = _keys(key)
    if not equals or not key:
        raise InputError(f"--grid {text}: expected table.key=value,value, e.g. --grid method.tau=0.1,1")
    try:
        parsed = tomllib.loads(f"values = [{values}]")["values"]
    except tomllib.TOMLDecodeError:
        parsed = [_value(part.strip()) for part in values.split(",") if part.strip()]
    return key, _values(key, parsed, "--grid")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tables: dict, key: str, value: Any) -> None:
    """tables[key] = value, key with dots; a whole table is merged into the one that is there."""
    table, *within = key.split(".")
    target = tables.setdefault(table, {})
    for name in within[:-1]:
        target = target.setdefault(name, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise InputError(f"grid: {key}: {key.rpartition('.')[0] or key} is no table")
    target.update(deepcopy({within[-1]: value} if within else value))


# ---- what they are called


def _stem(source: str | os.PathLike | dict) -> str:
    return "run" if isinstance(source, dict) else Path(source).stem


def _part(name: str, value: Any, values: list) -> str:
    """What a value adds to a run's name: tau=0.1; of names and whole tables only what tells them apart."""
    text = _text(value, values)
    return text if name in Config.model_fields or name.rpartition(".")[2] == "name" else f"{_safe(name)}={text}"


def _text(value: Any, among: list) -> str:
    """A value in characters that are safe everywhere. A table: its name, and the keys in which those of the same name
    differ."""
    if isinstance(value, dict):
        alike = [v for v in among if isinstance(v, dict) and v.get("name") == value.get("name")]
        keys = [key for key in value if key != "name" and any(v.get(key) != value[key] for v in alike)]
        parts = [_text(value["name"], [])] if "name" in value else []
        parts += [f"{_safe(key)}={_text(value[key], [])}" for key in (keys if parts or keys else value)]
        return ",".join(parts)
    if isinstance(value, list):
        return "+".join(_text(item, []) for item in value) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return _safe(Path(value).stem if isinstance(value, str) and value.endswith(".h5") else str(value))


def _safe(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII)


def _names(names: list[str], origins: list) -> list[str]:
    """The names, with a digest of what they are made of where they would be too long, or the same (also to a file
    system that does not tell a from A), or mean something else in a folder."""
    short = [name[:LONGEST].lstrip("-.,") or "run" for name in names]
    same = Counter(name.casefold() for name in short)
    return [name if name == whole and same[name.casefold()] == 1 and name.casefold() not in TAKEN else
            f"{name}-{blake2b(json.dumps(origin, default=str).encode(), digest_size=4).hexdigest()}"
            for name, whole, origin in zip(short, names, origins, strict=True)]


# ---- what there is of them


def _started(folder: Path, config: Config, fingerprint: str) -> tuple[bool, np.ndarray | None]:
    """What there is of a run in its folder: (whether it is done, its lines of metrics; None if it has not begun). The
    config has its number of workers. Raises InputError if the folder holds anything but this run."""
    path = folder / "run.h5"
    if not path.exists():
        if any(folder.glob("checkpoints/round-*.h5")):
            raise InputError(f"{folder}: has checkpoints, but no run.h5; expected a new folder or a whole run")
        return False, None
    header, lines = record.read(folder)
    now = json.loads(json.dumps(config.as_dict()))
    try:
        before = configs.load(record.config(header)).as_dict()
    except InputError as error:
        raise InputError(f"{folder}: holds another run: {error}") from None
    for table in {**now, **before}:
        new, old = now.get(table, {}), json.loads(json.dumps(before.get(table, {})))
        for key in sorted({**new, **old}, key=lambda key: key != "name"):      # of another method that it is another
            if new.get(key) != old.get(key) and f"{table}.{key}" not in MAY_DIFFER:
                raise InputError(f"{table}.{key} = {_said(new, key)}: {folder} was started with {_said(old, key)}; "
                                 "expected the same, or another folder (--out)")
    if header.get("data", "") != fingerprint:
        raise InputError(f"{config.data and config.data.file}: not the data that {folder} was started with")
    rounds = config.run.rounds
    return (len(lines) > 0 and lines["round"][-1] == rounds
            and (folder / "checkpoints" / f"round-{rounds:08d}.h5").exists()), lines


def _said(table: dict, key: str) -> str:
    return repr(table[key]) if key in table else "none"


def _put_aside(folder: Path) -> None:
    """Make room for a new start of a run that did not reach its first checkpoint: its record is renamed. What a private
    run has released cannot be taken back, so it is not forgotten either."""
    with record.lock(folder):
        if any(folder.glob("checkpoints/round-*.h5")):
            raise InputError(f"{folder}: another mpiclip has been running in this folder")
        try:
            released = folder / "released"
            if released.exists() and released.read_text()[:20].strip() not in ("", "0"):
                raise InputError(f"{folder}: was killed before its first checkpoint, but it has released private "
                                 "messages, which a new start would not count; to start all the same, remove it")
            os.replace(folder / "run.h5", folder / "run.h5.old")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {disk.reason(error)}") from None


# ---- running them


class _Sweep:
    """The work of one sweep on this rank; `group`: the ranks that do one run together."""

    def __init__(self, members: dict[str, Config], out: Path, world: Comm, group: Comm, progress: bool):
        self.out, self.world, self.group, self.progress = out, world, group, progress
        self.family = Family({name: out / name for name in members})
        self.stop_asked = False                             # whether a signal came
        self.training: Training | None = None               # the run that is going on
        self.claims: Path | None = None
        self.done: set[str] = set()
        self.fingerprints: dict[str, str] = {}
        self.members = {name: config.model_copy(update={"run": config.run.model_copy(
            update={"workers": config.run.workers or group.size})}) for name, config in members.items()}
        with world.agree():
            if world.rank == 0:
                self._check()
                self._lock = record.lock(out)
                self.claims = self._open_claims()
        self.done, self.claims = world.same((self.done, self.claims))

    def run(self) -> Family:
        """All that are left, in their order."""
        if self.done and self.world.rank == 0:
            self._say(f"{len(self.done)} of {len(self.members)} runs are done already")
        with stop_signals(self.stop):
            for number, (name, config) in enumerate(self.members.items(), 1):
                if name in self.done:
                    continue
                if self._stopping():
                    break
                if self._claimed(number):
                    self._one(name, config, number)
        parts = self.world.all((self.done, self.family.failed, self.stop_asked))
        for done, failed, _ in parts:
            self.done |= done
            self.family.failed |= failed
        left = len(self.members) - len(self.done) - len(self.family.failed)
        self.family.stopped = left > 0 and any(asked for *_, asked in parts)
        if self.world.rank == 0:
            if self.claims:
                shutil.rmtree(self.claims, ignore_errors=True)
            self._lock.close()
        return self.family

    def _check(self) -> None:
        """That every run can start, or go on. Rank 0."""
        if (self.out / "run.h5").exists():
            raise InputError(f"{self.out}: holds a run; expected a folder for a sweep's runs (--out)")
        for name, config in self.members.items():
            try:
                if (config.run.workers or 0) < self.group.size:
                    raise InputError(f"run.workers = {config.run.workers}: fewer than the {self.group.size} ranks that "
                                     "do a run")
                done, _ = _started(self.out / name, config, self._fingerprint(config))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if done:
                self.done.add(name)

    def _fingerprint(self, config: Config) -> str:
        """Of the data set; each is read once."""
        if config.data is None:
            return ""
        file = config.data.file
        if file not in self.fingerprints:
            self.fingerprints[file] = data.fingerprint(file)
        return self.fingerprints[file]

    # ---- one run

    def _one(self, name: str, config: Config, number: int) -> None:
        """A run from where it is to its end; what is wrong with it is noted."""
        group, folder = self.group, self.family.folders[name]
        done, lines = False, None
        try:
            with group.agree():
                if group.rank == 0:
                    done, lines = _started(folder, config, self._fingerprint(config))
                    if lines is not None and not any(folder.glob("checkpoints/round-*.h5")):
                        _put_aside(folder)
                        lines = None
            done, lines = group.same((done, lines))
            if not done:
                self._say(f"run {number} of {len(self.members)}: {name}")
                done = self._train(config, folder, lines)
        except InputError as error:
            if group.size > 1 and not error.agreed:
                raise
            self.family.failed[name] = str(error)
            self._say(f"failed: {name}: {error}")
        if done:
            self.done.add(name)

    def _train(self, config: Config, folder: Path, lines: np.ndarray | None) -> bool:
        """Start or go on with a run. Returns whether it has come to its end."""
        training = Training(config, self.group, folder, before=lines)
        if self.progress and self.world.rank == 0 and self.group is self.world:
            training.progress = record.Progress(training.rounds, training.start)
        self.training = training                                # from now on signals are told to it
        training.stop_asked |= self.stop_asked
        try:
            run = training.run()
        except InputError:
            training.close()
            raise
        finally:
            self.training = None
            self.stop_asked |= training.stop_asked
        self.stop_asked |= run.stopped
        return not run.stopped

    # ---- together with the other ranks

    def _open_claims(self) -> Path | None:
        """A folder for what the groups tell each other: a run belongs to the group that made the folder of its number.
        To make one is atomic on every file system, and waits for no rank that is busy. None: there is one group."""
        if self.group is self.world:
            return None
        try:
            for old in self.out.glob(".claims-*"):              # of a sweep that was killed
                shutil.rmtree(old)
            return Path(tempfile.mkdtemp(prefix=".claims-", dir=self.out))
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written: {disk.reason(error)}") from None

    def _claim(self, name: str) -> bool:
        """Whether this is the first to say so. Rank 0 of a group."""
        assert self.claims is not None
        try:
            (self.claims / name).mkdir()
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"{self.claims}: cannot be written: {disk.reason(error)}") from None
        return True

    def _claimed(self, number: int) -> bool:
        """Whether this group is the one that does the run."""
        if self.claims is None:
            return True
        mine = False
        with self.group.agree():
            if self.group.rank == 0:
                mine = self._claim(str(number))
        return self.group.same(mine)

    def _stopping(self) -> bool:
        """Whether any rank was asked to stop; all groups will know before their next run."""
        told = self.claims is not None and self.group.rank == 0 and (self.claims / "stop").exists()
        self.stop_asked = bool(self.group.highest(self.stop_asked or told))
        if self.stop_asked and self.claims is not None:
            with self.group.agree():
                if self.group.rank == 0:
                    self._claim("stop")
        return self.stop_asked

    def stop(self) -> None:
        """End the sweep after a checkpoint of the run that is going on."""
        self.stop_asked = True
        if self.training:
            self.training.stop()

    def _say(self, text: str) -> None:
        """A line on stderr, once for a group."""
        if self.progress and self.group.rank == 0:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
