"""The ViT teacher: its trunk up to the last block's input, and the last block replayed with its taps.

Q, K, V, h and the logits are all functions of x_L (B, P+N, D), the input of the last block; P prefix tokens
(class, distillation, registers), N patch tokens, D width, H heads, d = D / H. So x_L is what the store keeps.
Where the last block has no Q, K, V for eq. 2 (Swin, BEiT, ...), x is the final features instead, and the tail is
the head alone: such a teacher gives h and logits (decision 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.eva import Eva
from timm.models.mvitv2 import MultiScaleVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline import models, views
from pipeline.errors import UserError

ROW_BY_ROW = (
    VisionTransformer,
    Eva,
    Beit,
    VisionTransformerRelPos,
    Cait,
    ConVit,
)  # behind P prefix tokens
MAPS = (SwinTransformer, SwinTransformerV2, PyramidVisionTransformerV2, MultiScaleVit)
ALLOWED = (
    "of timm the vit_*, deit*, beit*, dinov2, dinov3, eva02_*, vit_pe_* and relpos models, and for h and logits "
    "alone cait, convit, swin, swinv2, pvt_v2 and mvitv2"
)
TAIL = ("blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")
SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Tokens:
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
    """Sizes of a teacher, and why its attention or its last block's replay is not to be had, where it is not."""

    prefix: int  # P
    grid: tuple[int, int]  # rows and columns of patches, N in all
    n_heads: int  # 0 where `no_attention` says why
    width: int
    extra: dict[
        str, Any
    ]  # what the last block is given beside x_L: the rotary embedding, in some families
    not_replayable: str | None
    no_attention: str | None = None


def anatomy(vit: Any, image_size: int | None = None) -> Anatomy:
    """Look at one zero image in a ViT; `image_size` counts where the model itself is built for no size.

    Raises UserError, by name and reason: its tokens stand in an order that is not known here.
    """
    if not isinstance(vit, (*ROW_BY_ROW, *MAPS)):
        raise UserError(
            f"teach.model: {type(vit).__name__} cannot teach: its tokens stand in an order not known here; "
            f"allowed: {ALLOWED}"
        )
    blocks: Any = getattr(vit, "blocks", None)
    a_row = isinstance(blocks, nn.Sequential | nn.ModuleList)
    seen = Witness(blocks[-1] if a_row else vit)
    if a_row:
        _fuse(seen.block)
    final = _look_at_nothing(vit, seen, image_size)
    reason = (
        _without_attention(vit, seen)
        if a_row
        else "it has no row of blocks over one grid of tokens"
    )
    mixed = "its last block has a learned rotary embedding of its own depth"
    prefix, rows = int(getattr(vit, "num_prefix_tokens", 0)), in_rows(final, vit)
    grid = _grid(vit, final, prefix)
    if rows.shape[1] != prefix + math.prod(grid):
        raise UserError(
            f"teach.model: {type(vit).__name__} cannot teach: it ends in {rows.shape[1]} tokens, not {prefix} and "
            f"{grid[0]}x{grid[1]}; correct teach.kwargs"
        )
    return Anatomy(
        prefix=prefix,
        grid=grid,
        n_heads=0 if reason else seen.calls[0][0][0].shape[1],
        width=rows.shape[2],
        extra=seen.extra,
        not_replayable=mixed if getattr(vit, "rope_mixed", False) and not reason else None,
        no_attention=reason,
    )


def _fuse(block: nn.Module) -> None:
    """Let attention go through the one call that a Witness sees, whatever TIMM_FUSED_ATTN says."""
    layer: Any
    for layer in block.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = True


def _without_attention(vit: Any, seen: Witness) -> str | None:
    """Why Q, K, V of the last block are not what eq. 2 takes; None where they are."""
    if len(seen.calls) != 1:
        return f"its last block makes {len(seen.calls)} attention calls, not one"
    (q, k, *_), kwargs = seen.calls[0]
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    if q.shape[2] != tokens or k.shape[2] != tokens:
        return f"its last block attends from {q.shape[2]} to {k.shape[2]} of {tokens} tokens"
    if kwargs.get("attn_mask") is not None:
        return (
            "its attention adds a position bias to the scores, which softmax(Q K^T / sqrt d) lacks"
        )
    if q.shape[1] * q.shape[3] != vit.embed_dim:
        return f"its {q.shape[1]} heads of {q.shape[3]} are not its width {vit.embed_dim}"
    return None


@torch.no_grad()
def _look_at_nothing(vit: Any, seen: Witness, image_size: int | None) -> Tensor:
    """The final features of one zero image, in eval mode."""
    default = (image_size,) * 2 if image_size else vit.pretrained_cfg["input_size"][1:]
    size = getattr(vit.patch_embed, "img_size", None) or default
    parameter = next(vit.parameters())
    was_training = vit.training
    vit.eval()
    with seen:
        final: Tensor = vit.forward_features(torch.zeros(1, 3, *size, device=parameter.device))
    vit.train(was_training)
    return final


