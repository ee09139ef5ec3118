"""The ViT teacher, whole or only its tail: the last block replayed from its stored input.

Q, K, V, h and the logits are all functions of x_L (B, P+N, D), the input of the last block; P prefix tokens
(class, distillation, registers), N patch tokens, D width, H heads, d = D / H. So the feature cache stores x_L.
Where the last block has no Q, K, V for eq. 2 (Swin, BEiT, a CNN, ...), x is the final features instead and the
tail is the head: such a teacher gives h and logits (docs/decisions.md, 16).
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
    CNNS,
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
    """What the methods read of the teacher, detached: patch tokens without the prefix (docs/decisions.md, 5)."""

    # (B, N, 3, H, d), as they enter the dot product: after any qk-norm and rotary embedding
    qkv: Tensor | None
    h: Tensor | None  # (B, N, D), after the final LayerNorm; None where only the logits were read
    logits: Tensor  # (B, K)
    # (B, D), the input of the head; None where the rest comes from a store without x_L
    pooled: Tensor | None = None

    @property
    def attention_inputs(self) -> Tensor:
        """Q, K, V (B, N, 3, H, d) of a teacher that has them."""
        assert (
            self.qkv is not None
        )  # `methods.table.check_attention` refuses a method that reads them otherwise
        return self.qkv

    @property
    def tokens(self) -> Tensor:
        """h (B, N, D) of a teacher of which not only the logits were read."""
        assert self.h is not None
        return self.h


class TeacherTail(nn.Module):
    """The last block, the final norm and the head of a ViT: from x_L to TeacherOutputs.

    `layer` says where h and Q, K, V are read (docs/decisions.md, 4): `last`, or `before_last`, where h is
    norm1(x_L), the normed output of the block before, and Q, K, V are that block's, which a replay does not have.
    """

    layer: Layer = "last"
    attention: bool = True  # whether the outputs have Q, K, V, which are copied

    def __init__(self, vit: Any, spec: TeacherSpec) -> None:
        super().__init__()
        self.vit, self.spec = vit, spec
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, x_l: Tensor) -> TeacherOutputs:
        """Replay the last block on x_L (B, P+N, D) float32."""
        block = self.vit.blocks[-1]
        extra = {
            name: value.to(x_l.device) if isinstance(value, Tensor) else value
            for name, value in self.spec.extra.items()
        }
        with AttentionRecorder(block) as recorder:
            final = self.vit.norm(block(x_l, **extra))
        return self._at_layer(self._outputs(recorder, final), x_l, None)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """Run the whole ViT on normalised pixels (B, 3, S, S): x_L (B, P+N, D) float32, and the outputs."""
        before = AttentionRecorder(self.vit.blocks[-2]) if self.layer == "before_last" else None
        with AttentionRecorder(self.vit.blocks[-1]) as recorder, before or nullcontext():
            final = self.vit.forward_features(pixels)
        return recorder.x, self._at_layer(self._outputs(recorder, final), recorder.x, before)

    def read_at(self, layer: Layer, attention: bool = True) -> None:
        """Set the layer, and whether the outputs have Q, K, V.

        Raises UserError: a teacher whose last block does not begin with a norm of x_L.
        """
        if layer == "before_last":
            block = self.vit.blocks[-1]
            if not hasattr(block, "norm1") or type(block).__name__ == "ResPostBlock":
                raise _no_layer_before(self.vit)
            if len(self.vit.blocks) > 1:
                fuse_attention(self.vit.blocks[-2])
        self.layer, self.attention = layer, attention

    def _at_layer(
        self, tokens: TeacherOutputs, x_l: Tensor, before: AttentionRecorder | None
    ) -> TeacherOutputs:
        """Replace h and Q, K, V by those of `layer`."""
        if self.layer == "last":
            return tokens
        prefix = self.spec.prefix
        h = self.vit.blocks[-1].norm1(x_l)[:, prefix:]
        qkv = before.qkv(prefix) if before is not None and self.attention else None
        return replace(tokens, h=h, qkv=qkv)

    def _outputs(self, recorder: AttentionRecorder, final: Tensor) -> TeacherOutputs:
        """Combine the recorded last block and the final features (B, P+N, D)."""
        prefix = self.spec.prefix
        pooled, logits = self._head(final)
        qkv = recorder.qkv(prefix) if self.attention else None
        return TeacherOutputs(qkv, self._normed(final)[:, prefix:], logits, pooled)

    def _normed(self, final: Tensor) -> Tensor:
        # With average pooling timm has the final LayerNorm after the pool (fc_norm); here it is applied per token.
        after_pool = isinstance(getattr(self.vit, "norm", None), nn.Identity)
        normed: Tensor = self.vit.fc_norm(final) if after_pool else final
        return normed

    def _head(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the input of the head (B, D), and the logits (B, K)."""
        vit = self.vit
        return vit.forward_head(final, pre_logits=True), vit.forward_head(final)


