"""The engine's own time: events around each run of a stand-in TensorRT, with a CUDA graph and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.trt import convert
from exporters.trt.build import Options
from exporters.trt.session import TrtSession
from tests.fake_jetson import RUN_MS
from tests.fake_tensorrt import LARGEST, Fake
from tests.test_trt_full import network


@pytest.fixture(params=["1", "0"], ids=["graph", "no graph"])
def session(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrtSession:
    Fake().install(monkeypatch)
    monkeypatch.setenv("CAKD_CUDA_GRAPH", request.param)
    source = network(tmp_path / "net.onnx", "Relu")
    plan, _ = convert.build_plan(
        source, tmp_path / "net.plan", "fp32", "tensorrt", Options(shapes=(1, 1, LARGEST))
    )
    return TrtSession(plan)


def test_every_call_tells_its_own_time_and_answers_as_without_a_clock(
    session: TrtSession,
) -> None:
    x = np.ones((1, 3, 8, 8), np.float32)
    for _ in range(3):
        assert session.run(x).tolist() == [[1.0, 2.0, 3.0, 4.0]]
        assert session.engine_ms() == RUN_MS  # the copies are left out
    assert session.engine_ms() == 0.0  # nothing ran since


def test_the_parts_of_a_batch_above_the_plans_largest_are_added(session: TrtSession) -> None:
    x = np.ones((2 * LARGEST + 1, 3, 8, 8), np.float32)
    session.run(x)
    assert session.engine_ms() == 3 * RUN_MS  # without the runs before a capture
    session.run(x)
    assert session.engine_ms() == 3 * RUN_MS
