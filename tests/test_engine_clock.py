"""The engine's own time: events around each run of a stand-in TensorRT, with a CUDA graph and without."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporters.trt import convert, driver
from exporters.trt.build import Options
from exporters.trt.clock import ClockedSession
from tests.fake_tensorrt import GPU, LARGEST, Fake
from tests.test_trt_full import network


class Event:
    """A CUDA event on a clock that each run of the engine moves by 0.25 ms."""

    def __init__(self, fake: Fake, enable_timing: bool) -> None:
        assert enable_timing
        self.fake = fake

    def record(self, stream: Any) -> None:
        assert stream.cuda_stream == 1
        self.at = 0.25 * (self.fake.count("replay") + self.fake.count("execute"))

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture(params=["1", "0"], ids=["graph", "no graph"])
def session(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ClockedSession:
    fake = Fake()
    events = SimpleNamespace(Event=lambda enable_timing: Event(fake, enable_timing))
    monkeypatch.setattr(fake.torch.cuda, "Event", events.Event, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.tensorrt)
    monkeypatch.setitem(sys.modules, "torch", fake.torch)
    monkeypatch.setattr(driver, "device", lambda: GPU)
    monkeypatch.setenv("CAKD_CUDA_GRAPH", request.param)
    source = network(tmp_path / "net.onnx", "Relu")
    plan, _ = convert.make(
        source, tmp_path / "net.plan", "fp32", "tensorrt", Options(shapes=(1, 1, LARGEST))
    )
    return ClockedSession(plan)


def test_every_call_tells_its_own_time_and_answers_as_without_a_clock(
    session: ClockedSession,
) -> None:
    x = np.ones((1, 3, 8, 8), np.float32)
    for _ in range(3):
        assert session.run(x).tolist() == [[1.0, 2.0, 3.0, 4.0]]
        assert session.engine_ms() == 0.25
    assert session.engine_ms() == 0.0  # nothing ran since


def test_the_parts_of_a_batch_above_the_plans_largest_are_added(session: ClockedSession) -> None:
    x = np.ones((2 * LARGEST + 1, 3, 8, 8), np.float32)
    session.run(x)
    session.engine_ms()  # the first calls of both batch sizes
    session.run(x)
    assert session.engine_ms() == 0.75
