"""PyTorch, eager or compiled, as the baseline of the other runtimes. Imports torch when it opens a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.artifact import metadata
from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.artifact.session import Array, Unavailable

if TYPE_CHECKING:
    from torch import nn


class EagerSession:
    """A loaded checkpoint behind the session interface; `compiled` compiles it in the first call."""

    precision_effective = "fp32"

    def __init__(
        self, model: nn.Module, description: dict[str, Any], threads: int, compiled: bool = False
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._model = torch, model
        self._call = torch.compile(model) if compiled else model
        self._size = int(description["preprocess"]["image_size"])
        self.runtime = f"torch {torch.__version__} {'compile' if compiled else 'eager'}"
        self.input_shape: tuple[int | None, int, int, int] = (None, 3, self._size, self._size)
        self.metadata: Mapping[str, str] = metadata.flatten(description)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> logits (B, K) float32."""
        with self._torch.inference_mode():
            logits: Array = self._call(self._torch.from_numpy(x)).numpy().copy()
        return logits

    @cached_property
    def counted(self) -> dict[str, int]:
        """`params` and `macs` of one image, as `pipeline.models.checkpoint.count` counts them."""
        from pipeline.models import checkpoint

        return checkpoint.count(self._model, self._size)


def make(_: str, model: str, exported: Exported, out: Path, __: Build) -> Path:
    """Copy MODEL.safetensors and MODEL.json into the folder `out`; returns the checkpoint."""
    for suffix in (".json", ".safetensors"):
        shutil.copy(exported.folder / f"{model}{suffix}", out)
    return out / f"{model}.safetensors"


def _runtime(name: str, compiled: bool) -> Runtime:
    def open_checkpoint(artefact: Path, threads: int, _: str) -> EagerSession:
        try:
            from pipeline.models import checkpoint
        except ImportError as error:
            raise Unavailable(
                f"torch targets: torch or timm is not installed ({error}); `pip install torch timm`"
            ) from None
        return EagerSession(*checkpoint.load(artefact), threads, compiled)

    packages = ("pipeline.models.checkpoint",)
    return Runtime(name, ".safetensors", make, open_checkpoint, packages)


EAGER, COMPILED = _runtime("torch-eager", False), _runtime("torch-compile", True)
