"""Products, means and sums of int8 in integers: the same in every order, and those of ONNX Runtime's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exporters.artifact import inputs, onnx_file
from exporters.ort import export, placement, quantize
from exporters.ort.session import OrtSession
from pipeline.quantize import folding, integers, simulation
from pipeline.quantize.integers import Grid, Layer
from pipeline.quantize.lsq import Quantizer
from tests.test_quantize import exact_int8_kernels, reactive

GRID = Grid(torch.tensor(0.0317), 121)


def quantized(*shape: int) -> Tensor:
    """A random tensor on GRID."""
    return (torch.randint(0, 256, shape) - GRID.zero_point) * GRID.scale


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, 2, 1)


def layer(weight: Tensor) -> Layer:
    return Layer(Quantizer(weight.flatten(1).abs().amax(1) / 127, -128, 127, 0), integer_bias=True)


def test_a_product_is_the_same_in_every_order_and_has_the_gradients_of_the_rounded_one() -> None:
    torch.manual_seed(0)
    x, weight = quantized(2, 48, 9, 9), torch.randn(16, 48, 3, 3, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    own = layer(weight.detach())
    x.requires_grad_()
    output, exact = integers.product(convolution, (x, weight, bias), own, GRID)
    assert exact is not None
    order = torch.randperm(48)
    turned = integers.product(convolution, (x[:, order], weight[:, order], bias), own, GRID)[0]
    assert torch.equal(output, turned)
    target = Grid(torch.tensor(0.2), 100)
    assert torch.allclose(exact(target) * 0.2, output, atol=1e-4)
    rounded = own.weight(weight)
    assert not torch.equal(
        convolution(x, rounded, None), convolution(x[:, order], rounded[:, order], None)
    )
    slope = torch.randn_like(output)
    parameters = (x, weight, bias, own.weight.log_scale)
    got = torch.autograd.grad((output * slope).sum(), parameters)
    expected = torch.autograd.grad((convolution(x, rounded, bias) * slope).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_mean_of_four_levels_in_the_middle_of_two_goes_to_the_even_one() -> None:
    levels = torch.tensor([1.0, 2.0, 1.0, 2.0]), torch.tensor([3.0, 2.0, 3.0, 2.0])
    means = torch.stack([own.mean() for own in levels])
    assert integers.mean(means, GRID)(GRID).round().tolist() == [2.0, 2.0]


def test_a_sum_is_rounded_once_after_each_multiply_add() -> None:
    a, b = quantized(100_000), quantized(100_000)
    target = Grid(torch.tensor(0.0519), 127)
    levels = integers.add((a, b), (GRID, GRID))(target)
    truth = (a.double() + b.double()) / target.scale.double()
    assert float((levels - truth).abs().max()) <= 0.5 + 1e-4
    assert torch.equal(levels, levels.round())


@exact_int8_kernels
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "repvgg_a0"])
def test_the_simulation_answers_as_onnx_runtime_to_the_level(name: str, tmp_path: Path) -> None:
    network = reactive(name)
    plain = folding.merge_branches(network)
    folding.fold(plain, 64)
    x = inputs.smooth(32, 64, 64)
    with quantize.Calibrated(export._trace(plain, 64, 18), x) as calibrated:
        sites = simulation.Sites(plain, torch.from_numpy(x[:1]))
        placed = placement.place(calibrated, x[:1], sites.computed, [], "int32")
        numbers = sites.find(placed.values, placed.owners)
        parameters = simulation.find_weights(plain, placed.weights)
        simulated = simulation.Simulation(placed.ranges, numbers, parameters, placed.ceilings)
        proto = calibrated.quantized(ranges=simulated.ranges())
    onnx_file.write_onnx(proto, tmp_path / "int8.onnx")
    answers = OrtSession(tmp_path / "int8.onnx", 1).run(x)
    simulated.attach(plain)
    with torch.no_grad():
        own = plain(torch.from_numpy(x)).numpy()
    level = placed.ranges["activations"][numbers[max(numbers)]]["scale"]
    # ONNX Runtime takes the mean of the last 2 x 2 values in float32, where a tie goes up or down by chance; and
    # sums of residuals are those of x86 with fused multiply-add.
    distance = np.abs(own - answers) / level
    assert (distance < 0.5).mean() >= 0.9 and distance.max() < 1.5
    assert (own.argmax(1) == answers.argmax(1)).all()
