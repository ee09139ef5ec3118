"""ONNX -> models, labels, preprocessing, parity inputs, runner and manifest of an edge bundle."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.artifact import agreement, inputs, metadata, onnx_file
from exporters.artifact.session import Array
from exporters.device import contents, image
from exporters.ort import int8, quantize
from exporters.ort.session import OrtSession
from pipeline.core import artifacts
from pipeline.core.errors import GateFailed, UserError
from pipeline.data import decoding
from pipeline.data.prepared import spread

if TYPE_CHECKING:
    import onnx

RUNNER = Path(__file__).parents[1] / "device"
DECODER = Path(decoding.__file__)  # the pipeline's own, so that the device reads what it read
PACKAGE = "bundle"  # the runner's name on the device
PARITY_INPUTS = 16

NO_CALIB = "not made: no --calib was given, a folder of images like those to come"
COMMANDS = {
    "verify": f"python -m {PACKAGE}.run --verify",
    "bench": f"python -m {PACKAGE}.run --bench --seconds 10",
    "image": f"python -m {PACKAGE}.run --image x.jpg",
}


@dataclass(frozen=True)
class Variant:
    """One ONNX file that a bundle may hold, and the runtimes it is for."""

    file: str
    precision: str
    runtimes: tuple[str, ...]
    symmetric: bool = False  # int8 as GPUs take it


VARIANTS = (
    Variant("model-fp32.onnx", "fp32", contents.RUNTIMES),
    Variant("model-fp16.onnx", "fp16", contents.RUNTIMES),
    Variant("model-int8-cpu.onnx", "int8", ("ort", "ov")),
    Variant("model-int8-trt.onnx", "int8", ("trt",), symmetric=True),
)


@dataclass(frozen=True)
class ParityImages:
    """x (N, 3, H, W): the parity inputs; ranges: what int8 is made by, none of x calibrated on, or None."""

    x: Array
    source: str
    ranges: int8.CalibrationImages | None


def parity_images(
    source: Path, session: OrtSession, calib: Path | None, images: Path | None
) -> ParityImages:
    """The parity inputs: of --images, else of the images of --calib held out from calibration, else smooth ones.

    16, rounded up to the network's own batch, evenly spaced over the folder; fewer where it holds fewer.
    Raises UserError: not a folder of images, too few of them.
    """
    batch = session.input_shape[0] or 1
    count = math.ceil(PARITY_INPUTS / batch) * batch
    ranges = None
    pool, told = inputs.smooth(count, *session.input_shape[2:]), "seeded smooth images"
    if calib is not None:
        ranges = int8.calibration_images(source, calib)
        pool = ranges.held
        told = "images of --calib held out from calibration"
    if images is not None:
        pool, told = (
            inputs.images_from_folder(images, session, int8.CALIBRATION),
            "images of --images",
        )
    usable = len(pool) // batch * batch
    if usable < 2:
        raise UserError(
            f"{images or calib}: gives {len(pool)} images for parity; at least {max(2, batch)} are needed"
        )
    rows = spread(np.arange(usable), count)
    return ParityImages(np.ascontiguousarray(pool[rows]), told, ranges)


def validate_network(source: Path, session: OrtSession) -> None:
    """The network is one the runner can run. Raises UserError: not RGB, notes of another network."""
    shape = session.input_shape
    if shape[1] != 3:
        raise UserError(f"{source}: the input has {shape[1]} channels; allowed: 3, an RGB picture")
    notes = metadata.preprocessing(session.metadata)
    if notes is None:
        return
    size = notes["image_size"]
    if shape[2:] != (size, size):
        raise UserError(
            f"{source}: input is {shape[2]}x{shape[3]}, its notes say {size}; export it again"
        )
    if (notes["interpolation"], notes["crop"]) != ("bicubic", image.CROP):
        raise UserError(
            f"{source}: preprocessing {notes['interpolation']!r}, {notes['crop']!r}; the runner does "
            f"'bicubic', {image.CROP!r} only"
        )


def build_bundle(
    source: Path, folder: Path, calib: Path | None, images: Path | None
) -> dict[str, Any]:
    """fp32 ONNX -> the bundle's files in the empty `folder`; returns its manifest.

    Raises UserError: not an image classifier this runner can run; GateFailed: its outputs are not finite.
    """
    proto, session = onnx_file.read_onnx(source), OrtSession(source, 1)
    validate_network(source, session)
    shown = parity_images(source, session, calib, images)
    logits = inputs.run_batches(session, shown.x)
    names = metadata.classes(session.metadata)
    if logits.ndim != 2 or (names and len(names) != logits.shape[1]):
        raise UserError(
            f"{source}: logits are {logits.shape} with {len(names)} class names; allowed: (N, classes)"
        )
    models, left_out = [], []
    for variant in VARIANTS:
        row = add_variant(variant, source, proto, folder, shown, logits)
        entry = {"precision": variant.precision, "runtimes": list(variant.runtimes)}
        if row["verdict"] == "FAIL":
            left_out.append({**entry, "reason": row["reason"]})
        else:
            models.append({"file": variant.file, **entry, "parity": row})
    if not any(m["precision"] == "fp32" for m in models):
        raise GateFailed(f"{source}: fp32: {left_out[0]['reason']}; nothing was written")
    np.save(folder / contents.INPUTS, shown.x)
    np.save(folder / contents.LOGITS, logits)
    _write_notes(folder, names, metadata.preprocessing(session.metadata))
    _copy_runner(folder)
    manifest = {
        "schema": contents.SCHEMA,
        "name": source.stem,
        "input": {"shape": list(session.input_shape), "type": "float32"},
        "classes": logits.shape[1],
        "models": models,
        "left_out": left_out,
        "parity": {"inputs": len(shown.x), "source": shown.source},
        "commands": COMMANDS,
        "files": hash_files(folder),
        "provenance": bundle_provenance(source, proto, shown),
    }
    artifacts.write_json(folder / contents.MANIFEST, manifest)
    return manifest


def add_variant(
    variant: Variant,
    source: Path,
    proto: onnx.ModelProto,
    folder: Path,
    shown: ParityImages,
    logits: Array,
) -> dict[str, Any]:
    """Write one variant and judge it on the parity inputs; returns its row. What fails is not left in `folder`."""
    path = folder / variant.file
    try:
        onnx_file.write_onnx(convert_variant(variant, source, proto, shown.ranges), path)
        session = OrtSession(path, 1)
        got = inputs.run_batches(session, shown.x)
        row = agreement.parity_row(path, session, logits, got, agreement.Thresholds())
    except UserError as error:
        reason = str(error).replace(str(path), variant.file)
        row = agreement.skipped_row(variant.file, variant.precision, reason) | {"verdict": "FAIL"}
    if row["verdict"] == "FAIL":
        path.unlink(missing_ok=True)
    return row


def convert_variant(
    variant: Variant, source: Path, proto: onnx.ModelProto, ranges: int8.CalibrationImages | None
) -> onnx.ModelProto:
    """The fp32 network as that variant. Raises UserError: int8 without images to calibrate on."""
    if variant.precision != "int8":
        return quantize.at_precision(proto, variant.precision, None)
    if ranges is None:
        raise UserError(NO_CALIB)
    if variant.symmetric:
        return quantize.at_precision(proto, "int8", ranges.shown)
    return int8.quantize_within_gates(source, ranges, int8.Settings(), agreement.Thresholds())


def _write_notes(folder: Path, names: list[str], notes: dict[str, Any] | None) -> None:
    """labels.txt and preprocessing.json, where the network carries them."""
    if names:
        text = "".join(f"{name}\n" for name in names)
        (folder / contents.LABELS).write_text(text, encoding="utf-8")
    if notes:
        text = json.dumps(notes, indent=1) + "\n"
        (folder / contents.PREPROCESSING).write_text(text, encoding="utf-8")


def _copy_runner(folder: Path) -> None:
    (folder / PACKAGE).mkdir()
    for path in (*sorted(RUNNER.glob("*.py")), DECODER):
        shutil.copyfile(path, folder / PACKAGE / path.name)
    shutil.copyfile(RUNNER / "README.md", folder / "README.md")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` by its path: bytes and SHA-256."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": artifacts.sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def bundle_provenance(source: Path, proto: onnx.ModelProto, shown: ParityImages) -> dict[str, Any]:
    """Inputs by hash, versions, what the network says of itself; no clock time, no path."""
    notes = onnx_file.read_metadata(proto)
    kept = ("model", "role", "method", "weights_sha256", "torch", "timm")
    calibration = shown.ranges.shown if shown.ranges else None
    return {
        **artifacts.provenance({"parity_inputs": PARITY_INPUTS}, onnx=source),
        "versions": artifacts.versions(("numpy", "onnx", "onnxruntime")),
        "network": {"opset": onnx_file.opset(proto), "ir": proto.ir_version}
        | {key: notes[key] for key in kept if key in notes},
        "calibration": None
        if calibration is None
        else {
            "images": len(calibration),
            "sha256": hashlib.sha256(calibration.tobytes()).hexdigest(),
        },
    }


def pack_tar(folder: Path, out: Path, root: str) -> None:
    """Every file of `folder` below `root` into an uncompressed tar: sorted, time 0, owner 0, mode 644."""
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(f"{root}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
