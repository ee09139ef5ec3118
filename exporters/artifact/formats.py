"""export.json of the stage export and manifest.json of a bundle, as strict models.

The runner on a device reads its manifest with the standard library (`exporters/device/contents.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.formats import Artefact, ParityRow, Provenance
from pipeline.core.validation import (
    Count,
    Format,
    Positive,
    Sha256,
    Size,
    Text,
    key,
    optional,
    schema_key,
)
from pipeline.models.description import Preprocess

Variant = Literal["fp32", "fp16", "int8"]
Runtimes = Annotated[list[Literal["ort", "ov", "trt"]], Field(min_length=1)]


class ExportParity(Format):
    """ONNX Runtime against torch on smooth images."""

    max_abs: Size = key("Largest absolute difference, logits.")
    rel_between_std: Size | None = key("The same over the std between images, a ratio.")
    verdict: Literal["PASS", "UNDECIDED"] = key("A FAIL is never written: the stage exits 3.")


class ExportedModel(Format):
    """One exported model."""

    onnx: Text = key("Name of the file beside this one.")
    sha256: Sha256 = key("SHA-256 of the ONNX file.")
    weights_sha256: Sha256 = key("SHA-256 of the checkpoint it came from.")
    size_mb: Size = key("Size of the ONNX file, in 1e6 bytes.")
    params: Positive = key("Parameters.")
    macs: Positive = key("Multiply-accumulates of one image.")
    ops: dict[str, Positive] = key("ONNX operator to the number of its nodes.")
    preprocess: Preprocess = key("The steps from an image to the input; in the ONNX metadata too.")
    num_classes: Positive = key("Length of the logits.")
    parity: ExportParity = key("ONNX Runtime against torch on smooth images.")


class ExportedModels(Format):
    """The two models that were exported."""

    student: ExportedModel = key("The exported student.")
    teacher: ExportedModel = key("Its teacher, for comparison.")


class ExportFile(Artefact):
    """Written by the stage export: the two ONNX files, their content, and how far ONNX Runtime is from torch."""

    schema_: Literal["cakd.export/1"] = schema_key()
    method: Text = key("The method whose student is exported.")
    student: Text = optional("Its name in distill.students; not of distill.student.")
    opset: Positive = key("ONNX opset of both files.")
    models: ExportedModels = key("The two models that were exported.")
    reference_images: Positive = key("Images of the val split in reference.npz.")
    calibration_images: Positive = key("Images of the train split in calibration.npy.")


class BundleInput(Format):
    """The input of every model."""

    shape: Annotated[
        list[Annotated[int, Field(ge=1)] | None], Field(min_length=4, max_length=4)
    ] = key("Batch, channels, height, width; the batch is null where it is dynamic.")
    type: Literal["float32"] = key("Element type, at every precision.")


class BundleModel(Format):
    """One ONNX file."""

    file: Text = key("Its path.")
    precision: Variant = key("Of its weights and, where the runtime has it, its arithmetic.")
    runtimes: Runtimes = key("Runtimes it is for, by the names of --runtime.")
    parity: ParityRow = key("Against fp32 in ONNX Runtime on the machine that made the bundle.")
    int8_db: float = optional(
        "Gate of the centred SQNR, dB, where it was trained under int8 and 15 dB are too much."
    )


class LeftOut(Format):
    """A precision that is missing for some runtimes."""

    precision: Variant = key("The precision.")
    runtimes: Runtimes = key("The runtimes without it.")
    reason: Text = key("Why: not asked for, refused, or the figure that broke its gate.")


class BundleParity(Format):
    """The images and logits the models were judged on."""

    inputs: Annotated[int, Field(ge=2)] = key("How many.")
    source: Text = key("Where they are from.")


class Commands(Format):
    """Commands for the device, to run in the bundle's folder."""

    __pydantic_extra__: dict[str, str]
    verify: str = key("Check every model against the logits.")
    bench: str = key("Measure latency.")
    image: str = key("Classify an image.")


class BundledFile(Format):
    """A file of the bundle."""

    bytes: Count = key("Its size.")
    sha256: Sha256 = key("Of its bytes.")


class BundledFiles(Format):
    """Every file of the bundle but its manifest, by its path."""

    __pydantic_extra__: dict[str, BundledFile]
    model: BundledFile = key("The fp32 network.", alias="model-fp32.onnx")
    inputs: BundledFile = key("Parity inputs.", alias="parity-inputs.npy")
    logits: BundledFile = key("Parity logits.", alias="parity-logits.npy")
    runner: BundledFile = key("The runner.", alias="bundle/run.py")


class Network(Format):
    """The opset, IR version and metadata of the network."""

    opset: Any = key("ONNX opset.")
    ir: Any = key("ONNX IR version.")


class Calibration(Format):
    """The images int8 was calibrated on."""

    images: Positive = key("How many.")
    sha256: Sha256 = key("Of the prepared float32 array's bytes.")


class BundleProvenance(Provenance):
    """What made a bundle: the ONNX by hash, versions, the network's metadata."""

    network: Network = key("Its opset, IR version and metadata: model, role, method, versions.")
    calibration: Calibration | None = key("The images int8 was calibrated on; or null.")


class BundleManifest(Format):
    """Written by exporters.bundle into the folder or .tar that goes to the device, read there by bundle.run.

    It has the hash of every file, and what was left out and why.
    """

    schema_: Literal["cakd.bundle/1"] = schema_key()
    name: Text = key("Stem of the ONNX file it was made from.")
    input: BundleInput = key("The input of every model.")
    classes: Positive = key("Length of the logits.")
    models: list[BundleModel] = key("The ONNX files, fp32 always.", min_length=1)
    left_out: list[LeftOut] = key("Precisions that are not in the bundle.")
    parity: BundleParity = key("The arrays are parity-inputs.npy and parity-logits.npy.")
    commands: Commands = key("What to type on the device, in the bundle's folder, by purpose.")
    files: BundledFiles = key("Every file of the bundle but this one, by its path.")
    provenance: BundleProvenance = key("The ONNX by hash, versions, the network's metadata.")
