"""A run that can be killed: one writer a work folder, checkpoints without pickle, signals that save and leave."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from pipeline import cli, files, progress
from pipeline.errors import UserError

PATIENCE = 10.0  # seconds a killed predecessor gets to save and leave
LONGEST_SHARE = timedelta(days=7)  # that a rank may wait for the others


@dataclass(frozen=True)
class Ranks:
    """The processes of one run: this one's number, how many there are, and its number on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            with self._ended():
                distributed.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it holds for any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)], device=self._place)
        with self._ended():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found.item())

    def refuse_unequal(self, what: str, value: int) -> None:
        """Raise UserError where the ranks do not have the same number."""
        if self.any(self._of_first(value) != value):
            raise UserError(
                f"rank {self.rank}: {what} is {value}, on another rank it is not; put the work folder where all "
                "machines see it"
            )

    def _of_first(self, value: int) -> int:
        if self.size == 1:
            return value
        found = torch.tensor([value], device=self._place)
        with self._ended():
            distributed.broadcast(found, 0)
        return int(found.item())

    @property
    def _place(self) -> torch.device:
        nccl = distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank}: another rank has ended ({str(error)[:60]}); its line says why"
            ) from None


ALONE = Ranks()


SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}  # what torchrun would set -> what srun sets


@contextmanager
def ranks(backend: str = "gloo") -> Iterator[Ranks]:
    """The ranks that torchrun or srun started, joined over `backend`; without either this process alone.

    Raises UserError: srun without MASTER_ADDR and MASTER_PORT.
    """
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_ID" in os.environ:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in SLURM.items()})
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"{name} is not set; export the first node's address and a free port")
    local, place = int(os.environ.get("LOCAL_RANK", "0")), None
    if backend == "nccl":
        place = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(place)
    distributed.init_process_group(backend, timeout=LONGEST_SHARE, device_id=place)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local)
    finally:
        distributed.destroy_process_group()


@contextmanager
def work_folder(root: Path, fingerprint: str, among: Ranks = ALONE) -> Iterator[Path]:
    """The folder of one run's unfinished work, `root/<fingerprint>`, locked against a second writer.

    Removed when the body ends well, kept when it does not. The lock stands beside it and is never removed. Of
    several ranks the first holds the lock and clears up, when all are done.
    Raises UserError: another process holds it and does not leave within PATIENCE seconds.
    """
    folder = root / fingerprint[:16]
    if among.rank:
        among.wait()
        yield folder
        among.wait()
        return
    files.make_parent(folder)
    with folder.with_suffix(".lock").open("w") as lock:
        until = time.monotonic() + PATIENCE
        while not _locked(lock):
            if time.monotonic() > until:
                raise UserError(
                    f"{folder}: another process is writing it; wait for it or stop it, then run again"
                )
            time.sleep(0.1)
        folder.mkdir(exist_ok=True)  # here: the process waited for has removed its own
        among.wait()
        yield folder
        among.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
        """Leave, if a signal has come."""
        if self.signal is not None:
            self.leave(saved)

    def leave(self, saved: Path, quiet: bool = False) -> None:
        """Exit with 128 + signal, saying where the work is saved; SIGTERM where another rank got the signal."""
        number = self.signal or signal.SIGTERM
        if not quiet:
            print(f"stopped by signal {number}; saved {saved}; run again to go on", file=sys.stderr)
        sys.exit(128 + number)


def as_worker(_: int) -> None:
    """What a process that makes batches does first: it leaves signals to its parent, and dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cli.die_with_parent(signal.SIGKILL)


Figures = dict[str, float]


def run_steps(
    tell: progress.Progress,
    every: int,
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Callable[[int], Figures],
    among: Ranks = ALONE,
) -> list[Figures]:
    """Call `step(i)` for i up to `tell.total`, going on after the last checkpoint; the figures of every step.

    Saves every `every` steps, and before it leaves on SIGINT or SIGTERM. A step must draw its random numbers from
    its own number alone: then a killed run ends in the same bits. `tell.what` begins with the params section.
    Of several ranks the first saves and tells; all of them load.
    Raises UserError: a figure that is not finite, a damaged checkpoint, disk full.
    """
    start, logged = load_checkpoint(checkpoint, modules, optimizers)
    among.refuse_unequal("the step to go on from", start)
    curves = _from_columns(logged)
    for module in modules.values():
        module.train()
    with Interrupts() as interrupts, tell:
        for i in range(start, tell.total):
            seen = step(i)
            _refuse_divergence(tell.what, i, seen)
            curves.append({"step": i, **seen})
            tell(i + 1, **seen)
            leaving = among.any(interrupts.signal is not None)
            if i + 1 < tell.total and (leaving or (i + 1) % every == 0):
                if among.rank == 0:
                    save_checkpoint(checkpoint, i + 1, modules, optimizers, _columns(curves))
                if leaving:
                    among.wait()
                    interrupts.leave(checkpoint, quiet=among.rank > 0)
    for module in modules.values():
        module.eval()
    return curves


def _refuse_divergence(name: str, step: int, seen: Figures) -> None:
    for term, value in seen.items():
        if not math.isfinite(value):
            section = name.split()[0]
            raise UserError(
                f"{name}: {term} is {value} at step {step}: the training diverged; lower {section}.lr, remove "
                f".work/{section}, run again"
            )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then cosine to 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def step_seed(seed: int, step: int, stream: str) -> int:
    """The seed of one named stream of random numbers in one step."""
    return int(files.digest([seed, step, stream])[:15], 16)


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
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, f"module/{name}/"))
        for name, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"optimizer/{name}/").items():
                index, what = key.split("/")
                state.setdefault(int(index), {})[what] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: damaged checkpoint ({told}); remove it and run again") from None
    return step, _below(tensors, "logged/")


def _columns(curves: list[Figures]) -> dict[str, Tensor]:
    """One float64 tensor a term over the steps so far, NaN where a step has no such figure."""
    terms = sorted({t for row in curves for t in row})
    nan = math.nan
    return {t: torch.tensor([r.get(t, nan) for r in curves], dtype=torch.float64) for t in terms}


def _from_columns(columns: Mapping[str, Tensor]) -> list[Figures]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    figures = [
        {t: v for t, v in zip(columns, row, strict=True) if not math.isnan(v)} for row in rows
    ]
    return [{**f, "step": int(f["step"])} for f in figures]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Stopwatch:
    """Milliseconds of each named stage of a training step, kept for every step.

    On a CUDA device the time between two events of its stream, read when the step ends: nothing waits for it.
    """

    def __init__(self, place: torch.device | None = None) -> None:
        self.steps: list[dict[str, float]] = [{}]
        self._cuda = place is not None and place.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name` of the current step."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begun = time.perf_counter()
        yield
        self._add(name, 1e3 * (time.perf_counter() - begun))

    def _add(self, name: str, ms: float) -> None:
        now = self.steps[-1]
        now[name] = now.get(name, 0.0) + ms

    def next_step(self) -> None:
        """Close the current step."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end))
        self._events.clear()
        self.steps.append({})


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    import resource

    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
