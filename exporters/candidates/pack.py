"""A pack: all candidates as ONNX files with the runner of the edge bundle, and the figures that come back.

On the device, which needs NumPy and a runtime: `python -m bundle.run --bench-all --json > device.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import inputs, onnx_file
from exporters.artifact.session import TARGETS
from exporters.bundle.__main__ import check_out
from exporters.bundle.make import copy_runner, hash_files
from exporters.candidates.untrained import CALIBRATION_IMAGES, Settings, Untrained
from exporters.device import contents
from exporters.ort import quantize
from pipeline.core import artifacts
from pipeline.core.atomic import atomic_dir
from pipeline.core.errors import UserError
from pipeline.core.students import Candidates, PackBench
from pipeline.core.validation import schema_name

ON_THE_DEVICE = "on the device: python -m bundle.run --bench-all --json > device.json"


def write(out: Path, built: Sequence[Untrained], settings: Settings) -> None:
    """Write the folder whole or not at all. Raises UserError: files that are no bundle, nothing to pack."""
    if out.suffix == ".tar":
        raise UserError(f"--pack: got {out}; expected a folder; pack it yourself with tar")
    check_out(out)
    target = TARGETS[settings.target]
    precision = "fp32" if target.precision in ("default", "bf16") else target.precision
    packed = [one for one in built if one.artefact is not None]
    if not packed:
        raise UserError(
            f"--pack: no candidate could be built: {built[0].candidate.name}: {built[0].reason}"
        )
    size = settings.image_size
    with atomic_dir(out) as folder:
        models = []
        for one in packed:
            file = f"{one.candidate.slug}-{precision}.onnx"
            _write_network(one, precision, target.runtime, size, folder / file)
            mb = (folder / file).stat().st_size / 1e6
            models.append({**one.facts(), "file": file, "size_mb": mb})
        np.save(folder / contents.INPUTS, inputs.smooth(CALIBRATION_IMAGES, size, size))
        copy_runner(folder)
        manifest = {
            "schema": contents.PACK_SCHEMA,
            "name": out.name,
            "target": target.name,
            "image_size": size,
            "precision": precision,
            "models": models,
            "left_out": [
                {**one.facts(), "reason": one.reason} for one in built if one.artefact is None
            ],
            "files": hash_files(folder),
            "provenance": artifacts.provenance(vars(settings)),
        }
        artifacts.write_json(folder / contents.MANIFEST, manifest)


def _write_network(one: Untrained, precision: str, runtime: str, size: int, path: Path) -> None:
    """The network's ONNX file at a precision: int8 for CPUs as it was measured here, else as TensorRT takes it."""
    assert one.artefact is not None and one.onnx is not None
    if precision == "int8" and one.artefact.suffix == ".onnx" and runtime == "ort":
        shutil.copyfile(one.artefact, path)
        return
    proto, x = onnx_file.read_onnx(one.onnx), inputs.smooth(CALIBRATION_IMAGES, size, size)
    if precision == "int8":
        network = quantize.to_int8(proto, x, symmetric=runtime in ("trt", "rtx"))
    else:
        network = quantize.at_precision(proto, precision, None)
    onnx_file.write_onnx(network, path)


def read_device(path: Path) -> dict[str, Any]:
    """What `--bench-all --json` printed on a device, as the document of a measurement here.

    Raises UserError: missing, not JSON, not what the runner prints.
    """
    found = artifacts.read(path, PackBench, "copy what `--bench-all --json` printed again")
    measured = {"load_ms", "first_ms", "rss_mb"}
    return {
        "schema": schema_name(Candidates),
        "target": f"{found['runtime']}, {found['precision']}",
        "threads": found["threads"],
        "image_size": found["image_size"],
        "rows": [{**dict.fromkeys(measured), **row} for row in found["rows"]],
        "machine": found["machine"],
        "provenance": {
            "params": None,
            "inputs": {path.name: artifacts.sha256(path)},
            "versions": {},
        },
    }
