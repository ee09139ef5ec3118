"""The int8 of an exported network simulated in its PyTorch student: every tensor is rounded where int8 rounds it.

Tensors of the ONNX are recognised by their values, so no table of names or operators is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.core.errors import UserError
from pipeline.models.ranges import LEVELS, WEIGHT_LEVELS
from pipeline.quantize.lsq import Quantizer

Array = NDArray[np.float32]
INPUT = 0  # the number of the image; operators count from 1
# They move values and compute none; hooks that read features call them too.
VIEWS = frozenset(
    {
        *("flatten", "permute", "reshape", "view", "transpose", "movedim", "contiguous"),
        *("squeeze", "unsqueeze", "expand", "detach", "to", "float", "__getitem__", "clone"),
    }
)
PRODUCTS = (F.conv2d, F.linear)
TOLERANCE = 1e-4  # of a tensor's largest value: float32 in another order of sums


class Visitor(TorchFunctionMode):
    """Passes the output of every operator through `visit(number, output)`, and (weight, bias) through `weigh`."""

    def __init__(
        self,
        visit: Callable[[int, Tensor], Tensor],
        weigh: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    ) -> None:
        super().__init__()
        self._visit, self._weigh = visit, weigh
        self._number = INPUT

    def start(self, image: Tensor) -> Tensor:
        """Begin a forward pass."""
        self._number = INPUT
        return self._visit(INPUT, image)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
            args = (x, *self._weigh(weight, bias), *rest)
        if func is F.linear and args[2] is not None:
            # ONNX has a product and an addition for it, unless the input is (B, C).
            product = self._next(func(*args[:2]))
            return self._next(product + args[2])
        output = func(*args, **kwargs)
        computed = isinstance(output, Tensor) and output.is_floating_point()
        return self._next(output) if computed and func.__name__ not in VIEWS else output

    def _next(self, output: Tensor) -> Tensor:
        self._number += 1
        return self._visit(self._number, output)


def visited(network: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Every operator's output by its number, from one pass of images x (B, 3, S, S)."""
    outputs: dict[int, Tensor] = {}

    def visit(number: int, output: Tensor) -> Tensor:
        outputs[number] = output.clone()  # an operator that works in place may follow
        return output

    visitor = Visitor(visit, lambda *products: products)
    with torch.no_grad():
        image = visitor.start(x)
        with visitor:
            network(image)
    return outputs


class Sites:
    """Numbers of a network's operators by the values that they compute for an image x (1, 3, S, S)."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        outputs = visited(network, x)
        self._sorted = {n: np.sort(y.cpu().numpy(), axis=None) for n, y in outputs.items()}

    def find(self, tensors: Mapping[str, Array], owners: Mapping[str, str]) -> dict[int, str]:
        """Operator -> owner of the tensor that it computes, in whatever order of axes.

        tensors: in the order of the graph. Of operators that compute the same values the first one is taken that
        no other owner has. Tensors that no operator computes are left out.
        """
        found: dict[int, str] = {}
        for name, value in tensors.items():
            free = (n for n in self._computing(value) if found.get(n, owners[name]) == owners[name])
            if (number := next(free, None)) is not None:
                found[number] = owners[name]
        return found

    def computed(self, tensors: Mapping[str, Array]) -> set[str]:
        """Names of the tensors that some operator computes."""
        return {
            name
            for name, value in tensors.items()
            if next(self._computing(value), None) is not None
        }

    def _computing(self, value: Array) -> Iterator[int]:
        ordered = np.sort(value, axis=None)
        tolerance = TOLERANCE * max(float(np.abs(ordered[[0, -1]]).max()), 1e-12)
        for number, own in self._sorted.items():
            if own.shape == ordered.shape and np.abs(own - ordered).max() <= tolerance:
                yield number


def find_weights(network: nn.Module, weights: Mapping[str, Array]) -> dict[str, str]:
    """The parameter behind each weight of the ONNX, which may be transposed.

    Raises UserError: a weight that no parameter has.
    """
    own = {n: p.detach().cpu().numpy() for n, p in network.named_parameters() if p.ndim > 1}
    found: dict[str, str] = {}
    for name, value in weights.items():
        for parameter, held in own.items():
            turned = held.T if held.shape != value.shape else held
            if turned.shape == value.shape and np.allclose(turned, value, rtol=1e-4, atol=1e-7):
                found[name] = parameter
                break
        else:
            raise UserError(
                f"quantize.steps: got weight {name} of {value.shape} in the exported network, which no layer of "
                f"{type(network).__name__} has; expected the same weights; set quantize.steps: 0"
            )
    return found


def rounded_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias (C,) on its int32 grid of scale (C,), that of the products; the gradient passes unchanged."""
    rounded = torch.div(bias, scale).round_().mul_(scale)
    return bias + (rounded - bias).detach()


