"""Energy by RAPL and tegrastats, both made for the test: counters in a folder, a tool that is a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporters.bench import energy, measure
from exporters.bench.latency import Block
from pipeline.report import page as report_page
from pipeline.report.page import markdown
from tests.test_bench import player, rows_of, subject  # noqa: F401 - the fixture
from tests.test_device import tool
from tests.test_report import (
    Run,
    cells,
    change_row,
    run,  # noqa: F401 - the fixture
    summary,
)
from tests.test_schemas import problems

RANGE = 65_712_999_613  # microjoules
NO_TEGRASTATS = "tegrastats: not there"


def powercap(root: Path, zones: dict[str, str]) -> Path:
    """A powercap folder with these zones and their names, each at 1 J."""
    for zone, name in zones.items():
        folder = root / energy.POWERCAP / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (folder / "energy_uj").write_text("1000000\n")
    return root


def two_packages(root: Path) -> Path:
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core"}
    return powercap(root, {**zones, "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0"})


def count(root: Path, zone: str, microjoules: int) -> None:
    """Set a counter, whole for whoever reads it meanwhile."""
    path = root / energy.POWERCAP / zone / "energy_uj"
    path.with_suffix(".new").write_text(f"{microjoules}\n")
    path.with_suffix(".new").replace(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds that the meters read."""
    now = [100.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_power_is_that_of_all_packages_and_of_nothing_twice(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    meter = energy.Rapl(two_packages(tmp_path))
    meter.begin()
    for zone, used in {"0": 3, "1": 5, "0:0": 100, "2": 100}.items():
        count(tmp_path, f"intel-rapl:{zone}", 1_000_000 + 1_000_000 * used)
    count(tmp_path, "intel-rapl-mmio:0", 99_000_000)
    clock(0.5)
    assert meter.watts() == 16.0


def test_a_counter_that_wraps_goes_on(tmp_path: Path, clock: Callable[[float], None]) -> None:
    meter = energy.Rapl(two_packages(tmp_path))
    count(tmp_path, "intel-rapl:0", RANGE - 1_500_000)
    meter.begin()
    count(tmp_path, "intel-rapl:0", 500_000)
    clock(2.0)
    assert meter.watts() == 1.0


def test_counters_that_stand_still_or_vanish_are_no_figure(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    meter = energy.Rapl(two_packages(tmp_path))
    clock(1.0)
    assert meter.watts() is None
    (tmp_path / energy.POWERCAP / "intel-rapl:1/energy_uj").write_text("")
    assert meter.watts() is None
    meter.begin()
    count(tmp_path, "intel-rapl:1", 5)
    assert meter.watts() is None


def endless(root: Path, _: pytest.MonkeyPatch) -> None:
    for path in (two_packages(root) / energy.POWERCAP).glob("*/max_energy_range_uj"):
        path.write_text("0\n")


def locked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters as the kernel makes them, for a process that is not root."""
    real = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    two_packages(root)
    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root, _: None, "RAPL: /sys/class/powercap: not there"),
        (
            lambda root, _: powercap(root, {"intel-rapl:0": "psys", "dtpm": "package-0"}),
            "RAPL: /sys/class/powercap: no package domain",
        ),
        (
            endless,
            "RAPL: /sys/class/powercap: not readable "
            "(max_energy_range_uj: got [0, 0]; expected above 0)",
        ),
        (locked, "RAPL: /sys/class/powercap/intel-rapl:0/energy_uj: not readable without root"),
        (
            lambda root, _: (
                two_packages(root) / energy.POWERCAP / "intel-rapl:0/energy_uj"
            ).write_text("?"),
            "RAPL: /sys/class/powercap: not readable (invalid literal for int() with base 10: '?')",
        ),
    ],
)
def test_a_machine_without_a_meter_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, reason: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spoil(tmp_path, monkeypatch)
    meter = energy.find_meter(tmp_path)
    assert meter.reason == f"{reason}; {NO_TEGRASTATS}"
    meter.measure_idle()
    assert meter.idle_watts is None and meter.watts() is None
    meter.close()
    told = energy.energy_of(meter, [Block([1.0], [1.0])], [None], False)
    assert told.pop("reason") == meter.reason and set(told.values()) == {None}


def test_a_jetson_is_read_by_tegrastats_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'for mw in 9000 4000; do echo "GR3D_FREQ 0% VDD_IN ${mw}mW/1mW"; sleep 0.2; done; exec sleep 60'
    tool(tmp_path, "tegrastats", body, monkeypatch)
    meter = energy.find_meter(tmp_path)
    assert isinstance(meter, energy.Tegrastats) and meter.sees_gpu
    assert meter.watts() == 9.0
    meter.begin()
    assert meter.watts() is None  # no line yet
    deadline = time.monotonic() + 10
    while meter.watts() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert meter.watts() == 4.0
    meter.close()
    assert meter._process.poll() is not None and not meter._reader.is_alive()


@pytest.mark.parametrize("body", ["exec sleep 60", "echo 'RAM 1/2MB'", "exit 1"])
def test_a_tool_without_power_is_named_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setattr(energy, "TOOL_SECONDS", 0.3)
    tool(tmp_path, "tegrastats", body, monkeypatch)
    reason = energy.find_meter(tmp_path).reason
    assert reason and reason.endswith("tegrastats: no power of the board within 0.3 s")


def test_joules_are_the_power_of_the_blocks_that_were_read_times_the_time_of_a_call() -> None:
    meter = energy.Meter()
    meter.source, meter.idle_watts = "a meter", 5.0
    blocks = [Block([10.0] * 4, [1.0] * 4), Block([20.0] * 2, [1.0] * 2), Block([99.0], [1.0])]
    told = energy.energy_of(meter, blocks, [10.0, 30.0, None], False)
    assert (told["watts"], told["idle_watts"], told["reason"]) == (20.0, 5.0, None)
    assert told["joules_per_call"] == pytest.approx(20.0 * 0.080 / 6, rel=1e-3)
    told = energy.energy_of(meter, blocks, [None] * 3, False)
    assert told["reason"] == "a meter: no reading in any block" and told["watts"] is None
    meter.sees_gpu = False
    assert (
        energy.energy_of(meter, blocks, [1.0] * 3, True)["reason"] == "a meter: leaves out the GPU"
    )


@contextmanager
def drawing(root: Path, watts: float) -> Iterator[None]:
    """A package that draws so much, by its counter."""
    began, stop = time.monotonic(), threading.Event()

    def draw() -> None:
        while not stop.wait(0.002):
            count(root, "intel-rapl:0", 1_000_000 + int(1e6 * watts * (time.monotonic() - began)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_bench_row_has_the_energy_of_a_call_and_what_idle_power_is_of_it(
    player: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = two_packages(tmp_path / "root")
    monkeypatch.setattr(measure, "find_meter", lambda: energy.find_meter(root))
    with drawing(root, 10.0):
        row, gone = rows_of([subject(tmp_path, ""), subject(tmp_path, "unavailable")])
    assert gone["energy"] is None
    told = row["energy"]
    assert told["source"] == "RAPL, CPU package" and told["reason"] is None
    assert told["watts"] == pytest.approx(10.0, rel=0.3)
    assert told["idle_watts"] == pytest.approx(10.0, rel=0.3)
    assert told["joules_per_call"] >= 0.9 * told["watts"] * row["wall_ms"]["min"] / 1000


def test_the_report_shows_energy_with_its_idle_share_or_why_there_is_none(run: Run) -> None:  # noqa: F811
    before = problems(summary(run))
    nothing = dict.fromkeys(("source", "watts", "idle_watts", "joules_per_call"))
    told = {"source": "RAPL, CPU package", "watts": 20.0, "idle_watts": 15.0, "reason": None}
    change_row(run, "ort-fp32", energy={**told, "joules_per_call": 0.012345})
    change_row(run, "ov-fp32", energy={**nothing, "reason": "RAPL: not there"})
    edge = summary(run)
    assert problems(edge) == before
    text = markdown([edge]).partition("## Tail latency")[2]
    assert cells(text, "ort-fp32")[5] == "12.3 (75 % idle)"
    assert cells(text, "ov-fp32")[5] == "n/a"
    assert "Energy n/a: not in this file; RAPL: not there." in text
    page = report_page.page([edge])
    assert ">12.3 (75 % idle)<" in page and "n/a: not in this file; RAPL: not there." in page
    edge["targets"][1]["student"]["energy"]["watts"] = -1.0
    assert len(problems(edge)) > len(before)
