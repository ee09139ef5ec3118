"""An unpacked bundle: its manifest, read strictly, and the files it lists, checked by SHA-256."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, one_line
from .parity import Thresholds

SCHEMA = "cakd.bundle/1"
PACK_SCHEMA = "cakd.pack/1"
KINDS = {SCHEMA: "a bundle of one model", PACK_SCHEMA: "a pack of candidates"}
ACTIONS = {SCHEMA: "--verify, --bench or --image", PACK_SCHEMA: "--bench-all"}
MANIFEST = "manifest.json"
INPUTS, LOGITS = "parity-inputs.npy", "parity-logits.npy"
LABELS, PREPROCESSING = "labels.txt", "preprocessing.json"
PRECISIONS = ("fp32", "fp16", "int8")
RUNTIMES = ("ort", "ov", "trt")
REMEDY = "copy the bundle again"
# What reading the content of another JSON object raises.
NOT_A_MANIFEST = (AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class ModelFile:
    """One ONNX file: its precision, the runtimes it is for, and its gates."""

    file: str
    precision: str
    runtimes: tuple[str, ...]
    thresholds: Thresholds


@dataclass(frozen=True)
class LeftOut:
    """A precision that the bundle lacks for these runtimes, and why."""

    precision: str
    runtimes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Bundle:
    """The opened folder. `input_shape` is (B, 3, H, W); B is None where the batch is dynamic."""

    root: Path
    name: str
    sha256: str  # of the manifest
    input_shape: tuple[int | None, int, int, int]
    models: tuple[ModelFile, ...]
    left_out: tuple[LeftOut, ...]
    files: dict[str, tuple[int, str]]  # path below root -> bytes, SHA-256

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read the manifest and check every file by it.

        Raises UserError: no manifest, damaged, of another schema; a file missing, truncated, altered.
        """
        manifest, sha256 = read_manifest(root, SCHEMA)
        try:
            bundle = _parse(root, manifest, sha256)
        except NOT_A_MANIFEST as error:
            raise damaged(root, error) from None
        check_files(root, bundle.files)
        return bundle

    def precisions(self, runtime: str) -> list[str]:
        """The precisions the bundle holds for a runtime, from fine to coarse."""
        return [m.precision for m in self.models if runtime in m.runtimes]

    def model(self, runtime: str, precision: str) -> ModelFile:
        """The file of that precision for that runtime. Raises UserError: not in the bundle, with the reason."""
        for model in self.models:
            if model.precision == precision and runtime in model.runtimes:
                return model
        reasons = [
            entry.reason
            for entry in self.left_out
            if entry.precision == precision and runtime in entry.runtimes
        ]
        reason = reasons[0] if reasons else "not built"
        available = ", ".join(self.precisions(runtime)) or "none"
        raise UserError(
            f"--precision: got {precision}, which this bundle lacks for {runtime} ({reason}); "
            f"expected {available}"
        )

    def parity(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The parity inputs (N, 3, H, W) and the fp32 model's logits (N, K).

        Raises UserError: not readable, shapes that do not belong together.
        """
        x, logits = (self._array(name) for name in (INPUTS, LOGITS))
        if x.ndim != 4 or x.shape[1:] != self.input_shape[1:] or logits.shape[:1] != x.shape[:1]:
            raise UserError(
                f"{self.root / INPUTS}: got {x.shape} with logits {logits.shape}; expected "
                f"{self.input_shape}; {REMEDY}"
            )
        return x, logits

    def _array(self, name: str) -> NDArray[np.float32]:
        path = self.root / name
        try:
            array: NDArray[np.float32] = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}: damaged: not an array ({one_line(error)}); {REMEDY}"
            ) from None
        return array

    def labels(self) -> list[str]:
        """The class names in the order of the logits; empty where the model carries none."""
        if LABELS not in self.files:
            return []
        return (self.root / LABELS).read_text(encoding="utf-8").split("\n")[:-1]

    def preprocessing(self) -> dict[str, Any]:
        """image_size, mean, std, interpolation, crop. Raises UserError: the model has no such metadata."""
        if PREPROCESSING not in self.files:
            raise UserError(
                f"--image: the model {self.name} has no preprocessing metadata; "
                "use --bench or --verify, or export it with mean, std and image_size"
            )
        text = (self.root / PREPROCESSING).read_text(encoding="utf-8")
        preprocess: dict[str, Any] = json.loads(text)
        return preprocess


def read_manifest(root: Path, schema: str) -> tuple[dict[str, Any], str]:
    """The manifest of that schema in `root`, and its SHA-256. Raises UserError: missing, damaged, another kind."""
    path = root / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; run in the folder that holds {MANIFEST}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON ({one_line(error)}); {REMEDY}") from None
    got = manifest.get("schema") if isinstance(manifest, dict) else None
    if got == schema:
        return manifest, hashlib.sha256(data).hexdigest()
    if got in ACTIONS:
        raise UserError(f"{path}: got {KINDS[got]}; expected {KINDS[schema]}; run {ACTIONS[got]}")
    raise UserError(f"{path}: schema: got {got!r}; expected {schema!r}; {REMEDY}, with its runner")


def damaged(root: Path, error: Exception) -> UserError:
    """The error of a manifest whose content is not that of its schema."""
    reason = f"{type(error).__name__}: {one_line(error)}"
    return UserError(f"{root / MANIFEST}: damaged: not a manifest ({reason}); {REMEDY}")


def check_files(root: Path, files: dict[str, tuple[int, str]]) -> None:
    """Compare every file with the manifest. Raises UserError: missing, truncated, altered."""
    for name, (size, expected) in files.items():
        path, digest, got = root / name, hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
                    got += len(block)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}, but the manifest lists it; {REMEDY}"
            ) from None
        if got != size:
            raise UserError(f"{path}: damaged: got {got} bytes; expected {size}; {REMEDY}")
        if digest.hexdigest() != expected:
            sha256 = f"got SHA-256 {digest.hexdigest()[:12]}...; expected {expected[:12]}..."
            raise UserError(f"{path}: damaged: {sha256}; {REMEDY}")


def files_of(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Path below the root -> bytes and SHA-256 of every file. Raises one of NOT_A_MANIFEST: no such entries."""
    return {
        _inside(path): (_count(entry["bytes"]), text(entry["sha256"]))
        for path, entry in manifest["files"].items()
    }


def _parse(root: Path, manifest: dict[str, Any], sha256: str) -> Bundle:
    """The manifest as a Bundle. Raises AttributeError, KeyError, TypeError or ValueError: not a manifest."""
    files = files_of(manifest)
    batch, channels, height, width = manifest["input"]["shape"]
    models = tuple(
        ModelFile(
            one_of(m["file"], files), one_of(m["precision"], PRECISIONS), _runtimes(m), _gates(m)
        )
        for m in manifest["models"]
    )
    for name in (INPUTS, LOGITS):
        one_of(name, files)
    return Bundle(
        root=root,
        name=text(manifest["name"]),
        sha256=sha256,
        input_shape=(
            None if batch is None else _count(batch),
            _count(channels),
            _count(height),
            _count(width),
        ),
        models=models,
        left_out=tuple(
            LeftOut(one_of(e["precision"], PRECISIONS), _runtimes(e), text(e["reason"]))
            for e in manifest["left_out"]
        ),
        files=files,
    )


def _runtimes(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(one_of(name, RUNTIMES) for name in entry["runtimes"])


def _gates(model: dict[str, Any]) -> Thresholds:
    """The gates of a model: the usual ones, but its own SQNR in int8 where it was trained under int8."""
    gate = model.get("int8_db", Thresholds().int8_db)
    if type(gate) not in (int, float):
        raise ValueError(f"int8_db: got {gate!r}; expected a number")
    return Thresholds(int8_db=gate)


def _inside(path: str) -> str:
    """A path below the bundle's folder. Raises ValueError: it leads out of it."""
    parts = PurePosixPath(path).parts
    if not parts or path[0] == "/" or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f"path {path!r} leads out of the bundle")
    return path


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"got {value!r}; expected a whole number")
    return value


def text(value: Any) -> str:
    """The value, if it is text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"got {value!r}; expected text")
    return value


def one_of(value: Any, allowed: Any) -> str:
    """The value, if it is one of `allowed`. Raises ValueError."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"got {value!r}; expected one of {', '.join(allowed)}")
    return value
