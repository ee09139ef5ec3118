"""One section of params.yaml -> one strict frozen dataclass: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import UserError, nearest

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
MAX_VALUES = 100_000  # values and characters that the aliases of a file may unfold to
INT64, SEEDS = 2**63, 2**32


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
    """The whole file as a dict. YAML 1.2, as DVC reads it: `1e-3` is a number.

    Raises UserError: none, no YAML, aliases that unfold without end.
    """
    try:
        params = YAML(typ="safe", pure=True).load(Path(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run from the repository's root or pass --params"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML: nested deeper than can be read") from None
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    except Exception as error:  # a tag's constructor raises whatever its text leads to
        raise UserError(f"{path}: not YAML: {type(error).__name__}: {error}") from None
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected sections at the top level, got {type(params).__name__}")
    _check_aliases(params, path)
    return params


def _check_aliases(params: dict[str, Any], path: Path | str) -> None:
    """Raise UserError where aliases make a small file a large value, or one that holds itself."""
    todo: list[Any] = [params]
    size = 0
    while todo:
        found = todo.pop()
        size += 1 + (len(found) if isinstance(found, str | bytes) else 0)
        if size > MAX_VALUES:
            raise UserError(
                f"{path}: holds more than {MAX_VALUES} values and characters, or an alias of itself; write it out"
            )
        if isinstance(found, dict):
            todo += [*found, *found.values()]
        elif isinstance(found, list | tuple | set):
            todo += found


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
        raise UserError(f"{where}: expected keys and values, got {_short(values)}")
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
            raise UserError(f"{where}: got {_short(value)}; {nearest(value, map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {_short(value)}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{where}: expected a list of {len(args)}, got {_short(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(
            _convert(v, k, f"{where}[{i}]")
            for i, (v, k) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected keys and values, got {_short(value)}")
        return {
            str(k): _convert(v, args[1] if args else Any, f"{where}.{k}") for k, v in value.items()
        }
    if hint is Any:
        return _plain(value, where)
    if isinstance(value, int) and not -INT64 <= value < INT64:
        raise UserError(f"{where}: expected a number of at most 64 bits, got {_short(value)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {_NAMES.get(hint, hint)}, got {_short(value)}")
    if where.endswith(".seed") and not 0 <= value < SEEDS:
        raise UserError(f"{where}: got {value}; allowed: 0 to {SEEDS - 1}")
    return value


def _plain(value: Any, where: str) -> Any:
    """A value of any kind that JSON has: what is not would be told only when a report is written."""
    if isinstance(value, list):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    if not isinstance(value, int | float):
        raise UserError(f"{where}: expected a number, text or list, got {_short(value)}")
    return _convert(value, type(value), where)


def _short(value: Any) -> str:
    """A value as the one line of a message shows it: the beginning of what is long."""
    return reprlib.repr(value)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
