"""What a figure was measured on: the machine, the same on every run, and the conditions of the moment."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipeline.core import artifacts

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
    cpu = cpuinfo(root)
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "cpu": _cpu_name(cpu),
        "isa": [name for name, kernel in ISA.items() if flags.intersection(kernel)],
        "cores": {"logical": os.cpu_count() or 1, "usable": usable_cores(root)},
        "memory_gb": _memory_gb(root),
        "os": platform.system(),
        "arch": platform.machine(),
        "board": read_text(
            root / "proc/device-tree/model"
        ),  # "NVIDIA Jetson Orin Nano ...", else null
        "gpu": _gpu(),
        "versions": {
            "python": platform.python_version(),
            **artifacts.versions(("numpy", *RUNTIMES)),
        },
    }


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use: the affinity mask, cut to whole cores of the cgroup's CPU quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [q for folder in cgroups(root) if (q := quota(folder)) is not None]
    return max(1, min([count, *(int(q) for q in quotas)]))


def cgroups(root: Path) -> list[Path]:
    """Our cgroup and its ancestors, v2 or the cpu controller of v1, where their files may lie."""
    found: list[Path] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = base / name.lstrip("/")
        found += [own, *(p for p in own.parents if p.is_relative_to(base))]
    return found


def quota(cgroup: Path) -> float | None:
    """CPU quota of one cgroup in cores, None without one."""
    v2 = (read_text(cgroup / "cpu.max") or "").split()
    v1 = [read_text(cgroup / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = v2 if len(v2) == 2 else v1
    if quota in (None, "max") or period is None or float(quota) <= 0:
        return None
    return float(quota) / float(period)


def cpuinfo(root: Path) -> dict[str, str]:
    """The first value of each key in /proc/cpuinfo."""
    pairs = (
        line.split(":", 1)
        for line in (read_text(root / "proc/cpuinfo") or "").splitlines()
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
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) * 1024 / 1e9, 1)
    return None


def _gpu() -> dict[str, Any] | None:
    """Name and driver of the first NVIDIA GPU, and how many there are; None without one."""
    rows = nvidia_smi("name,driver_version")
    return {"name": rows[0][0], "driver": rows[0][1], "count": len(rows)} if rows else None


def nvidia_smi(query: str) -> list[list[str]]:
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


def read_text(path: Path) -> str | None:
    """A small kernel file's text without padding, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None
