"""From a TOML file, or a dict, and --set options to one checked record of an experiment."""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import attacks, methods, problems, rules
from .errors import InputError, unknown


class Table(BaseModel):
    """A table of the config: frozen, and with no keys but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Table):
    """[data]: the data set and how its rows are split over the workers."""

    file: str                                                   # an HDF5 file made by `mpiclip data import`
    split: Literal["iid", "contiguous", "label", "dirichlet", "dirichlet_worker", "similarity"] = "iid"
    alpha: float | None = Field(None, gt=0)                     # of the two Dirichlet splits
    similarity: float | None = Field(None, ge=0, le=1)          # of the similarity split: the share that is i.i.d.


class Aggregate(Table):
    """[aggregate]: what becomes of the workers' vectors; no rules: their mean."""

    rules: list[str] = []
    f: int = Field(0, ge=0)                                     # Byzantine workers that the rules tolerate
    at: Literal["sharded", "rank0"] = "sharded"
    attack: dict[str, Any] | None = None                        # { name = …, … }: the last f workers are Byzantine


class Run(Table):
    """[run]: how much, with what, and how often to look."""

    workers: int | None = Field(None, ge=1)                     # default: one a rank
    rounds: int = Field(100, ge=0)
    seed: int = Field(0, ge=0, lt=2**64)
    batch: Literal["full"] | int = "full"                       # or rows per worker and gradient
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_aware_mpi: bool = False                                 # hand GPU pointers to MPI
    threads: int | None = Field(None, ge=1)                     # default: the rank's share of its cores
    eval_every: int = Field(10, ge=1)                           # rounds
    checkpoint_every: int | None = Field(None, ge=1)            # rounds; default: every ten minutes
    keep: int = Field(3, ge=1)                                  # checkpoints


class Config(Table):
    """One experiment. `problem` and `method` are the records of mpiclip.problems and mpiclip.methods."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    data: Data | None = None
    problem: problems.Problem
    method: methods.Method
    aggregate: Aggregate = Aggregate()
    run: Run = Run()

    def as_dict(self) -> dict[str, Any]:
        """The tables as plain values: what load() takes, with every default written out."""
        tables = {name: getattr(self, name).model_dump(exclude_none=True)
                  for name in ("data", "problem", "method", "aggregate", "run") if getattr(self, name) is not None}
        tables["problem"]["name"], tables["method"]["name"] = type(self.problem).name, type(self.method).name
        return tables


def load(source: str | os.PathLike | dict, settings: Sequence[str] = ()) -> Config:
    """The checked config. source: a TOML file's path, or the tables as a dict. settings: "table.key=value" strings that
    override it. Raises InputError naming the key, what was found and what was expected."""
    where = "config" if isinstance(source, dict) else str(source)
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in
              (source if isinstance(source, dict) else _read(Path(source))).items()}
    for setting in settings:
        _set(tables, setting)
    return _checked(tables, where)


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot read this config: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: this is not TOML: {error}") from None


def _set(tables: dict, setting: str) -> None:
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
                          ("data", Data), ("aggregate", Aggregate), ("run", Run)):
        if table in tables:
            values = {k: v for k, v in tables[table].items() if k != "name" or record in (Data, Aggregate, Run)}
            built[table] = _record(record, values, table, where)
    if "data" in built:         # a run can be resumed from another folder
        built["data"] = built["data"].model_copy(update={"file": os.path.abspath(built["data"].file)})
    config = Config(**built)
    _check_together(config, where)
    return config


def _record(record: type[BaseModel], values: dict, table: str, where: str):
    for key in values:
        if key not in record.model_fields:
            raise unknown(f"{where}: {table}.{key}", key, record.model_fields)
    try:
        checked = record(**values)
        for key, value in values.items():       # pydantic would take true for 1, and "10" for 10
            if isinstance(value, bool | str) and type(getattr(checked, key)) is not type(value):
                raise InputError(f"{where}: {table}.{key} = {value!r}: expected a value of another type")
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([table, str(first["loc"][0])]) if first["loc"] else table
        if first["type"] == "missing":
            raise InputError(f"{where}: {key}: missing") from None
        # A value that fits none of several types is reported once for each: say all that was expected.
        same = [e["msg"] for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
        expected = "; or ".join(dict.fromkeys(m[0].lower() + m[1:] for m in same))
        found = values.get(str(first["loc"][0])) if first["loc"] else values
        raise InputError(f"{where}: {key} = {found!r}: {expected}") from None


def _check_together(config: Config, where: str) -> None:
    """What no single key can show."""
    data, agg, run = config.data, config.aggregate, config.run
    if data is not None:
        needs = {"dirichlet": "alpha", "dirichlet_worker": "alpha", "similarity": "similarity"}.get(data.split)
        for key in ("alpha", "similarity"):
            if (getattr(data, key) is not None) != (key == needs):
                verb = "needs" if key == needs else "does not use"
                raise InputError(f"{where}: data.{key}: the split '{data.split}' {verb} it")
    if run.batch != "full" and run.batch < 1:
        raise InputError(f"{where}: run.batch = {run.batch}: expected \"full\", or at least 1 row per worker")
    if run.batch != "full" and config.problem.name == "quadratic":
        raise InputError(f"{where}: run.batch = {run.batch}: 'quadratic' has no rows to draw from; expected \"full\"")
    if agg.attack is not None:
        name = str(agg.attack.get("name"))
        if name not in attacks.ATTACKS:
            raise unknown(f"{where}: aggregate.attack", name, attacks.ATTACKS)
        constants = list(inspect.signature(attacks.ATTACKS[name]).parameters)[2:]       # after rows and byzantine
        for key in agg.attack.keys() - {"name", *constants}:
            raise unknown(f"{where}: aggregate.attack.{key}", key, ["name", *constants])
        if agg.f == 0:
            raise InputError(f"{where}: aggregate.f = 0: an attack needs at least one Byzantine worker")
    if agg.f and not agg.rules and agg.attack is None:
        raise InputError(f"{where}: aggregate.f = {agg.f}, but aggregate.rules is empty: the mean tolerates none")
    for name in agg.rules:
        if name not in rules.RULES:
            raise unknown(f"{where}: aggregate.rules", name, rules.RULES)
