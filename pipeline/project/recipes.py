"""Recipes: files of the parameters that differ from the default run, merged into params.yaml."""

from __future__ import annotations

import dataclasses
import io
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core import config
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError, nearest

DEFAULT = "digits"  # the only complete recipe; the others are merged over it
WITHOUT_PATH = ("digits",)  # sources that need no path

Params = dict[str, Any]
SCHEMA = "# yaml-language-server: $schema=params.schema.json\n"  # for editors
Values = Mapping[str, Mapping[str, Any]]
Sections = Mapping[str, type]  # name of a section of params.yaml -> its dataclass


def names(folder: Path) -> list[str]:
    """List the recipes of a folder in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def merged(
    name: str,
    folder: Path,
    sections: Sections,
    data: str | None = None,
    values: Values | None = None,
) -> Params:
    """Merge the recipe `folder/name.yaml` into a complete, checked params.yaml; `data` replaces prepare.path.

    values: section -> key -> what these images need beside the recipe.

    A value that is a list, or whose keys are free (`teach.kwargs`), is replaced as a whole; all others are merged
    key by key.
    Raises UserError: unknown recipe, section or key, a value that is not allowed, a path that is missing.
    """
    if name not in names(folder):
        raise UserError(f"recipe: got {name!r}; {nearest(name, names(folder))}")
    params = config.read(folder / f"{DEFAULT}.yaml")
    file = folder / f"{name}.yaml"
    for section, overlay in config.read(file).items():
        if section not in sections:
            raise UserError(f"{file}: unknown section '{section}:'; {nearest(section, sections)}")
        where = f"{file}: {section}"
        params[section] = _merge(params.get(section, {}), overlay, sections[section], where)
        config.parse(sections[section], params[section], where)
    choices = tuned_path(name, folder)
    if choices.is_file():
        params["distill"]["tuned"] = params["distill"].get("tuned", {}) | config.read(choices)
        config.parse(sections["distill"], params["distill"], f"{choices}: distill")
    for section, own in (values or {}).items():
        params[section] = {**params[section], **own}
    if data is not None:
        if (source := params["prepare"]["source"]) in WITHOUT_PATH:
            raise UserError(
                f"recipe {name}: got the images {data}, which its source {source!r} does not read; expected none; "
                f"run `make repro DATA={data}`, which chooses a recipe, then edit params.yaml"
            )
        params["prepare"]["path"] = data
    path = params["prepare"]["path"]
    if path is None and params["prepare"]["source"] not in WITHOUT_PATH:
        raise UserError(
            f"recipe {name}: prepare.path: got {path}; expected the path of the images; run "
            f"`make repro RECIPE={name} DATA=PATH`"
        )
    return params


def tuned_path(name: str, folder: Path) -> Path:
    """Return the file of the settings tuned on val for a recipe's methods; it is merged into `distill.tuned`."""
    return folder / "tuned" / f"{name}.yaml"


def write_tuned(name: str, folder: Path, method: str, choice: Mapping[str, Any]) -> None:
    """Write the tuned settings of one method into `tuned_path`; empty ones, the recipe unchanged, remove it."""
    path = tuned_path(name, folder)
    choices = config.read(path) if path.is_file() else {}
    choices[method] = dict(choice)
    text = f"# Settings chosen on val for the methods of {name}.yaml: `python -m benchmarks.tune {name}`.\n"
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(
            text + _yaml({m: c for m, c in choices.items() if c}), encoding="utf-8"
        )


def _merge(default: Any, overlay: Any, kind: type, where: str) -> Any:
    if not isinstance(overlay, dict) or not isinstance(default, dict):
        return overlay
    hints = typing.get_type_hints(kind)
    result = dict(default)
    for key, value in overlay.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            value = _merge(result.get(key, {}), value, hints[key], f"{where}.{key}")
        result[key] = value
    return result


def apply(
    name: str,
    folder: Path,
    params: Path,
    sections: Sections,
    data: str | None = None,
    force: bool = False,
    values: Values | None = None,
) -> str:
    """Write a recipe to `params` atomically and return a line for the user.

    A copy of what was written is in `.work/recipe.yaml` beside `params`: it shows whether the file has been edited
    since. `force` overwrites edits.
    Raises UserError: as `merged`; edits that would be lost.
    """
    default, requested = (
        merged(DEFAULT, folder, sections),
        merged(name, folder, sections, data, values),
    )
    last = written(params)
    if not force:
        if params.is_file() and config.read(params) == requested:
            return f"{params}: unchanged, it is {folder / name}.yaml already"
        check_unedited(folder, params, sections)
    text = SCHEMA + _title(folder / f"{name}.yaml") + _yaml(requested)
    for path in (last, params):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    changed = sum(1 for _ in differences(requested, default))
    source = requested["prepare"]["path"] or requested["prepare"]["source"]
    return (
        f"{params}: written from {folder / name}.yaml, {changed} values differ from the default; "
        f"images: {source}"
    )


def written(params: Path) -> Path:
    """Return the copy of what a recipe last wrote to `params`."""
    return params.parent / ".work" / "recipe.yaml"


def check_unedited(folder: Path, params: Path, sections: Sections) -> None:
    """Check that `params` may be overwritten. Raises UserError: neither the default nor what a recipe wrote."""
    default, last = merged(DEFAULT, folder, sections), written(params)
    present = config.read(params) if params.is_file() else default
    was = config.read(last) if last.is_file() else default
    if present not in (default, was):
        raise UserError(
            f"{params}: got edits by hand ({_summary(present, was)}); expected none, which a recipe would "
            "overwrite; to run them, `make repro` without RECIPE and DATA; to lose them, FORCE=1 (--force)"
        )


def written_for(data: str, params: Path) -> bool:
    """Whether `params` is, unedited, what a recipe wrote for these images."""
    last = written(params)
    if not (params.is_file() and last.is_file()):
        return False
    present = config.read(params)
    return bool(present["prepare"]["path"] == data and present == config.read(last))


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted names of the values in which two mappings differ, in the order of the first."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            location = f"{where}.{key}" if where else str(key)
            yield from differences(one.get(key), other.get(key), location)
    elif one != other:
        yield where


def _summary(present: Params, was: Params) -> str:
    changed = list(differences(present, was))
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more


def _title(path: Path) -> str:
    """Read the recipe's first line where it is a comment; it becomes the first line of params.yaml."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return f"{first}\n" if first.startswith("#") else ""


def _yaml(params: Params) -> str:
    """Dump in block style, as DVC writes params.yaml."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    stream = io.StringIO()
    yaml.dump(params, stream)
    return stream.getvalue()
