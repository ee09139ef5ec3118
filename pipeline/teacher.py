"""The ViT teacher: its trunk up to the last block's input, and the last block replayed with its taps.

Q, K, V, h and the logits are all functions of x_L (B, P+N, D), the input of the last block; P prefix tokens
(class, distillation, registers), N patch tokens, D width, H heads, d = D / H. So x_L is what the store keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline import models, views
from pipeline.errors import UserError

FAMILIES = (VisionTransformer, Eva)  # their tokens stand row by row behind the prefix
ALLOWED = "timm's VisionTransformer and Eva classes (vit_*, deit*, beit3_*, dinov2, dinov3, eva02_*, vit_pe_*)"
TAIL = ("blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")
SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Tokens:
    """What the method takes from the teacher, detached: patch tokens only, prefix sliced off (decision 5)."""

    qkv: Tensor  # (B, N, 3, H, d), as they enter the dot product: after any qk-norm and rotary embedding
    h: Tensor  # (B, N, D), after the final LayerNorm
    logits: Tensor  # (B, K)
    pooled: Tensor | None = (
        None  # (B, D), the input of the head; None where a store without x_L gave the rest
    )


class Witness(TorchFunctionMode):
    """Sees one block at work: its input x (B, P+N, D), what else it was given, and its attention calls.

    Asking the block itself makes fused and split projections, qk-norm and rotary embeddings all alike.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> Witness:
        self._hook = self.block.register_forward_pre_hook(self._enter_block, with_kwargs=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def _enter_block(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.x: Tensor = args[0]
        self.extra = kwargs
        self.calls = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.calls.append((args, kwargs))
        return func(*args, **kwargs)

    def qkv(self, prefix: int) -> Tensor:
        """(B, N, 3, H, d) of the only attention call, without its first `prefix` tokens."""
        (args, _), = self.calls  # fmt: skip
        return torch.stack([part[:, :, prefix:].transpose(1, 2) for part in args[:3]], dim=2)


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a teacher that is fit to teach, and why its last block cannot be replayed, where it cannot."""

    prefix: int  # P
    grid: tuple[int, int]  # rows and columns of patches, N in all
    n_heads: int
    width: int
    extra: dict[
        str, Any
    ]  # what the last block is given beside x_L: the rotary embedding, in some families
    not_replayable: str | None


def anatomy(vit: Any) -> Anatomy:
    """Look at one zero image in a ViT. Raises UserError, by name and reason: not fit to teach by its tokens."""
    reason, seen = _unfit(vit)
    if reason is not None:
        raise UserError(
            f"teach.model: {type(vit).__name__} cannot teach: {reason}; allowed: {ALLOWED}"
        )
    mixed = "its last block has a learned rotary embedding of its own depth"
    q = seen.calls[0][0][0]
    return Anatomy(
        prefix=int(vit.num_prefix_tokens),
        grid=token_grid(vit),
        n_heads=q.shape[1],
        width=int(vit.embed_dim),
        extra=seen.extra,
        not_replayable=mixed if getattr(vit, "rope_mixed", False) else None,
    )


def _unfit(vit: Any) -> tuple[str | None, Witness]:
    """Why the queries, keys, values and tokens of the last block are not to be had; None where they are."""
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(vit, "patch_embed"):
        return "it has no row of blocks with global attention over one token grid", Witness(vit)
    seen = Witness(blocks[-1])
    if not isinstance(vit, FAMILIES):
        return _unknown_family(vit, seen), seen
    _look_at_nothing(vit, seen)
    if len(seen.calls) != 1:
        return f"its last block makes {len(seen.calls)} attention calls, not one", seen
    (q, k, *_), kwargs = seen.calls[0]
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    if q.shape[2] != tokens or k.shape[2] != tokens:
        return f"its last block attends from {q.shape[2]} to {k.shape[2]} of {tokens} tokens", seen
    if kwargs.get("attn_mask") is not None:
        return "its attention adds a position bias to the scores", seen
    if q.shape[1] * q.shape[3] != vit.embed_dim:
        return f"its {q.shape[1]} heads of {q.shape[3]} are not its width {vit.embed_dim}", seen
    return None, seen


def _unknown_family(vit: Any, seen: Witness) -> str:
    try:
        _look_at_nothing(vit, seen)
    except Exception as error:  # whatever a stranger's forward pass raises
        return f"its blocks cannot be followed ({type(error).__name__})"
    if any(kwargs.get("attn_mask") is not None for _, kwargs in seen.calls):
        return (
            "its attention adds a position bias to the scores, which softmax(Q K^T / sqrt d) lacks"
        )
    if len(seen.calls) != 1:
        return f"its last block makes {len(seen.calls)} attention calls, not one"
    return "the order of its tokens is not known here"


@torch.no_grad()
def _look_at_nothing(vit: Any, seen: Witness) -> None:
    """One zero image through the features, in eval mode."""
    size = getattr(vit.patch_embed, "img_size", None) or vit.pretrained_cfg["input_size"][1:]
    parameter = next(vit.parameters())
    was_training = vit.training
    vit.eval()
    with seen:
        vit.forward_features(torch.zeros(1, 3, *size, device=parameter.device))
    vit.train(was_training)


class TeacherTail(nn.Module):
    """The last block, the final norm and the head of a ViT: x_L -> Tokens."""

    def __init__(self, vit: Any, found: Anatomy) -> None:
        super().__init__()
        self.vit, self.anatomy = vit, found
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, x_l: Tensor) -> Tokens:
        """Replay: x_L (B, P+N, D) float32 -> Tokens."""
        block = self.vit.blocks[-1]
        extra = {
            name: value.to(x_l.device) if isinstance(value, Tensor) else value
            for name, value in self.anatomy.extra.items()
        }
        with Witness(block) as seen:
            final = self.vit.norm(block(x_l, **extra))
        return self.tokens(seen, final)

    def tokens(self, seen: Witness, final: Tensor) -> Tokens:
        """What the last block did and the normed features (B, P+N, D) it led to -> Tokens."""
        vit, prefix = self.vit, self.anatomy.prefix
        # With average pooling timm keeps the final norm behind the pool; it is the same LayerNorm, token-wise.
        h = vit.fc_norm(final) if isinstance(vit.norm, nn.Identity) else final
        pooled = vit.forward_head(final, pre_logits=True)
        return Tokens(seen.qkv(prefix), h[:, prefix:], vit.forward_head(final), pooled)


class Teacher(nn.Module):
    """A whole frozen ViT, always in eval mode and without gradient."""

    def __init__(self, vit: Any, description: dict[str, Any]) -> None:
        super().__init__()
        self.anatomy = anatomy(vit)
        self.tail = TeacherTail(vit, self.anatomy)
        self.description = description
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - a teacher never leaves eval mode
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def look(self, batch: Tensor) -> tuple[Tensor, Tokens]:
        """Views (B, 3, S, S) uint8 -> x_L (B, P+N, D) float32, and Tokens, in one pass."""
        vit = self.tail.vit
        x = views.normalise(batch, self.description["preprocess"])
        with Witness(vit.blocks[-1]) as seen:
            final = vit.forward_features(x)
        return seen.x, self.tail.tokens(seen, final)

    def forward(self, batch: Tensor) -> Tokens:
        """Views (B, 3, S, S) uint8 -> Tokens."""
        return self.look(batch)[1]


def load(path: Path) -> Teacher:
    """The whole teacher from artifacts/teacher. Raises UserError: damaged, not fit to teach."""
    vit, description = models.load(path)
    return Teacher(vit, description)


def load_tail(path: Path) -> TeacherTail:
    """Only the last block, norm and head: the other blocks are neither built nor read from the disk.

    Raises UserError: damaged, not fit to teach, a block that x_L alone does not replay.
    """
    description = models.describe(path)
    shallow = {**description["kwargs"], "depth": 1}
    vit: Any = models.create(description["model"], shallow, description["num_classes"]).eval()
    found = anatomy(vit)
    if found.not_replayable:
        raise UserError(
            f"{path}: {found.not_replayable}, so x_L alone does not replay it; set cache.layout: qkvh"
        )
    for name in [*vit._modules, *vit._parameters]:
        if name not in TAIL:
            setattr(vit, name, None)
    vit.load_state_dict(_tail_weights(path, set(vit.state_dict())), strict=True, assign=True)
    return TeacherTail(vit, found)


def _tail_weights(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors of a one-block ViT from a deep one's file: `blocks.0` is its last block."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        last = max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
        source = {w: w.replace("blocks.0.", f"blocks.{last}.", 1) for w in wanted}
        return {w: file.get_tensor(source[w]) for w in wanted if source[w] in names}


def token_grid(vit: Any) -> tuple[int, int]:
    """Height and width of the patch grid."""
    rows, columns = vit.patch_embed.grid_size
    return int(rows), int(columns)
