"""One target's artefacts from the exported models, each held against torch's own logits.

A lower precision that fails its gate is not shipped: fp32 takes its place, and the reason says so.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import agreement, counts, inputs, onnx_file
from exporters.artifact.session import Array, Target, Unavailable
from exporters.open import open_session
from exporters.ort import int8
from exporters.ov import convert as ov_convert
from exporters.trt import build, plan
from exporters.trt import convert as trt_convert
from pipeline.core.errors import UserError

BACKENDS = {
    "rtx": "rtx",
    "trt": "tensorrt",
}  # first word of a target's name -> exporters.trt's name


IMAGES = {"student": "x", "teacher": "teacher_x"}  # in reference.npz, each normalised for its model


@dataclass(frozen=True)
class Build(agreement.Gates):
    """`build:` the parity gates, what int8 may cost, and the batches of an engine."""

    int8_drop: float = 0.01  # top-1 on the reference images, as a fraction
    int8_calibration: int8.Calibration = "minmax"
    int8_search_s: float = 60.0  # to look for nodes to leave in float, where int8 fails its gates
    trt_shapes: tuple[int, int, int] = build.SHAPES


@dataclass(frozen=True)
class Exported:
    """artifacts/export, opened: labels (N,); by model x (N, 3, S, S), logits (N, K); calibration (M, 3, S, S)."""

    folder: Path
    x: dict[str, Array]  # each model's own normalisation of the same pictures
    labels: NDArray[np.int64]
    logits: dict[str, Array]
    calibration: Array

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Read reference.npz and calibration.npy. Raises UserError: missing or damaged."""
        try:
            with np.load(folder / "reference.npz", allow_pickle=False) as held:
                found = {key: held[key] for key in ("labels", *IMAGES, *IMAGES.values())}
            calibration = np.load(folder / "calibration.npy", allow_pickle=False)
        except Exception as error:  # a header is parsed as Python text, and raises what that raises
            raise UserError(f"{folder}: not an export ({error}); run `dvc repro export`") from None
        x = {model: found[key] for model, key in IMAGES.items()}
        logits = {model: found[model] for model in IMAGES}
        return cls(folder, x, found["labels"], logits, calibration)


def build_model(
    target: Target, model: str, exported: Exported, out: Path, gates: Build
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Build one model into `out` -> (its entry of build.json, its rows of parity.json)."""
    if target.precision == "int8" and model == "teacher":
        reason = "int8 is built for the student only: the teacher does not ship"
        return _left_out(target, model, reason)
    start = time.perf_counter()
    try:
        artefact = make(target, target.precision, model, exported, out, gates)
        row = check(target, artefact, model, exported, gates)
    except Unavailable as error:
        return _left_out(target, model, str(error))
    rows, reason = [row], row["reason"]
    if row["verdict"] == "FAIL" and row["precision_effective"] != "fp32":
        row["verdict"] = "REJECTED"
        _remove(artefact)
        if target.precision == "default":
            reason = f"{row['precision_effective']}: {reason}; {target.name} offers nothing else"
            return _left_out(target, model, reason, rows)
        artefact = make(target, "fp32", model, exported, out, gates)
        rows.insert(0, check(target, artefact, model, exported, gates))
        reason = f"fell back to fp32: {reason}"
    entry = {
        "status": "built",
        "reason": reason,
        "artefact": artefact.name,
        "precision_requested": target.precision,
        "precision_effective": rows[0]["precision_effective"],
        "size_mb": sum(p.stat().st_size for p in counts.parts(artefact)) / 1e6,
        "seconds": time.perf_counter() - start,
    }
    return entry, rows


def make(
    target: Target, precision: str, model: str, exported: Exported, out: Path, gates: Build
) -> Path:
    """Write the artefact of that precision; returns its path. Raises Unavailable as its exporter."""
    source = exported.folder / f"{model}.onnx"
    if target.runtime == "torch":
        for suffix in (".json", ".safetensors"):
            shutil.copy(source.with_suffix(suffix), out)
        return out / f"{model}.safetensors"
    if target.runtime == "trt":
        made, _ = trt_convert.make(
            source,
            out / f"{model}.plan",
            precision,
            BACKENDS[target.name.split("-")[0]],
            build.Options(gates.trt_shapes),
            exported.calibration,
        )
        return made
    with tempfile.TemporaryDirectory() as folder:
        network, proto = Path(folder) / source.name, onnx_file.read(source)
        if precision == "int8":
            network = network.with_stem(f"{model}-int8")
            pictures = int8.Pictures(exported.calibration, exported.x[model], exported.labels)
            how = int8.Settings(gates.int8_calibration, gates.int8_search_s, gates.int8_drop)
            proto = int8.quantized(source, pictures, how, gates)
        onnx_file.save(proto, network)
        if target.runtime == "ov":
            ov_convert.convert(network, out / f"{network.stem}.xml")
            return out / f"{network.stem}.xml"
        return Path(shutil.copy(network, out))


def check(
    target: Target, artefact: Path, model: str, exported: Exported, gates: Build
) -> dict[str, Any]:
    """The artefact's parity row against torch's logits; for int8 the loss of top-1 too.

    An engine that cannot run here is a skipped row: it was built, nothing more is known.
    """
    try:
        session = open_session(target, artefact, 1)
    except Unavailable as error:
        if target.runtime != "trt":
            raise
        precision = plan.read_sidecar(artefact)["precision"]
        return agreement.skipped(artefact.name, precision, str(error))
    reference = exported.logits[model]
    got = inputs.run(session, exported.x[model])
    row = agreement.row(artefact, session, reference, got, gates)
    if row["precision_effective"] == "int8":
        row = agreement.with_accuracy(row, reference, got, exported.labels, gates.int8_drop)
    return row


def _left_out(
    target: Target, model: str, reason: str, rows: list[dict[str, Any]] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry and the row of a model that is not built for this target."""
    entry: dict[str, Any] = {
        "status": "skipped",
        "reason": reason,
        "artefact": None,
        "precision_requested": target.precision,
        "precision_effective": None,
        "size_mb": None,
        "seconds": None,
    }
    artefact = target.artefact.format(model=model)
    return entry, rows or [agreement.skipped(artefact, target.precision, reason)]


def _remove(artefact: Path) -> None:
    for part in (*counts.parts(artefact), plan.sidecar_of(artefact)):
        part.unlink(missing_ok=True)


def failures(rows: list[dict[str, Any]]) -> str:
    """The rows that break a hard gate, in words; empty where none does."""
    return "; ".join(f"{r['artifact']}: {r['reason']}" for r in rows if r["verdict"] == "FAIL")
