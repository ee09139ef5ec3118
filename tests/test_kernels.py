"""The projector losses against fp64 definitions written out here, and the random masks against known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.errors import UserError
from pipeline.distill.kernels import pca, reference
from pipeline.distill.kernels.philox import LOW, Key, bernoulli, philox
from pipeline.distill.projectors import token_groups

B, N, H, D = 3, 20, 2, 8

# Squared error of equal float64 values that a matrix product made twice: on some CPUs the last bit depends on
# where the tensors lie in memory. Any real difference is above 1e-20.
ROUNDING = 1e-30


def packed(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, N, 3, H, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def key(step: int = 0) -> Key:
    return Key(seed=5, ids=torch.tensor([11, 7, 900]), step=step)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, seed, words):
    found = philox(tuple(torch.tensor(c) for c in counter), seed)
    assert tuple(int(w) for w in found) == words


def test_a_key_copied_to_a_device_draws_the_same():
    plain = Key(2**62 + 5, torch.tensor([11, 7, 900], dtype=torch.int32), 4)
    moved = plain.on(torch.device("cpu"))
    assert torch.equal(moved.stream(), plain.stream()) and torch.equal(moved.ids, plain.ids.long())
    assert (
        moved.stream().data_ptr() % 16 == moved.ids.data_ptr() % 16 == 0
    )  # as the kernels load them
    assert torch.equal(bernoulli(moved, 4, 40, 0, 0.3), bernoulli(plain, 4, 40, 0, 0.3))


@pytest.mark.parametrize("p", [0.5, 0.25, 0.3, 0.9])
def test_mask_mean_is_p_within_the_binomial_bound(p):
    mask = bernoulli(Key(1, torch.arange(50), 3), rows=64, width=24, tensor=0, p=p)
    assert abs(mask.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / mask.numel())


def test_masks_of_p_0_and_1_are_exact():
    assert not bernoulli(key(), 4, 40, 0, 0.0).any()
    assert bernoulli(key(), 4, 40, 0, 1.0).all()


def test_mask_is_a_function_of_sample_and_step_not_of_batch_order():
    shape = (B, N, 3, H, D)
    masks = reference.swap_masks(key(), shape, 0.5, "element")
    turned = reference.swap_masks(Key(5, key().ids.flip(0), 0), shape, 0.5, "element")
    alone = reference.swap_masks(Key(5, key().ids[1:2], 0), (1, *shape[1:]), 0.5, "element")
    assert torch.equal(masks.flip(0), turned)
    assert torch.equal(masks[1:2], alone)
    assert not torch.equal(masks, reference.swap_masks(key(step=1), shape, 0.5, "element"))


@pytest.mark.parametrize("granularity", ["element", "token", "matrix"])
def test_masks_of_q_k_v_differ_and_have_the_granularity_asked(granularity):
    ids = torch.arange(64)
    masks = reference.swap_masks(Key(0, ids, 0), (64, N, 3, H, D), 0.5, granularity)
    masks = masks.expand(64, N, 3, H, D)
    q, k, v = masks.unbind(2)
    assert not torch.equal(q, k) and not torch.equal(k, v) and not torch.equal(q, v)
    per_row = masks.float().flatten(3).std(dim=3)
    per_matrix = masks.float().permute(0, 2, 1, 3, 4).flatten(2).std(dim=2)
    assert (per_row.max() > 0) == (granularity == "element")
    assert (per_matrix.max() > 0) == (granularity != "matrix")


def test_swap_with_p_1_is_the_teacher_and_with_p_0_the_student():
    s, t = packed(0), packed(1)
    assert torch.equal(reference.swap_mix(s, t, key(), 1.0), t)
    assert torch.equal(reference.swap_mix(s, t, key(), 0.0), s)
    attention_loss, _ = reference.pca_loss(s, t, key(), p=1.0)
    assert attention_loss < ROUNDING


def test_swap_passes_no_gradient_where_the_teacher_was_taken():
    s, t = packed(0).requires_grad_(), packed(1)
    masks = reference.swap_masks(key(), s.shape, 0.5, "element")
    loss, _ = reference.pca_loss(s, t, key(), 0.5)
    loss.backward()
    assert s.grad[masks].abs().max() == 0
    assert (s.grad[~masks].abs() > 0).double().mean() > 0.99


def test_pca_loss_is_equation_4():
    s, t = packed(0), packed(1)
    masks = reference.swap_masks(key(), s.shape, 0.5, "element")
    mixed = torch.where(masks, t, s)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
        return torch.softmax(q @ k.mT / D**0.5, -1) @ v

    def gram(x: Tensor) -> Tensor:
        v = x[:, :, 2].transpose(1, 2)
        return v @ v.mT / D**0.5

    attention_loss, gram_loss = reference.pca_loss(s, t, key(), 0.5)
    assert attention_loss.item() == pytest.approx(
        F.mse_loss(attend(mixed), attend(t)).item(), rel=1e-12
    )
    assert gram_loss.item() == pytest.approx(F.mse_loss(gram(s), gram(t)).item(), rel=1e-12)


def test_both_terms_are_zero_where_student_and_teacher_agree():
    t = packed(1)
    assert all(loss < ROUNDING for loss in reference.pca_loss(t.clone(), t, key(), 0.5))


def test_gram_gradient_is_that_of_the_definition():
    a, b = packed(0)[:, :, 2].transpose(1, 2), packed(1)[:, :, 2].transpose(1, 2)
    near = (b + 1e-3 * a).requires_grad_()
    reference.gram_loss(near, b).backward()
    plain = near.detach().clone().requires_grad_()
    F.mse_loss(plain @ plain.mT / D**0.5, b @ b.mT / D**0.5).backward()
    torch.testing.assert_close(near.grad, plain.grad, rtol=1e-9, atol=0)


def textbook_gram(v_s: Tensor, v_t: Tensor) -> Tensor:
    """||A^T A||^2 + ||B^T B||^2 - 2 ||A^T B||^2: equal on paper, and cancelling near convergence."""
    return (
        (v_t.mT @ v_t).square().sum()
        + (v_s.mT @ v_s).square().sum()
        - 2 * (v_t.mT @ v_s).square().sum()
    )


def gram_gradient_error(loss, distance: float) -> float:
    draw = torch.Generator().manual_seed(0)
    v_t = torch.randn(4, 2, 49, 64, dtype=torch.float64, generator=draw)
    v_s = v_t + distance * torch.randn(v_t.shape, dtype=torch.float64, generator=draw)
    v_t, v_s = (v.bfloat16().double() for v in (v_t, v_s))

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = v_s.to(dtype).clone().requires_grad_()
        loss(leaf, v_t.to(dtype)).backward()
        return leaf.grad.double()

    exact = gradient(torch.float64)
    return ((gradient(torch.bfloat16) - exact).norm() / exact.norm()).item()


def gram_operator(v_s: Tensor, v_t: Tensor) -> Tensor:
    return pca.gram_loss_op(v_s.transpose(1, 2), v_t.transpose(1, 2))[0]


@pytest.mark.parametrize(("distance", "lost"), [(1.0, False), (0.1, True), (0.01, True)])
def test_gram_keeps_its_gradient_in_bfloat16_where_the_textbook_form_loses_it(distance, lost):
    for loss in (reference.gram_loss, gram_operator):
        assert gram_gradient_error(loss, distance) <= 6e-3  # measured 4.0e-3 to 5.0e-3
    assert (gram_gradient_error(textbook_gram, distance) > 6e-3) == lost


def test_sdpa_agrees_with_the_reference_in_value_and_gradient():
    s, t = packed(0).requires_grad_(), packed(1)
    twin = s.detach().clone().requires_grad_()
    eager = pca.pca_loss(s, t, key(), impl="eager")
    fused = pca.pca_loss(twin, t, key(), impl="sdpa")
    for a, b in zip(eager, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
    sum(eager).backward()
    sum(fused).backward()
    torch.testing.assert_close(s.grad, twin.grad, rtol=1e-8, atol=1e-12)


def test_an_unknown_implementation_is_refused_with_the_names():
    with pytest.raises(UserError, match="'fast'.*auto, eager, sdpa"):
        pca.pca_loss(packed(0), packed(1), key(), impl="fast")


def test_gl_projects_each_token_by_its_own_groups_layer():
    groups = token_groups(5, 6)
    x = torch.randn(2, 30, 7, dtype=torch.float64)
    weight = torch.randn(len(groups), 9, 7, dtype=torch.float64)
    bias = torch.randn(len(groups), 9, dtype=torch.float64)
    found = reference.gl_project(x, weight, bias, groups)
    for g, tokens in enumerate(groups):
        for token in tokens:
            torch.testing.assert_close(found[:, token], x[:, token] @ weight[g].T + bias[g])


def test_gl_one_hot_input_reaches_only_its_groups_layer():
    groups = token_groups(8, 8)
    for token in (0, 27, 36, 63):
        weight = torch.zeros(4, 5, 3, requires_grad=True)
        x = torch.zeros(1, 64, 3)
        x[0, token] = 1
        reference.gl_project(x, weight, torch.zeros(4, 5), groups).sum().backward()
        reached = weight.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
        assert reached == [g for g, members in enumerate(groups) if token in members]


def test_dropout_keeps_the_expectation_and_depends_on_the_step():
    x = torch.ones(3, 64, 50)
    dropped = reference.dropout(x, key(), 0.25)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert set(dropped.unique().tolist()) == {0.0, (torch.ones(()) / 0.75).item()}
    assert not torch.equal(dropped, reference.dropout(x, key(step=1), 0.25))
    assert reference.dropout(x, key(), 0.0) is x
