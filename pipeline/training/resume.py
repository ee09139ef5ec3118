"""Resuming a killed run: work folders with one writer, signal handlers, checkpoints without pickle."""

from __future__ import annotations

import fcntl
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.core import cli
from pipeline.core.atomic import atomic, make_parent
from pipeline.core.errors import UserError
from pipeline.training.ranks import SINGLE_PROCESS, Ranks

PATIENCE = 10.0  # seconds a killed predecessor gets to save and leave


@contextmanager
def work_folder(root: Path, fingerprint: str, ranks: Ranks = SINGLE_PROCESS) -> Iterator[Path]:
    """Open the folder of one run's unfinished work, `root/<fingerprint>`, locked against a second writer.

    It is removed when the body succeeds and stays when it fails, so that the next run resumes. Of several ranks
    the first one holds the lock and removes the folder when all are done.
    Raises UserError: another process holds it and does not exit within PATIENCE seconds.
    """
    folder = root / fingerprint[:16]
    if ranks.rank:
        ranks.wait()
        yield folder
        ranks.wait()
        return
    make_parent(folder)
    # The lock file is beside the folder and never removed: a process that waits for it would hold a deleted file,
    # and a third one would lock the new file of the same name.
    with folder.with_suffix(".lock").open("w") as lock:
        until = time.monotonic() + PATIENCE
        while not locked(lock):
            if time.monotonic() > until:
                raise UserError(
                    f"{folder}: locked by another process that writes it; wait for it or stop it, then run again"
                )
            time.sleep(0.1)
        folder.mkdir(exist_ok=True)  # here: the process waited for has removed its own
        ranks.wait()
        yield folder
        ranks.wait()
        shutil.rmtree(folder, ignore_errors=True)


def locked(file: TextIO) -> bool:
    """Lock an open file until it is closed; False where another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Interrupts:
    """Turns SIGINT and SIGTERM into a flag, so that a loop can save before it exits."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._record) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def leave_if_signalled(self, saved: Path) -> None:
        """Exit if a signal has arrived."""
        if self.signal is not None:
            self.leave(saved)

    def leave(self, saved: Path, quiet: bool = False) -> None:
        """Exit with 128 + signal and print where the work is saved, unless `quiet`."""
        number = self.signal or signal.SIGTERM  # none here: another rank got the signal
        if not quiet:
            print(
                f"stopped by signal {number}; saved {saved}; run again to resume", file=sys.stderr
            )
        sys.exit(128 + number)


def as_worker(_: int) -> None:
    """Set up a data-loader process: signals are left to its parent, and it is killed with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cli.die_with_parent(signal.SIGKILL)


Figures = dict[str, float]  # of one step: its number and the losses by name


def save_checkpoint(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    logged: Mapping[str, Tensor],
) -> None:
    """Save parameters, buffers, optimiser moments and the `logged` tensors after `step` steps, atomically.

    Raises UserError: cannot write, disk full.
    """
    tensors = {f"logged/{name}": value for name, value in logged.items()}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"module/{name}/{key}"] = value.detach().cpu().contiguous()
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensor = torch.as_tensor(value).cpu().contiguous()
                tensors[f"optimizer/{name}/{index}/{key}"] = tensor
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[int, dict[str, Tensor]]:
    """Restore what `save_checkpoint` wrote; returns (steps done, `logged`), (0, {}) without a checkpoint.

    Raises UserError: damaged.
    """
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, f"module/{name}/"))
        for name, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"optimizer/{name}/").items():
                index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            _in_their_formats(optimizer)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: damaged: not a checkpoint of this run ({reason}); remove it and run again"
        ) from None
    return step, _below(tensors, "logged/")


def _in_their_formats(optimizer: torch.optim.Optimizer) -> None:
    """Give every moment the strides of its parameter: a fused step walks through both as plain memory."""
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def to_columns(curves: list[Figures]) -> dict[str, Tensor]:
    """Convert the figures of each step to a float64 tensor per term, NaN where a step has no such figure."""
    terms = sorted({t for row in curves for t in row})
    nan = math.nan
    return {t: torch.tensor([r.get(t, nan) for r in curves], dtype=torch.float64) for t in terms}


def from_columns(columns: Mapping[str, Tensor]) -> list[Figures]:
    """Invert `to_columns`."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    figures = [
        {t: v for t, v in zip(columns, row, strict=True) if not math.isnan(v)} for row in rows
    ]
    return [{**f, "step": int(f["step"])} for f in figures]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
