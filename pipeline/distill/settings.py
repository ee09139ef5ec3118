"""Settings of the distill stage: the `distill` section of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.methods.logits import LogitsConfig
from pipeline.distill.methods.table import Terms, terms_of
from pipeline.training.compute import Compute

PERF_SCHEMA = "cakd.train/1"


@dataclass(frozen=True)
class Distill:
    """`distill:` which student, by which methods, with one recipe for all of them."""

    methods: tuple[str, ...]
    student: str
    student_kwargs: dict[str, Any] = field(default_factory=dict)  # timm's: output_stride, ...
    epochs: int = 30  # passes over all training images; fixes the steps of every method
    batch: int = 64
    lr: float = 2e-3  # peak; linear warm-up over 5 % of the steps, then cosine to 0
    weight_decay: float = 0.05
    labelled_share: float = 0.125  # of a batch, where not every image shows its label (decision 17)
    seed: int = 0
    workers: int = 0  # processes that make the views of coming steps; 0: made when they are needed
    checkpoint_every: int = 200  # steps
    logits: LogitsConfig = LogitsConfig()
    cakd: CakdConfig = CakdConfig()
    terms: Terms = Terms()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        for method in self.methods:
            terms_of(method)
        for name, least in (("epochs", 1), ("batch", 2), ("workers", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr, weight_decay are {self.lr}, {self.weight_decay}; allowed: lr > 0, decay >= 0"
            )
        if not 0 < self.labelled_share < 1:
            raise ValueError(f"labelled_share is {self.labelled_share}; allowed: between 0 and 1")
