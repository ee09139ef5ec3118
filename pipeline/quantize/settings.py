"""Settings of the quantize stage: the `quantize` section of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.config import STRICT
from pipeline.models.ranges import Bias

Layer = Literal["int8", "float"]


@dataclass(frozen=True, config=STRICT)
class Quantize:
    """`quantize:` fine-tuning of the exported student under int8; batch, seed and losses are those of distill."""

    steps: NonNegativeInt = 0  # 0: the student is exported as it was distilled
    lr: PositiveFloat = 2e-4  # peak; of weights and ranges
    first: Layer = "int8"  # the first convolution
    last: Layer = "int8"  # the classifier
    # further layers that stay in float: those whose quantization alone costs the most SQNR
    floating: NonNegativeInt = 0
    bias: Bias = "int32"  # of the exported network; ONNX Runtime computes in float32 with float
