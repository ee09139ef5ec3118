"""What a GPU measured: milliseconds of a call with its gradient, by compute capability and tokens. `auto`
follows it.

From benchmarks/results/h100-kernels.json, bfloat16, one H100. `small`, `flash` and `triton` were written anew
since: their figures are those of the kernels before, which made 20, 22 and 12 launches a call; the new ones are
not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Milliseconds = Mapping[str, float]
SOURCE = "h100-kernels.md, of the Triton kernels before these"

ATTENTION: dict[int, dict[int, Milliseconds]] = {
    90: {
        49: {"eager": 8.778, "sdpa": 2.123, "small": 1.240, "flash": 1.534},
        64: {"eager": 13.711, "sdpa": 2.666, "small": 1.556, "flash": 1.943},
        196: {"eager": 27.653, "sdpa": 3.934, "flash": 4.566},
    },
}
TOKENS: dict[int, dict[int, Milliseconds]] = {
    90: {
        49: {"eager": 3.363, "grouped": 3.490, "triton": 1.836},
        64: {"eager": 3.470, "grouped": 2.968, "triton": 2.337},
        196: {"eager": 4.944, "grouped": 3.457, "triton": 1.996},
    },
}
LIKE = {
    100: 90
}  # not measured; as large in registers and shared memory, and the same instructions of torch


def fastest(
    table: dict[int, dict[int, Milliseconds]],
    architecture: int,
    tokens: int,
    runs: Callable[[str], bool],
) -> tuple[str, str] | None:
    """The fastest implementation that `runs` here, at the measured number of tokens nearest by ratio; and why.

    None where nothing was measured on this generation, nor on one like it.
    """
    by_tokens = table.get(LIKE.get(architecture, architecture))
    if by_tokens is None:
        return None
    nearest = min(by_tokens, key=lambda n: max(n, tokens) / min(n, tokens))
    times = {name: ms for name, ms in by_tokens[nearest].items() if runs(name)}
    name = min(times, key=times.__getitem__)
    return name, f"{times[name]:.2f} ms at {nearest} tokens, the least in {SOURCE}"
