"""The ViT teacher: its trunk up to the last block's input, and the last block replayed with its taps.

Q, K, V, h and the logits are all functions of x_L (B, P+N, D), the input of the last block; P prefix tokens
(class, distillation, registers), N patch tokens, D width, H heads, d = D / H. So x_L is what the store keeps.
Where the last block has no Q, K, V for eq. 2 (Swin, BEiT, ...), x is the final features instead, and the tail is
the head alone: such a teacher gives h and logits (decision 16).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.models import checkpoint
from pipeline.models.probe import (
    ROW_BY_ROW,
    AttentionRecorder,
    TeacherSpec,
    channels_last,
    fuse_attention,
    in_rows,
    probe_teacher,
)

Layer = Literal["last", "before_last"]
TAIL = ("blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")


@dataclass(frozen=True)
class TeacherOutputs:
    """What the method takes from the teacher, detached: patch tokens only, prefix sliced off (decision 5)."""

    qkv: (
        Tensor | None
    )  # (B, N, 3, H, d), as they enter the dot product: after any qk-norm and rotary embedding
    h: Tensor  # (B, N, D), after the final LayerNorm
    logits: Tensor  # (B, K)
    pooled: Tensor | None = (
        None  # (B, D), the input of the head; None where a store without x_L gave the rest
    )

    @property
    def attention_inputs(self) -> Tensor:
        """Q, K, V (B, N, 3, H, d), where the teacher is known to have them."""
        assert self.qkv is not None  # a method that reads them was refused otherwise
        return self.qkv


class TeacherTail(nn.Module):
    """The last block, the final norm and the head of a ViT: x_L -> Tokens.

    `layer` says where h and Q, K, V are read (decision 4): `last`, or `before_last`, where h is norm1(x_L), the
    normed output of the block before, and Q, K, V are that block's, which a replay of x_L does not have.
    """

    layer: Layer = "last"

    def __init__(self, vit: Any, found: TeacherSpec) -> None:
        super().__init__()
        self.vit, self.spec = vit, found
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, x_l: Tensor) -> TeacherOutputs:
        """Replay: x_L (B, P+N, D) float32 -> Tokens."""
        block = self.vit.blocks[-1]
        extra = {
            name: value.to(x_l.device) if isinstance(value, Tensor) else value
            for name, value in self.spec.extra.items()
        }
        with AttentionRecorder(block) as seen:
            final = self.vit.norm(block(x_l, **extra))
        return self._at_layer(self._tokens(seen, final), x_l, None)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """The whole ViT on normalised pixels (B, 3, S, S) -> x_L (B, P+N, D) float32, and Tokens, in one pass."""
        before = AttentionRecorder(self.vit.blocks[-2]) if self.layer == "before_last" else None
        with AttentionRecorder(self.vit.blocks[-1]) as seen, before or nullcontext():
            final = self.vit.forward_features(pixels)
        return seen.x, self._at_layer(self._tokens(seen, final), seen.x, before)

    def read_at(self, layer: Layer) -> None:
        """Choose the layer. Raises UserError: a teacher whose last block does not begin with a norm of x_L."""
        block = self.vit.blocks[-1] if hasattr(self.vit, "blocks") else None
        known = hasattr(block, "norm1") and type(block).__name__ != "ResPostBlock"
        if layer == "before_last" and (self.spec.no_attention or not known):
            raise UserError(
                f"distill.cakd.layer: got before_last with {type(self.vit).__name__}; expected a ViT whose last "
                "block begins with a norm of its input; use last"
            )
        self.layer = layer
        if layer == "before_last" and len(self.vit.blocks) > 1:
            fuse_attention(self.vit.blocks[-2])

    def _at_layer(
        self, tokens: TeacherOutputs, x_l: Tensor, before: AttentionRecorder | None
    ) -> TeacherOutputs:
        """The outputs with h and Q, K, V of the chosen layer."""
        if self.layer == "last":
            return tokens
        prefix = self.spec.prefix
        h = self.vit.blocks[-1].norm1(x_l)[:, prefix:]
        return replace(tokens, h=h, qkv=before.qkv(prefix) if before is not None else None)

    def _tokens(self, seen: AttentionRecorder, final: Tensor) -> TeacherOutputs:
        """What the last block did and the normed features (B, P+N, D) it led to -> Tokens."""
        prefix = self.spec.prefix
        pooled, logits = self._answer(final)
        return TeacherOutputs(seen.qkv(prefix), self._normed(final)[:, prefix:], logits, pooled)

    def _normed(self, final: Tensor) -> Tensor:
        # With average pooling timm keeps the final norm behind the pool; it is the same LayerNorm, token-wise.
        behind = isinstance(getattr(self.vit, "norm", None), nn.Identity)
        normed: Tensor = self.vit.fc_norm(final) if behind else final
        return normed

    def _answer(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the head (B, D), and the logits (B, K)."""
        vit = self.vit
        return vit.forward_head(final, pre_logits=True), vit.forward_head(final)


