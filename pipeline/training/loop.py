"""The loop over training steps: checkpoints, interruption, divergence, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core import progress
from pipeline.core.errors import UserError
from pipeline.training.ranks import SINGLE_PROCESS, Ranks
from pipeline.training.resume import (
    Interrupts,
    StepFigures,
    from_columns,
    load_checkpoint,
    save_checkpoint,
    to_columns,
)


def run_steps(
    bar: progress.Progress,
    every: int,
    checkpoint: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Callable[[int], StepFigures],
    ranks: Ranks = SINGLE_PROCESS,
) -> list[StepFigures]:
    """Call `step(i)` for i up to `bar.total`, from the last checkpoint on; returns the figures of every step.

    Saves every `every` steps, and before it exits on SIGINT or SIGTERM. A step must draw its random numbers from
    its own number alone: then a killed run ends in the same bits. `bar.what` begins with the params section.
    Of several ranks the first one saves and logs; all of them load.
    Raises UserError: a figure that is not finite, a damaged checkpoint, disk full.
    """
    start, logged = load_checkpoint(checkpoint, modules, optimizers)
    ranks.check_equal("the step to go on from", start)
    curves = from_columns(logged)
    for module in modules.values():
        module.train()
    with Interrupts() as interrupts, bar:
        for i in range(start, bar.total):
            figures = step(i)
            _check_divergence(bar.what, i, figures)
            curves.append({"step": i, **figures})
            bar(i + 1, **figures)
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


def _check_divergence(name: str, step: int, figures: StepFigures) -> None:
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
