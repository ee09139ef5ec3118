"""Shared fixtures: a small prepared folder of real digits, built once a session."""

from __future__ import annotations

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
