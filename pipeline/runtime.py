"""A run that can be killed: one writer a work folder, checkpoints without pickle, signals that save and leave."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import files
from pipeline.errors import UserError

PR_SET_PDEATHSIG = 1


@contextmanager
def work_folder(root: Path, fingerprint: str) -> Iterator[Path]:
    """The folder of one run's unfinished work, `root/<fingerprint>`, locked against a second writer.

    Removed when the body ends well, kept when it does not. The lock stands beside it and is never removed.
    Raises UserError: another process holds it.
    """
    folder = root / fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is writing it; wait for it or stop it, then run again"
            ) from None
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def die_with_parent() -> None:
    """Ask Linux to terminate this process when its parent dies: a killed dvc leaves no orphan training."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Interrupts:
    """Turns SIGINT and SIGTERM into a flag the loop can ask for, so that it saves before it leaves."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def leave_if_asked(self, saved: Path) -> None:
        """Exit with 128 + signal, saying where the work is saved."""
        if self.signal is not None:
            print(
                f"stopped by signal {self.signal}; saved {saved}; run again to go on",
                file=sys.stderr,
            )
            sys.exit(128 + self.signal)


def save_checkpoint(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    logged: Mapping[str, Tensor],
) -> None:
    """Write parameters, buffers, optimiser moments and the `logged` tensors after `step` steps, atomically.

    Raises UserError: cannot write, disk full.
    """
    tensors = {f"logged/{name}": value for name, value in logged.items()}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"module/{name}/{key}"] = value.detach().cpu().contiguous()
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{name}/{index}/{key}"] = (
                    torch.as_tensor(value).cpu().contiguous()
                )
    try:
        with files.atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[int, dict[str, Tensor]]:
    """Restore what `save_checkpoint` wrote -> (steps done, `logged`); (0, {}) where there is none.

    Raises UserError: damaged.
    """
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); remove it and run again") from None
    for name, module in modules.items():
        module.load_state_dict(_below(tensors, f"module/{name}/"))
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _below(tensors, f"optimizer/{name}/").items():
            index, what = key.split("/")
            state.setdefault(int(index), {})[what] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step, _below(tensors, "logged/")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Stopwatch:
    """Milliseconds of each named stage of a training step, kept for every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [{}]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name` of the current step."""
        start = time.perf_counter()
        yield
        now = self.steps[-1]
        now[name] = now.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    def next_step(self) -> None:
        """Close the current step."""
        self.steps.append({})


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    import resource

    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
