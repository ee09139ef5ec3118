"""A checkpoint run by PyTorch, eager or compiled, a yardstick of the other runtimes. Imports torch when opened."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from exporters.artifact import metadata
from exporters.artifact.session import Array, Unavailable


class EagerSession:
    """`pipeline.models.checkpoint.load` behind the session interface; `compiled` compiles it in the first call."""

    precision_effective = "fp32"

    def __init__(self, artefact: Path, threads: int, compiled: bool = False) -> None:
        try:
            import torch

            from pipeline.models import checkpoint
        except ImportError as error:
            raise Unavailable(f"torch targets need torch and timm: {error}") from None
        torch.set_num_threads(threads)
        self._torch, self._models = torch, checkpoint
        self._model, description = checkpoint.load(artefact)
        self._call = torch.compile(self._model) if compiled else self._model
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
        return self._models.count(self._model, self._size)
