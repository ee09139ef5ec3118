"""A checkpoint run by PyTorch in eager mode: the yardstick of the other runtimes. Imports torch when opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporters import metadata
from exporters.session import Array, Unavailable


class EagerSession:
    """`pipeline.models.load` behind the session interface."""

    precision_effective = "fp32"

    def __init__(self, artefact: Path, threads: int) -> None:
        try:
            import torch

            from pipeline import models
        except ImportError as error:
            raise Unavailable(f"torch eager needs torch and timm: {error}") from None
        torch.set_num_threads(threads)
        self._torch = torch
        self._model, description = models.load(artefact)
        size = int(description["preprocess"]["image_size"])
        self.runtime = f"torch {torch.__version__} eager"
        self.input_shape: tuple[int | None, int, int, int] = (None, 3, size, size)
        self.metadata: Mapping[str, str] = metadata.flatten(description)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> logits (B, K) float32."""
        with self._torch.inference_mode():
            logits: Array = self._model(self._torch.from_numpy(x)).numpy().copy()
        return logits
