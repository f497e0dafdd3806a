"""From a TOML file, or a dict, and --set options to one checked record of an experiment."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import attacks, methods, problems, records
from .errors import InputError, unknown
from .rules import Chain


class Table(BaseModel):
    """A table of the config: frozen, and with no keys but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Table):
    """[data]: the data set and how its rows, or its text, are split over the workers."""

    file: str                                                   # an HDF5 file made by `mpiclip data import`
    split: Literal["iid", "contiguous", "label", "dirichlet", "dirichlet_worker", "similarity", "rotate"] = "iid"
    alpha: float | None = Field(None, gt=0)                     # of the two Dirichlet splits
    similarity: float | None = Field(None, ge=0, le=1)          # of the similarity split: the share that is i.i.d.
    standardize: bool = False                                   # features of mean 0 and standard deviation 1


class Aggregate(Table):
    """[aggregate]: what becomes of the workers' vectors; no rules: their mean."""

    rules: list[str | dict[str, Any]] = []                      # names, or { name = …, … } with constants
    f: int = Field(0, ge=0)                                     # Byzantine workers that the rules tolerate
    at: Literal["sharded", "rank0"] = "sharded"
    attack: dict[str, Any] | None = None                        # { name = …, … }: the last f workers are Byzantine
    suspect: bool = False                                       # record each worker's distance to the aggregate


class Privacy(Table):
    """[privacy]: what the noise of method.sigma or method.epsilon protects, and how it is accounted for."""

    level: Literal["worker", "example"] = "worker"              # a worker's whole data set, or one row of it
    clip: float | None = Field(None, gt=0, allow_inf_nan=False)     # of examples: the longest gradient that one row has
    adjacency: Literal["replace", "add_remove"] | None = None   # default: replace for workers, add_remove for examples
    against: Literal["server", "model"] = "server"              # who sees every message, or who sees the models only
    accountant: Literal["pld", "rdp"] = "pld"
    scaling: Literal["certified", "paper"] = "certified"        # how σ follows from ε
    noise: Literal["secret", "reproducible"] = "secret"         # reproducible: from run.seed, for tests; not private


class Run(Table):
    """[run]: how much, with what, and how often to look."""

    workers: int | None = Field(None, ge=1)                     # default: one a rank
    participation: int | None = Field(None, ge=1)               # workers drawn for each round; default: all
    rounds: int = Field(100, ge=0)
    seed: int = Field(0, ge=0, lt=2**64)
    batch: Literal["full"] | int = "full"                       # or rows per worker and gradient
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_aware_mpi: bool = False                                 # hand GPU pointers to MPI
    threads: int | None = Field(None, ge=1)                     # default: the rank's share of its cores
    eval_every: int = Field(10, ge=1)                           # rounds
    eval_rows: Literal["all"] | Annotated[int, Field(ge=1)] = "all"     # of each worker, for loss and grad_norm
    checkpoint_every: int | None = Field(None, ge=1)            # rounds; default: every ten minutes
    keep: int = Field(3, ge=1)                                  # checkpoints


