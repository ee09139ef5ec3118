"""Sections of params.yaml as strict frozen pydantic dataclasses, and one formatter for what pydantic refuses."""

from __future__ import annotations

import json
import math
import reprlib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import UserError, nearest

C = TypeVar("C")
SECTIONS = (
    "prepare",
    "teach",
    "cache",
    "distill",
    "quantize",
    "evaluate",
    "export",
    "build",
    "bench",
    "report",
)
INT64 = 2**63
# Of every settings class, `@dataclass(frozen=True, config=STRICT)` of pydantic.dataclasses: a dataclass like any
# other for replace, asdict and pickle, and checked whenever one is constructed.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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

    Raises UserError: no file, no YAML, no sections.
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
    return params


def value(key: str, path: Path | str = "params.yaml", default: Any = None) -> Any:
    """One value of another stage's section by its dotted name (`bench.enabled`).

    Raises UserError: not there, and no `default`.
    """
    value: Any = read(path)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if default is not None:
                return default
            raise UserError(f"{path}: no key '{key}'; add it")
        value = value[part]
    return value


def parse(kind: type[C], values: Any, where: str) -> C:
    """Keys and values, as YAML or JSON has them -> `kind`, a class that pydantic validates.

    `where` is the dotted name of `values` in messages (`distill.cakd`). A list is taken for a tuple and a whole
    number for a float, as strict JSON has it; no text is taken for a number, nor 1.0 for 1.
    Raises UserError: unknown or missing key, wrong type, a value out of range.
    """
    try:
        _check_plain(values, where)
    except RecursionError:
        raise UserError(
            f"{where}: got {_short(values)}, nested too deep or an alias of itself; write it out"
        ) from None
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(explain(error, kind, values, where)) from None


def _check_plain(value: Any, where: str) -> None:
    """Raise UserError where YAML holds what a JSON report cannot: a date, a set, NaN, endless numbers, the key 50.

    DVC, too, finds nothing by a key that is no text.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, tuple):
                raise UserError(f"{where}: got the key {_short(key)}; expected text")
            _check_plain(key, where)
            if not isinstance(key, str):
                text = json.dumps(key)
                raise UserError(f"{where}: got the key {text}; expected text; write '{text}'")
            _check_plain(item, _dotted(where, [key]))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, _dotted(where, [i]))
    elif isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: got {_short(value)}; expected text in Unicode")
    elif isinstance(value, int):
        if not -INT64 <= value < INT64:
            raise UserError(f"{where}: got {_short(value)}; expected a number of at most 64 bits")
    elif not isinstance(value, float | None):
        raise UserError(f"{where}: got {_short(value)}; expected a number, text, list or mapping")
    elif value is not None and not math.isfinite(value):
        raise UserError(f"{where}: got {value}; expected a finite number")


def explain(
    error: ValidationError, kind: type, values: Any, where: str = "", remedy: str = ""
) -> str:
    """The one line of a pydantic error: dotted name, what was got, what is expected, the nearest name of a key.

    `remedy` closes the line of a JSON file, which is made again rather than corrected.
    """
    errors = error.errors(include_url=False)
    first = min(
        errors, key=lambda e: e["type"] not in _UNKNOWN
    )  # where one is misspelt, one is missing
    steps, got = _reach(values, first["loc"])
    name, key = _dotted(where, steps, ": "), first["loc"][-1] if first["loc"] else None
    end = f"; {remedy}" if remedy else ""
    if first["type"] in _UNKNOWN:
        parent = _dotted(where, steps[:-1], ": ")
        return f"{parent}unknown key {key!r}; {nearest(key, _keys(kind, steps[:-1]))}{end}"
    if key == "[key]":  # pydantic's step to a key that does not fit
        parent = _dotted(where, steps[:-1], ": ")
        return f"{parent}got the key {steps[-1]!r}; expected {_expected(first)}; {remedy or 'rename it'}"
    if first["type"] == "missing" and isinstance(key, str):
        keys = shorten(", ".join(map(str, got))) or "nothing"
        return f"{name}got {keys}; expected the key {key!r} too{end or '; add it'}"
    if first["type"] == "value_error":
        return f"{name}{shorten(str(first['ctx']['error']), 400)}{end}"
    if first["type"] == "literal_error" and len(errors) == 1:
        allowed = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{name}got {_short(got)}; {nearest(got, allowed)}{end}"
    expected = [_expected(e) for e in errors if _reach(values, e["loc"])[0] == steps]
    return f"{name}got {_short(got)}; expected {' or '.join(dict.fromkeys(expected))}{end}"


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _expected(error: Any) -> str:
    """What one error of pydantic's asks for; of a union there is one for each member."""
    limits = error.get("ctx", {})
    if error["type"] == "missing":
        return f"a list of {error['loc'][-1] + 1}"
    if error["type"] == "greater_than" and isinstance(limits["gt"], int):
        return f"{limits['gt'] + 1} or more"
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in limits.items()}
    template: str = _EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return template.format(**whole) if error["type"] in _EXPECTED else template


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "none_required": "null",
    "string_too_short": "text",
    "string_pattern_mismatch": "text like {pattern}",
    "too_long": "a list of {max_length}",
    "too_short": "a list of {min_length} or more",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
}


def _reach(values: Any, loc: Sequence[int | str]) -> tuple[list[int | str], Any]:
    """The steps of a pydantic location that `values` has, without names of union members, and what is there."""
    steps: list[int | str] = []
    for step in loc:
        inside = isinstance(values, dict) and step in values
        if inside or (
            isinstance(values, list | tuple) and isinstance(step, int) and step < len(values)
        ):
            values = values[step]
            steps.append(step)
    return steps, values


def _dotted(where: str, steps: Iterable[Any], end: str = "") -> str:
    name = where + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps)
    return shorten(name.removeprefix(".")) + end if name else ""


def _keys(kind: Any, steps: Iterable[int | str]) -> list[str]:
    """The keys of the class that is at `steps` in `kind`."""
    for step in steps:
        fields = getattr(kind, "__pydantic_fields__", {})
        kind = fields[step].annotation if step in fields else kind
        inner = [a for a in typing.get_args(kind) if hasattr(a, "__pydantic_fields__")]
        kind = inner[-1] if inner else kind  # of a list, a mapping or an optional one
    return list(getattr(kind, "__pydantic_fields__", ()))


def shorten(text: str, most: int = 200) -> str:
    """The text without its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _short(value: Any) -> str:
    """A value as the one line of a message shows it: the beginning of what is long."""
    return reprlib.repr(value)
