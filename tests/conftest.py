"""Shared fixtures: a small prepared folder of real digits, built once a session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import Prepare, prepare

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/prepared of the digits: 1,297 train, 100 val, 400 test, 32 px, 5 student labels a class."""
    folder = tmp_path_factory.mktemp("digits") / "prepared"
    prepare(Prepare("digits", image_size=32, student_labels=5, val=100, test=400), folder)
    return folder


@pytest.fixture(scope="session")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/export of an untrained student and teacher that react to their input, 10 classes at 32 px.

    Random weights alone answer every image alike; four train-mode passes give the batch norms real statistics.
    """
    import torch

    from exporters.inputs import smooth
    from pipeline import models

    folder = tmp_path_factory.mktemp("exported")
    for role, name, kwargs in (
        ("student", "test_resnet", {"channels": [8, 12, 16, 24], "output_stride": 8}),
        ("teacher", "test_vit", {"img_size": 32, "patch_size": 4}),
    ):
        torch.manual_seed(0)
        model = models.create(name, kwargs, 10)
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = None
        with torch.no_grad():
            for _ in range(4):
                model.train()(torch.from_numpy(smooth(16, 32, 32)))
        description = {
            "model": name,
            "kwargs": kwargs,
            "num_classes": 10,
            "classes": [f"digit {i}, drawn" for i in range(10)],
            "preprocess": models.preprocessing(model, 32),
            "role": role,
            "method": "cakd",
        }
        models.save(folder / f"{role}.safetensors", model, description)
    params = folder / "params.yaml"
    params.write_text("export:\n  method: cakd\n  reference_images: 64\n  calibration_images: 96\n")
    paths = [folder / "student.safetensors", folder / "teacher.safetensors", digits, folder / "out"]
    command = [sys.executable, "-m", "stages.export", *map(str, paths), "--params", str(params)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout + done.stderr)
    return folder / "out"
