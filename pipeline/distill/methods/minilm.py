"""Deep self-attention distillation: Wang et al., "MiniLM", NeurIPS 2020."""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.kernels.reference import heads
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import PartiallyCrossAttention
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class MinilmConfig:
    """The paper adds the two with weight 1."""

    weight: NonNegativeFloat = 1.0
    reduce: PositiveInt = (
        256  # 1x1 reduction before the 3x3 convolutions where c is larger, as for L_proj1
    )


def relation(a: Tensor, b: Tensor) -> Tensor:
    """log softmax(A B^T / sqrt(d)) of every head: (B, H, N, d) -> (B, H, N, N)."""
    return F.log_softmax(a @ b.mT / math.sqrt(a.shape[-1]), dim=-1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log relations (B, H, N, N), mean over heads and rows (eq. 6 and 8)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


class Minilm(Term):
    """`minilm_attention` of queries and keys, `minilm_values` of the values with themselves; no swap.

    A CNN has no queries: three 3x3 convolutions of the tap stand for them, as in L_proj1.
    """

    losses = {"minilm_attention": "weight", "minilm_values": "weight"}
    teacher = frozenset({"qkv"})
    student = frozenset({"tap"})

    def __init__(self, config: MinilmConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.project = PartiallyCrossAttention(
            sizes.channels, sizes.space.n_heads, sizes.space.width, sizes.grid, config.reduce
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The two divergences of the last block."""
        (q, k, v), (q_t, k_t, v_t) = (
            heads(self.project(outputs.feature)),
            heads(teacher.attention_inputs),
        )
        return {
            "minilm_attention": kl(relation(q, k), relation(q_t, k_t)),
            "minilm_values": kl(relation(v, v), relation(v_t, v_t)),
        }
