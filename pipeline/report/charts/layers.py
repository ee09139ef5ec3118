"""Sensitivity of the layers to int8: SQNR of the logits with one layer alone in int8. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, WIDTH

ROW = 15  # px
MOST = 24  # layers of the chart, the most sensitive ones


def draw(layers: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """A bar a layer, the most sensitive first; outlined where it stays in float. None without layers."""
    if not layers:
        return None
    rows = sorted(layers, key=lambda layer: float(layer["sqnr_db"]))[:MOST]
    names = [layer["name"] for layer in rows]
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, ROW * len(rows) + 46, canvas.room_for(names))
        for at, layer in enumerate(rows):
            face = "none" if layer["floating"] else COLOUR["student"]
            axis.barh(at, layer["sqnr_db"], 0.62, facecolor=face, edgecolor=COLOUR["student"])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        canvas.named_rows(axis, names, range(len(rows)))
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x")
        axis.set_xlabel("SQNR of the logits (dB)")
        return canvas.svg(figure, name, f"Sensitivity to int8 of {len(rows)} layers")
