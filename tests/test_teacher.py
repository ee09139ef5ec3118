"""The teacher's taps and replay are timm's own computation; what cannot be replayed is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.distill.kernels.reference import attention, heads
from pipeline.models import checkpoint, probe, teacher
from tests.conftest import VIT

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = {  # what it shows -> timm's name, further kwargs, prefix tokens
    "class token": ("vit_tiny_patch16_224", {}, 1),
    "no prefix, average pool": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False},
        0,
    ),
    "LayerScale and qk-norm": ("vit_tiny_patch16_224", {"init_values": 0.1, "qk_norm": True}, 1),
    "four registers": ("vit_base_patch16_reg4_gap_256", {}, 4),
    "class token and four registers": ("vit_small_patch14_reg4_dinov2", {}, 5),
    "distillation token, two heads": ("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": ("deit3_small_patch16_224", {}, 1),
    "pre-norm": ("vit_base_patch32_clip_224", {}, 1),
    "attention pool": ("vit_base_patch16_siglip_224", {}, 0),
    "norm behind attention and MLP": ("vit_base_patch16_rpn_224", {}, 0),
    "attention and MLP side by side, split qkv": ("vit_base_patch16_xp_224", {}, 1),
    "rotary, split qkv, SwiGLU": ("eva02_tiny_patch14_224", {}, 1),
    "fused qkv with separate biases": ("eva_giant_patch14_224", {}, 1),
    "rotary, registers": ("vit_small_patch16_dinov3", {}, 5),
    "rotary, attention pool": ("vit_pe_core_tiny_patch16_384", {}, 1),
}
REFUSED = {
    "maxvit_tiny_rw_224": "got MaxxVit, whose token order is unknown; expected one of timm's vit_",
    "samvit_base_patch16_224": "got VisionTransformerSAM, whose token order is unknown",
    "hiera_tiny_224": "got Hiera, whose token order is unknown",
}
WITHOUT_ATTENTION = {
    "swin_tiny_patch4_window7_224": "no sequence of blocks over one grid of tokens",
    "beit_base_patch16_224": "its attention adds a position bias to the scores",
    "vit_relpos_small_patch16_224": "its attention adds a position bias to the scores",
    "cait_xxs24_224": "its last block makes 2 attention calls, not one",
    "convit_tiny": "its last block makes 0 attention calls, not one",
    "vit_small_patch16_18x2_224": "its last block makes 2 attention calls, not one",
    "resnet18": "it is a CNN",
    "repvgg_a0": "it is a CNN",
    "convnext_atto": "it is a CNN",
    "densenet121": "it is a CNN",
    "dla46_c": "it is a CNN",
    "efficientnet_lite0": "it is a CNN",
    "mobilenetv3_small_100": "it is a CNN",
    "regnetx_002": "it is a CNN",
    "vit_dlittle_patch16_reg1_gap_256": "its last block makes 2 attention calls, not one",
}


def saved(path, name, kwargs):
    torch.manual_seed(0)
    vit = checkpoint.create(name, kwargs, 10)
    for parameter in vit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    description = {
        "role": "teacher",
        "model": name,
        "kwargs": kwargs,
        "num_classes": 10,
        "classes": [str(n) for n in range(10)],
        "preprocess": checkpoint.preprocessing(vit, 32),
    }
    checkpoint.save(path, vit, description)
    return vit.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_last_block_gives_timms_own_logits_tokens_and_attention_bit_by_bit(
    family, tmp_path, prepared
):
    name, more, prefix = FAMILIES[family]
    path = tmp_path / "teacher.safetensors"
    vit = saved(path, name, SMALL | more)
    live = teacher.load(path)
    batch = views.whole(prepared.images.squares(range(8)))
    x_l, tokens = live.look(batch)
    with torch.no_grad():
        x = views.normalise(batch, live.description["preprocess"])
        final = vit.forward_features(x)
        assert torch.equal(tokens.logits, vit(x))
        h = vit.fc_norm(final) if isinstance(vit.norm, torch.nn.Identity) else final
        assert torch.equal(tokens.h, h[:, prefix:])
    assert live.spec.prefix == prefix and live.spec.grid == (8, 8)
    assert x_l.shape == (8, 64 + prefix, 32) and tokens.qkv.shape == (8, 64, 3, 2, 16)
    for tail in (live.tail, teacher.load_tail(path)):
        replayed = tail(x_l)
        for part in ("qkv", "h", "logits"):
            assert torch.equal(getattr(tokens, part), getattr(replayed, part)), part


def test_a_block_with_a_rotary_embedding_of_its_own_cannot_be_replayed_and_says_so(tmp_path):
    path = tmp_path / "teacher.safetensors"
    saved(path, "vit_small_patch16_rope_mixed_224", SMALL)
    assert "rotary embedding of its own depth" in teacher.load(path).spec.not_replayable
    with pytest.raises(UserError, match="its own depth.*set cache.layout: qkvh"):
        teacher.load_tail(path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_whose_tokens_are_in_no_known_order_is_refused_by_name_and_reason(name):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=10)
    with pytest.raises(UserError, match=REFUSED[name]):
        probe.probe_teacher(vit)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_a_teacher_without_one_global_attention_says_why_and_keeps_its_tokens(name):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=10)
    found = probe.probe_teacher(vit)
    assert WITHOUT_ATTENTION[name] in found.no_attention and found.n_heads == 0
    assert found.width == vit.num_features and min(found.grid) >= 7


def test_a_teacher_that_ends_in_other_tokens_than_its_grid_is_refused():
    with torch.device("meta"):  # its class token joins in the tenth block
        vit = timm.create_model("convit_tiny", depth=2)
    with pytest.raises(
        UserError,
        match="got 196 final tokens; expected 1 prefix tokens and 14x14 patches; correct teach.kwargs",
    ):
        probe.probe_teacher(vit)


def test_q_k_v_are_the_ones_timm_feeds_its_attention(tmp_path, prepared, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    saved(
        path,
        "vit_tiny_patch16_224",
        VIT | {"qk_norm": True, "class_token": False, "global_pool": "avg"},
    )
    live = teacher.load(path)
    seen = []
    exact = F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append((q, k, v))
        return exact(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    tokens = live(views.whole(prepared.images.squares(range(4))))
    for ours, timms in zip(heads(tokens.qkv), seen[-1], strict=True):
        torch.testing.assert_close(ours, timms)
    torch.testing.assert_close(
        attention(*heads(tokens.qkv)), exact(*seen[-1]), rtol=1e-4, atol=1e-5
    )


def test_only_the_last_block_is_built_and_read_for_the_replay(teacher_path, monkeypatch):
    read = []
    exact = teacher.safe_open

    def spy(*args, **kwargs):
        file = exact(*args, **kwargs)
        return Spy(file)

    class Spy:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(teacher, "safe_open", spy)
    tail = teacher.load_tail(teacher_path)
    assert len(tail.vit.blocks) == 1 and len(read) == len(tail.state_dict())
    assert {name.split(".")[1] for name in read if name.startswith("blocks.")} == {"1"}
    assert {name.split(".")[0] for name in read} == {"blocks", "norm", "head"}
    kept = sum(p.numel() for p in tail.parameters())
    whole = sum(p.numel() for p in teacher.load(teacher_path).parameters())
    assert kept < 0.55 * whole


def test_the_teacher_never_trains_and_never_gets_a_gradient(teacher_path, prepared):
    live = teacher.load(teacher_path)
    live.train()
    assert not live.training and not any(m.training for m in live.modules())
    tokens = live(views.whole(prepared.images.squares(range(2))))
    assert not any(t.requires_grad for t in (tokens.qkv, tokens.h, tokens.logits))
    assert not any(p.requires_grad for p in live.parameters())


def test_a_misspelt_model_is_refused_with_the_nearest_names():
    with pytest.raises(
        UserError,
        match="got 'vit_tinny_patch16_224'; expected a model of timm .*; nearest: vit_tiny_patch16_224",
    ):
        checkpoint.create("vit_tinny_patch16_224", {}, 10)


def test_a_checkpoint_that_was_swapped_for_another_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    saved(path, "vit_tiny_patch16_224", VIT)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="SHA-256: got .*; expected .*, that of teacher.json"):
        checkpoint.load(path)


def test_a_rotary_teachers_tail_moves_to_another_device_as_a_whole():
    vit = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2).eval()
    tail = teacher.TeacherTail(vit, probe.probe_teacher(vit)).to("meta")
    found = tail(torch.empty(2, 5, 192, device="meta"))
    assert found.qkv.device.type == "meta" and found.qkv.shape == (2, 4, 3, 3, 64)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", VIT | {"depth": 1}),
        ("beit_base_patch16_224", VIT),
    ],
)
def test_a_teacher_without_a_normed_layer_before_its_last_refuses_before_last(
    name, kwargs, tmp_path
):
    path = tmp_path / "teacher.safetensors"
    saved(path, name, kwargs)
    live = teacher.load(path)
    live.read_at("last")
    with pytest.raises(UserError, match="cakd.layer: got before_last with .*; set it to last"):
        live.read_at("before_last")
