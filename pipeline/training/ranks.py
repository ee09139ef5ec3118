"""Distributed training: ranks from the environment, means over all of them.

Gradients are averaged after the backward pass, not during it as in DistributedDataParallel: student and projectors
are small, and one plain loop serves accumulation, two optimisers and any device (docs/scaling.md).
"""

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
    """Replace every gradient by its mean over the ranks, in one all-reduce."""
    if ranks.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    means = (flat / ranks.size).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def average_figures(figures: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Average figures over the ranks, which all have the same names."""
    if ranks.size == 1:
        return figures
    row = torch.tensor([figures[name] for name in sorted(figures)], device=ranks.device)
    distributed.all_reduce(row)
    return dict(zip(sorted(figures), (row / ranks.size).tolist(), strict=True))


def of_all_ranks(own: Tensor) -> Tensor:
    """Concatenate the tensors (B, ...) of all ranks, whose B may differ, in the order of their numbers."""
    if not distributed.is_initialized():
        return own
    ranks = range(distributed.get_world_size())
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in ranks]
    distributed.all_gather(counts, torch.full_like(counts[0], len(own)))
    lengths = torch.cat(counts).tolist()
    padded = own.new_zeros(max(lengths), *own.shape[1:])  # all_gather takes tensors of one shape
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in ranks]
    distributed.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])


def same_start(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Copy the first rank's parameters and buffers to all ranks."""
    if ranks.size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


# Above torch's default of minutes: the others wait while one rank hashes a store or writes its last shards.
RANK_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """The processes of one run: this one's number, how many there are, and its number on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            with self._ended():
                distributed.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it holds for any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        with self._ended():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags.item())

    def check_equal(self, what: str, value: int) -> None:
        """Compare a number between the ranks. Raises UserError: it differs, on every rank."""
        if self.any(self._of_first(value) != value):
            raise UserError(
                f"rank {self.rank}: {what}: got {value}; expected the same number on all ranks; put the work "
                "folder on a disk that all machines share"
            )

    def _of_first(self, value: int) -> int:
        if self.size == 1:
            return value
        number = torch.tensor([value], device=self.device)
        with self._ended():
            distributed.broadcast(number, 0)
        return int(number.item())

    @property
    def device(self) -> torch.device:
        """Where the ranks' messages are: a GPU over NCCL, else the CPU."""
        nccl = distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank}: another rank has ended ({str(error)[:60]}); see its own error message"
            ) from None


SINGLE_PROCESS = Ranks()
# torchrun's variable -> srun's
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def from_environment() -> Ranks:
    """Read this process's rank from torchrun's or srun's variables, without joining the others."""
    if "WORLD_SIZE" not in os.environ and "SLURM_STEP_ID" in os.environ:
        os.environ.update({variable: os.environ[slurm] for variable, slurm in SLURM.items()})
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return SINGLE_PROCESS
    return Ranks(int(os.environ.get("RANK", "0")), size, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def ranks(backend: str = "gloo") -> Iterator[Ranks]:
    """Join the ranks that torchrun or srun started, over `backend`; without either a single process.

    Raises UserError: srun without MASTER_ADDR and MASTER_PORT.
    """
    launched = from_environment()
    if launched.size == 1:
        yield SINGLE_PROCESS
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name}: got no value under srun; expected the first node's address and a free port; export both"
            )
    device = None
    if backend == "nccl":
        device = torch.device("cuda", launched.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=RANK_TIMEOUT, device_id=device)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), launched.local)
    finally:
        distributed.destroy_process_group()
