"""The Triton kernels proved without a GPU: interpreted, with planted faults, compiled for every generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipeline import files
from pipeline.kernels.configs import ARCHITECTURES, TABLE, Config
from tests.conftest import ROOT
from tests.house import modules

pytest.importorskip("triton", reason="the kernels' proofs need triton: pip install '.[kernels]'")

# float32 multiplied exactly: rounding of N to d additions, some 1e-7; a planted fault shows 5e-3 or more.
LOSS, GRADIENT = 1e-6, 5e-6
MUTANTS = [
    "scale one percent off",
    "the mask stream of another matrix",
    "keys beyond the end",
    "delta dropped",
    "gradient through what was swapped",
    "no rescaling of earlier keys",
    "the step ignored",
    "half of the mean missing in the Gram gradient",
]


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


def wrong(cases):
    """What is over its bound, NaN included; masks and repetitions are exact."""
    return [
        (one["shape"], one["granularity"], one["p"], name, error)
        for one in cases
        for name, error in one["errors"].items()
        if not error <= (GRADIENT if "gradient" in name else LOSS)
    ]


@pytest.mark.parametrize("scope", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_in_the_interpreter_every_kernel_is_the_reference(scope):
    cases = interpreted("--scope", scope)
    assert wrong(cases) == []
    for one in cases:
        kernels = {"mix", "gram", "flash"} | ({"small"} if one["shape"][1] <= 64 else set())
        assert kernels <= set(one["errors"])
    if scope == "all":
        assert {one["shape"][1] for one in cases} == {20, 49, 64, 65, 196}
        assert {one["granularity"] for one in cases} == {"element", "token", "matrix"}
        certain = next(one for one in cases if one["p"] == 1.0)["errors"]
        assert certain["flash"] == certain["small"] == certain["flash gradient"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_is_found(mutant):
    assert wrong(interpreted("--mutant", mutant))


BOTH = [90, 80]


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize(
    "architecture",
    [*BOTH, *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in BOTH)],
)
def test_compiled_ahead_a_kernel_spills_nothing_and_keeps_its_budget(kernel, architecture):
    from pipeline.kernels import ahead

    budget = files.read_json(ahead.BUDGET, ahead.SCHEMA)["builds"]
    found = ahead.build(kernel, architecture)
    assert (
        ahead.faults(kernel, architecture, found, budget.get(f"{kernel} sm_{architecture}")) == []
    )


def test_a_configuration_that_spills_is_a_fault():
    from pipeline.kernels import ahead

    found = ahead.build("gram", 80, Config(block=128, keys=0, warps=2, stages=3))
    (told,) = [f for f in ahead.faults("gram", 80, found, None) if "spilled" in f]
    assert "allowed: 0" in told


def test_more_memory_no_product_and_no_budget_are_faults():
    from pipeline.kernels import ahead

    found = ahead.Build(registers=200, spilled_bytes=0, shared_bytes=120 * 1024, products=0)
    told = ahead.faults("flash_keys", 86, found, {"registers": 100, "shared_bytes": 90_000})
    assert [f.split(": ")[1][:9] for f in told] == ["no HMMA i", "122880 by", "200 regis"]
    assert "not in budget.json" in ahead.faults("small", 86, found, None)[-1]


def test_every_kernel_of_the_table_is_built_and_belongs_to_the_house():
    from pipeline.kernels import ahead

    assert set(ahead.KERNELS) == set(TABLE)
    assert "pipeline.kernels.flash" in modules()
