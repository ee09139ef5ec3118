"""One process or several ranks: set-up from the environment, means over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from pipeline.core.errors import UserError


def average_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace every gradient by its mean over the ranks: one message for all of them."""
    if ranks.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(
        gradients, (flat / ranks.size).split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def average_figures(
    figures: dict[str, float], device: torch.device, ranks: Ranks
) -> dict[str, float]:
    """The mean of every figure over the ranks; all ranks have the same names."""
    if ranks.size == 1:
        return figures
    row = torch.tensor([figures[name] for name in sorted(figures)], device=device)
    distributed.all_reduce(row)
    return dict(zip(sorted(figures), (row / ranks.size).tolist(), strict=True))


def of_all_ranks(part: Tensor) -> Tensor:
    """The parts (B, ...) of all ranks, one after the other; alone, the part itself."""
    if not distributed.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def same_start(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Give every rank the first one's parameters and buffers."""
    if ranks.size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


RANK_TIMEOUT = timedelta(days=7)  # that a rank may wait for the others


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
        found = torch.tensor([int(flag)], device=self._device)
        with self._ended():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found.item())

    def check_equal(self, what: str, value: int) -> None:
        """Raise UserError where the ranks do not have the same number."""
        if self.any(self._of_first(value) != value):
            raise UserError(
                f"rank {self.rank}: {what} is {value}, on another rank it is not; put the work folder where all "
                "machines see it"
            )

    def _of_first(self, value: int) -> int:
        if self.size == 1:
            return value
        found = torch.tensor([value], device=self._device)
        with self._ended():
            distributed.broadcast(found, 0)
        return int(found.item())

    @property
    def _device(self) -> torch.device:
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


SINGLE_PROCESS = Ranks()


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
        yield SINGLE_PROCESS
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"{name} is not set; export the first node's address and a free port")
    local, device = int(os.environ.get("LOCAL_RANK", "0")), None
    if backend == "nccl":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=RANK_TIMEOUT, device_id=device)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local)
    finally:
        distributed.destroy_process_group()
