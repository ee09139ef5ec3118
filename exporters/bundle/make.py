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
from exporters.ort import int8, quantize, trained
from exporters.ort.session import OrtSession
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.data import decoding
from pipeline.data.prepared import spread

if TYPE_CHECKING:
    import onnx

RUNNER = Path(__file__).parents[1] / "device"
# The pipeline's own decoder, so that the device sees the pixels the student was trained on.
DECODER = Path(decoding.__file__)
PACKAGE = "bundle"  # name of the runner's package on the device
PARITY_INPUTS = 16

NO_CALIB = "not built: no --calib was given"
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
    symmetric: bool = False  # int8 for TensorRT


VARIANTS = (
    Variant("model-fp32.onnx", "fp32", contents.RUNTIMES),
    Variant("model-fp16.onnx", "fp16", contents.RUNTIMES),
    Variant("model-int8-cpu.onnx", "int8", ("ort", "ov")),
    Variant("model-int8-trt.onnx", "int8", ("trt",), symmetric=True),
)


@dataclass(frozen=True)
class ParityImages:
    """x (N, C, H, W): the parity inputs; int8: calibration images, of which x holds none, or None."""

    x: Array
    source: str
    int8: int8.CalibrationImages | None


def parity_images(
    source: Path, session: OrtSession, calib: Path | None, images: Path | None
) -> ParityImages:
    """The parity inputs: of --images, else of the images of --calib held out from calibration, else smooth ones.

    16, rounded up to the network's own batch, evenly spaced over the folder; fewer where it holds fewer.
    Raises UserError: not a folder of images, too few of them.
    """
    batch = session.input_shape[0] or 1
    count = math.ceil(PARITY_INPUTS / batch) * batch
    calibration = None
    pool, origin = inputs.smooth_for(session, count), "seeded smooth images"
    if calib is not None:
        calibration = int8.calibration_images(source, calib)
        pool = calibration.held_out
        origin = "images of --calib held out from calibration"
    if images is not None:
        pool = inputs.images_from_folder(images, session, int8.MAX_IMAGES)
        origin = "images of --images"
    usable = len(pool) // batch * batch
    if usable < 2:
        raise UserError(
            f"{images or calib}: got {len(pool)} images for parity; expected {max(2, batch)} or more; add images"
        )
    rows = spread(np.arange(usable), count)
    return ParityImages(np.ascontiguousarray(pool[rows]), origin, calibration)


def validate_network(source: Path, session: OrtSession) -> None:
    """Check that the runner can prepare images for the network. Raises UserError: another preprocessing."""
    preprocess = metadata.preprocessing(session.metadata)
    if preprocess is None:
        return
    if session.input_shape[1] != 3:
        raise UserError(
            f"{source}: got {session.input_shape[1]} channel and preprocessing metadata, which is of RGB images; "
            "expected 3 channels; export it without preprocessing metadata"
        )
    if preprocess["interpolation"] != "bicubic" or preprocess["crop"] not in image.CROPS:
        raise UserError(
            f"{source}: preprocessing: got {preprocess['interpolation']!r}, {preprocess['crop']!r}; "
            f"expected 'bicubic', {image.CROP!r}; export it without preprocessing metadata"
        )


def build_bundle(
    source: Path,
    folder: Path,
    calib: Path | None,
    images: Path | None,
    force: bool = False,
) -> dict[str, Any]:
    """fp32 ONNX -> the bundle's files in the empty `folder`; returns its manifest.

    Raises UserError: not an image classifier this runner can run; GateFailed: its outputs are not finite,
    or parity is UNDECIDED without `force`.
    """
    proto, session = onnx_file.read_onnx(source), OrtSession(source, 1)
    validate_network(source, session)
    parity = parity_images(source, session, calib, images)
    logits = inputs.run_batches(session, parity.x)
    names = metadata.classes(session.metadata)
    if logits.ndim != 2 or (names and len(names) != logits.shape[1]):
        raise UserError(
            f"{source}: got logits {logits.shape} and {len(names)} class names; expected (N, classes); "
            "export it again"
        )
    rows = [add_variant(v, source, proto, folder, parity, logits, force) for v in VARIANTS]
    agreement.require_pass(source, rows[0][0], force, "fp32: ")
    models, left_out = [], []
    for variant, (row, gates) in zip(VARIANTS, rows, strict=True):
        entry = {"precision": variant.precision, "runtimes": list(variant.runtimes)}
        if reason := agreement.rejection(row, force):
            left_out.append({**entry, "reason": reason})
        else:
            own = {} if gates == agreement.Thresholds() else {"int8_db": gates.int8_db}
            models.append({"file": variant.file, **entry, "parity": row, **own})
    np.save(folder / contents.INPUTS, parity.x)
    np.save(folder / contents.LOGITS, logits)
    _write_metadata(folder, names, metadata.preprocessing(session.metadata))
    copy_runner(folder)
    manifest = {
        "schema": contents.SCHEMA,
        "name": source.stem,
        "input": {"shape": list(session.input_shape), "type": "float32"},
        "classes": logits.shape[1],
        "models": models,
        "left_out": left_out,
        "parity": {"inputs": len(parity.x), "source": parity.source},
        "commands": COMMANDS,
        "files": hash_files(folder),
        "provenance": bundle_provenance(source, proto, parity),
    }
    artifacts.write_json(folder / contents.MANIFEST, manifest)
    return manifest