class Config(Table):
    """One experiment. `problem` and `method` are the records of mpiclip.problems and mpiclip.methods."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    data: Data | None = None
    problem: problems.Problem
    method: methods.Method
    aggregate: Aggregate = Aggregate()
    privacy: Privacy = Privacy()
    run: Run = Run()

    def as_dict(self) -> dict[str, Any]:
        """The tables as plain values: what load() takes, with every default written out."""
        tables = {name: getattr(self, name).model_dump(exclude_none=True)
                  for name in ("data", "problem", "method", "aggregate", "privacy", "run")
                  if getattr(self, name) is not None and (name != "privacy" or self.method.private)}
        tables["problem"]["name"], tables["method"]["name"] = type(self.problem).name, type(self.method).name
        return tables


def load(source: str | os.PathLike | dict, settings: Sequence[str] = ()) -> Config:
    """The checked config. source: a TOML file's path, or the tables as a dict. settings: "table.key=value" strings that
    override it. Raises InputError naming the key, what was found and what was expected."""
    where = "config" if isinstance(source, dict) else str(source)
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in
              (source if isinstance(source, dict) else _read(Path(source))).items()}
    if "grid" in tables:
        raise InputError(f"{where}: [grid] makes it a family of runs; expected `mpiclip sweep {where}`")
    for setting in settings:
        override(tables, setting)
    return _checked(tables, where)


def split_grid(source: str | os.PathLike | dict) -> tuple[dict, dict]:
    """The tables of a config, and apart from them its [grid], from which `mpiclip sweep` makes a family of runs."""
    tables = dict(source if isinstance(source, dict) else _read(Path(source)))
    return tables, tables.pop("grid", {})


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot read this config: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: this is not TOML: {error}") from None


def override(tables: dict, setting: str) -> None:
    """Apply one --set table.key=value. The value is TOML; what is not, is a string (so that names need no quotes)."""
    key, equals, text = setting.partition("=")
    table, _, name = key.strip().partition(".")
    if not equals or not name:
        raise InputError(f"--set {setting}: expected table.key=value, e.g. --set run.rounds=1000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables_within, last = name.split(".")
    target = tables.setdefault(table, {})
    for within in tables_within:
        target = target.setdefault(within, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise InputError(f"--set {setting}: {'.'.join([table, *tables_within])} is no table")
    target[last] = value


def _checked(tables: dict, where: str) -> Config:
    for table in tables:
        if table not in Config.model_fields:
            raise unknown(f"{where}: table [{table}]", table, Config.model_fields)
        if not isinstance(tables[table], dict):
            raise InputError(f"{where}: {table} = {tables[table]!r}: expected a table, [{table}] and keys below it")
    for table, module in (("problem", problems), ("method", methods)):
        name = tables.get(table, {}).get("name")
        if not isinstance(name, str):
            raise InputError(f"{where}: {table}.name = {name!r}: expected one of {', '.join(module.names())}")
    built: dict[str, Any] = {}
    for table, record in (("problem", problems.load(tables["problem"]["name"])),
                          ("method", methods.load(tables["method"]["name"])),
                          ("data", Data), ("aggregate", Aggregate), ("privacy", Privacy), ("run", Run)):
        if table in tables:
            values = {k: v for k, v in tables[table].items() if k != "name" or table not in ("problem", "method")}
            built[table] = records.build(record, values, f"{where}: {table}")
    if "data" in built:         # a run can be resumed from another folder
        built["data"] = built["data"].model_copy(update={"file": os.path.abspath(built["data"].file)})
    config = Config(**built)
    _check_together(config, where)
    return config


def _check_together(config: Config, where: str) -> None:
    """What no single key can show."""
    data, agg, run = config.data, config.aggregate, config.run
    if data is not None:
        needs = {"dirichlet": "alpha", "dirichlet_worker": "alpha", "similarity": "similarity"}.get(data.split)
        for key in ("alpha", "similarity"):
            if (getattr(data, key) is not None) != (key == needs):
                verb = "needs" if key == needs else "does not use"
                raise InputError(f"{where}: data.{key}: the split '{data.split}' {verb} it")
    if run.participation is not None:
        if config.method.partial is None:
            able = [name for name in methods.names() if methods.load(name).partial]
            raise InputError(f"{where}: run.participation = {run.participation}: '{config.method.name}' wants all "
                             f"workers in every round; expected one of {', '.join(able)}")
        if agg.rules or agg.attack or config.method.private:
            raise InputError(f"{where}: run.participation = {run.participation}: what rules tolerate, and what noise "
                             "protects, is known of all workers only; expected no aggregate.rules, no aggregate.attack "
                             "and no method.sigma or method.epsilon")
    if run.batch != "full" and run.batch < 1:
        raise InputError(f"{where}: run.batch = {run.batch}: expected \"full\", or at least 1 row per worker")
    for key, asked, usual in (("batch", run.batch, "full"), ("eval_rows", run.eval_rows, "all")):
        if asked != usual and config.problem.name == "quadratic":
            raise InputError(f"{where}: run.{key} = {asked}: 'quadratic' has no rows to draw from; expected "
                             f"\"{usual}\"")
    if agg.attack is not None:
        name, _ = records.named(attacks.ATTACKS, agg.attack, f"{where}: aggregate.attack", attacks.GIVEN)
        if agg.f == 0:
            raise InputError(f"{where}: aggregate.f = 0: an attack needs at least one Byzantine worker")
        if attacks.FACTS[name].flips and not config.problem.classifier:
            raise InputError(f"{where}: aggregate.attack = {name}: '{config.problem.name}' has no classes whose labels "
                             "could be flipped; expected a problem that classifies")
        if attacks.FACTS[name].flips and not config.method.sends_gradients:
            able = [other for other in methods.names() if methods.load(other).sends_gradients]
            raise InputError(f"{where}: aggregate.attack = {name}: sends a gradient, but workers of "
                             f"'{config.method.name}' send something else; expected one of {', '.join(able)}")
    if agg.f and not agg.rules and agg.attack is None:
        raise InputError(f"{where}: aggregate.f = {agg.f}, but aggregate.rules is empty: the mean tolerates none")
    try:
        Chain(agg.rules)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if agg.suspect and not agg.rules:
        raise InputError(f"{where}: aggregate.suspect = true: expected with aggregate.rules; a mean suspects nobody")
    if getattr(config.method, "compressor", None) is not None:
        for key, refused in (("rules", agg.rules), ("attack", agg.attack), ("at", agg.at == "rank0")):
            if refused:
                raise InputError(f"{where}: aggregate.{key} = {getattr(agg, key)!r}: not with method.compressor; every "
                                 "rank receives the compressed messages and takes their mean")
    _check_privacy(config, where)


def _check_privacy(config: Config, where: str) -> None:
    """That the noise has something to protect: a bound on what it is added to, found without a look at the data."""
    method, privacy, agg = config.method, config.privacy, config.aggregate
    examples = privacy.level == "example"
    if not method.private:
        if privacy != Privacy() or method.delta is not None:
            raise InputError(f"{where}: {'privacy' if privacy != Privacy() else 'method.delta'} is given, but there is "
                             "no noise; expected method.sigma, or method.epsilon and method.delta")
        return
    if method.sigma is not None and method.epsilon is not None:
        raise InputError(f"{where}: method.sigma = {method.sigma:g} and method.epsilon = {method.epsilon:g}: expected "
                         "one of them, the other follows from it")
    if method.delta is None:
        raise InputError(f"{where}: method.delta: missing; expected the δ of (ε, δ)-differential privacy, well below "
                         "1 over the number of those who are protected, e.g. 1e-5")
    if examples != (privacy.clip is not None):
        raise InputError(f"{where}: privacy.clip: " + (
            "missing; expected the length at which every row's gradient is clipped" if examples else
            "workers' messages are clipped at the method's own threshold; expected only with privacy.level = "
            "\"example\""))
    if examples and config.data is None:
        raise InputError(f"{where}: privacy.level = 'example': '{config.problem.name}' has no rows to protect; "
                         "expected a problem that learns from data")
    if examples and config.data is not None and config.data.split == "dirichlet_worker":
        raise InputError(f"{where}: data.split = 'dirichlet_worker': gives a row to several workers, each of which "
                         "tells of it; expected another split with privacy.level = 'example'")
    if not examples and method.bound() is None:
        able = [name for name in methods.names() if methods.load(name).bound is not methods.Method.bound]
        raise InputError(f"{where}: method.name = '{method.name}': nothing bounds what a worker sends, so no noise can "
                         f"make it private; expected one of {', '.join(able)}, or privacy.level = \"example\"")
    if privacy.scaling == "paper" and (examples or method.epsilon is None):
        raise InputError(f"{where}: privacy.scaling = 'paper': expected with method.epsilon, and privacy.level = "
                         "'worker'")
    if privacy.against == "model" and (agg.rules or agg.attack):
        raise InputError(f"{where}: privacy.against = 'model': only in a mean of all workers' messages their noise "
                         "adds up; expected no aggregate.rules and no aggregate.attack")
    if agg.attack is not None and attacks.FACTS[agg.attack["name"]].flips:
        raise InputError(f"{where}: aggregate.attack = {agg.attack['name']}: sends a gradient of the honest workers' "
                         "rows without noise; expected another attack, or no method.sigma and no method.epsilon")
    for key in ("tau", "stepsize"):
        value = getattr(method, key, None)
        if not isinstance(value, int | float | None):
            raise InputError(f"{where}: method.{key} = {value if isinstance(value, str) else value.model_dump()}: is "
                             "calculated from the data, which no noise would protect; expected a number")
        if key == "tau" and not examples and value is not None and not 0 < value < inf:
            raise InputError(f"{where}: method.tau = {value:g}: bounds nothing; expected a finite number above 0")
