"""Conditions during a measurement: load, clocks, power, throttling, memory limits."""

from __future__ import annotations

import math
import platform
import re
import shutil
import subprocess
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pipeline.core.machine import ROOT, TOOL_SECONDS, cgroups, cpuinfo, nvidia_smi, quota, read_text

# Of the whole board in a line of tegrastats, in mW: now, then the mean since its start.
BOARD_POWER = re.compile(r"(?:VDD_IN|POM_5V_IN) (\d+)(?:mW)?/")


def conditions(root: Path = ROOT) -> dict[str, Any]:
    """Time, kernel, load, limits of the cgroup, governor, clocks, power and throttling at this moment.

    On a Jetson the power mode is nvpmodel's, clock, power and temperature are the first line of tegrastats.
    """
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    khz = read_text(frequency / "scaling_cur_freq")
    mhz = float(khz) / 1000 if khz else float(cpuinfo(root).get("cpu MHz", "nan"))
    load = read_text(root / "proc/loadavg")
    clock = nvidia_smi("clocks.sm")
    gpu_mhz = int(clock[0][0]) if clock and clock[0][0].isdigit() else None
    jetson = _tegrastats()
    quotas = [q for folder in cgroups(root) if (q := quota(folder)) is not None]
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "load_1m": float(load.split()[0]) if load else None,
        "cpu_mhz": None if math.isnan(mhz) else round(mhz),
        "governor": read_text(frequency / "scaling_governor"),
        "gpu_mhz": jetson["gpu_mhz"] if gpu_mhz is None else gpu_mhz,
        "throttled": _throttled(root),
        "cpu_quota": min(quotas, default=None),
        "memory_limit_gb": _memory_limit_gb(root),
        "power_mode": _power_mode(),
        "power_w": jetson["power_w"],
        "celsius": jetson["celsius"],
    }


def _memory_limit_gb(root: Path) -> float | None:
    """The tightest memory limit of our cgroups in 1e9 bytes; None without one."""
    texts = (read_text(folder / "memory.max") for folder in cgroups(root))
    limits = [int(text) for text in texts if text and text.isdigit()]
    return round(min(limits) / 1e9, 2) if limits else None


def _throttled(root: Path) -> int | None:
    """Periods in which the CPU quota has stopped this cgroup so far; None where they are not counted."""
    for folder in cgroups(root):
        for line in (read_text(folder / "cpu.stat") or "").splitlines():
            if line.startswith("nr_throttled "):
                return int(line.split()[1])
    return None


def _power_mode() -> str | None:
    """A Jetson's power mode as `nvpmodel -q` names it: `15W`; None elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return None
    try:
        process = subprocess.run(
            [tool, "-q"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    mode = re.search(r"NV Power Mode:\s*(\S+)", process.stdout)
    return mode[1] if mode else None


def _tegrastats() -> dict[str, Any]:
    """`gpu_mhz`, `power_w` of the board, `celsius` of the GPU from one line of tegrastats; None where absent."""
    line = _first_line("tegrastats", "--interval", "100")
    clock = re.search(r"GR3D_FREQ \d+%@\[?(\d+)", line)
    power = BOARD_POWER.search(line)
    temperature = re.search(r"gpu@(-?[\d.]+)C", line, re.IGNORECASE)
    return {
        "gpu_mhz": int(clock[1]) if clock else None,
        "power_w": int(power[1]) / 1000 if power else None,
        "celsius": float(temperature[1]) if temperature else None,
    }


def _first_line(name: str, *options: str) -> str:
    """The first line of a tool that never ends; empty where it is absent or silent for TOOL_SECONDS."""
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
