"""An untrained candidate as an artefact of a target: latency needs no training.

The artefact is made as the pipeline makes a trained one (same exporter, branches merged, batch norms folded, int8
of every node), from seeded random weights, and kept in the work folder by what decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import inputs
from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build
from exporters.artifact.session import TARGETS, Target, Unavailable
from exporters.candidates.catalogue import Candidate
from exporters.open import RUNTIMES
from exporters.ort.export import export
from pipeline.core import artifacts
from pipeline.core.atomic import atomic_dir
from pipeline.core.errors import GateFailed, UserError

EXPORTERS = Path(__file__).parents[1]
SEED = 0  # of the random weights
CALIBRATION_IMAGES = 8  # any range gives the same latency
MODEL = "student"  # the artefact is named as a trained one
FACTS = "facts.json"
CONFIG = Build(
    int8_search_s=0.0
)  # every node in int8: random weights cannot tell which to leave in float


@dataclass(frozen=True)
class Settings:
    """What all candidates are built for."""

    target: str
    image_size: int
    classes: int
    grid: int  # rows and columns of the teacher's patch tokens


@dataclass(frozen=True)
class Untrained:
    """A candidate as built; without an artefact `reason` says why.

    params and macs are those of the checkpoint, as of a trained student. tap: where CAKD would read it,
    `blocks.4 8x8`, or None and `no_tap`, why its losses cannot be used.
    """

    candidate: Candidate
    artefact: Path | None = None
    onnx: Path | None = None
    params: int | None = None
    macs: int | None = None
    tap: str | None = None
    no_tap: str | None = None
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """What is known of it without measuring it, the same keys in a document and in a pack."""
        return {
            "name": self.candidate.name,
            "model": self.candidate.model,
            "kwargs": self.candidate.kwargs,
            "params": self.params,
            "macs": self.macs,
            "tap": self.tap,
            "no_tap": self.no_tap,
        }


def build(candidate: Candidate, settings: Settings, work: Path) -> Untrained:
    """Build a candidate, or read what an earlier call has built. Raises Unavailable: the runtime is missing."""
    target = TARGETS[settings.target]
    try:
        network = _network(candidate, settings, work)
        folder = network.with_name(f"{network.name}-{target.name}")
        if not folder.exists():
            with atomic_dir(folder) as temporary:
                _artefact(target, network, settings.image_size, temporary)
    except Unavailable:
        raise
    except (UserError, GateFailed) as error:
        return Untrained(candidate, reason=str(error))
    artefact = folder / target.artefact.format(model=MODEL)
    return Untrained(
        candidate, artefact, network / f"{MODEL}.onnx", **artifacts.read_json(network / FACTS)
    )


def _network(candidate: Candidate, settings: Settings, work: Path) -> Path:
    """The folder of the exported network, named after what decides it; made where it is missing."""
    sources = {str(path): artifacts.sha256(path) for path in sorted(EXPORTERS.rglob("*.py"))}
    versions = artifacts.versions(("torch", "timm", "onnx", "onnxruntime", "openvino"))
    sizes = [settings.image_size, settings.classes, settings.grid]
    decides = [candidate.model, candidate.kwargs, sizes, SEED, sources, versions]
    folder = work / f"{candidate.slug}-{artifacts.digest(decides)[:12]}"
    if not folder.exists():
        with atomic_dir(folder) as temporary:
            artifacts.write_json(temporary / FACTS, _export(candidate, settings, temporary))
    return folder


def _export(candidate: Candidate, settings: Settings, folder: Path) -> dict[str, Any]:
    """Write checkpoint and ONNX file of seeded random weights into `folder`; returns the facts of the network."""
    import torch

    from pipeline.models import checkpoint
    from pipeline.models.student import find_tap

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = checkpoint.create(candidate.model, candidate.kwargs, settings.classes).eval()
    size = settings.image_size
    tap = no_tap = None
    try:
        found = find_tap(network, size, (settings.grid, settings.grid))
        tap = f"{found.module} {found.grid[0]}x{found.grid[1]}"
    except UserError as error:
        no_tap = str(error)
    description = {
        "role": "student",
        "model": candidate.model,
        "kwargs": candidate.kwargs,
        "num_classes": settings.classes,
        "classes": [str(k) for k in range(settings.classes)],
        "preprocess": checkpoint.preprocessing(network, size),
    }
    checkpoint.save(folder / f"{MODEL}.safetensors", network, description)
    export(folder / f"{MODEL}.safetensors", folder / f"{MODEL}.onnx", force=True)
    return {**checkpoint.count(network, size), "tap": tap, "no_tap": no_tap}


def _artefact(target: Target, network: Path, size: int, out: Path) -> None:
    """Make the artefact of a target from the network's folder, as the stage build does, every node in int8."""
    images = inputs.smooth(CALIBRATION_IMAGES, size, size)
    unlabelled = np.full(CALIBRATION_IMAGES, -1)
    exported = Exported(network, {MODEL: images}, unlabelled, {}, images)
    RUNTIMES[target.runtime].make(target.precision, MODEL, exported, out, CONFIG)
