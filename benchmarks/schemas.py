"""Writes docs/schemas from the pydantic models of the JSON files: `python -m benchmarks.schemas`."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from exporters.artifact.formats import BundleManifest, ExportFile
from pipeline.core import artifacts, cli, formats
from pipeline.core.atomic import atomic
from pipeline.core.validation import Format, schema_name
from pipeline.models.description import Description
from pipeline.report.formats import accuracy, bench, edge
from pipeline.store.manifest import Manifest

FOLDER = Path("docs/schemas")
BASE = "https://cakd-edge.invalid/schemas/"  # a name, never fetched: `.invalid` cannot resolve
TITLES: dict[type[Format], str] = {
    accuracy.Accuracy: "reports/accuracy.json",
    accuracy.Device: "reports/device.json",
    accuracy.Evidence: "reports/evidence.json",
    accuracy.TrainPerf: "reports/train_perf.json",
    bench.Bench: "reports/bench/<target>.json",
    bench.BundleBench: "python -m bundle.run --bench --json",
    edge.Edge: "reports/edge.json",
    formats.Train: "reports/train/<method>.json",
    formats.Selection: "reports/selection.json",
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
        found = super().model_schema(schema)
        found.pop("title", None)
        if found.get("additionalProperties") is True:
            del found["additionalProperties"]
        bases = [b for b in schema["cls"].__mro__ if issubclass(b, Format)]
        for name, field in schema["cls"].model_fields.items():
            inherited = (b.model_fields.get(name, FieldInfo()).description for b in bases)
            described = next(filter(None, inherited), None)
            found["properties"][field.alias or name]["description"] = described
        return found


def schema_of(kind: type[Format]) -> tuple[str, str]:
    """The name of a file's schema in docs/schemas, and its text."""
    name = f"{schema_name(kind).removeprefix('cakd.').partition('/')[0]}.schema.json"
    found = kind.model_json_schema(schema_generator=Generator)
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": BASE + name, "title": TITLES[kind]}
    described = " ".join((inspect.getdoc(kind) or "").split())
    return name, artifacts.json_text(head | found | {"description": described}) + "\n"


def main(args: argparse.Namespace) -> None:
    """Write every schema."""
    for name, text in map(schema_of, TITLES):
        with atomic(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(TITLES)} schemas")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schemas", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    cli.run(main, parser)
