"""The torch targets: compiled or eager the same answers, and the counts that a checkpoint's row carries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporters.artifact import inputs
from exporters.artifact.session import TARGETS
from exporters.open import open_session


def test_a_checkpoint_counts_as_its_export_says(exported: Path) -> None:
    session = open_session(TARGETS["torch-eager"], exported / "student.safetensors", 1)
    told = json.loads((exported / "export.json").read_text())["models"]["student"]
    counted = getattr(session, "counted")  # noqa: B009  # no part of the common interface
    assert counted == {key: told[key] for key in ("params", "macs")}
    assert session.runtime.endswith(" eager")


@pytest.mark.slow  # Inductor compiles C++ for a minute
def test_compiled_it_answers_as_eager(exported: Path) -> None:
    checkpoint = exported / "student.safetensors"
    eager, compiled = (
        open_session(TARGETS[f"torch-{k}"], checkpoint, 1) for k in ("eager", "compile")
    )
    x = inputs.smooth(2, *eager.input_shape[2:])
    assert np.abs(eager.run(x) - compiled.run(x)).max() < 1e-4 * np.abs(eager.run(x)).max()
    assert compiled.runtime.endswith(" compile")
