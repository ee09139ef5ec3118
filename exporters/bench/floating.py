"""What the layers that the settings of a fine-tuning leave in float cost in ONNX Runtime: its nodes, CPU time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.artifact import onnx_file
from exporters.artifact.session import TARGETS, Array
from exporters.bench.compare import compare_artefacts
from exporters.bench.measure import Subject
from exporters.ort.placement import place
from exporters.ort.quantize import Calibrated
from exporters.ort.session import OrtSession
from exporters.ort.simulated import layer_names
from pipeline.core import artifacts
from pipeline.models.ranges import SUFFIX

if TYPE_CHECKING:
    from pipeline.quantize.fine_tune import Student

# The ranges of these layers are calibrated on so many: the time does not depend on their values.
IMAGES = 8
TARGET = TARGETS["ort-int8"]


def measure(student: Student, source: Path, names: Sequence[str], x: Array) -> dict[str, Any]:
    """The layers `names` of a fine-tuned student, each with its nodes that ONNX Runtime runs in float.

    A node that is in float with every layer in int8 too is not counted. Where there are nodes, also `cpu_ratio`:
    CPU time over that of the network with every layer in int8, or None and a `reason`. x: images (N, 3, S, S).
    source: the student's ONNX, its ranges beside it. Raises UserError: ranges of another network.
    """
    if not names:
        return {"layers": []}
    with tempfile.TemporaryDirectory() as folder:
        mixed, whole = Path(folder) / "mixed.onnx", Path(folder) / "int8.onnx"
        groups = _write(student, source, x[:IMAGES], mixed, whole)
        run, run_whole = (OrtSession(path, 1).precisions() for path in (mixed, whole))
        added = {n for n, at in run.items() if at == "fp32" != run_whole.get(n)}
        layers = [
            {"name": name, "nodes": [node for node in groups[name] if node in added]}
            for name in names
        ]
        if not any(layer["nodes"] for layer in layers):
            return {"layers": layers}
        own, baseline = (Subject("student", path, TARGET) for path in (mixed, whole))
        compared, _ = compare_artefacts(own, baseline, 0, None)
    interval = compared["ratio"]
    ratio = interval and {key: interval[key] for key in ("median", "ci_low", "ci_high")}
    return {"layers": layers, "cpu_ratio": ratio, "reason": compared["reason"]}


def _write(
    student: Student, source: Path, x: Array, mixed: Path, whole: Path
) -> dict[str, list[str]]:
    """Write the int8 of a student with its ranges and with every layer in int8; layer -> names of its nodes."""
    import torch

    from pipeline.quantize.simulation import Sites

    ranges = artifacts.read_json(source.with_name(f"{source.stem}{SUFFIX}"))
    sites = Sites(student.folded, torch.from_numpy(x[:1]))
    with Calibrated(onnx_file.read_onnx(source), x) as network:
        every = place(network, x[:1], sites.computed, [], ranges["bias"]).ranges
        for kind in ("activations", "weights"):
            every[kind] |= {n: grid for n, grid in ranges[kind].items() if n in every[kind]}
        onnx_file.write_onnx(network.quantized(ranges=ranges), mixed)
        onnx_file.write_onnx(network.quantized(ranges=every), whole)
        return {name: network.groups[group] for group, name in layer_names(network).items()}
