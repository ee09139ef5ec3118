"""Structure of a teacher: what its last block computes, probed by running it once on zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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

from pipeline.core.errors import UserError
from pipeline.models.checkpoint import first_line

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

SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention


class AttentionRecorder(TorchFunctionMode):
    """Sees one block at work: its input x (B, P+N, D), what else it was given, and its attention calls.

    Asking the block itself makes fused and split projections, qk-norm and rotary embeddings all alike.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> AttentionRecorder:
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
        """(B, N, 3, H, d) of the block's attention call, without its first `prefix` tokens."""
        args, _ = self.calls[0]
        return torch.stack([part[:, :, prefix:].transpose(1, 2) for part in args[:3]], dim=2)


@dataclass(frozen=True)
class TeacherSpec:
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


def probe_teacher(vit: Any, image_size: int | None = None) -> TeacherSpec:
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
    if a_row and not len(blocks):
        raise UserError(
            f"teach.model: {type(vit).__name__} has {len(blocks)} blocks; expected 1 or more; correct "
            "teach.kwargs (depth)"
        )
    seen = AttentionRecorder(blocks[-1] if a_row else vit)
    if a_row:
        fuse_attention(seen.block)
    final = _probe_with_zeros(vit, seen, image_size)
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
    return TeacherSpec(
        prefix=prefix,
        grid=grid,
        n_heads=0 if reason else seen.calls[0][0][0].shape[1],
        width=rows.shape[2],
        extra=seen.extra,
        not_replayable=mixed if getattr(vit, "rope_mixed", False) and not reason else None,
        no_attention=reason,
    )


def fuse_attention(block: nn.Module) -> None:
    """Route attention through the one call that AttentionRecorder records, whatever TIMM_FUSED_ATTN is."""
    layer: Any
    for layer in block.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = True


def _without_attention(vit: Any, seen: AttentionRecorder) -> str | None:
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
def _probe_with_zeros(vit: Any, seen: AttentionRecorder, image_size: int | None) -> Tensor:
    """The final features of one zero image, in eval mode."""
    default = (image_size,) * 2 if image_size else vit.pretrained_cfg["input_size"][1:]
    size = getattr(vit.patch_embed, "img_size", None) or default
    parameter = next(vit.parameters())
    was_training = vit.training
    vit.eval()
    image = torch.zeros(1, 3, *size, device=parameter.device)
    try:
        with seen:
            final: Tensor = vit.forward_features(image)
        logits: Tensor = vit.forward_head(final)
    except Exception as error:  # a network raises whatever its layers raise
        raise UserError(
            f"teach.model: {type(vit).__name__} does not take an RGB image of {size[0]}x{size[1]} px "
            f"({first_line(error)}); correct teach.kwargs"
        ) from None
    if logits.ndim != 2:
        raise UserError(
            f"teach.model: {type(vit).__name__} gives logits of shape {tuple(logits.shape)} for one image; "
            "expected (1, classes); correct teach.kwargs (global_pool)"
        )
    vit.train(was_training)
    return final


def _grid(vit: Any, final: Tensor, prefix: int) -> tuple[int, int]:
    """Height and width of the grid that the final features (1, ...) stand on."""
    patches = getattr(vit.patch_embed, "grid_size", None)
    if patches is not None and final.dim() == 3:
        rows, columns = patches
    elif final.dim() == 4:
        rows, columns = final.shape[1:3] if channels_last(vit) else final.shape[2:]
    else:
        rows = columns = math.isqrt(final.shape[1] - prefix)
    return int(rows), int(columns)


def channels_last(vit: Any) -> bool:
    """Whether timm leaves the final features as a map (B, h, w, D)."""
    return getattr(vit, "output_fmt", "NCHW") == "NHWC"


def in_rows(final: Tensor, vit: Any) -> Tensor:
    """Final features as timm leaves them, a map or tokens, -> (B, P+N, D), row by row."""
    if final.dim() == 3:
        return final
    return final.flatten(1, 2) if channels_last(vit) else final.flatten(2).mT
