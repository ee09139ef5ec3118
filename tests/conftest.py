"""Shared fixtures: prepared digits, a small quickly trained teacher, its feature store, made once a run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data.prepared import Prepared
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from tests import artefacts, command_line, tiny
from tests.shared import Shared

ROOT = Path(__file__).parents[1]
CROP_PCT = 0.9  # of the exported networks
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CNN = {"channels": [8, 12, 16, 24], "output_stride": 8}
LONG = (  # the longest first: of `make test-ci`, then of `make test`
    *("test_workflow", "test_store_accidents", "test_repro", "test_contributing", "test_documents"),
    *("test_compute", "test_chaos", "test_recipes"),
    *(
        "test_quantize",
        "test_training",
        "test_methods",
        "test_bundle",
        "test_schemas",
        "test_bench",
    ),
    *("test_store", "test_stages", "test_ort", "test_kernels_proof", "test_kernels_ops"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that at the end no worker waits for another."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Once]:
    """`once("digits", make)`: the folder that `make` filled, for all workers; tests only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = Shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once")
    yield shared.folder
    shared.refuse_changes()


@pytest.fixture(scope="session")
def digits(once: Once) -> Path:
    """data/prepared of the digits: 1,297 train, 100 val, 400 test, 32 px, 5 student labels a class."""

    def make(folder: Path) -> None:
        config = Prepare("digits", image_size=32, student_labels=5, val=100, test=400)
        prepare(config, folder / "prepared")

    return once("digits", make) / "prepared"


@pytest.fixture(scope="session")
def prepared(digits: Path) -> Prepared:
    """The digits, opened."""
    return Prepared.open(digits)


@pytest.fixture(scope="session")
def teacher_path(prepared: Prepared, once: Once) -> Path:
    """A ViT of width 32 after two epochs on the digits: its features react to its input."""

    def make(folder: Path) -> None:
        from pipeline import teach

        config = teach.Teach("vit_tiny_patch16_224", kwargs=VIT, epochs=2)
        teach.teach(config, prepared, folder / "teacher", folder / "work")

    return once("teacher", make) / "teacher" / "teacher.safetensors"


@pytest.fixture(scope="session")
def features(prepared: Prepared, teacher_path: Path, once: Once) -> Path:
    """The teacher's store: 2 float32 views an image, three shards."""

    def make(folder: Path) -> None:
        from pipeline.models import teacher
        from pipeline.store import policy, writing

        cache = policy.Cache(dtype="float32", views=2, shard_mb=9)
        live = teacher.load(teacher_path)
        out, work = folder / "store", folder / "work"
        writing.write(cache, prepared, live, out, work, lambda _: None)

    return once("features", make) / "store"


@pytest.fixture(scope="session")
def finished_run(once: Once) -> Path:
    """A run of the whole chain from an empty cache, in a folder with a space, as tests/tiny.py sets it."""

    def make(folder: Path) -> None:
        tiny.copy(folder)
        done = tiny.dvc(folder, "repro")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

    return once("finished run", make)


@pytest.fixture(scope="session")
def exported(digits: Path, once: Once) -> Path:
    """artifacts/export of an untrained student and teacher that react to their input, 10 classes at 32 px."""
    return once("exported", lambda folder: export(digits, folder)) / "out"


def export(digits: Path, folder: Path) -> None:
    """Checkpoints of both networks, params.yaml, and what `stages.export` makes of them."""
    from benchmarks.exporters import reactive
    from pipeline.models import checkpoint

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
        path = folder / "students" / "cakd" if role == "student" else folder
        checkpoint.save(path / f"{role}.safetensors", model, description)
    params = folder / "params.yaml"
    params.write_text(
        "export:\n  method: cakd\n  reference_images: 64\n  calibration_images: 96\n"
        f"evaluate:\n  crop_pct: {CROP_PCT}\n"
    )
    selection = folder / "selection.json"
    selection.write_text(json.dumps(artefacts.selection("cakd")))
    (folder / "quantized").mkdir()
    models = [folder / "students", selection, folder / "quantized", folder / "teacher.safetensors"]
    paths = [*models, digits, folder / "out"]
    done = command_line.process("stages.export", *paths, "--params", params)
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("exporters.ort", ...)`: a module of ours as a command line, in this process.

    `real=True` runs it as a process of its own, `torch=False` as one in which torch is blocked.
    """

    def run(
        *argv: object, torch: bool = True, real: bool = False
    ) -> subprocess.CompletedProcess[str]:
        if real or not torch:
            return command_line.process(*argv, torch=torch)
        return command_line.here(*argv)

    return run


@pytest.fixture(scope="session")
def light() -> Path:
    """Someone else's ONNX: the onnx wheel's ResNet-50, opset 9, batch fixed at 1, constant weights."""
    import onnx

    return Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx"


@pytest.fixture(scope="session")
def damaged(exported: Path, once: Once) -> Path:
    """student.onnx with half a standard deviation of noise on the weights of its last layer."""

    def make(folder: Path) -> None:
        import numpy as np
        import onnx

        proto = onnx.load(exported / "student.onnx")
        weight = next(w for w in proto.graph.initializer if len(w.dims) == 2)
        values = onnx.numpy_helper.to_array(weight)
        noise = np.random.default_rng(0).standard_normal(values.shape) * values.std() / 2
        wrong = (values + noise).astype(np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(wrong, weight.name))
        onnx.save(proto, folder / "damaged.onnx")

    return once("damaged", make) / "damaged.onnx"
