"""How a training step is computed: device, precision, memory format, micro-batches, EMA."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from pipeline.core.config import STRICT, BelowOne
from pipeline.core.errors import UserError
from pipeline.training import memory
from pipeline.training.ranks import Ranks

Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA where there is one
GRAPHS = "cuda-graphs"  # of `compile`


@dataclass(frozen=True, config=STRICT)
class Compute:
    """`distill.compute:` where and how a training is computed.

    By rounding its bits depend on it; with `accumulate` also batch statistics, and what is compared within a part.
    """

    device: Device = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast
    # the student's memory format; auto: with bf16 on a CUDA device, with grouped convolutions on a CPU
    channels_last: Literal["auto"] | bool = "auto"
    accumulate: PositiveInt = 1  # parts of a batch that are computed one after the other
    # torch.compile of the student and of every loss term; cuda-graphs: the student's kernels as CUDA graphs too
    compile: bool | Literal["cuda-graphs"] = False
    ema: BelowOne = 0.0  # decay of the averaged weights that are published; 0: the last weights

    def backend(self) -> str:
        """Return the backend of torch.distributed: NCCL between CUDA devices, else gloo."""
        return "nccl" if self.device != "cpu" and torch.cuda.is_available() else "gloo"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context of the forward pass: autocast to bfloat16, or none."""
        if self.precision == "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    def memory_format(self, network: nn.Module, device: torch.device) -> torch.memory_format:
        """Return the memory format of the student's weights and inputs.

        `auto` is channels_last for tensor cores, as PyTorch's tuning guide recommends: with bf16 on a CUDA device.
        On a CPU it is channels_last for grouped and depthwise convolutions, which it makes faster; dense ones gain
        or lose a little by it (benchmarks.training --both-formats).
        """
        if self.channels_last != "auto":
            on = self.channels_last
        elif device.type == "cuda":
            on = self.precision == "bf16"
        else:
            convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
            on = any(m.groups > 1 for m in convolutions)
        return torch.channels_last if on else torch.preserve_format

    def compiled(self, student: nn.Module, device: torch.device) -> Any:
        """Return the student's forward pass, compiled where it is set. Raises UserError: no CUDA for its graphs.

        Only the student is captured: a loss may take the step's number, for which a graph would be made anew in
        every step.
        """
        if self.compile != GRAPHS:
            return torch.compile(student) if self.compile else student
        if device.type != "cuda":
            raise UserError(
                f"distill.compute.compile: got {self.compile!r} on a {device.type}; expected true or false "
                "without a CUDA device; set it to true"
            )
        return torch.compile(student, mode="reduce-overhead")

    def begin_step(self) -> None:
        """Let the CUDA graphs of this step overwrite what those of the last one returned.

        Within a step they keep the gradients of earlier micro-batches. Losses outlive a step: they are computed
        outside the graphs.
        """
        if self.compile == GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()

    def micro_batches(self, batch: int, ranks: Ranks) -> int:
        """Count the micro-batches of a step over ranks and accumulation. Raises UserError: of unequal size."""
        micro_batches = self.accumulate * ranks.size
        if batch % micro_batches or batch // micro_batches < 2:
            raise UserError(
                f"distill.batch: got {batch} for {ranks.size} ranks x {self.accumulate} micro-batches "
                "(distill.compute.accumulate); expected a multiple that leaves 2 images or more in each; change "
                "one of the three"
            )
        return micro_batches

    def average(self, student: nn.Module) -> Averaged | None:
        """Create the exponential moving average of weights and buffers; None where it is off."""
        return Averaged(student, self.ema) if self.ema else None


class Averaged(nn.Module):
    """The exponential moving average of a student's weights and buffers, `module`.

    torch's AveragedModel keeps its count on the device and waits for it at every step.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(student).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Take in the weights after a step; those after step 0 are the first average."""
        own, other = (list(n.state_dict().values()) for n in (self.module, student))
        moving = [tensor.is_floating_point() and step > 0 for tensor in own]
        if any(moving):
            torch._foreach_lerp_(
                list(compress(own, moving)), list(compress(other, moving)), 1 - self.decay
            )
        for average, now, moves in zip(own, other, moving, strict=True):
            if not moves:
                average.copy_(now)


def pick_device(device: Device, parameter: str, ranks: Ranks) -> torch.device:
    """Choose the device of this rank; on a CPU the process keeps the memory that it frees (`memory.keep_freed`).

    Raises UserError: `parameter` says CUDA and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            f"{parameter}: got {device!r}; expected a CUDA device, PyTorch sees none; set it to auto"
        )
    if device == "cpu" or not available:
        memory.keep_freed()
        return torch.device("cpu")
    cuda = torch.device("cuda", ranks.local % torch.cuda.device_count())
    torch.cuda.set_device(cuda)
    return cuda
