"""CONTRIBUTING.md by doing: a method, a data source and a target are added to a copy, in the places it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

# Each runs commands of its own, one after the other, on a machine that others share.
pytestmark = [pytest.mark.ci, pytest.mark.timeout(1800)]

COSINE = '''"""Cosine of logits."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import StudentOutputs, Term
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class CosineConfig:
    """How much it counts."""

    weight: NonNegativeFloat = 1.0


class Cosine(Term):
    """`cosine`: one minus the cosine between both rows of logits."""

    losses = {"cosine": "weight"}
    teacher = frozenset({"logits"})

    def __init__(self, config: CosineConfig, _: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, seen: StudentOutputs, taught: TeacherOutputs) -> dict[str, Tensor]:
        """1 - cos, the mean over the batch."""
        return {"cosine": 1 - F.cosine_similarity(seen.logits, taught.logits).mean()}
'''
ARRAYS = '''"""Pictures in one .npz: x (N, H, W, 3) uint8, y (N,)."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from pipeline.prepare.sources.sample import Columns, SourceImages, Sample, existing


def read(path: str | None, columns: Columns) -> SourceImages:
    """Every picture of the file, in one split."""
    columns.only("arrays")
    with np.load(existing("arrays", path, "an .npz with x and y"), allow_pickle=False) as held:
        x, y = held["x"], held["y"]
    samples = [
        Sample(f"row {i}", partial(Image.fromarray, a), int(k), None)
        for i, (a, k) in enumerate(zip(x, y))
    ]
    return SourceImages([f"class {k}" for k in range(int(y.max()) + 1)], samples)
'''


REFERENCE = '''"""ONNX's own reference implementation, in NumPy: slow, and right by definition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx.reference import ReferenceEvaluator

from exporters.artifact import onnx_file
from exporters.artifact.runtime import Runtime
from exporters.artifact.session import Array, validated_shape
from exporters.ort.runtime import make


class ReferenceSession:
    """One model on one thread."""

    def __init__(self, path: Path) -> None:
        model = onnx_file.read_onnx(path)
        self._evaluator = ReferenceEvaluator(model)
        self.runtime = f"onnx reference {onnx.__version__}"
        self.precision_effective = "fp32"
        self.metadata: Mapping[str, str] = onnx_file.read_metadata(model)
        dims = [d.dim_value or None for d in model.graph.input[0].type.tensor_type.shape.dim]
        self.input_shape = validated_shape(dims, self.metadata, path)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) -> logits (B, K)."""
        made: Array = self._evaluator.run(None, {"image": x})[0]
        return made


REFERENCE = Runtime(
    "reference",
    ".onnx",
    make,
    lambda artefact, *_: ReferenceSession(artefact),
    packages=("onnx",),
)
'''
HOUSE = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py")


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Each first string in the file replaced by the second; it must be there."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    path.write_text(text)


def python(folder: Path, *arguments: str) -> str:
    """`python ARGUMENTS` there; its stdout. Fails the test where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_method_is_a_file_a_row_and_its_settings(finished_run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    tiny.copy(
        copied,
        "tests",
        "recipes",
        run=finished_run,
        distill={"methods": ["plain", "logits", "cosine+gl"]},
        export={"method": "cosine+gl"},
    )
    table = copied / "pipeline" / "distill" / "methods" / "table.py"
    (table.parent / "cosine.py").write_text(COSINE)
    edit(
        table,
        (
            "from pipeline.distill.methods.crd import",
            "from pipeline.distill.methods.cosine import Cosine, CosineConfig\n"
            "from pipeline.distill.methods.crd import",
        ),
        ('    "dkd": ("dkd",),\n', '    "dkd": ("dkd",),\n    "cosine": ("cosine",),\n'),
        (
            '    "dkd": (Dkd, "dkd"),\n',
            '    "dkd": (Dkd, "dkd"),\n    "cosine": (Cosine, "cosine"),\n',
        ),
        ("    dkd: DkdConfig", "    cosine: CosineConfig = CosineConfig()\n    dkd: DkdConfig"),
    )
    for name in ("params.yaml", "recipes/digits.yaml"):
        edit(copied / name, ("    dkd:\n", "    cosine:\n      weight: 2.0\n    dkd:\n"))
    assert "params.yaml: correct" in python(copied, "-m", "stages.check")
    done = tiny.dvc(copied, "repro", "distill@cosine+gl")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    curves = (copied / "reports" / "curves" / "cosine+gl.csv").read_text()
    assert "cosine" in curves.splitlines()[0].split(",")
    python(copied, *HOUSE, "-k", "dependencies or docstring or key_a_stage_reads or section")
    python(
        copied,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_methods.py",
        "-k",
        "cosine",
    )


def test_a_data_source_is_a_file_and_a_row(tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    own = {"source": "arrays", "path": "mine.npz", "val": 0.2, "test": 0.2, "student_labels": "all"}
    tiny.copy(copied, "tests", prepare=own)
    (copied / "pipeline" / "prepare" / "sources" / "arrays.py").write_text(ARRAYS)
    edit(
        copied / "pipeline" / "prepare" / "settings.py",
        (
            "from pipeline.prepare.sources import cifar",
            "from pipeline.prepare.sources import arrays, cifar",
        ),
        (
            '    "digits": digits.read,\n',
            '    "digits": digits.read,\n    "arrays": arrays.read,\n',
        ),
    )
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (60, 12, 12, 3), np.uint8), np.arange(60) % 3
    np.savez(copied / "mine.npz", x=x, y=y)
    told = python(copied, "-m", "stages.prepare", "data/prepared")
    assert "3 classes" in told
    index = json.loads((copied / "data" / "prepared" / "index.json").read_text())
    assert index["classes"] == ["class 0", "class 1", "class 2"]
    images = np.load(copied / "data" / "prepared" / "images.npy")
    assert images.shape == (60, 32, 32, 3)
    python(copied, *HOUSE, "-k", "dependencies or docstring")


def test_a_target_is_a_folder_and_a_row_in_two_tables(tmp_path: Path, exported: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    tiny.copy(copied, "tests", bench={"enabled": ["ort-fp32", "reference-fp32"]})
    folder = copied / "exporters" / "reference"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""ONNX\'s reference implementation."""\n')
    (folder / "runtime.py").write_text(REFERENCE)
    edit(
        copied / "exporters" / "artifact" / "session.py",
        (
            '        Target("ov-fp32"',
            '        Target("reference-fp32", "reference", "fp32", "{model}.onnx"),\n'
            '        Target("ov-fp32"',
        ),
    )
    edit(
        copied / "exporters" / "open.py",
        (
            "from exporters.trt.runtime",
            "from exporters.reference.runtime import REFERENCE\nfrom exporters.trt.runtime",
        ),
        ("OV, RTX, TRT)", "OV, RTX, TRT, REFERENCE)"),
    )
    built, told = tmp_path / "built", tmp_path / "bench.json"
    target = ("--target", "reference-fp32")
    python(copied, "-m", "stages.build", str(exported), str(built), *target)
    parity = json.loads((built / "parity.json").read_text())
    assert {row["verdict"] for row in parity["rows"]} == {"PASS"}
    python(copied, "-m", "stages.bench", str(exported), str(built), str(told), *target)
    rows = json.loads(told.read_text())["rows"]
    assert [row["status"] for row in rows] == ["measured", "measured"]
    assert rows[0]["runtime"].startswith("onnx reference")
    python(copied, *HOUSE, "-k", "dependencies or docstring")
