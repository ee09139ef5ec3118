"""Hard distillation: Touvron et al., "Training data-efficient image transformers", ICML 2021, section 4, eq. 3."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class DeitConfig:
    """The paper halves both cross-entropies; that of the labels has weight 1 here, so this one has it too."""

    weight: NonNegativeFloat = 1.0


class Deit(Term):
    """`deit`: the teacher's decision is a second label.

    The paper's student learns it by a distillation token with a head of its own. A CNN has no tokens, so its one
    head learns both, as in the paper's ablation without the token. The teacher's label is not smoothed.
    """

    losses = {"deit": "weight"}

    def __init__(self, config: DeitConfig, _: Sizes) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Cross-entropy with y_t = argmax_c Z_t(c), the second half of eq. 3, mean over images."""
        return {"deit": F.cross_entropy(outputs.logits, teacher.logits.argmax(1))}
