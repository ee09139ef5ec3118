"""Batch norms of a timm CNN folded into its convolutions, as the exporter folds them, and back to timm's keys."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models.byobnet import RepVggBlock
from timm.models.convnext import ConvNeXtBlock
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from pipeline.core.errors import UserError

Norms = dict[str, str]  # batch norm -> its convolution, by module name


def fold(network: nn.Module, image_size: int) -> Norms:
    """Fold branches, batch norms and layer scales of a student in place; it then computes alike in both modes.

    Dropout and drop path go: the deployed network has neither. Raises UserError: a batch norm that follows no
    convolution.
    """
    norms = _pairs(network.eval(), image_size)
    for norm_name, convolution_name in norms.items():
        _fold_norm(network, norm_name, convolution_name)
    for module in network.modules():
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            _fold_scale(module)
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout | DropPath):
                setattr(module, name, nn.Identity())
    if hasattr(network, "drop_rate"):
        network.drop_rate = 0.0  # type: ignore[assignment]  # timm's classifiers drop out by this number alone
    return norms


def merge_branches(network: nn.Module) -> nn.Module:
    """The network with the branches of RepVGG merged; others unchanged.

    Raises UserError: other blocks with branches of their own for the training, which cannot be written back.
    """
    merged: nn.Module = reparameterize_model(network)
    changed = {name for name, _ in merged.named_parameters()} ^ {
        n for n, _ in network.named_parameters()
    }
    blocks = tuple(name for name, m in network.named_modules() if isinstance(m, RepVggBlock))
    if foreign := sorted(name for name in changed if not name.startswith(blocks)):
        raise UserError(
            f"quantize.steps: got a {type(network).__name__}, which merges {foreign[0]} at its export; expected "
            "a network without branches for the training, or RepVGG; set quantize.steps: 0"
        )
    return merged


def _pairs(network: nn.Module, image_size: int) -> Norms:
    """Each batch norm with the convolution whose output it reads, from one run on zeros."""
    names = {module: name for name, module in network.named_modules()}
    made: dict[int, str] = {}
    outputs: list[Tensor] = []  # kept, so that no id is used twice
    norms: Norms = {}

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = names[module]
        outputs.append(output)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) not in made:
            raise UserError(
                f"quantize.steps: got a {type(network).__name__}, whose batch norm {names[module]} follows no "
                "convolution; expected convolution, then batch norm; set quantize.steps: 0"
            )
        norms[names[module]] = made[id(args[0])]

    handles = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(before))
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return norms


@torch.no_grad()
def _fold_norm(network: nn.Module, norm_name: str, convolution_name: str) -> None:
    norm, convolution = network.get_submodule(norm_name), network.get_submodule(convolution_name)
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d)
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    convolution.weight.mul_(factor.view(-1, 1, 1, 1))
    before = 0.0 if convolution.bias is None else convolution.bias
    convolution.bias = nn.Parameter(norm.bias + factor * (before - norm.running_mean))
    parent, _, name = norm_name.rpartition(".")
    rest = [layer for key in ("drop", "act") if (layer := getattr(norm, key, None)) is not None]
    setattr(network.get_submodule(parent), name, nn.Sequential(*rest))


@torch.no_grad()
def _fold_scale(block: ConvNeXtBlock) -> None:
    """Fold gamma into the last layer; it stays as a buffer of ones, which the exporter drops."""
    assert block.gamma is not None
    last, gamma = block.mlp.fc2, block.gamma.detach().clone()
    last.weight.mul_(gamma.view(-1, *[1] * (last.weight.ndim - 1)))
    if last.bias is not None:
        last.bias.mul_(gamma)
    del block.gamma
    block.register_buffer("gamma", torch.ones_like(gamma))


@torch.no_grad()
def unfold(folded: nn.Module, plain: nn.Module, norms: Norms) -> nn.Module:
    """Write a folded network's weights into `plain`, a student as timm creates it, with batch norms that only add.

    Exporting `plain` folds back to exactly the weights of `folded`.
    """
    state = plain.state_dict()
    own = folded.state_dict()
    branches = {n: m for n, m in plain.named_modules() if isinstance(m, RepVggBlock)}
    for name, block in branches.items():
        _unmerge(block, own[f"{name}.reparam_conv.weight"], own[f"{name}.reparam_conv.bias"])
    inside = tuple(f"{name}." for name in branches)
    for name, value in own.items():
        if name in state and not name.startswith(inside):
            state[name].copy_(value)
    for norm_name, convolution_name in norms.items():
        norm, convolution = plain.get_submodule(norm_name), plain.get_submodule(convolution_name)
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d)
        if convolution.bias is not None:
            convolution.bias.zero_()
        _only_add(norm, own[f"{convolution_name}.bias"])
    return plain.eval()


def _unmerge(block: Any, weight: Tensor, bias: Tensor) -> None:
    """Put a merged kernel into the k x k branch of a RepVggBlock; the others add zero."""
    block.conv_kxk.conv.weight.copy_(weight)
    _only_add(block.conv_kxk.bn, bias)
    block.conv_1x1.conv.weight.zero_()
    _only_add(block.conv_1x1.bn, torch.zeros_like(bias))
    if block.identity is not None:
        _only_add(block.identity, torch.zeros_like(bias))
        block.identity.weight.zero_()


def _only_add(norm: nn.BatchNorm2d, bias: Tensor) -> None:
    """Make a batch norm, in eval mode, add `bias` and nothing else, to the bit."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.weight.fill_(1)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    one = torch.ones(())
    variance = one - norm.eps
    while variance + norm.eps != 1:
        variance = torch.nextafter(variance, one if variance + norm.eps < 1 else -one)
    norm.running_var.fill_(variance)
