"""The loop over training steps: checkpoints, interruption, divergence, learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core import progress
from pipeline.core.errors import UserError
from pipeline.training.ranks import SINGLE_PROCESS, Ranks, average_figures
from pipeline.training.resume import (
    Figures,
    Interrupts,
    from_columns,
    load_checkpoint,
    save_checkpoint,
    to_columns,
)

# Between two readings of the losses: on a GPU each one waits for the device.
LOG_SECONDS = 1.0
LOG_STEPS = 10  # of several ranks, which must read at the same step

StepFigures = Mapping[str, Tensor | float]  # of one step; tensors () are read later, many at once


def run_steps(
    bar: progress.Progress,
    every: int,
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Callable[[int], StepFigures],
    ranks: Ranks = SINGLE_PROCESS,
) -> list[Figures]:
    """Call `step(i)` for i up to `bar.total`, from the last checkpoint on; returns the figures of every step.

    Saves every `every` steps, and before it exits on SIGINT or SIGTERM. A step must draw its random numbers from
    its own number alone: then a killed run ends in the same bits. `bar.what` begins with the params section.
    The figures are read, averaged over the ranks, checked and logged every LOG_SECONDS (LOG_STEPS of several
    ranks), before each checkpoint and at the end. Of several ranks the first one saves and logs; all of them load.
    Raises UserError: a figure that is not finite, a damaged checkpoint, disk full.
    """
    start, logged = load_checkpoint(checkpoint, modules, optimizers)
    ranks.check_equal("the step to go on from", start)
    curves = from_columns(logged)
    for module in modules.values():
        module.train()
    unread: dict[int, StepFigures] = {}
    last = time.monotonic()
    with Interrupts() as interrupts, bar:
        for i in range(start, bar.total):
            unread[i] = step(i)
            if ranks.size > 1:
                due = (i + 1) % LOG_STEPS == 0
            else:
                due = interrupts.signal is not None or time.monotonic() - last >= LOG_SECONDS
            if not due and (i + 1) % every and i + 1 < bar.total:
                continue
            curves += _read(unread, bar.what, ranks)
            unread.clear()
            last = time.monotonic()
            bar(i + 1, **{name: value for name, value in curves[-1].items() if name != "step"})
            leaving = ranks.any(interrupts.signal is not None)
            if i + 1 < bar.total and (leaving or (i + 1) % every == 0):
                if ranks.rank == 0:
                    save_checkpoint(checkpoint, i + 1, modules, optimizers, to_columns(curves))
                if leaving:
                    ranks.wait()
                    interrupts.leave(checkpoint, quiet=ranks.rank > 0)
    for module in modules.values():
        module.eval()
    return curves


def _read(unread: Mapping[int, StepFigures], name: str, ranks: Ranks) -> list[Figures]:
    """Read the figures of several steps by one copy from the device, and check them."""
    flat = {(step, term): value for step, row in unread.items() for term, value in row.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    if tensors:
        read = torch.stack([*tensors.values()]).tolist()
        flat |= zip(tensors, read, strict=True)
    averaged = average_figures(
        {f"{step} {term}": float(v) for (step, term), v in flat.items()}, ranks
    )
    rows: list[Figures] = []
    for step, row in unread.items():
        rows.append({"step": step} | {term: averaged[f"{step} {term}"] for term in row})
        _check_divergence(name, step, rows[-1])
    return rows


def _check_divergence(name: str, step: int, figures: Figures) -> None:
    for term, value in figures.items():
        if not math.isfinite(value):
            section = name.split()[0]
            raise UserError(
                f"{name}: training diverged: {term}: got {value} at step {step}; expected a finite number; lower "
                f"{section}.lr, remove .work/{section}, run again"
            )


def decay_groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Split parameters into optimiser groups: matrices and kernels decay, norms and biases (ndim <= 1) do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.ndim > 1].append(parameter)
    return [{"params": p, "weight_decay": decay if decays else 0.0} for decays, p in groups.items()]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Compute the learning rate of a step: linear warm-up over 5 % of the steps, then cosine to 0."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