class Simulation(nn.Module):
    """The quantizers of a student, by the names in its ONNX; `attach` puts them to work.

    numbers: operator -> tensor whose range it has. parameters: weight of the ONNX -> parameter. inputs: weight,
    where its bias is int32 -> tensor whose range its input has. ceilings: largest value of a range, by tensor.
    """

    def __init__(
        self,
        ranges: Mapping[str, Any],
        numbers: Mapping[int, str],
        parameters: Mapping[str, str],
        inputs: Mapping[str, str],
        ceilings: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._numbers, self._inputs = dict(numbers), dict(inputs)
        self._behind = dict(parameters)
        self._fixed = {"floating": list(ranges["floating"]), "bias": ranges["bias"]}
        self._zero_points = {n: g["zero_point"] for n, g in ranges["activations"].items()}
        self._axes = {n: g["axis"] for n, g in ranges["weights"].items()}
        self.activations = nn.ModuleList()
        for name, grid in ranges["activations"].items():
            low, high = (level - grid["zero_point"] for level in LEVELS)
            scale = torch.tensor(grid["scale"])
            self.activations.append(Quantizer(scale, low, high, None, ceilings.get(name)))
        self.weights = nn.ModuleList()
        for grid in ranges["weights"].values():
            # The output channels of a layer are its first axis, wherever the ONNX has them.
            self.weights.append(Quantizer(torch.tensor(grid["scales"]), *WEIGHT_LEVELS, 0))

    def attach(self, network: nn.Module) -> None:
        """Quantize in every forward pass of `network` from now on; the quantizers become its submodule."""
        activations = dict(zip(self._zero_points, self.activations, strict=True))
        at = {number: activations[name] for number, name in self._numbers.items()}
        weights = dict(zip(self._axes, self.weights, strict=True))
        layers = {
            id(network.get_parameter(parameter)): (
                weights[name],
                activations.get(self._inputs.get(name, "")),
            )
            for name, parameter in self._behind.items()
        }

        def visit(number: int, output: Tensor) -> Tensor:
            return at[number](output) if number in at else output

        def weigh(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if id(weight) not in layers:
                return weight, bias
            own, of_input = layers[id(weight)]
            if bias is not None and of_input is not None:
                bias = rounded_bias(bias, own.scale * of_input.scale)
            return own(weight), bias

        visitor = Visitor(visit, weigh)

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            image = visitor.start(args[0])
            visitor.__enter__()  # type: ignore[no-untyped-call]
            return (image,)

        def leave(*_: Any) -> None:
            visitor.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave, always_call=True)
        network.add_module("simulation", self)

    def ranges(self) -> dict[str, Any]:
        """The trained ranges, as the exporter takes them."""
        activations = {
            name: {"scale": float(scale), "zero_point": self._zero_points[name]}
            for name, scale in _scales(self._zero_points, self.activations).items()
        }
        weights = {
            name: {"scales": scales.tolist(), "axis": self._axes[name]}
            for name, scales in _scales(self._axes, self.weights).items()
        }
        return {"activations": activations, "weights": weights, **self._fixed}


def _scales(names: Iterable[str], quantizers: Iterable[nn.Module]) -> dict[str, Tensor]:
    pairs = zip(names, quantizers, strict=True)
    return {name: q.scale.detach() for name, q in pairs if isinstance(q, Quantizer)}
