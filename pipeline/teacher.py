"""The ViT teacher: its trunk up to the last block's input, and the last block replayed with its taps.

Q, K, V, h and the logits are all functions of x_L (B, P+N, D), the input of the last block; P prefix tokens
(class, registers), N patch tokens, D width, H heads, d = D / H. So x_L is what the store keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipeline import models, views
from pipeline.errors import UserError

TRUNK = ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre", "patch_drop", "pos_drop")


@dataclass(frozen=True)
class Tokens:
    """What the method takes from the teacher, detached: patch tokens only, prefix sliced off (decision 5)."""

    qkv: Tensor  # (B, N, 3, H, d), after any qk-norm
    h: Tensor  # (B, N, D), after the final LayerNorm
    logits: Tensor  # (B, K)


class TeacherTail(nn.Module):
    """The last block, the final norm and the head of a ViT: x_L -> Tokens."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        check_supported(vit)
        self.vit = vit
        self.prefix = int(vit.num_prefix_tokens)
        self.n_heads = int(self._block.attn.num_heads)
        self.width = int(vit.embed_dim)

    @property
    def _block(self) -> Any:
        return self.vit.blocks[-1]

    @torch.no_grad()
    def forward(self, x_l: Tensor) -> Tokens:
        """Replay: x_L (B, P+N, D) float32 -> Tokens."""
        final = self.vit.norm(self._block(x_l))
        # With average pooling timm keeps the final norm behind the pool; it is the same LayerNorm, token-wise.
        h = self.vit.fc_norm(final) if isinstance(self.vit.norm, nn.Identity) else final
        return Tokens(self._qkv(x_l), h[:, self.prefix :], self.vit.forward_head(final))

    def _qkv(self, x_l: Tensor) -> Tensor:
        attn = self._block.attn
        y = self._block.norm1(x_l)
        batch, tokens, _ = y.shape
        qkv = attn.qkv(y).reshape(batch, tokens, 3, self.n_heads, -1)[:, self.prefix :]
        q, k, v = qkv.unbind(2)
        return torch.stack((attn.q_norm(q), attn.k_norm(k), v), dim=2)


class Teacher(nn.Module):
    """A whole frozen ViT: views in, x_L or Tokens out, always in eval mode and without gradient."""

    def __init__(self, vit: VisionTransformer, description: dict[str, Any]) -> None:
        super().__init__()
        self.tail = TeacherTail(vit)
        self.description = description
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - a teacher never leaves eval mode
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def block_input(self, batch: Tensor) -> Tensor:
        """Views (B, 3, S, S) uint8 -> x_L (B, P+N, D) float32."""
        vit = self.tail.vit
        x: Tensor = vit.patch_embed(views.normalise(batch, self.description["preprocess"]))
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        for block in vit.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, batch: Tensor) -> Tokens:
        """Views (B, 3, S, S) uint8 -> Tokens."""
        tokens: Tokens = self.tail(self.block_input(batch))
        return tokens


def check_supported(vit: nn.Module) -> None:
    """Raise UserError, by name and reason, for a teacher whose last block cannot be replayed."""
    name = type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"teach.model: {name} has no global attention over one token grid that this release can replay; "
            "allowed: models of timm's VisionTransformer class (vit_*, deit3_*, dinov2)"
        )
    block = vit.blocks[-1]
    attn = getattr(block, "attn", None)
    if not isinstance(block, Block) or not isinstance(attn, Attention):
        raise UserError(
            f"teach.model: last block is {type(block).__name__} with {type(attn).__name__}; "
            "allowed: timm's pre-norm Block with Attention; choose another ViT"
        )


def load(path: Path) -> Teacher:
    """The whole teacher from artifacts/teacher. Raises UserError: damaged, not a replayable ViT."""
    vit, description = models.load(path)
    return Teacher(vit, description)  # type: ignore[arg-type]


def load_tail(path: Path) -> TeacherTail:
    """Only the last block, norm and head: the other blocks are never read from the disk."""
    description = models.describe(path)
    with torch.device("meta"):
        vit = models.create(description["model"], description["kwargs"], description["num_classes"])
    check_supported(vit)
    last = len(vit.blocks) - 1  # type: ignore[arg-type]
    vit.blocks = vit.blocks[last:]  # type: ignore[index]
    for name in TRUNK:
        if hasattr(vit, name):
            setattr(vit, name, None)
    state: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
            if key.startswith(f"blocks.{last}.") or not key.startswith(("blocks.", *TRUNK)):
                state[key] = file.get_tensor(key)
    vit.load_state_dict(state, strict=True, assign=True)
    tail = TeacherTail(vit)  # type: ignore[arg-type]
    tail.requires_grad_(False)
    return tail.eval()


def token_grid(vit: Any) -> tuple[int, int]:
    """Height and width of the patch grid."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)
