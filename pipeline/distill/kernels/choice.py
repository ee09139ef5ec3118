"""Selection of the implementation of a projector loss for a device, with the reason."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.core.errors import UserError, nearest
from pipeline.distill.kernels.configs import (
    LARGE_REGISTER_FILE,
    MAX_TOKENS,
    WIDEST_GRAM,
    WIDEST_HEAD,
)
from pipeline.distill.kernels.measured import ATTENTION, TOKENS, fastest

IMPLS = ("auto", "eager", "sdpa", "small", "flash")
Choice = tuple[str, str]


def has_triton() -> bool:
    """True where the Triton kernels can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose_pca(impl: str, device: torch.device, n: int, width: int) -> Choice:
    """Select the implementation of L_proj1 (`eager`, `sdpa`, `small`, `flash`) for N tokens and heads of `width`.

    Returns its name and the reason. Raises UserError: unknown, or set by name where it cannot run.
    """
    _known(impl)
    cannot = _cannot(impl, device, n, width)
    if cannot:
        raise UserError(f"kernels impl: got {impl!r}, but {cannot}; use auto")
    if impl != "auto":
        return impl, "set by name"
    if device.type == "cpu":
        return "eager", "a CPU: gradients in closed form, in plain torch"
    architecture = _architecture(device)
    measured = fastest(
        ATTENTION, architecture, n, lambda name: _cannot(name, device, n, width) is None
    )
    return measured or ("sdpa", f"nothing was measured on sm_{architecture}: PyTorch's attention")


def choose_gl(
    impl: str, device: torch.device, dtype: torch.dtype, channels: int, width: int, n: int
) -> Choice:
    """Select the implementation of L_proj2 (`eager`, `grouped`, `triton`) for c channels, D width and N tokens.

    Returns its name and the reason. `impl` is that of L_proj1: `sdpa` means PyTorch's operators, `small` and
    `flash` Triton's. Raises UserError: unknown.
    """
    _known(impl)
    if impl == "eager":
        return "eager", "set by name"
    if device.type != "cuda":
        return "eager", f"a {device.type.upper()}: one product a group, in plain torch"
    architecture = _architecture(device)
    # Below sm_90 torch's grouped_mm is a loop that waits for the device; rows of 16 bytes are its own condition.
    fits = dtype == torch.bfloat16 and channels % 8 == width % 8 == 0
    runs = {
        "eager": True,
        "grouped": fits and architecture in LARGE_REGISTER_FILE and impl in ("auto", "sdpa"),
        "triton": has_triton() and impl != "sdpa",
    }
    if impl in ("small", "flash") and runs["triton"]:
        return "triton", "set by name"
    measured = fastest(TOKENS, architecture, n, runs.__getitem__)
    if measured:
        return measured
    if runs["triton"]:
        return "triton", f"nothing was measured on sm_{architecture}: one launch for all groups"
    return "eager", "no grouped_mm for this GPU and dtype: one product a group"


def _known(impl: str) -> None:
    if impl not in IMPLS:
        raise UserError(f"kernels impl: got {impl!r}; {nearest(impl, IMPLS)}")


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _cannot(impl: str, device: torch.device, n: int, width: int) -> str | None:
    """The reason why a Triton kernel cannot run here; None where it can."""
    if impl not in ("small", "flash"):
        return None
    if device.type != "cuda":
        return f"the tensors are on the {device.type}: it needs a CUDA device"
    if not has_triton():
        return "triton is not installed (`pip install '.[kernels]'`)"
    if width > WIDEST_HEAD:
        return f"a head is {width} wide: it takes {WIDEST_HEAD} at most"
    if impl == "small" and n > MAX_TOKENS:
        return f"there are {n} tokens: it takes {MAX_TOKENS} at most"
    if impl == "flash" and width > WIDEST_GRAM:
        return f"a head is {width} wide: it takes {WIDEST_GRAM} at most"
    return None
