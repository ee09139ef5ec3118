"""The Triton kernels proved without a GPU: interpreted, with planted faults, compiled for every generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipeline.core import artifacts
from pipeline.distill.kernels.configs import ARCHITECTURES, SHARED_KB, TABLE, Config
from tests.bounds import BOUNDS, bound
from tests.conftest import ROOT
from tests.house import modules
from tests.mutants import MUTANTS

pytest.importorskip("triton", reason="the kernels' proofs need triton: pip install '.[kernels]'")
from benchmarks import kernel_budget  # imports the kernels, which need it

SPACING = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


def interpreted(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def wrong(cases, kind="float32"):
    """What is over its bound, or over twice plain torch's error in the same dtype; NaN included."""
    found = []
    for one in cases:
        for name, error in one["errors"].items():
            most = bound(name, kind)
            if name in one["plain"]:
                most = min(most, 2 * one["plain"][name] + 2 * SPACING[kind])
            if not error <= most:
                found.append((one["case"], name, error, most))
    return found


def of(cases, name):
    return [one for one in cases if one["case"][0] == name]


@pytest.mark.parametrize(
    "kind",
    ["float32", *(pytest.param(k, marks=pytest.mark.ci) for k in BOUNDS if k != "float32")],
)
@pytest.mark.parametrize("scope", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_in_the_interpreter_every_kernel_is_the_reference(scope, kind):
    cases = interpreted("--scope", scope, "--dtype", kind)
    assert wrong(cases, kind) == []
    for one in of(cases, "attention"):
        _, n, _, width = one["case"][1]
        kernels = {"mix", "gram", *["small"] * (n <= 64), *["flash"] * (width <= 64)}
        assert kernels <= set(one["errors"]) and (n > 64) == ("small" not in one["errors"])
    assert {
        *("dropout", "gl", "gl gradient of weight by loss", "gl dropped gradient of tokens by both")
    } <= set(of(cases, "groups")[0]["errors"])
    if scope == "all":
        assert {one["case"][1][1] for one in of(cases, "attention")} == {20, 33, 49, 64, 65, 196}
        assert {one["case"][2] for one in of(cases, "attention")} == {"element", "token", "matrix"}
        assert [one["case"][1] for one in of(cases, "gram")] == [1.0, 0.1, 0.01]
        certain = next(one for one in of(cases, "attention") if one["case"][3] == 1.0)["errors"]
        assert (
            max(certain[n] for n in ("small", "flash")) < 1e-20 and certain["flash gradient"] == 0
        )


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_is_found(mutant):
    assert wrong(interpreted("--mutant", mutant))


QUICK = 90


@pytest.mark.parametrize("variant", kernel_budget.VARIANTS)
@pytest.mark.parametrize(
    "architecture",
    [
        QUICK,
        pytest.param(80, marks=pytest.mark.ci),
        *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in (QUICK, 80)),
    ],
)
def test_compiled_ahead_a_kernel_spills_nothing_and_keeps_its_budget(variant, architecture):
    budget = artifacts.read_json(kernel_budget.BUDGET, kernel_budget.SCHEMA)["builds"]
    found = kernel_budget.build(variant, architecture)
    own = budget.get(f"{variant} sm_{architecture}")
    assert kernel_budget.faults(variant, architecture, found, own) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90])
@pytest.mark.parametrize("kernel", ["small_gradient", "flash_losses", "flash_keys", "gl_gradients"])
def test_in_float32_a_program_finds_enough_shared_memory(kernel, architecture):
    """There is no tensor core for exact float32; registers spill, some kilobytes."""
    found = kernel_budget.build(kernel, architecture, kind="fp32")
    assert found.spilled_bytes <= 16 * 1024
    assert found.shared_bytes <= SHARED_KB[architecture] * 1024


def test_a_configuration_that_spills_is_a_fault():
    found = kernel_budget.build("gram", 80, Config(block=128, inner=0, warps=2, stages=3))
    (told,) = [f for f in kernel_budget.faults("gram", 80, found, None) if "spilled" in f]
    assert "allowed: 0" in told


def test_more_memory_no_product_and_no_budget_are_faults():
    found = kernel_budget.CompiledKernel(
        registers=200, spilled_bytes=0, shared_bytes=120 * 1024, products=0
    )
    told = kernel_budget.faults("flash_keys", 86, found, {"registers": 100, "shared_bytes": 90_000})
    assert [f.split(": ")[1][:9] for f in told] == ["no HMMA i", "122880 by", "200 regis"]
    assert "not in kernel-budget.json" in kernel_budget.faults("small_losses", 86, found, None)[-1]


def test_every_kernel_of_the_table_is_built_and_belongs_to_the_house():
    assert set(kernel_budget.KERNELS) == set(TABLE) <= set(kernel_budget.VARIANTS)
    assert "pipeline.distill.kernels.flash" in modules()