def _no_layer_before(vit: nn.Module) -> UserError:
    return UserError(
        f"distill.cakd.layer: got before_last with {type(vit).__name__}; expected a ViT of 2 blocks or more whose "
        "last block begins with a norm of its input; set it to last"
    )


class TeacherHead(TeacherTail):
    """The tail of a teacher without Q, K, V: only its head. x is the final features (B, P+N, D)."""

    def read_at(self, layer: Layer, attention: bool = True) -> None:  # noqa: ARG002 - it has none
        """Accept the last layer only. Raises UserError: before_last."""
        if layer == "before_last":
            raise _no_layer_before(self.vit)

    @torch.no_grad()
    def forward(self, x: Tensor) -> TeacherOutputs:
        """Run the head on x (B, P+N, D) float32; the outputs have no qkv."""
        pooled, logits = self._head(self._as_timm_has_it(x))
        return TeacherOutputs(None, self._normed(x)[:, self.spec.prefix :], logits, pooled)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """Run the whole teacher on normalised pixels (B, 3, S, S): x (B, P+N, D) float32, and the outputs."""
        x = in_rows(self.vit.forward_features(pixels), self.vit).contiguous()
        return x, self(x)

    def _as_timm_has_it(self, x: Tensor) -> Tensor:
        """Invert `in_rows`."""
        if isinstance(self.vit, (*ROW_BY_ROW, MultiScaleVit)):
            return x
        grid = self.spec.grid
        final: Tensor = x.unflatten(1, grid) if channels_last(self.vit) else x.mT.unflatten(2, grid)
        return final


def tail_of(vit: Any, spec: TeacherSpec) -> TeacherTail:
    """Build the part of a teacher that computes TeacherOutputs from a stored x."""
    return (TeacherHead if spec.no_attention else TeacherTail)(vit, spec)


class Teacher(nn.Module):
    """A whole frozen ViT, always in eval mode and without gradient."""

    def __init__(self, vit: Any, description: dict[str, Any]) -> None:
        super().__init__()
        self.spec = probe_teacher(vit, description["preprocess"]["image_size"])
        self.tail = tail_of(vit, self.spec)
        self.description = description
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - a teacher never leaves eval mode
        """Stay in eval mode whatever `mode` is."""
        return super().train(False)

    def read_at(self, layer: Layer, attention: bool = True) -> None:
        """Set the layer of h, Q, K and V, and whether Q, K, V are given.

        Raises UserError: a teacher that has no such layer.
        """
        if layer == "before_last" and not self.spec.no_attention and len(self.tail.vit.blocks) < 2:
            raise _no_layer_before(self.tail.vit)
        self.tail.read_at(layer, attention)

    def look(self, batch: Tensor) -> tuple[Tensor, TeacherOutputs]:
        """Run views (B, 3, S, S) uint8: x (B, P+N, D) float32, which a store keeps, and the outputs."""
        return self.tail.look(views.normalise(batch, self.description["preprocess"]))

    def forward(self, batch: Tensor) -> TeacherOutputs:
        """Compute the outputs for views (B, 3, S, S) uint8."""
        return self.look(batch)[1]


def load(path: Path) -> Teacher:
    """Load the whole teacher from its checkpoint. Raises UserError: damaged, or not supported."""
    vit, description = checkpoint.load(path)
    return Teacher(vit, description)


def load_tail(path: Path) -> TeacherTail:
    """Load only the last block, norm and head, without reading the other blocks' weights; a CNN whole.

    Raises UserError: damaged, not supported, a block that x_L alone does not replay.
    """
    description = checkpoint.describe(path)
    with torch.device("meta"):
        vit = _build(description, description["kwargs"])
        spec = probe_teacher(vit, description["preprocess"]["image_size"])
    if spec.not_replayable:
        raise UserError(
            f"{path}: got a teacher that cannot be replayed from x_L ({spec.not_replayable}); set cache.layout: "
            "qkvh"
        )
    if isinstance(vit, CNNS):  # small, and each names the parts of its head as it likes
        return load(path).tail
    needed = set(TAIL)
    if spec.no_attention:
        needed.remove("blocks")
    else:
        # Once more off the meta device, one block deep: a rotary embedding in `spec.extra` needs its values.
        vit = _build(description, {**description["kwargs"], "depth": 1})
        spec = probe_teacher(vit)
    for name in [*vit._modules, *vit._parameters]:
        if name not in needed:
            setattr(vit, name, None)
    vit.load_state_dict(_tail_weights(path, set(vit.state_dict())), strict=True, assign=True)
    return tail_of(vit, spec)


def _build(description: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return checkpoint.create(description["model"], kwargs, description["num_classes"]).eval()


def _tail_weights(path: Path, needed: set[str]) -> dict[str, Tensor]:
    """Read the tensors of a one-block ViT from a deep one's file: `blocks.0` is its last block."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        last = max(
            (int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=0
        )
        source = {w: w.replace("blocks.0.", f"blocks.{last}.", 1) for w in needed}
        return {w: file.get_tensor(source[w]) for w in needed if source[w] in names}
