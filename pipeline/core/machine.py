"""The machine that figures are measured on, as a block of every JSON."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipeline.core import artifacts

ROOT = Path("/")
TOOL_SECONDS = 5.0  # for the first line of a tool that does not end by itself
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
    """Describe this machine: identity only, the same bytes on a second run.

    No load, clock or time: DVC re-runs builds and benches where reports/device.json changes. `root` is where /proc
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
        # "NVIDIA Jetson Orin Nano ..."; null on a PC
        "board": read_text(root / "proc/device-tree/model"),
        "gpu": _gpu(),
        "versions": {
            "python": platform.python_version(),
            **artifacts.versions(("numpy", *RUNTIMES)),
        },
    }


def usable_cores(root: Path = ROOT) -> int:
    """Count the cores this process may use: affinity mask and CPU quota of the cgroup, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [q for folder in cgroups(root) if (q := quota(folder)) is not None]
    return max(1, min([count, *(int(q) for q in quotas)]))


def cgroups(root: Path) -> list[Path]:
    """List the folders of this process's cgroup and its ancestors, v2 or the cpu controller of v1."""
    folders: list[Path] = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = base / name.lstrip("/")
        folders += [own, *(p for p in own.parents if p.is_relative_to(base))]
    return folders


def quota(cgroup: Path) -> float | None:
    """Read the CPU quota of one cgroup in cores; None without one."""
    v2 = (read_text(cgroup / "cpu.max") or "").split()
    v1 = [read_text(cgroup / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = v2 if len(v2) == 2 else v1
    if quota in (None, "max") or period is None or float(quota) <= 0:
        return None
    return float(quota) / float(period)


def cpuinfo(root: Path) -> dict[str, str]:
    """Read the first value of each key in /proc/cpuinfo."""
    pairs = (
        line.split(":", 1)
        for line in (read_text(root / "proc/cpuinfo") or "").splitlines()
        if ":" in line
    )
    values: dict[str, str] = {}
    for key, value in pairs:
        values.setdefault(key.strip(), value.strip())
    return values


def _cpu_name(cpu: dict[str, str]) -> str:
    """Name the CPU; on Arm, which gives no name, by implementer and part (0x41 0xd42 is a Cortex-A78AE)."""
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
    """Ask nvidia-smi: a row of values per GPU; no rows where the tool is absent or finds no device."""
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
    """Read a small kernel file without its padding; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None