def add_variant(
    variant: Variant,
    source: Path,
    proto: onnx.ModelProto,
    folder: Path,
    parity: ParityImages,
    logits: Array,
    force: bool,
) -> tuple[dict[str, Any], agreement.Thresholds]:
    """Write one variant, removed again if it is rejected; returns its row on the parity inputs, and its gates."""
    path, gates = folder / variant.file, agreement.Thresholds()
    try:
        onnx_file.write_onnx(convert_variant(variant, source, proto, parity.int8), path)
        session = OrtSession(path, 1)
        # TensorRT's int8 sums are wide, whatever this CPU's are.
        judged = OrtSession(path, 1, integer_kernels=False) if variant.symmetric else session
        outputs = inputs.run_batches(judged, parity.x)
        gates = agreement.fair_thresholds(session, gates)
        row = agreement.parity_row(path, session, logits, outputs, gates)
        if variant.precision == "int8" and parity.int8 is not None:
            row = add_top1_drop(row, OrtSession(source, 1), judged, parity.int8)
    except UserError as error:
        reason = str(error).replace(str(path), variant.file)
        row = agreement.skipped_row(variant.file, variant.precision, reason) | {"verdict": "FAIL"}
    if agreement.rejection(row, force):
        path.unlink(missing_ok=True)
    return row, gates


def add_top1_drop(
    row: dict[str, Any], fp32: OrtSession, variant: OrtSession, images: int8.CalibrationImages
) -> dict[str, Any]:
    """The row with the top-1 that int8 loses on labelled held-out images; too much of it is a FAIL."""
    if (images.labels < 0).all():
        return row
    before, after = (inputs.run_batches(one, images.held_out) for one in (fp32, variant))
    return agreement.add_accuracy(row, before, after, images.labels, int8.Settings().max_drop)


def convert_variant(
    variant: Variant, source: Path, proto: onnx.ModelProto, images: int8.CalibrationImages | None
) -> onnx.ModelProto:
    """The fp32 network as that variant. Raises UserError: int8 without images to calibrate on."""
    if variant.precision != "int8":
        return quantize.at_precision(proto, variant.precision, None)
    if images is None:
        raise UserError(NO_CALIB)
    if variant.symmetric:
        return quantize.at_precision(proto, "int8", images.calibration, trained.beside(source))
    return int8.quantize_within_gates(source, images, int8.Settings(), agreement.Thresholds())


def _write_metadata(folder: Path, names: list[str], preprocess: dict[str, Any] | None) -> None:
    """Write labels.txt and preprocessing.json, where the network has them."""
    if names:
        text = "".join(f"{name}\n" for name in names)
        (folder / contents.LABELS).write_text(text, encoding="utf-8")
    if preprocess:
        text = json.dumps(preprocess, indent=1) + "\n"
        (folder / contents.PREPROCESSING).write_text(text, encoding="utf-8")


def copy_runner(folder: Path) -> None:
    """Copy the runner into `folder`, with the decoder it needs and its README."""
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


def bundle_provenance(source: Path, proto: onnx.ModelProto, parity: ParityImages) -> dict[str, Any]:
    """Hashes of the inputs, versions, and the network's own metadata, without times and paths."""
    properties = onnx_file.read_metadata(proto)
    keys = ("model", "role", "method", "weights_sha256", "torch", "timm")
    calibration = parity.int8.calibration if parity.int8 else None
    return {
        **artifacts.provenance({"parity_inputs": PARITY_INPUTS}, onnx=source),
        "versions": artifacts.versions(("numpy", "onnx", "onnxruntime")),
        "network": {"opset": onnx_file.opset(proto), "ir": proto.ir_version}
        | {key: properties[key] for key in keys if key in properties},
        "calibration": None
        if calibration is None
        else {
            "images": len(calibration),
            "sha256": hashlib.sha256(calibration.tobytes()).hexdigest(),
        },
    }


def pack_tar(folder: Path, out: Path, root: str) -> None:
    """Write every file of `folder` below `root` into an uncompressed tar: sorted, time 0, owner 0, mode 644."""
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(f"{root}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
