"""Where and how a training step is computed: device, precision, memory format, ranks, parts of a batch, EMA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.core.config import STRICT, BelowOne
from pipeline.core.errors import UserError
from pipeline.training.ranks import Ranks

Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA where there is one


@dataclass(frozen=True, config=STRICT)
class Compute:
    """`distill.compute:` where and how a training is computed.

    By rounding its bits depend on it; with `accumulate` also batch statistics, and what is compared within a part.
    """

    device: Device = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast
    channels_last: bool = False  # the student's memory format
    accumulate: PositiveInt = 1  # parts of a batch that are computed one after the other
    compile: bool = False  # torch.compile of the student
    ema: BelowOne = 0.0  # decay of the averaged weights that are published; 0: the last weights

    def backend(self) -> str:
        """What carries messages between ranks: NCCL between CUDA devices, else gloo."""
        return "nccl" if self.device != "cpu" and torch.cuda.is_available() else "gloo"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the forward pass runs under."""
        return (
            torch.autocast(device.type, torch.bfloat16)
            if self.precision == "bf16"
            else nullcontext()
        )

    def parts(self, batch: int, ranks: Ranks) -> int:
        """Parts of a step's batch over ranks and accumulation. Raises UserError: it does not divide."""
        parts = self.accumulate * ranks.size
        if batch % parts or batch // parts < 2:
            raise UserError(
                f"distill.batch: got {batch}, which {ranks.size} ranks x {self.accumulate} parts do not "
                "divide into equal parts of 2 or more; change one of the three"
            )
        return parts

    def average(self, student: nn.Module) -> AveragedModel | None:
        """The exponential moving average of the student's weights and buffers; None where it is off."""
        if not self.ema:
            return None
        return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(self.ema), use_buffers=True)


def pick_device(device: Device, parameter: str, ranks: Ranks) -> torch.device:
    """The device of this rank. Raises UserError: `parameter` asks for CUDA where there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(f"{parameter}: got {device!r}, but PyTorch sees no CUDA device; use auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    found = torch.device("cuda", ranks.local % torch.cuda.device_count())
    torch.cuda.set_device(found)
    return found
