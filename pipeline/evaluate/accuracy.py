"""Accuracy of a model, clean and under noise disjoint from Trans."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, Seed
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.evaluate.corruptions import NOISE, Pixels, noisy

SCHEMA = "cakd.accuracy/1"


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """`evaluate:` how the models are judged."""

    split: Literal["train", "val", "test"] = "test"
    batch: PositiveInt = 100
    ece_bins: PositiveInt = 15
    seed: Seed = 0  # of the noise


@torch.no_grad()
def predict(model: nn.Module, images: Pixels, preprocess: dict[str, Any], batch: int) -> Tensor:
    """Logits (n, K) of whole images (n, S, S, 3)."""
    parts = [
        model(views.normalise(views.whole(images[at : at + batch]), preprocess))
        for at in range(0, len(images), batch)
    ]
    return torch.cat(parts)


def figures(logits: Tensor, labels: Tensor, bins: int) -> dict[str, float | int]:
    """top1, top5 (of K where K < 5), nll, ece as fractions, and n. logits (n, K), labels (n,).

    ECE: mean |accuracy - confidence| over equal-width bins of the top confidence, weighted by their share
    (Guo et al., ICML 2017).
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    confidence, hit = logits.softmax(dim=1).amax(dim=1), ranked[:, 0].float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, which, hit - confidence).abs().sum() / len(labels)
    return {
        "top1": hit.mean().item(),
        "top5": ranked.any(dim=1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": gap.item(),
        "n": len(labels),
    }


def judged_rows(prepared: Prepared, config: Evaluate) -> NDArray[np.int64]:
    """The labelled rows of the split."""
    rows = prepared.rows(config.split)
    return rows[prepared.labels[rows] >= 0]


def accuracy(
    model: nn.Module, preprocess: dict[str, Any], prepared: Prepared, config: Evaluate
) -> tuple[dict[str, Any], Tensor]:
    """`clean`, `noisy` (every kind of noise on every image) and `noisy_by_kind`; logits (n, K) of the clean."""
    rows = judged_rows(prepared, config)
    images, labels = prepared.images[rows], torch.from_numpy(prepared.labels[rows])
    ids = tuple(prepared.sha256[r] for r in rows)
    by_kind = {
        kind: predict(model, noisy(images, ids, kind, config.seed), preprocess, config.batch)
        for kind in NOISE
    }
    clean = predict(model, images, preprocess, config.batch)
    every = torch.cat(list(by_kind.values()))
    found = {
        "clean": figures(clean, labels, config.ece_bins),
        "noisy": figures(every, labels.repeat(len(by_kind)), config.ece_bins),
        "noisy_by_kind": {k: figures(v, labels, config.ece_bins) for k, v in by_kind.items()},
    }
    return found, clean
