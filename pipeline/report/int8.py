"""int8 of the exported student, by calibration and after fine-tuning, from quantize.json. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
