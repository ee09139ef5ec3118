"""Freed memory stays with a process that trains on a CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pipeline.training import memory

FAULTS = """
import resource, sys
import torch
from pipeline.training.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed()
print([faults() for _ in range(30)][-1])
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def clean():
    return {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}


def page_faults(how):
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), check=True)
    return int(done.stdout)


@glibc
@pytest.mark.ci
def test_a_large_tensor_takes_pages_that_the_last_one_left():
    assert page_faults("default") > 1000 > 10 > page_faults("keep")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_MAX_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")],
)
def test_malloc_settings_of_the_environment_stay(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not memory.keep_freed()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed()
