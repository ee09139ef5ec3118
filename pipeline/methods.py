"""What a student is trained on: each method a sum of named terms, and the objective that computes them.

The term names are the ones in the logs: `cross_entropy`, `logits`, `attention` and `gram` (L_proj1), `tokens`
(L_proj2), `adversarial` (L_MVG); `trans` is not a loss but the student-only transform of eq. 7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import losses, projectors
from pipeline.kernels import gl, pca
from pipeline.kernels.philox import Key
from pipeline.kernels.reference import Granularity, attention, heads
from pipeline.robust import Discriminator, Trans
from pipeline.runtime import Stopwatch
from pipeline.students import Tap
from pipeline.teacher import Tokens

CAKD = ("attention", "gram", "tokens", "adversarial", "trans")
METHODS: dict[str, tuple[str, ...]] = {
    "plain": ("cross_entropy",),
    "logits": ("cross_entropy", "logits"),
    "cakd": ("cross_entropy", *CAKD),
    "cakd+logits": ("cross_entropy", "logits", *CAKD),
    # Controls: what the student-only transform does by itself, without any projector.
    "plain+trans": ("cross_entropy", "trans"),
    "logits+trans": ("cross_entropy", "logits", "trans"),
}
TAUGHT = {"logits", "tokens"}  # terms that need the teacher


@dataclass(frozen=True)
class LogitsConfig:
    """Hinton distillation; a term of its own that never hides inside `cakd` (decision 18)."""

    weight: float = 1.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"logits.temperature is {self.temperature}; allowed: above 0")


@dataclass(frozen=True)
class CakdConfig:
    """Every decision of the method as a parameter; the numbers in brackets are those of docs/method.md."""

    tap: str = "auto"  # the student's feature map, or a module name (4)
    granularity: Granularity = "element"  # of g() (1)
    swap_p: float = 0.5  # p_T (2)
    swap_anneal: bool = False  # p_T falls linearly to 0 over training (2)
    attention_weight: float = 1.0
    gram_weight: float = 0.05  # w_vv of eq. 4 (6)
    tokens_weight: float = 1.0
    adversarial_weight: float = 0.1  # lambda of eq. 10 (10)
    adversarial: losses.Adversarial = "non-saturating"  # or eq. 9's (10)
    warmup: float = 0.1  # share of the steps over which these weights grow from 0 (10)
    discriminator_every: int = 5  # iterations, Algorithm 1
    discriminator_lr: float = 1e-3  # (11)
    reduce: int = 256  # 1x1 reduction before the 3x3 convolutions when c is larger (8)
    dropout: float = 0.1  # before the group-wise linear layer, eq. 5
    standardise: bool = False  # h_T and h'_S by the store's channel statistics (12)
    trans: Trans = field(default_factory=Trans)  # eq. 7
    impl: Literal["auto", "eager", "sdpa", "small", "flash"] = (
        "auto"  # who computes the projector losses
    )

    def __post_init__(self) -> None:
        for name in ("swap_p", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"cakd.{name} is {getattr(self, name)}; allowed: 0 to 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"cakd.dropout is {self.dropout}; allowed: 0 to below 1")
        for name in ("discriminator_every", "reduce"):
            if getattr(self, name) < 1:
                raise ValueError(f"cakd.{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.discriminator_lr <= 0:
            raise ValueError(f"cakd.discriminator_lr is {self.discriminator_lr}; allowed: above 0")


@dataclass(frozen=True)
class TeacherSpace:
    """Dimensions of the teacher: H heads, D width, and the channel statistics (D,) of h_T."""

    n_heads: int
    width: int
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, described: dict[str, Any]) -> TeacherSpace:
        """From the JSON-able keys n_heads, width, h_mean, h_std."""
        mean, std = (torch.tensor(described[k], dtype=torch.float32) for k in ("h_mean", "h_std"))
        return cls(described["n_heads"], described["width"], mean, std)

    def described(self) -> dict[str, Any]:
        """The JSON-able form that `of` reads."""
        return {
            "n_heads": self.n_heads,
            "width": self.width,
            "h_mean": self.mean.tolist(),
            "h_std": self.std.tolist(),
        }


@dataclass(frozen=True)
class Step:
    """One batch as the objective sees it. labels (B,) with -1 where no label is shown; taught None for `plain`."""

    logits: Tensor
    feature: Tensor | None
    labels: Tensor
    taught: Tokens | None
    key: Key
    progress: float  # share of the training done, 0 to 1


class Objective(nn.Module):
    """The terms of one method with the projectors and the discriminator they need; both are dropped at the end."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        method: str,
        distilled: LogitsConfig,
        cakd: CakdConfig,
        tap: Tap | None,
        space: TeacherSpace | None,
    ) -> None:
        super().__init__()
        self.terms = METHODS[method]
        self.distilled, self.cakd, self.tap, self.space = distilled, cakd, tap, space
        self.projectors = nn.ModuleDict()
        self.discriminator: nn.Module | None = None
        if tap is not None and space is not None:
            self.projectors["pca"] = projectors.PartiallyCrossAttention(
                tap.channels, space.n_heads, space.width, cakd.reduce
            )
            self.projectors["gl"] = projectors.GroupWiseLinear(
                tap.channels, space.width, tap.tokens
            )
            self.discriminator = Discriminator(space.width)
            self.register_buffer("mean", space.mean, persistent=False)
            self.register_buffer("std", space.std, persistent=False)

    @property
    def needs_tokens(self) -> bool:
        """True where the method reads the student's tap and the teacher's tokens."""
        return "tokens" in self.terms

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss term at this share of the training (decision 10: linear warm-up)."""
        cakd = self.cakd
        ramp = min(1.0, progress / cakd.warmup) if cakd.warmup else 1.0
        table = {
            "cross_entropy": 1.0,
            "logits": self.distilled.weight,
            "attention": ramp * cakd.attention_weight,
            "gram": ramp * cakd.gram_weight,
            "tokens": ramp * cakd.tokens_weight,
            "adversarial": ramp * cakd.adversarial_weight,
        }
        return {term: table[term] for term in self.terms if term in table}

    def forward(self, step: Step, watch: Stopwatch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every loss term unweighted, and h'_S (B, N, D) for the discriminator (None where there is none)."""
        found = {"cross_entropy": losses.cross_entropy(step.logits, step.labels)}
        if "logits" in self.terms and step.taught is not None:
            found["logits"] = losses.logits(
                step.logits, step.taught.logits, self.distilled.temperature
            )
        if not self.needs_tokens or step.feature is None or step.taught is None:
            return found, None
        assert self.tap is not None and self.discriminator is not None
        with watch.stage("projector"):
            feature = self.tap.resized(step.feature)
            found["attention"], found["gram"] = self._attention(feature, step.taught.qkv, step)
            found["tokens"], fake = self._tokens(feature, step.taught.h, step.key)
        with watch.stage("adversarial"):
            found["adversarial"] = losses.adversarial(
                self.discriminator, fake, self.cakd.adversarial
            )
        return found, fake

    def _attention(self, feature: Tensor, qkv_t: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        cakd = self.cakd
        p = cakd.swap_p * (1 - step.progress) if cakd.swap_anneal else cakd.swap_p
        qkv_s = self.projectors["pca"](feature)
        return pca.pca_loss(qkv_s, qkv_t, step.key, p, cakd.granularity, cakd.impl)

    def _tokens(self, feature: Tensor, h_t: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        layer: Any = self.projectors["gl"]
        return gl.gl_mse(
            projectors.tokens_of(feature),
            layer.weight,
            layer.bias,
            self.target(h_t),
            layer.groups,
            self.cakd.dropout,
            key,
            self.cakd.impl,
        )

    def target(self, h_t: Tensor) -> Tensor:
        """What h'_S is held against: h_T (B, N, D), per-channel standardised where asked (decision 12)."""
        return (h_t - self.mean) / self.std if self.cakd.standardise else h_t

    @torch.no_grad()
    def projected(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluation: the student's attention (B, H, N, d) with no swap, and h'_S (B, N, D) with no drop-out."""
        assert self.tap is not None
        feature = self.tap.resized(feature)
        layer: Any = self.projectors["gl"]
        tokens = gl.gl_project(
            projectors.tokens_of(feature), layer.weight, layer.bias, layer.groups, self.cakd.impl
        )
        return attention(*heads(self.projectors["pca"](feature))), tokens
