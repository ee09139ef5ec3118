"""A recipe: a file of the parameters in which a run differs from the default one, merged into params.yaml."""

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

DEFAULT = "digits"  # the recipe that is complete: every other one is merged over it
SELF_MADE = ("digits",)  # sources that need no path

Params = dict[str, Any]
Sections = Mapping[str, type]  # name of a section of params.yaml -> its dataclass


def names(folder: Path) -> list[str]:
    """The recipes of a folder, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def merged(name: str, folder: Path, sections: Sections, data: str | None = None) -> Params:
    """The whole of params.yaml by the recipe `folder/name.yaml`, checked; `data` takes the place of prepare.path.

    A key that is itself a list, or whose keys are free (`teach.kwargs`), is replaced as a whole; all others are
    merged key by key.
    Raises UserError: unknown recipe, section or key, a value that its dataclass refuses, a path that is not given.
    """
    if name not in names(folder):
        raise UserError(f"recipe: got {name!r}; {nearest(name, names(folder))}")
    whole = config.read(folder / f"{DEFAULT}.yaml")
    file = folder / f"{name}.yaml"
    for section, overlay in config.read(file).items():
        if section not in sections:
            raise UserError(f"{file}: unknown section '{section}:'; {nearest(section, sections)}")
        where = f"{file}: {section}"
        whole[section] = _merge(whole.get(section, {}), overlay, sections[section], where)
        config.parse(sections[section], whole[section], where)
    choices = tuned_path(name, folder)
    if choices.is_file():
        whole["distill"]["tuned"] = whole["distill"].get("tuned", {}) | config.read(choices)
        config.parse(sections["distill"], whole["distill"], f"{choices}: distill")
    if data is not None:
        whole["prepare"]["path"] = data
    path = whole["prepare"]["path"]
    if path is None and whole["prepare"]["source"] not in SELF_MADE:
        raise UserError(
            f"recipe {name}: prepare.path is {path}; say where the pictures are: "
            f"`make repro RECIPE={name} DATA=PATH`"
        )
    return whole


def tuned_path(name: str, folder: Path) -> Path:
    """Where the settings that were chosen on val for a recipe's methods stand: merged into `distill.tuned`."""
    return folder / "tuned" / f"{name}.yaml"


def write_tuned(name: str, folder: Path, method: str, choice: Mapping[str, Any]) -> None:
    """Put the choice of one method into `tuned_path`; an empty one, the recipe as it is, takes it out."""
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
    whole = dict(default)
    for key, value in overlay.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            value = _merge(whole.get(key, {}), value, hints[key], f"{where}.{key}")
        whole[key] = value
    return whole


def apply(
    name: str,
    folder: Path,
    params: Path,
    sections: Sections,
    data: str | None = None,
    force: bool = False,
) -> str:
    """Write `params` by a recipe, atomically; the line that says what was written.

    What it wrote last is kept in `.work/recipe.yaml` beside `params`: so a file that somebody has edited since is
    told from one that may be replaced. `force` replaces either.
    Raises UserError: as `merged`; edits that would be lost.
    """
    default, wanted = merged(DEFAULT, folder, sections), merged(name, folder, sections, data)
    last = params.parent / ".work" / "recipe.yaml"
    present = config.read(params) if params.is_file() and not force else None
    if present == wanted:
        return f"{params}: holds {folder / name}.yaml already"
    if present not in (None, default):
        was = config.read(last) if last.is_file() else default
        if present != was:
            raise UserError(
                f"{params}: edited by hand ({_told(present, was)}); commit or copy it, then give FORCE=1 "
                f"(--force) to put recipe {name} in its place"
            )
    text = _title(folder / f"{name}.yaml") + _yaml(wanted)
    for path in (last, params):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    changed = sum(1 for _ in differences(wanted, default))
    source = wanted["prepare"]["path"] or wanted["prepare"]["source"]
    return (
        f"{params}: written by {folder / name}.yaml, {changed} values unlike the default; "
        f"images: {source}"
    )


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the values in which two nests of keys differ, in the order of the first."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            location = f"{where}.{key}" if where else str(key)
            yield from differences(one.get(key), other.get(key), location)
    elif one != other:
        yield where


def _told(present: Params, was: Params) -> str:
    found = list(differences(present, was))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _title(path: Path) -> str:
    """The recipe's first line where it is a comment, with its line end: the first line of params.yaml too."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return f"{first}\n" if first.startswith("#") else ""


def _yaml(params: Params) -> str:
    """Block style, as DVC writes params.yaml."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    stream = io.StringIO()
    yaml.dump(params, stream)
    return stream.getvalue()
