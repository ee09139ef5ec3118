"""The machine block is stable and true; the conditions are of the moment. /proc and /sys are folders here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporters.bench import conditions
from pipeline.core import machine

ROOT = Path(__file__).parents[1]


def write(root: Path, **text: str) -> Path:
    """Files below `root`; `__` in a name stands for `/`."""
    for name, content in text.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def nvidia_smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_stage_writes_the_same_bytes_twice_and_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('stages.device', run_name='__main__')"
    for name in ("a.json", "b.json"):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(tmp_path / name))
    first = (tmp_path / "a.json").read_bytes()
    assert first == (tmp_path / "b.json").read_bytes()
    written = json.loads(first)
    assert written["schema"] == "cakd.device/1"
    assert written["machine"]["versions"]["torch"] is not None  # read from its metadata


def test_machine_names_cpu_isa_memory_and_board_of_an_arm_box(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__cpuinfo="Features : fp asimd asimddp i8mm\nCPU implementer : 0x41\nCPU part : 0xd42\n",
        proc__meminfo="MemTotal:        8000000 kB\nMemFree: 1 kB\n",
    )
    (root / "proc/device-tree").mkdir()
    (root / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    block = machine.machine(root)
    assert block["cpu"] == "Arm implementer 0x41 part 0xd42"
    assert block["isa"] == ["neon", "dotprod", "i8mm"]
    assert block["memory_gb"] == 8.2
    assert block["board"] == "NVIDIA Jetson Orin Nano Developer Kit"


def test_machine_lists_the_x86_extensions_that_matter(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__cpuinfo="model name : Some CPU\nflags : fpu avx2 avx512f avx512_vnni amx_tile\n",
    )
    block = machine.machine(root)
    assert block["cpu"] == "Some CPU"
    assert block["isa"] == ["avx2", "avx512f", "avx512_vnni", "amx"]


def test_an_empty_proc_is_described_with_nulls(tmp_path: Path) -> None:
    block = machine.machine(tmp_path)
    assert block["memory_gb"] is None and block["board"] is None and block["isa"] == []
    assert block["cpu"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc__self__cgroup": "0::/job\n", "sys__fs__cgroup__job__cpu.max": "max 100000"}, 8),
        ({"proc__self__cgroup": "0::/job\n", "sys__fs__cgroup__job__cpu.max": "250000 100000"}, 2),
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__cpu.max": "300000 100000"}, 3),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "50000 100000"}, 1),
        (
            {
                "proc__self__cgroup": "4:memory:/m\n1:cpu,cpuacct:/job\n",
                "sys__fs__cgroup__cpu__job__cpu.cfs_quota_us": "400000",
                "sys__fs__cgroup__cpu__job__cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc__self__cgroup": "1:cpu:/\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_usable_cores_are_cut_by_the_cgroup_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.usable_cores(write(tmp_path, **files)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_usable_cores_follow_the_affinity_mask() -> None:
    code = (
        "import os; from pipeline.core.machine import usable_cores;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_gpu_is_named_with_its_driver_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, "printf 'NVIDIA L4, 570.86.15\\nNVIDIA L4, 570.86.15\\n'", monkeypatch)
    gpu = machine.machine(tmp_path)["gpu"]
    assert gpu == {"name": "NVIDIA L4", "driver": "570.86.15", "count": 2}


@pytest.mark.parametrize("body", ["echo 'No devices were found'", "exit 9", "printf ''"])
def test_a_driver_without_a_device_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    nvidia_smi(tmp_path, body, monkeypatch)
    assert machine.machine(tmp_path)["gpu"] is None


def test_conditions_tell_load_governor_clock_and_throttling(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__loadavg="3.25 1.00 0.50 1/90 1\n",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="powersave\n",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq="1800000\n",
        proc__self__cgroup="0::/job\n",
        **{"sys__fs__cgroup__job__cpu.stat": "usage_usec 5\nnr_throttled 7\n"},
    )
    told = conditions.conditions(root)
    assert (told["load_1m"], told["governor"], told["cpu_mhz"]) == (3.25, "powersave", 1800)
    assert told["throttled"] == 7
    assert told["time"].endswith("+00:00")


def tool(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "RAM 2448/7620MB CPU [5%@1510,2%@1510] GR3D_FREQ 12%@[624] cpu@48C gpu@46.5C VDD_IN 4998mW/5000mW",
            (624, 4.998, 46.5),
        ),
        ("RAM 1/3964MB GR3D_FREQ 0%@76 PLL@31C GPU@-2C POM_5V_IN 1540/1540", (76, 1.54, -2.0)),
        ("RAM 1/3964MB GR3D_FREQ 0% no clocks here", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_a_jetson_tells_its_power_mode_clock_power_and_heat(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    told: tuple[int | None, float | None, float | None],
) -> None:
    tool(tmp_path, "tegrastats", f"echo '{line}'; exec sleep 60", monkeypatch)
    tool(tmp_path, "nvpmodel", "printf 'NV Power Mode: MAXN_SUPER\n2\n'", monkeypatch)
    found = conditions.conditions(tmp_path)
    assert (found["gpu_mhz"], found["power_w"], found["celsius"]) == told
    assert found["power_mode"] == "MAXN_SUPER"


def test_a_silent_or_broken_tool_of_the_board_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "TOOL_SECONDS", 0.2)
    tool(tmp_path, "tegrastats", "exec sleep 60", monkeypatch)
    tool(tmp_path, "nvpmodel", "echo 'NVPM ERROR: no permission'; exit 1", monkeypatch)
    began = time.monotonic()
    found = conditions.conditions(tmp_path)
    assert time.monotonic() - began < 10
    assert (found["gpu_mhz"], found["power_w"], found["power_mode"]) == (None, None, None)


def test_conditions_tell_the_tightest_limits_of_the_cgroups(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        proc__self__cgroup="0::/box/job\n",
        **{
            "sys__fs__cgroup__box__cpu.max": "150000 100000",
            "sys__fs__cgroup__box__memory.max": "2000000000\n",
            "sys__fs__cgroup__box__job__cpu.max": "max 100000",
            "sys__fs__cgroup__box__job__memory.max": "max\n",
        },
    )
    told = conditions.conditions(root)
    assert (told["cpu_quota"], told["memory_limit_gb"]) == (1.5, 2.0)


def test_conditions_of_a_bare_box_are_nulls(tmp_path: Path) -> None:
    told = conditions.conditions(tmp_path)
    assert {key for key, value in told.items() if value is not None} == {"time", "kernel"}
    json.dumps(told, allow_nan=False)
