"""Which operators of an artefact ran where, and in which precision: its nodes as the runtime counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

CONVERSION, OTHER = "conversion", "other"
# Nodes that only change the type or layout of a tensor, in ONNX Runtime, OpenVINO and TensorRT.
CONVERSIONS = frozenset(
    (
        *("QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput"),
        *("Reorder", "Convert", "Reformat"),
    )
)


class Node(NamedTuple):
    """A node as it was run: `location` is an execution provider or device, `precision` that of its input."""

    location: str
    operator: str
    precision: str | None  # None: neither floating-point nor int8, or the runtime does not say


def placement(source: str, nodes: Iterable[Node]) -> dict[str, Any]:
    """`source`, and `groups` of the nodes of a location and precision, the largest first: operator -> its nodes.

    The precision of CONVERSIONS is `conversion`, a missing one `other`.
    """
    groups: dict[tuple[str, str], Counter[str]] = {}
    for node in nodes:
        precision = CONVERSION if node.operator in CONVERSIONS else node.precision or OTHER
        groups.setdefault((node.location, precision), Counter())[node.operator] += 1
    return {
        "source": source,
        "groups": [
            {"location": where, "precision": precision, "operators": _ordered(operators)}
            for (where, precision), operators in sorted(
                groups.items(), key=lambda group: (-group[1].total(), group[0])
            )
        ],
        "reason": None,
    }


def _ordered(operators: Counter[str]) -> dict[str, int]:
    """The most frequent first; of equal ones by name."""
    return dict(sorted(operators.items(), key=lambda entry: (-entry[1], entry[0])))


def unplaced(reason: str) -> dict[str, Any]:
    """The same of an artefact whose runtime does not say it."""
    return {"source": None, "groups": [], "reason": reason}
