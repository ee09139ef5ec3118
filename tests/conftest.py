"""Shared fixtures: prepared digits, a small quickly trained teacher, its feature store, made once a session."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.prepared import Prepared
from pipeline.prepare.prepare import Prepare, prepare

ROOT = Path(__file__).parents[1]
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CNN = {"channels": [8, 12, 16, 24], "output_stride": 8}
LONG = ("test_workflow", "test_repro", "test_contributing", "test_chaos", "test_compute")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose few tests take minutes first, so that at the end no worker waits for another."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/prepared of the digits: 1,297 train, 100 val, 400 test, 32 px, 5 student labels a class."""
    folder = tmp_path_factory.mktemp("digits") / "prepared"
    prepare(Prepare("digits", image_size=32, student_labels=5, val=100, test=400), folder)
    return folder


@pytest.fixture(scope="session")
def prepared(digits: Path) -> Prepared:
    """The digits, opened."""
    return Prepared.open(digits)


@pytest.fixture(scope="session")
def teacher_path(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of width 32 after two epochs on the digits: its features react to its input."""
    from pipeline import teach

    config = teach.Teach("vit_tiny_patch16_224", kwargs=VIT, epochs=2)
    folder = tmp_path_factory.mktemp("teacher")
    teach.teach(config, prepared, folder / "teacher", folder / "work")
    return folder / "teacher" / "teacher.safetensors"


@pytest.fixture(scope="session")
def features(
    prepared: Prepared, teacher_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The teacher's store: 2 float32 views an image, three shards."""
    from pipeline.models import teacher
    from pipeline.store import policy, writing

    folder = tmp_path_factory.mktemp("features")
    cache = policy.Cache(dtype="float32", views=2, shard_mb=9)
    writing.write(
        cache,
        prepared,
        teacher.load(teacher_path),
        folder / "store",
        folder / "work",
        lambda _: None,
    )
    return folder / "store"


@pytest.fixture(scope="session")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/export of an untrained student and teacher that react to their input, 10 classes at 32 px."""
    from benchmarks.exporters import reactive
    from pipeline.models import checkpoint

    folder = tmp_path_factory.mktemp("exported")
    for role, name, kwargs in (
        ("student", "test_resnet", {"channels": [8, 12, 16, 24], "output_stride": 8}),
        ("teacher", "test_vit", {"img_size": 32, "patch_size": 4}),
    ):
        model = reactive(name, kwargs, 32)
        description = {
            "model": name,
            "kwargs": kwargs,
            "num_classes": 10,
            "classes": [f"digit {i}, drawn" for i in range(10)],
            "preprocess": checkpoint.preprocessing(model, 32),
            "role": role,
            "method": "cakd",
        }
        if role == "teacher":  # real pairs differ in normalisation: each must get its own
            description["preprocess"]["mean"] = [0.48, 0.45, 0.40]
        checkpoint.save(folder / f"{role}.safetensors", model, description)
    params = folder / "params.yaml"
    params.write_text("export:\n  method: cakd\n  reference_images: 64\n  calibration_images: 96\n")
    paths = [folder / "student.safetensors", folder / "teacher.safetensors", digits, folder / "out"]
    command = [sys.executable, "-m", "stages.export", *map(str, paths), "--params", str(params)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout + done.stderr)
    return folder / "out"


WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("exporters.ort", ...)`: a module of ours as a process; `torch=False` blocks torch in it."""

    def run(*argv: object, torch: bool = True) -> subprocess.CompletedProcess[str]:
        start = ["-m"] if torch else ["-c", WITHOUT_TORCH]
        line = [sys.executable, *start, *map(str, argv)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def light() -> Path:
    """Someone else's ONNX: the onnx wheel's ResNet-50, opset 9, batch fixed at 1, constant weights."""
    import onnx

    return Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx"


@pytest.fixture(scope="session")
def damaged(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student.onnx with half a standard deviation of noise on the weights of its last layer."""
    import numpy as np
    import onnx

    proto = onnx.load(exported / "student.onnx")
    weight = next(w for w in proto.graph.initializer if len(w.dims) == 2)
    values = onnx.numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).standard_normal(values.shape) * values.std() / 2
    wrong = (values + noise).astype(np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(wrong, weight.name))
    path = tmp_path_factory.mktemp("damaged") / "damaged.onnx"
    onnx.save(proto, path)
    return path