class TeacherHead(TeacherTail):
    """The tail of a teacher without Q, K, V to be had: its head alone. x is the final features (B, P+N, D)."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> TeacherOutputs:
        """Replay: x (B, P+N, D) float32 -> Tokens without qkv."""
        pooled, logits = self._answer(self._as_timm_has_it(x))
        return TeacherOutputs(None, self._normed(x)[:, self.spec.prefix :], logits, pooled)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """The whole teacher on normalised pixels (B, 3, S, S) -> x (B, P+N, D) float32, and Tokens."""
        x = in_rows(self.vit.forward_features(pixels), self.vit).contiguous()
        return x, self(x)

    def _as_timm_has_it(self, x: Tensor) -> Tensor:
        """The inverse of `in_rows`."""
        if isinstance(self.vit, (*ROW_BY_ROW, MultiScaleVit)):
            return x
        grid = self.spec.grid
        made: Tensor = x.unflatten(1, grid) if channels_last(self.vit) else x.mT.unflatten(2, grid)
        return made


def tail_of(vit: Any, found: TeacherSpec) -> TeacherTail:
    """The part of a teacher that makes Tokens of what a store keeps."""
    return (TeacherHead if found.no_attention else TeacherTail)(vit, found)


class Teacher(nn.Module):
    """A whole frozen ViT, always in eval mode and without gradient."""

    def __init__(self, vit: Any, description: dict[str, Any]) -> None:
        super().__init__()
        self.spec = probe_teacher(vit, description["preprocess"]["image_size"])
        self.tail = tail_of(vit, self.spec)
        self.description = description
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - a teacher never leaves eval mode
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def look(self, batch: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """Views (B, 3, S, S) uint8 -> x (B, P+N, D) float32, what a store keeps, and Tokens, in one pass."""
        return self.tail.look(views.normalise(batch, self.description["preprocess"]))

    def forward(self, batch: Tensor) -> TeacherOutputs:
        """Views (B, 3, S, S) uint8 -> Tokens."""
        return self.look(batch)[1]


def load(path: Path) -> Teacher:
    """The whole teacher from artifacts/teacher. Raises UserError: damaged, not fit to teach."""
    vit, description = checkpoint.load(path)
    return Teacher(vit, description)


def load_tail(path: Path) -> TeacherTail:
    """Only the last block, norm and head: the weights of the other blocks are not read from the disk.

    Raises UserError: damaged, not fit to teach, a block that x_L alone does not replay.
    """
    description = checkpoint.describe(path)
    with torch.device("meta"):
        vit = _build(description, description["kwargs"])
        found = probe_teacher(vit, description["preprocess"]["image_size"])
    if found.not_replayable:
        raise UserError(
            f"{path}: {found.not_replayable}, so x_L alone does not replay it; set cache.layout: qkvh"
        )
    kept = set(TAIL)
    if found.no_attention:
        kept.remove("blocks")
    else:  # built for true, one block deep: what the block is given beside x_L is computed
        vit = _build(description, {**description["kwargs"], "depth": 1})
        found = probe_teacher(vit)
    for name in [*vit._modules, *vit._parameters]:
        if name not in kept:
            setattr(vit, name, None)
    vit.load_state_dict(_tail_weights(path, set(vit.state_dict())), strict=True, assign=True)
    return tail_of(vit, found)


def _build(description: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return checkpoint.create(description["model"], kwargs, description["num_classes"]).eval()


def _tail_weights(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors of a one-block ViT from a deep one's file: `blocks.0` is its last block."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        last = max(
            (int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=0
        )
        source = {w: w.replace("blocks.0.", f"blocks.{last}.", 1) for w in wanted}
        return {w: file.get_tensor(source[w]) for w in wanted if source[w] in names}
