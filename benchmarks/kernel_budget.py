"""Every shipped kernel compiled for every GPU generation, without a GPU: spills, registers, memory, products.

`python -m benchmarks.kernel_budget` writes them to benchmarks/results/kernel-budget.json; a test compares every
build with it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.core import artifacts, cli
from pipeline.distill.kernels import (
    dropout,
    flash,
    flash_gradient,
    gram,
    group_linear,
    small,
    swap_mix,
)
from pipeline.distill.kernels.configs import ARCHITECTURES, SHARED_KB, Config, config

BUDGET = Path(__file__).parent / "results" / "kernel-budget.json"
SCHEMA = "cakd.kernels.budget/1"
SLACK = 1.1  # registers may grow by a tenth with another compiler before the gate says so
KERNELS: dict[str, Any] = {
    "swap_mix": swap_mix.swap_mix_kernel,
    "dropout": dropout.dropout_kernel,
    "gram": gram.gram_kernel,
    "small_losses": small.small_losses_kernel,
    "small_gradient": small.small_gradient_kernel,
    "flash_losses": flash.flash_losses_kernel,
    "flash_queries": flash_gradient.flash_queries_kernel,
    "flash_keys": flash_gradient.flash_keys_kernel,
    "gl_project": group_linear.project_kernel,
    "gl_gradients": group_linear.gradients_kernel,
}
CONSTANTS = {  # of ViT's heads, 64 wide, and the mask of every element
    "SCALE": 0.125,
    "WIDTH": 64,
    "COLUMNS": 64,
    "GRAN": 0,
    "ZERO": False,
    "PRECISION": "ieee",
    "TARGET": True,
    "LOSS": True,
    "OUT": True,
    "DROP": True,
}
TYPES = {  # of the arguments that are not strides or counts
    **dict.fromkeys(("student", "teacher", "out", "gradient", "doubled", "tokens"), "*bf16"),
    **dict.fromkeys(("weight", "bias", "target", "residual", "up_out"), "*bf16"),
    **dict.fromkeys(("d_tokens", "d_weight", "d_bias"), "*bf16"),
    **dict.fromkeys(("partial", "loss", "loss_gram", "log_sums", "deltas"), "*fp32"),
    **dict.fromkeys(("up_attention", "up_gram", "up_loss"), "*fp32"),
    "arrived": "*i32",
    **dict.fromkeys(("ids", "stream", "order", "tiles", "groups"), "*i64"),
    **dict.fromkeys(("scale", "kept", "of_attention", "of_gram"), "fp32"),
}
ALIGNED = re.compile(r"[stgox]_[bnmh]$|channels$|width$")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of a kernel, with other constants
    **{name: (name, {}) for name in KERNELS},
    "small_losses, d 80": ("small_losses", {"WIDTH": 80, "COLUMNS": 128}),
    "small_gradient, d 80": ("small_gradient", {"WIDTH": 80, "COLUMNS": 128}),
    "gl_gradients, loss alone": ("gl_gradients", {"OUT": False}),
}
PRODUCT = {
    8: "HMMA",
    9: "HGMMA",
    10: "UTC",
    12: "HMMA",
}  # the tensor-core instruction, by generation
WITHOUT_PRODUCT = {"swap_mix", "dropout"}


@dataclass(frozen=True)
class CompiledKernel:
    """Resources of one kernel on one architecture."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int  # tensor-core instructions


def build(
    variant: str, architecture: int, settings: Config | None = None, kind: str = "bf16"
) -> CompiledKernel:
    """Compile a variant of a kernel, in bfloat16 or fp32, with the table's configuration or with `settings`."""
    kernel, others = VARIANTS[variant]
    table = config(kernel, architecture, others.get("WIDTH", 64)).of(4 if kind == "fp32" else 2)
    settings = settings or table
    function = KERNELS[kernel]
    tiles = {"BLOCK": settings.block, "KEYS": settings.inner, "DEPTH": settings.inner}
    if settings.columns:
        tiles["COLUMNS"] = settings.columns
    constants = {
        k: v for k, v in {**CONSTANTS, **others, **tiles}.items() if k in function.arg_names
    }
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "i32").replace("bf16", kind)
        for name in function.arg_names
    }
    aligned = [["tt.divisibility", 16]]  # as at a real launch: without it no load is vectorised
    attributes = {
        (index,): aligned
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or ALIGNED.match(name)
    }
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": settings.warps, "num_stages": settings.stages},
    )
    registers, spilled, instructions = _assembled(compiled.asm["cubin"])
    product = PRODUCT[architecture // 10]
    return CompiledKernel(
        registers,
        spilled,
        int(compiled.metadata.shared),
        sum(line.startswith(product) and "MMA" in line for line in instructions),
    )


def _assembled(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers a thread, bytes of spilled registers, and the instructions of a binary, by NVIDIA's own tools."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers and stack, usage
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)
    spilled = int(stack.group(1)) + 4 * sum(o.startswith(("STL", "LDL")) for o in opcodes)
    return int(registers.group(1)), spilled, opcodes


def _output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout


def faults(
    kernel: str, architecture: int, compiled: CompiledKernel, budget: dict[str, int] | None
) -> list[str]:
    """Faults of a build: spills, no tensor-core product, too much shared memory, more than its budget."""
    where = f"{kernel} on sm_{architecture}"
    limit = SHARED_KB[architecture] * 1024
    wrong = []
    if compiled.spilled_bytes:
        wrong.append(f"{where}: {compiled.spilled_bytes} bytes of registers spilled, allowed: 0")
    if kernel not in WITHOUT_PRODUCT and not compiled.products:
        wrong.append(
            f"{where}: no {PRODUCT[architecture // 10]} instruction: not on the tensor cores"
        )
    if compiled.shared_bytes > limit:
        wrong.append(f"{where}: {compiled.shared_bytes} bytes of shared memory, limit {limit}")
    if budget is None:
        wrong.append(f"{where}: not in {BUDGET.name}; run `python -m benchmarks.kernel_budget`")
    elif (
        compiled.registers > SLACK * budget["registers"]
        or compiled.shared_bytes > SLACK * budget["shared_bytes"]
    ):
        wrong.append(
            f"{where}: {compiled.registers} registers and {compiled.shared_bytes} bytes of shared memory, "
            f"budget {budget['registers']} and {budget['shared_bytes']}"
        )
    return wrong


def write_budget() -> dict[str, dict[str, int]]:
    """Build everything and write the budget file; the builds by `kernel sm_xx`."""
    builds = {f"{k} sm_{a}": asdict(build(k, a)) for k in VARIANTS for a in ARCHITECTURES}
    made_by = artifacts.versions(("triton",))
    artifacts.write_json(BUDGET, {"schema": SCHEMA, "versions": made_by, "builds": builds})
    return builds


def main(_: argparse.Namespace) -> None:
    """Compile every kernel for every architecture and write the budget; needs triton, no GPU."""
    for name, made in write_budget().items():
        print(f"{name}: " + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in made.items()))
    print(BUDGET)


if __name__ == "__main__":
    cli.run(main, argparse.ArgumentParser(prog="benchmarks.kernel_budget", description=__doc__))
