"""The teacher's taps and replay are timm's own computation; what cannot be replayed is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from pipeline import models, teacher, views
from pipeline.errors import UserError
from pipeline.kernels.reference import attention, heads
from tests.conftest import VIT

FAMILIES = {
    "class token": ("vit_tiny_patch16_224", VIT),
    "average pool": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 4}),
    "layer scale and qk-norm": (
        "vit_tiny_patch16_224",
        VIT | {"init_values": 0.1, "qk_norm": True},
    ),
    "pre-norm": ("vit_tiny_patch16_224", VIT | {"pre_norm": True}),
}


def saved(path, name, kwargs):
    torch.manual_seed(0)
    vit = models.create(name, kwargs, 10)
    for parameter in vit.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    description = {
        "model": name,
        "kwargs": kwargs,
        "num_classes": 10,
        "preprocess": models.preprocessing(vit, 32),
    }
    models.save(path, vit, description)
    return vit.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_last_block_gives_timms_own_logits_tokens_and_attention(
    family, tmp_path, prepared
):
    path = tmp_path / "teacher.safetensors"
    vit = saved(path, *FAMILIES[family])
    live = teacher.load(path)
    batch = views.whole(prepared.images[:8])
    tokens = teacher.load_tail(path)(live.block_input(batch))
    x = views.normalise(batch, live.description["preprocess"])
    with torch.no_grad():
        torch.testing.assert_close(tokens.logits, vit(x), rtol=1e-5, atol=1e-6)
        final = vit.forward_features(x)
        h = vit.fc_norm(final) if isinstance(vit.norm, torch.nn.Identity) else final
        torch.testing.assert_close(tokens.h, h[:, vit.num_prefix_tokens :], rtol=1e-5, atol=1e-5)
    assert tokens.h.shape == (8, 64, 32)
    assert tokens.qkv.shape == (8, 64, 3, 2, 16)


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
    tokens = live(views.whole(prepared.images[:4]))
    for ours, timms in zip(heads(tokens.qkv), seen[-1]):
        torch.testing.assert_close(ours, timms)
    torch.testing.assert_close(
        attention(*heads(tokens.qkv)), exact(*seen[-1]), rtol=1e-4, atol=1e-5
    )


def test_only_the_last_block_is_read_for_the_replay(teacher_path):
    tail = teacher.load_tail(teacher_path)
    names = {n.split(".")[2] for n, _ in tail.named_parameters() if n.startswith("vit.blocks.")}
    assert names == {"1"}
    assert not any(n.startswith("vit.patch_embed") for n, _ in tail.named_parameters())


def test_the_teacher_never_trains_and_never_gets_a_gradient(teacher_path, prepared):
    live = teacher.load(teacher_path)
    live.train()
    assert not live.training and not any(m.training for m in live.modules())
    tokens = live(views.whole(prepared.images[:2]))
    assert not any(t.requires_grad for t in (tokens.qkv, tokens.h, tokens.logits))
    assert not any(p.requires_grad for p in live.parameters())


def test_a_teacher_without_global_attention_is_refused_by_name():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1, 1, 1)
    )
    with pytest.raises(UserError, match="SwinTransformer has no global attention"):
        teacher.check_supported(swin)


def test_a_misspelt_model_is_refused_with_the_nearest_names():
    with pytest.raises(
        UserError, match="no model 'vit_tinny_patch16_224'; nearest: vit_tiny_patch16_224"
    ):
        models.create("vit_tinny_patch16_224", {}, 10)


def test_a_checkpoint_that_was_swapped_for_another_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    saved(path, "vit_tiny_patch16_224", VIT)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="its SHA-256 is not the one in teacher.json"):
        models.load(path)
