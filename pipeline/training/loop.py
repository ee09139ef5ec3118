"""A run that can be killed: one writer a work folder, checkpoints without pickle, signals that save and leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from pipeline.core import progress
from pipeline.core.errors import UserError
from pipeline.training.ranks import ALONE, Ranks
from pipeline.training.resume import (
    Figures,
    Interrupts,
    from_columns,
    load_checkpoint,
    save_checkpoint,
    to_columns,
)


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
    curves = from_columns(logged)
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
                    save_checkpoint(checkpoint, i + 1, modules, optimizers, to_columns(curves))
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
