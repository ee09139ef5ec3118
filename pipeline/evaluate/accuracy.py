"""Accuracy of a model on clean images and under noise that the training transforms do not have."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, Seed
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.evaluate.corruptions import NOISE, Pixels, noisy

SCHEMA = "cakd.accuracy/1"
BATCH = 100  # images a call: a whole student's activations stay in the cache of a CPU
BINS = 15  # of the calibration error, as in Guo et al.


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """`evaluate:` how the models are judged."""

    split: Literal["train", "val", "test"] = "test"
    seed: Seed = 0  # of the noise


@torch.no_grad()
def predict(
    model: nn.Module, images: Pixels, preprocess: dict[str, Any], batch: int = BATCH
) -> Tensor:
    """Compute logits (n, K) for whole images (n, S, S, 3) uint8."""
    logits = [
        model(views.normalise(views.whole(images[start : start + batch]), preprocess))
        for start in range(0, len(images), batch)
    ]
    return torch.cat(logits)


def figures(logits: Tensor, labels: Tensor, bins: int = BINS) -> dict[str, float | int]:
    """Compute top1, top5 (of K where K < 5), nll and ece as fractions, and n. logits (n, K), labels (n,).

    ECE: mean |accuracy - confidence| over equal-width bins of the top confidence, weighted by their share
    (Guo et al., ICML 2017).
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    confidence, hit = logits.softmax(dim=1).amax(dim=1), ranked[:, 0].float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    # Per bin the sum of hit - confidence is its share times (accuracy - confidence), times n.
    ece = torch.zeros(bins).index_add_(0, index, hit - confidence).abs().sum() / len(labels)
    return {
        "top1": hit.mean().item(),
        "top5": ranked.any(dim=1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": ece.item(),
        "n": len(labels),
    }


def labelled_rows(prepared: Prepared, config: Evaluate) -> NDArray[np.int64]:
    """Return the labelled rows of the split."""
    rows = prepared.rows(config.split)
    return rows[prepared.labels[rows] >= 0]


def accuracy(
    model: nn.Module, preprocess: dict[str, Any], prepared: Prepared, config: Evaluate
) -> tuple[dict[str, Any], Tensor]:
    """Evaluate a model: `clean`, `noisy` (all kinds on all images), `noisy_by_kind`; and clean logits (n, K)."""
    rows = labelled_rows(prepared, config)
    images, labels = prepared.images[rows], torch.from_numpy(prepared.labels[rows])
    ids = tuple(prepared.sha256[r] for r in rows)
    by_kind = {
        kind: predict(model, noisy(images, ids, kind, config.seed), preprocess) for kind in NOISE
    }
    clean = predict(model, images, preprocess)
    all_kinds = torch.cat(list(by_kind.values()))
    result = {
        "clean": figures(clean, labels),
        "noisy": figures(all_kinds, labels.repeat(len(by_kind))),
        "noisy_by_kind": {k: figures(v, labels) for k, v in by_kind.items()},
    }
    return result, clean
