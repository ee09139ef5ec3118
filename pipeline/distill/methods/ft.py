"""Factor transfer: Kim et al., "Paraphrasing complex network", NeurIPS 2018."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class FtConfig:
    """The authors' beta of 500, and their L1 distance as a mean over elements."""

    weight: NonNegativeFloat = 500.0
    reconstruction_weight: NonNegativeFloat = 1.0  # of the paraphraser's own loss
    rate: float = Field(default=0.5, gt=0, le=1)  # k: width of the factors over the teacher's


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """||F_T / ||F_T||_2 - F_S / ||F_S||_2||_1 of the factors of an image (eq. 4, p = 1), mean over elements."""
    ours, theirs = (F.normalize(x.flatten(1), dim=1) for x in (student, teacher))
    return F.l1_loss(ours, theirs)


def encoder(channels: int, factors: int) -> nn.Sequential:
    """Three 3x3 convolutions, each with leaky ReLU: (B, c, h, w) -> factors (B, k D, h, w)."""
    widths = ((channels, channels), (channels, factors), (factors, factors))
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)) for a, b in widths]
    return nn.Sequential(*(module for layer in layers for module in layer))


def decoder(factors: int, channels: int) -> nn.Sequential:
    """Three transposed 3x3 convolutions, leaky ReLU between them: factors -> (B, D, h, w)."""
    return nn.Sequential(
        nn.ConvTranspose2d(factors, factors, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(factors, channels, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(channels, channels, 3, padding=1),
    )


class Ft(Term):
    """`ft` and `ft_reconstruction`: factors of the teacher's tokens by a paraphraser, of the tap by a translator.

    The paraphraser is an auto-encoder of h_T alone: only `ft_reconstruction` trains it, and only `ft` translator
    and student. The paper trains it for some epochs before the student; here it is trained beside the student, on
    the same cached batches, so that a method stays one training: the factors move in the first steps. No batch
    norm, as in the authors' code, and no leaky ReLU behind the last layer: h_T has both signs.
    """

    losses = {"ft": "weight", "ft_reconstruction": "reconstruction_weight"}
    beside = frozenset({"ft_reconstruction"})
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: FtConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        width = sizes.space.width
        factors = max(1, round(config.rate * width))
        self.paraphrase = encoder(width, factors)
        self.reconstruct = decoder(factors, width)
        self.translate = encoder(sizes.channels, factors)

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Eq. 4 with the teacher's factors detached, and ||x - P(x)||^2 (eq. 1) as a mean over elements."""
        assert outputs.feature is not None
        maps = teacher.tokens.mT.unflatten(2, self.grid)
        factors = self.paraphrase(maps)
        ours = self.translate(on_grid(outputs.feature, self.grid))
        return {
            "ft": factor_distance(ours, factors.detach()),
            "ft_reconstruction": F.mse_loss(self.reconstruct(factors), maps),
        }
