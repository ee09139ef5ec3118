"""Checkpoints of timm models: a safetensors file with timm's own keys, and beside it the JSON that rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import nn

from pipeline.core import artifacts
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError, nearest
from pipeline.core.validation import schema_name
from pipeline.data.decoding import CROPS
from pipeline.models.description import Description

REMEDY = "write it again with `dvc repro`"
REMOTE_SOURCES = (
    "hf-hub",
    "hf_hub",
    "local-dir",
    "local_dir",
)  # prefixes of names that timm loads elsewhere


SCHEMA = schema_name(Description)
KEYS = {  # section -> where params.yaml names its model, and where the model's arguments
    "teach": ("teach.model", "teach.kwargs"),
    "distill": ("distill.student", "distill.student_kwargs"),
}


def create(
    name: str,
    kwargs: dict[str, Any],
    num_classes: int,
    section: str = "model",
    pretrained: bool = False,
) -> nn.Module:
    """Call `timm.create_model` for the model that `section` of params.yaml names.

    Raises UserError: unknown name, pretrained weights that cannot be downloaded, kwargs the model does not take.
    """
    where, arguments = KEYS.get(section, (section, "its kwargs"))
    source, _, rest = name.partition(":")
    if source in REMOTE_SOURCES and rest:
        architecture = rest.split("/")[-1].split(".")[0]
        raise UserError(
            f"{where}: got {name!r}; expected a model name of timm {timm.__version__}, because every stage "
            f"rebuilds the model offline; use the architecture's name ({architecture!r}?) with its weights as a "
            ".safetensors file in teach.weights"
        )
    if not timm.is_model(name):
        raise UserError(
            f"{where}: got {name!r}; expected a model of timm {timm.__version__}; {_similar(name)}"
        )
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **kwargs
        )
    except Exception as error:  # timm raises whatever the constructor or the hub raised
        if pretrained:
            raise UserError(
                f"{where}: cannot download pretrained weights of {name} ({first_line(error)}); check the network, "
                "or set teach.weights to a .safetensors file or scratch"
            ) from error
        raise UserError(
            f"{where}: cannot create {name} with {kwargs} ({first_line(error)}); correct {arguments}"
        ) from error
    return model


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _similar(name: str) -> str:
    import difflib

    names = timm.list_models()
    close = [n for n in names if n.startswith(f"{name}_")][:3]
    close = close or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"nearest: {', '.join(close)}" if close else nearest(name, ["see timm.list_models()"])


def preprocessing(model: nn.Module, image_size: int, crop_mode: str = "center") -> dict[str, Any]:
    """Describe how a uint8 RGB image becomes the model's input; part of the ONNX metadata."""
    config = resolve_model_data_config(model)
    return {
        "image_size": image_size,
        "interpolation": "bicubic",
        "crop": CROPS[crop_mode],
        "mean": [float(v) for v in config["mean"]],
        "std": [float(v) for v in config["std"]],
    }


def save(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write `path` (.safetensors) and the JSON beside it, which holds the SHA-256 of the weights.

    Raises UserError: cannot write.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # One metadata key only: safetensors writes several in no fixed order, and one seed must give the same bytes.
    rebuild = {key: description[key] for key in ("model", "kwargs")}
    metadata = {"cakd": json.dumps(rebuild, sort_keys=True)}
    try:
        with atomic(path) as temporary:
            save_file(state, temporary, metadata=metadata)
            weights = artifacts.sha256(temporary)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None
    artifacts.write_json(
        path.with_suffix(".json"), {"schema": SCHEMA, **description, "weights_sha256": weights}
    )


def describe(path: Path) -> dict[str, Any]:
    """Read the JSON beside a checkpoint and check it against the SHA-256 of the weights.

    Keys: model, kwargs, num_classes, classes, preprocess {image_size, mean, std, ...}, role, weights_sha256.
    Raises UserError: either file missing, or the weights are not those the JSON was written with.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; expected a .safetensors file; correct the path or run `dvc repro`"
        )
    description = artifacts.read(path.with_suffix(".json"), Description, REMEDY)
    expected = description["weights_sha256"]
    if (got := artifacts.sha256(path)) != expected:
        raise UserError(
            f"{path}: damaged or replaced: SHA-256: got {got[:12]}; expected {expected[:12]}, that of "
            f"{path.with_suffix('.json').name}; write both again with `dvc repro`"
        )
    return description


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the plain timm model in eval mode; also its description. Raises UserError: as `describe`."""
    description = describe(path)
    model = create(description["model"], description["kwargs"], description["num_classes"])
    load_weights(model, path)
    return model.eval(), description


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors state dict strictly. Raises UserError: not safetensors, keys or shapes differ."""
    try:
        state = load_file(path)
        check_dtypes(state, model, path)
        model.load_state_dict(state, strict=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected weights as .safetensors; correct the path"
        ) from None
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype torch does not have
        raise UserError(
            f"{path}: not a safetensors file ({error}); pickles (.pt, .pth) are never loaded; convert it"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"{path}: the weights do not fit the model ({str(error)[:300]}); give those of this model"
        ) from None


def check_dtypes(state: dict[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    """Check that weights are floating where the model's are. Raises UserError: integers, which torch casts."""
    for name, expected in model.state_dict().items():
        got = state.get(name, expected)
        if got.is_floating_point() != expected.is_floating_point():
            raise UserError(
                f"{path}: the weights do not fit the model ({name}: got {got.dtype}; expected {expected.dtype}); "
                "give those of this model"
            )


def count(model: nn.Module, image_size: int) -> dict[str, int]:
    """Count parameters, and multiply-accumulates of one image (half of PyTorch's FLOP count)."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        device = next(model.parameters()).device
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
    }
