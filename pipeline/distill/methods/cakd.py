"""Cross-architecture knowledge distillation: Liu et al., ACCV 2022. Equation numbers are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import Self

from pipeline.core.config import STRICT, BelowOne, Share, parse
from pipeline.distill import robust
from pipeline.distill.kernels import gl, pca
from pipeline.distill.kernels.reference import Granularity, attention, heads
from pipeline.distill.methods.term import Sizes, StudentOutputs, TeacherSpace, Term
from pipeline.distill.projectors import GroupWiseLinear, PartiallyCrossAttention, on_grid, tokens_of
from pipeline.distill.robust import Trans
from pipeline.models import checkpoint
from pipeline.models.student import Tap
from pipeline.models.teacher import Layer, TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class CakdConfig:
    """`distill.cakd:` the decisions of the method; the numbers in brackets are those of docs/method.md."""

    layer: Layer = "last"  # of the teacher, where h_T and Q, K, V are read (4)
    tap: str = "auto"  # the student's feature map, or a module name (4)
    granularity: Granularity = "element"  # of g() (1)
    swap_p: Share = 0.5  # p_T (2)
    swap_anneal: bool = False  # p_T falls linearly to 0 over training (2)
    attention_weight: NonNegativeFloat = 1.0
    gram_weight: NonNegativeFloat = 0.05  # w_vv of eq. 4 (6)
    tokens_weight: NonNegativeFloat = 1.0
    adversarial_weight: NonNegativeFloat = 0.1  # lambda of eq. 10 (10)
    adversarial: robust.Adversarial = "non-saturating"  # or eq. 9's (10)
    warmup: Share = 0.1  # share of the steps over which these weights grow from 0 (10)
    discriminator_every: PositiveInt = 5  # iterations, Algorithm 1
    discriminator_lr: PositiveFloat = 1e-3  # (11)
    # Proj1 on the student's grid, or resized before it (4)
    project_at: Literal["tap", "tokens"] = "tap"
    reduce: PositiveInt = 256  # 1x1 reduction before the 3x3 convolutions when c is larger (8)
    dropout: BelowOne = 0.1  # before the group-wise linear layer, eq. 5
    standardise: bool = False  # h_T and h'_S by the store's channel statistics (12)
    trans: Trans = Trans()  # eq. 7
    # implementation of the projector losses
    impl: Literal["auto", "eager", "sdpa", "small", "flash"] = "auto"

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        if self.standardise and self.layer == "before_last":
            raise ValueError(
                f"got standardise true with layer {self.layer}; expected layer last, the one whose channel "
                "statistics the feature cache has; set one of them"
            )
        return self


class Pca(Term):
    """`attention` and `gram`: L_proj1 through the partially cross attention projector, eq. 1 to 4."""

    losses = {"attention": "attention_weight", "gram": "gram_weight"}
    teacher = frozenset({"qkv"})
    student = frozenset({"tap"})

    def __init__(self, config: CakdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.project = PartiallyCrossAttention(
            sizes.channels,
            sizes.space.n_heads,
            sizes.space.width,
            sizes.grid,
            config.reduce,
            config.project_at,
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The two terms of eq. 4."""
        config = self.config
        p = config.swap_p * (1 - outputs.progress) if config.swap_anneal else config.swap_p
        qkv_s = self.project(outputs.feature)
        losses = pca.pca_loss(
            qkv_s, teacher.attention_inputs, outputs.key, p, config.granularity, config.impl
        )
        return {"attention": losses[0], "gram": losses[1]}


class Gl(Term):
    """`tokens`: L_proj2 through the group-wise linear projector, eq. 5 and 6. `fake` keeps h'_S (B, N, D)."""

    losses = {"tokens": "tokens_weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})
    mean: Tensor
    std: Tensor

    def __init__(self, config: CakdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.tokens = sizes.grid
        self.project = GroupWiseLinear(sizes.channels, sizes.space.width, self.tokens)
        self.register_buffer("mean", sizes.space.mean, persistent=False)
        self.register_buffer("std", sizes.space.std, persistent=False)
        self.fake: Tensor | None = None

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Eq. 6."""
        assert outputs.feature is not None
        layer, config = self.project, self.config
        loss, self.fake = gl.gl_mse(
            tokens_of(on_grid(outputs.feature, self.tokens)),
            layer.weight,
            layer.bias,
            self.target(teacher.tokens),
            layer.groups,
            config.dropout,
            outputs.key,
            config.impl,
        )
        return {"tokens": loss}

    def target(self, h_t: Tensor) -> Tensor:
        """Return the target of h'_S: h_T (B, N, D), standardised per channel where set (decision 12)."""
        return _standardised(self.config, h_t, self.mean, self.std)


def _standardised(config: CakdConfig, h: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (h - mean) / std if config.standardise else h


class Projectors(nn.Module):
    """The two projectors of a trained student, for evaluation only."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: CakdConfig, tap: Tap, space: TeacherSpace) -> None:
        super().__init__()
        self.config, self.tap = config, tap
        self.pca = PartiallyCrossAttention(
            tap.channels,
            space.n_heads,
            space.width,
            tap.tokens,
            config.reduce,
            config.project_at,
        )
        self.gl = GroupWiseLinear(tap.channels, space.width, tap.tokens)
        self.register_buffer("mean", space.mean, persistent=False)
        self.register_buffer("std", space.std, persistent=False)

    @torch.no_grad()
    def projected(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The student's attention (B, H, N, d) with no swap, and h'_S (B, N, D) with no dropout."""
        tokens = gl.gl_project(
            tokens_of(on_grid(feature, self.tap.tokens)),
            self.gl.weight,
            self.gl.bias,
            self.gl.groups,
            self.config.impl,
        )
        return attention(*heads(self.pca(feature))), tokens

    def target(self, h_t: Tensor) -> Tensor:
        """Return the target of h'_S in training: h_T (B, N, D), standardised where it was."""
        return _standardised(self.config, h_t, self.mean, self.std)


def load_projectors(folder: Path, description: dict[str, Any]) -> Projectors | None:
    """The projectors beside a CAKD student, for evaluation only; None where the method has not both."""
    if description["tap"] is None:
        return None
    cakd = parse(CakdConfig, description["cakd"], f"{folder}: cakd")
    tap = parse(Tap, description["tap"], f"{folder}: tap")
    projectors = Projectors(cakd, tap, TeacherSpace.of(description["space"]))
    checkpoint.load_weights(projectors, folder / "projectors.safetensors")
    return projectors.eval()
