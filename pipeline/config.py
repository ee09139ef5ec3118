"""One section of params.yaml -> one strict frozen dataclass: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError, nearest

C = TypeVar("C")
SECTIONS = (
    "prepare",
    "teach",
    "cache",
    "distill",
    "evaluate",
    "export",
    "build",
    "bench",
    "report",
)


def load(section: type[C], path: Path | str = "params.yaml") -> C:
    """Read the section named like the dataclass (`Distill` -> `distill:`) from a YAML 1.2 file.

    Raises UserError: file missing or not YAML, section missing or unknown, unknown key, wrong type.
    """
    name = section.__name__.lower()
    params = read(path)
    for other in params:
        if other not in (*SECTIONS, name):
            raise UserError(f"{path}: unknown section '{other}:'; {nearest(other, SECTIONS)}")
    if name not in params:
        raise UserError(
            f"{path}: no section '{name}:'; it has: {', '.join(params)}; add the section"
        )
    return parse(section, params[name], name)


def read(path: Path | str) -> dict[str, Any]:
    """The whole file as a dict. YAML 1.2, as DVC reads it: `1e-3` is a number. Raises UserError: none, no YAML."""
    try:
        params = YAML(typ="safe", pure=True).load(Path(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run from the repository's root or pass --params"
        ) from None
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected sections at the top level, got {type(params).__name__}")
    return params


def value(key: str, path: Path | str = "params.yaml") -> Any:
    """One value of another stage's section by its dotted name (`bench.enabled`). Raises UserError: not there."""
    found: Any = read(path)
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise UserError(f"{path}: no key '{key}'; add it")
        found = found[part]
    return found


def parse(section: type[C], values: Any, where: str) -> C:
    """A mapping -> the dataclass `section`; `where` names the place in messages (`distill.cakd`).

    Raises UserError: unknown or missing key, wrong type, a value that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    hints = typing.get_type_hints(section)
    fields = {f.name: f for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, fields)}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(
                f"{where}: key '{name}' is missing; got {', '.join(values) or 'nothing'}; add it"
            )
    try:
        return section(**{k: _convert(v, hints[k], f"{where}.{k}") for k, v in values.items()})
    except ValueError as error:  # a __post_init__ check, which names field and value
        raise UserError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for option in rest[:-1]:
            try:
                return _convert(value, option, where)
            except UserError:
                continue
        return _convert(value, rest[-1], where)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where}: got {value!r}; {nearest(value, map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{where}: expected a list of {len(args)}, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds)))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected keys and values, got {value!r}")
        return {
            str(k): _convert(v, args[1] if args else Any, f"{where}.{k}") for k, v in value.items()
        }
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {_NAMES.get(hint, hint)}, got {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
