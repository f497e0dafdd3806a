"""Checked records: the tables of a config, and the constants of what a table names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .errors import InputError, unknown


def build(record: type[BaseModel], values: dict, where: str) -> Any:
    """The record of these values. `where` is what its keys follow in a message: "job.toml: run". Raises InputError
    naming the key, what was found and what was expected."""
    for key in values:
        if key not in record.model_fields:
            raise unknown(f"{where}.{key}", key, record.model_fields)
    try:
        checked = record(**values)
        for key, value in values.items():       # pydantic would take true for 1, and "10" for 10
            if isinstance(value, bool | str) and type(getattr(checked, key)) is not type(value):
                raise InputError(f"{where}.{key} = {value!r}: expected a value of another type")
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, str(first["loc"][0])]) if first["loc"] else where
        if first["type"] == "missing":
            raise InputError(f"{key}: missing") from None
        # A value that fits none of several types is reported once for each: say all that was expected.
        same = [e["msg"] for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
        expected = "; or ".join(dict.fromkeys(m[0].lower() + m[1:] for m in same))
        found = values.get(str(first["loc"][0])) if first["loc"] else values
        raise InputError(f"{key} = {found!r}: {expected}") from None


def named(registry: dict[str, Callable], entry: Any, where: str, given: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(name, constants) of a function of the registry, as a config names it: its name, or { name = …, … } with
    constants, which are the function's keyword arguments but for the `given` ones; their annotations say what is
    allowed. Raises InputError as build."""
    name = entry.get("name") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        raise InputError(f"{where} = {entry!r}: expected a name, or {{ name = …, … }} with constants")
    if name not in registry:
        raise unknown(where, name, registry)
    values = {key: value for key, value in entry.items() if key != "name"} if isinstance(entry, dict) else {}
    return name, build(_constants(registry[name], given), values, f"{where}.{name}").model_dump()


@functools.cache
def _constants(function: Callable, given: tuple[str, ...]) -> type[BaseModel]:
    """The record of a function's constants."""
    types = get_type_hints(function, include_extras=True)
    fields: Any = {name: (types[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
                   for name, parameter in inspect.signature(function).parameters.items() if name not in given}
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
