"""What a figure was measured on: the machine, the same on every run, and the conditions of the moment."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipeline import files

ROOT = Path("/")
TOOL_SECONDS = 5.0  # for the first line of a tool that never ends
RUNTIMES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13")
ISA = {  # name in the report -> the kernel's names for it, x86 `flags` and Arm `Features`
    "avx2": ("avx2",),
    "avx_vnni": ("avx_vnni",),
    "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile",),
    "neon": ("neon", "asimd"),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "sve": ("sve",),
}


def machine(root: Path = ROOT) -> dict[str, Any]:
    """The machine block of every JSON: identity only, the same bytes on a second run.

    No load, clock or time: reports/device.json keys builds and latencies by it. `root` is where /proc
    and /sys are looked up. `cores.usable` respects affinity and the cgroup's quota; memory in 1e9 bytes.
    """
    cpu = _cpuinfo(root)
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": _cpu_name(cpu),
        "isa": [name for name, kernel in ISA.items() if flags.intersection(kernel)],
        "cores": {"logical": os.cpu_count() or 1, "usable": usable_cores(root)},
        "memory_gb": _memory_gb(root),
        "os": platform.system(),
        "arch": platform.machine(),
        "board": _text(root / "proc/device-tree/model"),  # "NVIDIA Jetson Orin Nano ...", else null
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **files.versions(("numpy", *RUNTIMES))},
    }


def conditions(root: Path = ROOT) -> dict[str, Any]:
    """The moment of a measurement: time, kernel, load, limits of the cgroup, governor, clocks, power, throttling.

    On a Jetson the power mode is nvpmodel's, clock, power and temperature are the first line of tegrastats.
    """
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    khz = _text(frequency / "scaling_cur_freq")
    mhz = float(khz) / 1000 if khz else float(_cpuinfo(root).get("cpu MHz", "nan"))
    load = _text(root / "proc/loadavg")
    clock = _nvidia_smi("clocks.sm")
    gpu_mhz = int(clock[0][0]) if clock and clock[0][0].isdigit() else None
    jetson = _tegrastats()
    quotas = [q for folder in _cgroups(root) if (q := _quota(folder)) is not None]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "load_1m": float(load.split()[0]) if load else None,
        "governor": _text(frequency / "scaling_governor"),
        "cpu_mhz": None if math.isnan(mhz) else round(mhz),
        "gpu_mhz": jetson["gpu_mhz"] if gpu_mhz is None else gpu_mhz,
        "throttled": _throttled(root),
        "cpu_quota": min(quotas, default=None),
        "memory_limit_gb": _memory_limit_gb(root),
        "power_mode": _power_mode(),
        "power_w": jetson["power_w"],
        "celsius": jetson["celsius"],
    }


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use: the affinity mask, cut to whole cores of the cgroup's CPU quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [q for folder in _cgroups(root) if (q := _quota(folder)) is not None]
    return max(1, min([count, *(int(q) for q in quotas)]))


def _cgroups(root: Path) -> list[Path]:
    """Our cgroup and its ancestors, v2 or the cpu controller of v1, where their files may lie."""
    found: list[Path] = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = base / name.lstrip("/")
        found += [own, *(p for p in own.parents if p.is_relative_to(base))]
    return found


def _quota(cgroup: Path) -> float | None:
    """CPU quota of one cgroup in cores, None without one."""
    v2 = (_text(cgroup / "cpu.max") or "").split()
    v1 = [_text(cgroup / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = v2 if len(v2) == 2 else v1
    if quota in (None, "max") or period is None or float(quota) <= 0:
        return None
    return float(quota) / float(period)


def _memory_limit_gb(root: Path) -> float | None:
    """The tightest memory limit of our cgroups in 1e9 bytes; None without one."""
    texts = (_text(folder / "memory.max") for folder in _cgroups(root))
    limits = [int(text) for text in texts if text and text.isdigit()]
    return round(min(limits) / 1e9, 2) if limits else None


def _throttled(root: Path) -> int | None:
    """How many periods the CPU quota has stopped this cgroup so far, None where it is not counted."""
    for folder in _cgroups(root):
        for line in (_text(folder / "cpu.stat") or "").splitlines():
            if line.startswith("nr_throttled "):
                return int(line.split()[1])
    return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first value of each key in /proc/cpuinfo."""
    pairs = (
        line.split(":", 1)
        for line in (_text(root / "proc/cpuinfo") or "").splitlines()
        if ":" in line
    )
    found: dict[str, str] = {}
    for key, value in pairs:
        found.setdefault(key.strip(), value.strip())
    return found


def _cpu_name(cpu: dict[str, str]) -> str:
    """The model name; where Arm gives none, implementer and part, which name the core (0x41 0xd42: A78AE)."""
    if "model name" in cpu:
        return cpu["model name"]
    if "CPU part" in cpu:
        return f"Arm implementer {cpu.get('CPU implementer', '?')} part {cpu['CPU part']}"
    return platform.processor() or platform.machine()


def _memory_gb(root: Path) -> float | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) * 1024 / 1e9, 1)
    return None


def _gpu() -> dict[str, Any] | None:
    """Name and driver of the first NVIDIA GPU, and how many there are; None without one."""
    rows = _nvidia_smi("name,driver_version")
    return {"name": rows[0][0], "driver": rows[0][1], "count": len(rows)} if rows else None


def _nvidia_smi(query: str) -> list[list[str]]:
    """A row of values per GPU, no rows where nvidia-smi is absent or finds no device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[v.strip() for v in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == query.count(",") + 1]


def _power_mode() -> str | None:
    """A Jetson's power mode as `nvpmodel -q` names it: `15W`; None elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    named = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    return named[1] if named else None


def _tegrastats() -> dict[str, Any]:
    """`gpu_mhz`, `power_w` of the board, `celsius` of the GPU from one line of tegrastats; None where untold."""
    line = _first_line("tegrastats", "--interval", "100")
    clock = re.search(r"GR3D_FREQ \d+%@\[?(\d+)", line)
    power = re.search(r"(?:VDD_IN|POM_5V_IN) (\d+)(?:mW)?/", line)
    heat = re.search(r"gpu@(-?[\d.]+)C", line, re.IGNORECASE)
    return {
        "gpu_mhz": int(clock[1]) if clock else None,
        "power_w": int(power[1]) / 1000 if power else None,
        "celsius": float(heat[1]) if heat else None,
    }


def _first_line(name: str, *options: str) -> str:
    """What a tool that never ends says first; empty where it is absent or silent for TOOL_SECONDS."""
    tool = shutil.which(name)
    if tool is None:
        return ""
    try:
        with subprocess.Popen([tool, *options], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            deadline = threading.Timer(TOOL_SECONDS, process.kill)
            deadline.start()
            line = process.stdout.readline()
            deadline.cancel()
            process.kill()
    except OSError:
        return ""
    return line


def _text(path: Path) -> str | None:
    """A small kernel file's text without padding, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None