def _grid(vit: Any, final: Tensor, prefix: int) -> tuple[int, int]:
    """Height and width of the grid that the final features (1, ...) stand on."""
    patches = getattr(vit.patch_embed, "grid_size", None)
    if patches is not None and final.dim() == 3:
        rows, columns = patches
    elif final.dim() == 4:
        rows, columns = final.shape[1:3] if _channels_last(vit) else final.shape[2:]
    else:
        rows = columns = math.isqrt(final.shape[1] - prefix)
    return int(rows), int(columns)


def _channels_last(vit: Any) -> bool:
    return getattr(vit, "output_fmt", "NCHW") == "NHWC"


def in_rows(final: Tensor, vit: Any) -> Tensor:
    """Final features as timm leaves them, a map or tokens, -> (B, P+N, D), row by row."""
    if final.dim() == 3:
        return final
    return final.flatten(1, 2) if _channels_last(vit) else final.flatten(2).mT


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
        return self._tokens(seen, final)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tokens]:
        """The whole ViT on normalised pixels (B, 3, S, S) -> x_L (B, P+N, D) float32, and Tokens, in one pass."""
        with Witness(self.vit.blocks[-1]) as seen:
            final = self.vit.forward_features(pixels)
        return seen.x, self._tokens(seen, final)

    def _tokens(self, seen: Witness, final: Tensor) -> Tokens:
        """What the last block did and the normed features (B, P+N, D) it led to -> Tokens."""
        prefix = self.anatomy.prefix
        pooled, logits = self._answer(final)
        return Tokens(seen.qkv(prefix), self._normed(final)[:, prefix:], logits, pooled)

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
    def forward(self, x: Tensor) -> Tokens:
        """Replay: x (B, P+N, D) float32 -> Tokens without qkv."""
        pooled, logits = self._answer(self._as_timm_has_it(x))
        return Tokens(None, self._normed(x)[:, self.anatomy.prefix :], logits, pooled)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tokens]:
        """The whole teacher on normalised pixels (B, 3, S, S) -> x (B, P+N, D) float32, and Tokens."""
        x = in_rows(self.vit.forward_features(pixels), self.vit).contiguous()
        return x, self(x)

    def _as_timm_has_it(self, x: Tensor) -> Tensor:
        """The inverse of `in_rows`."""
        if isinstance(self.vit, (*ROW_BY_ROW, MultiScaleVit)):
            return x
        grid = self.anatomy.grid
        made: Tensor = x.unflatten(1, grid) if _channels_last(self.vit) else x.mT.unflatten(2, grid)
        return made


def tail_of(vit: Any, found: Anatomy) -> TeacherTail:
    """The part of a teacher that makes Tokens of what a store keeps."""
    return (TeacherHead if found.no_attention else TeacherTail)(vit, found)


class Teacher(nn.Module):
    """A whole frozen ViT, always in eval mode and without gradient."""

    def __init__(self, vit: Any, description: dict[str, Any]) -> None:
        super().__init__()
        self.anatomy = anatomy(vit, description["preprocess"]["image_size"])
        self.tail = tail_of(vit, self.anatomy)
        self.description = description
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - a teacher never leaves eval mode
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def look(self, batch: Tensor) -> tuple[Tensor, Tokens]:
        """Views (B, 3, S, S) uint8 -> x (B, P+N, D) float32, what a store keeps, and Tokens, in one pass."""
        return self.tail.look(views.normalise(batch, self.description["preprocess"]))

    def forward(self, batch: Tensor) -> Tokens:
        """Views (B, 3, S, S) uint8 -> Tokens."""
        return self.look(batch)[1]


def load(path: Path) -> Teacher:
    """The whole teacher from artifacts/teacher. Raises UserError: damaged, not fit to teach."""
    vit, description = models.load(path)
    return Teacher(vit, description)


def load_tail(path: Path) -> TeacherTail:
    """Only the last block, norm and head: the weights of the other blocks are not read from the disk.

    Raises UserError: damaged, not fit to teach, a block that x_L alone does not replay.
    """
    description = models.describe(path)
    with torch.device("meta"):
        vit = _build(description, description["kwargs"])
        found = anatomy(vit, description["preprocess"]["image_size"])
    if found.not_replayable:
        raise UserError(
            f"{path}: {found.not_replayable}, so x_L alone does not replay it; set cache.layout: qkvh"
        )
    kept = set(TAIL)
    if found.no_attention:
        kept.remove("blocks")
    else:  # built for true, one block deep: what the block is given beside x_L is computed
        vit = _build(description, {**description["kwargs"], "depth": 1})
        found = anatomy(vit)
    for name in [*vit._modules, *vit._parameters]:
        if name not in kept:
            setattr(vit, name, None)
    vit.load_state_dict(_tail_weights(path, set(vit.state_dict())), strict=True, assign=True)
    return tail_of(vit, found)


def _build(description: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return models.create(description["model"], kwargs, description["num_classes"]).eval()


def _tail_weights(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The tensors of a one-block ViT from a deep one's file: `blocks.0` is its last block."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        last = max(
            (int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=0
        )
        source = {w: w.replace("blocks.0.", f"blocks.{last}.", 1) for w in wanted}
        return {w: file.get_tensor(source[w]) for w in wanted if source[w] in names}
