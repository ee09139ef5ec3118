"""The structure of a teacher, probed by running it once on an image of zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.byobnet import ByobNet
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.dla import DLA
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.mvitv2 import MultiScaleVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.core.errors import UserError
from pipeline.models.checkpoint import first_line

# Final features (B, P+N, D): P prefix tokens, then the patches row by row.
ROW_BY_ROW = (VisionTransformer, Eva, Beit, VisionTransformerRelPos, Cait, ConVit)
# Final features as a map, or as tokens without prefix.
MAPS = (SwinTransformer, SwinTransformerV2, PyramidVisionTransformerV2, MultiScaleVit)
# Final features as a map (B, D, h, w): the control that asks whether a student needs a ViT to learn from.
CNNS = (ResNet, ByobNet, ConvNeXt, DenseNet, DLA, EfficientNet, MobileNetV3, RegNet)
ALLOWED = (
    "timm's vit_*, deit*, beit*, dinov2, dinov3, eva02_*, vit_pe_* and relpos models; for h and logits only also "
    "cait, convit, swin, swinv2, pvt_v2, mvitv2 and CNNs as resnet, regnet, efficientnet, mobilenet or convnext"
)

NO_BLOCKS = "it has no sequence of blocks over one grid of tokens"

SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention


class AttentionRecorder(TorchFunctionMode):
    """Records one block's forward pass: its input x (B, P+N, D), its other arguments, its attention calls.

    Q, K, V are the arguments of scaled_dot_product_attention, so fused and split projections, qk-norm and rotary
    embeddings need no code of their own here.
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
        """Return Q, K, V (B, N, 3, H, d) of the first attention call, without the first `prefix` tokens."""
        args, _ = self.calls[0]
        return torch.stack([tensor[:, :, prefix:].transpose(1, 2) for tensor in args[:3]], dim=2)


@dataclass(frozen=True)
class TeacherSpec:
    """Sizes of a teacher, and the reasons why it has no Q, K, V or its last block cannot be replayed."""

    prefix: int  # P
    grid: tuple[int, int]  # rows and columns of patches, N together
    n_heads: int  # H; 0 where `no_attention` says why
    width: int  # D
    extra: dict[
        str, Any
    ]  # arguments of the last block beside x_L: in some families a rotary embedding
    not_replayable: str | None  # None: x_L alone gives the last block's output
    no_attention: str | None = None  # None: the last block has the Q, K, V of eq. 2


def probe_teacher(vit: Any, image_size: int | None = None) -> TeacherSpec:
    """Run a teacher on one image of zeros and describe it; `image_size` for models that are built for no size.

    Raises UserError: a class whose token order is not known here, or another number of tokens than its grid has.
    """
    if not isinstance(vit, (*ROW_BY_ROW, *MAPS, *CNNS)):
        raise UserError(
            f"teach.model: got {type(vit).__name__}, whose token order is unknown; expected one of {ALLOWED}; "
            "choose another"
        )
    blocks: Any = getattr(vit, "blocks", None)
    of_cnn = isinstance(vit, CNNS)  # whose blocks, where they are called so, are stages
    has_blocks = not of_cnn and isinstance(blocks, nn.Sequential | nn.ModuleList)
    if has_blocks and not len(blocks):
        raise UserError(
            f"teach.model: {type(vit).__name__}: got {len(blocks)} blocks; expected 1 or more; correct "
            "teach.kwargs (depth)"
        )
    recorder = AttentionRecorder(blocks[-1] if has_blocks else vit)
    if has_blocks:
        fuse_attention(recorder.block)
    final = _probe_with_zeros(vit, recorder, image_size)
    reason: str | None = "it is a CNN" if of_cnn else NO_BLOCKS
    if has_blocks:
        reason = _without_attention(vit, recorder)
    mixed = "its last block has a learned rotary embedding of its own depth"
    prefix, rows = int(getattr(vit, "num_prefix_tokens", 0)), in_rows(final, vit)
    grid = _grid(vit, final, prefix)
    if rows.shape[1] != prefix + math.prod(grid):
        raise UserError(
            f"teach.model: {type(vit).__name__}: got {rows.shape[1]} final tokens; expected {prefix} prefix "
            f"tokens and {grid[0]}x{grid[1]} patches; correct teach.kwargs"
        )
    return TeacherSpec(
        prefix=prefix,
        grid=grid,
        n_heads=0 if reason else recorder.calls[0][0][0].shape[1],
        width=rows.shape[2],
        extra=recorder.extra,
        not_replayable=mixed if getattr(vit, "rope_mixed", False) and not reason else None,
        no_attention=reason,
    )


def fuse_attention(block: nn.Module) -> None:
    """Make a block call scaled_dot_product_attention, which is recorded, even under TIMM_FUSED_ATTN=0."""
    layer: Any
    for layer in block.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = True


def _without_attention(vit: Any, recorder: AttentionRecorder) -> str | None:
    """Return why Q, K, V of the last block are not those of eq. 2; None where they are."""
    if len(recorder.calls) != 1:
        return f"its last block makes {len(recorder.calls)} attention calls, not one"
    (q, k, *_), kwargs = recorder.calls[0]
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
def _probe_with_zeros(vit: Any, recorder: AttentionRecorder, image_size: int | None) -> Tensor:
    """Run the ViT on one image of zeros in eval mode; its final features (1, ...)."""
    default = (image_size,) * 2 if image_size else vit.pretrained_cfg["input_size"][1:]
    size = getattr(getattr(vit, "patch_embed", None), "img_size", None) or default
    parameter = next(vit.parameters())
    was_training = vit.training
    vit.eval()
    image = torch.zeros(1, 3, *size, device=parameter.device)
    try:
        with recorder:
            final: Tensor = vit.forward_features(image)
        logits: Tensor = vit.forward_head(final)
    except Exception as error:  # a network raises whatever its layers raise
        raise UserError(
            f"teach.model: {type(vit).__name__} does not take an RGB image of {size[0]}x{size[1]} px "
            f"({first_line(error)}); correct teach.kwargs"
        ) from None
    if logits.ndim != 2:
        raise UserError(
            f"teach.model: {type(vit).__name__}: got logits of shape {tuple(logits.shape)} for one image; "
            "expected (1, classes); correct teach.kwargs (global_pool)"
        )
    vit.train(was_training)
    return final


def _grid(vit: Any, final: Tensor, prefix: int) -> tuple[int, int]:
    """Return height and width of the patch grid of the final features (1, ...)."""
    patches = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    if patches is not None and final.dim() == 3:
        rows, columns = patches
    elif final.dim() == 4:
        rows, columns = final.shape[1:3] if channels_last(vit) else final.shape[2:]
    else:
        rows = columns = math.isqrt(final.shape[1] - prefix)
    return int(rows), int(columns)


def channels_last(vit: Any) -> bool:
    """Whether timm's final features are a map (B, h, w, D)."""
    return getattr(vit, "output_fmt", "NCHW") == "NHWC"


def in_rows(final: Tensor, vit: Any) -> Tensor:
    """Reshape timm's final features, a map or tokens, to (B, P+N, D), row by row."""
    if final.dim() == 3:
        return final
    return final.flatten(1, 2) if channels_last(vit) else final.flatten(2).mT
