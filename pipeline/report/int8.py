"""int8 of the exported student, by calibration and after fine-tuning, from quantize.json. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.wording import figure


def int8_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each target whose int8 was run: points lost by both kinds, agreement, latency over ort-fp32."""
    block = summary.get("int8")
    if not block:
        return []
    p50 = {t["target"]: t["student"].get("wall_ms", {}).get("p50") for t in summary["targets"]}
    by = {(row["target"], row["ranges"]): row for row in block["rows"]}
    rows = []
    for name in dict.fromkeys(row["target"] for row in block["rows"]):
        calibrated, trained = by[name, "calibration"], by[name, "training"]
        lost = {
            kind: None if row["top1"] is None else 100 * (block["fp32_top1"] - row["top1"])
            for kind, row in (("calibrated", calibrated), ("trained", trained))
        }
        own, reference = p50.get(name), p50.get("ort-fp32")
        rows.append(
            {
                "target": name,
                **lost,
                "agreement": trained["top1_agreement"],
                "sqnr_db": trained["sqnr_centered_db"],
                "time": own / reference if own and reference else None,
                "reason": trained["reason"],
            }
        )
    return rows


def left_in_float(summary: Mapping[str, Any]) -> str:
    """One sentence: the layers that the settings left in float, and their CPU time; empty where there are none.

    "Left in float: stem, head (2 of 21 layers); the network takes 1.08 (1.06 to 1.10) of its CPU time with ..."
    """
    block = summary.get("int8") or {}
    floating = block.get("floating") or {"layers": []}
    if not (layers := floating["layers"]):
        return ""
    names = ", ".join(layer["name"] for layer in layers)
    text = f"Left in float: {names} ({len(layers)} of {len(block['layers'])} layers)"
    inert = [layer["name"] for layer in layers if not layer["nodes"]]
    if inert:
        every = "all" if len(inert) == len(layers) else ", ".join(inert)
        text += f"; ONNX Runtime runs {every} in int8 all the same"
    if len(inert) == len(layers):
        return f"{text}."
    ratio = floating.get("cpu_ratio")
    if not ratio:
        return f"{text}; what that costs was not measured: {floating.get('reason')}."
    median, low, high = (figure(ratio[end]) for end in ("median", "ci_low", "ci_high"))
    took = f"the network takes {median} ({low} to {high}) of its CPU time with all layers in int8"
    return f"{text}; {took}, in ONNX Runtime."
