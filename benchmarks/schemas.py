"""Writes docs/schemas and params.schema.json from our pydantic classes: `python -m benchmarks.schemas`."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from exporters.artifact.formats import BundleManifest, ExportFile
from pipeline.core import artifacts, cli, formats, students
from pipeline.core.atomic import atomic
from pipeline.core.validation import Format, schema_name
from pipeline.models import ranges
from pipeline.models.description import Description
from pipeline.report.formats import accuracy, bench, edge, quantize
from pipeline.store.manifest import Manifest
from stages.check import SECTIONS

FOLDER = Path("docs/schemas")
PARAMS = "params.schema.json"
BASE = "https://cakd-edge.invalid/schemas/"  # a name, never fetched: `.invalid` cannot resolve
TITLES: dict[type[Format], str] = {
    accuracy.Accuracy: "reports/accuracy.json",
    accuracy.Device: "reports/device.json",
    accuracy.Evidence: "reports/evidence.json",
    accuracy.TrainPerf: "reports/train_perf.json",
    bench.Bench: "reports/bench/<target>.json",
    bench.BundleBench: "python -m bundle.run --bench --json",
    students.Candidates: "python -m exporters.candidates --json",
    students.Students: "reports/students.json",
    students.PackBench: "python -m bundle.run --bench-all --json",
    edge.Edge: "reports/edge.json",
    formats.Train: "reports/train/<method>.json",
    formats.Selection: "reports/selection.json",
    quantize.Quantized: "reports/quantize.json",
    ranges.Ranges: "STEM-ranges.json beside a student's checkpoint or ONNX",
    formats.BuildFile: "artifacts/build/<target>/build.json",
    formats.ParityFile: "artifacts/build/<target>/parity.json and reports/parity.json",
    Description: "The JSON beside a checkpoint",
    ExportFile: "artifacts/export/export.json",
    BundleManifest: "manifest.json of an edge bundle",
    Manifest: "data/features/manifest.json",
}


class Generator(GenerateJsonSchema):
    """JSON Schema without what pydantic adds for its own sake: titles, a default of keys that may be missing."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """No titles: the name of a key is enough."""
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        """The value alone: a key that may be missing has no value then."""
        return self.generate_inner(schema["schema"])

    def model_schema(self, schema: Any) -> dict[str, Any]:
        """A model with the descriptions of keys it inherits and with none of pydantic's own keywords."""
        result = super().model_schema(schema)
        result.pop("title", None)
        if result.get("additionalProperties") is True:
            del result["additionalProperties"]
        bases = [b for b in schema["cls"].__mro__ if issubclass(b, Format)]
        for name, field in schema["cls"].model_fields.items():
            inherited = (b.model_fields.get(name, FieldInfo()).description for b in bases)
            described = next(filter(None, inherited), None)
            result["properties"][field.alias or name]["description"] = described
        return result


class Settings(Generator):
    """The same of settings classes: with simple defaults, and the comments of fields as their descriptions."""

    def default_schema(self, schema: Any) -> dict[str, Any]:
        """A value with its default, unless that is a whole section."""
        result = GenerateJsonSchema.default_schema(self, schema)
        if isinstance(result.get("default"), dict):
            del result["default"]
        return result

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """A settings class with what its comments say of each field."""
        result = super().dataclass_schema(schema)
        result.pop("title", None)
        for kind in reversed(schema["cls"].__mro__[:-1]):
            for name, comment in comments(kind):
                result["properties"][name]["description"] = comment
        return result


def comments(kind: type) -> Iterator[tuple[str, str]]:
    """Fields of a class, each with the comment behind it or on the lines above it."""
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if comment := re.match(r"    # (.*)", line):
            above.append(comment[1])
            continue
        field = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if field and (text := field[2] or " ".join(above)):
            yield field[1], text
        above = []


def schema_of_params() -> str:
    """The text of the schema of params.yaml."""
    kinds: Any = [(name, "validation", TypeAdapter(kind)) for name, kind in SECTIONS.items()]
    properties, definitions = TypeAdapter.json_schemas(kinds, schema_generator=Settings)
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": BASE + PARAMS,
        "title": "params.yaml",
        "description": "Every setting of the chain, a section a stage.",
        "type": "object",
        "properties": {name: properties[name, "validation"] for name in SECTIONS},
        "required": list(SECTIONS),
        "additionalProperties": False,
    }
    return artifacts.json_text(head | definitions) + "\n"


def schema_of(kind: type[Format]) -> tuple[str, str]:
    """The name of a file's schema in docs/schemas, and its text."""
    name = f"{schema_name(kind).removeprefix('cakd.').partition('/')[0]}.schema.json"
    result = kind.model_json_schema(schema_generator=Generator)
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": BASE + name, "title": TITLES[kind]}
    described = " ".join((inspect.getdoc(kind) or "").split())
    return name, artifacts.json_text(head | result | {"description": described}) + "\n"


def main(args: argparse.Namespace) -> None:
    """Write every schema."""
    texts = {FOLDER / name: text for name, text in map(schema_of, TITLES)}
    for path, text in {**texts, Path(PARAMS): schema_of_params()}.items():
        with atomic(args.out / path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(texts)} schemas in {FOLDER}, and {PARAMS}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schemas", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="the repository's root")
    cli.run(main, parser)
