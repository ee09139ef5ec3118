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
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core.errors import UserError
from pipeline.models.ranges import LEVELS, WEIGHT_LEVELS
from pipeline.quantize import integers
from pipeline.quantize.integers import Exact, Grid, Layer
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
# Monotone, and int8 takes them over in its own limits: they keep what the product before them computed.
CLIPS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_"})
MEANS = frozenset({"mean", "adaptive_avg_pool2d"})
SUMS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
TOLERANCE = 1e-4  # of a tensor's largest value: float32 in another order of sums


Visit = Callable[[int, Tensor, Exact | None], tuple[Tensor, Grid | None]]  # -> output, its grid


class Visitor(TorchFunctionMode):
    """Passes the output of every operator through `visit(number, output, exact)`, and computes int8 in integers.

    exact: what the operator computes of integers, where it read int8, or None. `layer_of`: the layer of a weight
    """

    def __init__(self, visit: Visit, layer_of: Callable[[Tensor], Layer | None]) -> None:
        super().__init__()
        self._visit, self._layer_of = visit, layer_of
        self._number = INPUT
        self._grids = WeakTensorKeyDictionary()  # tensor -> the grid it is on
        self._exact = WeakTensorKeyDictionary()  # output of an operator that read int8 -> exact

    def start(self, image: Tensor) -> Tensor:
        """Begin a forward pass."""
        self._number = INPUT - 1
        return self._next(image)

    def stop(self) -> None:
        """End a forward pass."""
        self._grids.clear()
        self._exact.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if func in PRODUCTS:
            return self._product(func, *args, **kwargs)
        exact = self._exact.pop(args[0], None) if args and isinstance(args[0], Tensor) else None
        grids = [self._grids.get(x) for x in args[:2] if isinstance(x, Tensor)]
        on_grid = bool(grids) and None not in grids
        if name in MEANS and on_grid:
            exact = integers.mean(func(grids[0].levels(args[0]), *args[1:], **kwargs), grids[0])
        elif name in SUMS and on_grid and len(grids) == len(args) == 2 and not kwargs:
            exact = integers.add(args, grids)
        elif name not in CLIPS:
            exact = None
        output = func(*args, **kwargs)
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        if name not in VIEWS:
            return self._next(output, exact)
        if on_grid:
            self._grids[output] = grids[0]
        return output

    def _product(
        self,
        func: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        added = None
        if func is F.linear and x.ndim != 2:
            # ONNX has a product and an addition for it, unless the input is (B, C).
            added, bias = bias, None

        def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(x, weight, bias, *rest, **options)
            return output

        layer, grid = self._layer_of(weight), self._grids.get(x)
        if layer is None or grid is None:
            output = self._next(call(x, weight if layer is None else layer.weight(weight), bias))
        else:
            output = self._next(*integers.product(call, (x, weight, bias), layer, grid))
        return output if added is None else self._next(output + added)

    def _next(self, output: Tensor, exact: Exact | None = None) -> Tensor:
        self._number += 1
        output, grid = self._visit(self._number, output, exact)
        # An operator that works in place may have left what was known of the value before.
        self._grids.pop(output, None)
        if grid is not None:
            self._grids[output] = grid
        elif exact is not None:
            self._exact[output] = exact
        return output


def visited(network: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Every operator's output by its number, from one pass of images x (B, 3, S, S)."""
    outputs: dict[int, Tensor] = {}

    def visit(number: int, output: Tensor, _: Exact | None) -> tuple[Tensor, None]:
        outputs[number] = output.clone()  # an operator that works in place may follow
        return output, None

    visitor = Visitor(visit, lambda _: None)
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


class Simulation(nn.Module):
    """The quantizers of a student, by the names in its ONNX; `attach` puts them to work.

    numbers: operator -> tensor whose range it has. parameters: weight of the ONNX -> parameter. ceilings:
    largest value of a range, by tensor.
    """

    def __init__(
        self,
        ranges: Mapping[str, Any],
        numbers: Mapping[int, str],
        parameters: Mapping[str, str],
        ceilings: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._numbers, self._behind = dict(numbers), dict(parameters)
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
            id(network.get_parameter(parameter)): Layer(
                weights[name], self._fixed["bias"] == "int32"
            )
            for name, parameter in self._behind.items()
        }

        def visit(number: int, output: Tensor, exact: Exact | None) -> tuple[Tensor, Grid | None]:
            if number not in at:
                return output, None
            grid = Grid(at[number].scale.detach(), -at[number].low)
            return at[number](output, None if exact is None else exact(grid)), grid

        visitor = Visitor(visit, lambda weight: layers.get(id(weight)))

        def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            image = visitor.start(args[0])
            visitor.__enter__()  # type: ignore[no-untyped-call]
            return (image,)

        def leave(*_: Any) -> None:
            visitor.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            visitor.stop()

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
