"""The operators as torch sees them: schema, fake, autograd, compile; what they keep and what they move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipeline import runtime
from pipeline.errors import UserError
from pipeline.kernels import eager, ops, reference
from pipeline.kernels.philox import Key
from pipeline.projectors import token_groups
from pipeline.training import Trainer
from tests.test_training import QUICK, loss_terms

B, N, H, D = 2, 20, 2, 8
CPU = torch.device("cpu")


def packed(seed, dtype=torch.float64, shape=(B, N, 3, H, D)):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def key(step=4):
    return Key(seed=5, ids=torch.tensor([11, 900]), step=step)


@pytest.mark.parametrize("granularity", ["element", "token", "matrix", "none"])
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_every_implementation_has_the_references_losses_and_gradients(impl, granularity, p):
    s, t = packed(0).requires_grad_(), packed(1)
    got = ops.pca_loss(s, t, key(), p, granularity, impl)
    exact = reference.pca_loss(s, t, key(), p, granularity)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    weighted = [torch.autograd.grad(2 * a + 3 * b, s)[0] for a, b in (got, exact)]
    torch.testing.assert_close(*weighted, rtol=1e-9, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    s, t = packed(0, shape=(2, 6, 3, 2, 4)).requires_grad_(), packed(1, shape=(2, 6, 3, 2, 4))
    assert torch.autograd.gradcheck(lambda x: ops.pca_loss(x, t, key(), impl="eager"), (s,))


def operands():
    s, t = packed(0, torch.float32).requires_grad_(), packed(1, torch.float32)
    drawn = (key().ids, key().stream(), 0.5, "element")
    return {
        "swap_mix": (ops.swap_mix_op, (s, t, *drawn)),
        "swap_mix without a teacher": (ops.swap_mix_op, (s, None, *drawn)),
        "attention_loss": (ops.attention_loss_op, (s, t, *drawn, "eager")),
        "gram_loss": (ops.gram_loss_op, (s[:, :, 2], t[:, :, 2])),
    }


@pytest.mark.parametrize("name", operands())
def test_an_operator_keeps_the_contract_of_torch(name):
    op, arguments = operands()[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph_the_losses_are_the_same(impl, dynamic):
    t = packed(1, torch.float32)

    def step(x, ids, stream_step):
        return ops.pca_loss(x, t[: len(x)], Key(5, ids, stream_step), 0.5, "element", impl)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for at in (3, 4):
        x, y = (packed(0, torch.float32).requires_grad_() for _ in range(2))
        a, b = compiled(x, key().ids, at), step(y, key().ids, at)
        sum(a).backward()
        sum(b).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_on_the_meta_device_shapes_come_out_without_a_number():
    s = torch.empty(4, 196, 3, 12, 64, device="meta", dtype=torch.bfloat16)
    ids, stream = (torch.empty(n, device="meta", dtype=torch.int64) for n in (4, 2))
    loss, gradient = ops.attention_loss_op(s, s, ids, stream, 0.5, "element", "flash")
    assert loss.shape == () and loss.dtype == torch.float32
    assert gradient.shape == s.shape and gradient.dtype == torch.bfloat16


def test_flops_are_counted_by_formula():
    s, t = packed(0, torch.float32), packed(1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops.pca_loss(s, t, key(), impl="eager")
    attention, gram = 2 * 8 * B * H * N * N * D, 2 * 5 * B * H * N * D * D
    assert counter.get_total_flops() == attention + gram


def test_nothing_of_the_size_n_by_n_is_kept_for_the_backward():
    shape = (4, 100, 3, 2, 8)
    s, t = packed(0, torch.float32, shape).requires_grad_(), packed(1, torch.float32, shape)
    ids = torch.arange(4)
    kept = {}
    for impl in ("eager", "sdpa", "reference"):
        sizes: list[int] = []

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            if impl == "reference":
                reference.pca_loss(s, t, Key(5, ids, 1))
            else:
                ops.pca_loss(s, t, Key(5, ids, 1), impl=impl)
        kept[impl] = max(sizes)
    n_by_n, whole = 4 * 2 * 100 * 100, 4 * 100 * 3 * 2 * 8
    assert kept["reference"] >= n_by_n  # so the count sees what it looks for
    assert kept["eager"] <= whole < n_by_n and kept["sdpa"] <= whole


class Largest(TorchDispatchMode):
    """The largest tensor made, and the bytes that went in and out of every operation."""

    def __init__(self):
        super().__init__()
        self.elements, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not func.is_view:
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        self.elements = max(
            [self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))]
        )
        return out


def test_the_eager_path_makes_its_scores_a_few_samples_at_a_time(monkeypatch):
    shape = (16, 64, 3, 2, 8)
    s, t = packed(0, torch.float32, shape), packed(1, torch.float32, shape)
    monkeypatch.setattr(eager, "SCORES", 2 * 2 * 64 * 64)  # two samples' worth
    with Largest() as seen:
        eager.attention_loss(s, t, Key(5, torch.arange(16), 1), 0.0, "none")
    assert seen.elements <= max(s.numel(), 2 * 2 * 64 * 64) < 16 * 2 * 64 * 64


def by_the_loop(x, weight, bias, groups):
    """What public code does: pick each group's tokens out of x, and put the answers into place."""
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for g, tokens in enumerate(groups):
        out[:, list(tokens)] = torch.nn.functional.linear(x[:, list(tokens)], weight[g], bias[g])
    return out


def test_group_wise_linear_moves_less_than_a_quarter_of_the_loops_bytes():
    groups = token_groups(14, 14)
    x, weight, bias = torch.randn(64, 196, 128), torch.randn(16, 96, 128), torch.randn(16, 96)
    moved, gradients = {}, {}
    for name, project in (("loop", by_the_loop), ("ours", reference.gl_project)):
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        with Largest() as seen:
            project(*leaves, groups).square().mean().backward()
        moved[name], gradients[name] = seen.bytes, [v.grad for v in leaves]
    for a, b in zip(gradients["loop"], gradients["ours"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert moved["ours"] <= moved["loop"] / 4, moved


def test_twenty_steps_of_training_are_the_same_by_either_implementation(
    prepared, teacher_path, features
):
    curves = {}
    for impl in ("auto", "sdpa"):
        config = replace(QUICK, cakd=replace(QUICK.cakd, impl=impl))
        trainer = Trainer(config, "cakd", prepared, teacher_path, features)
        watch = runtime.Stopwatch()
        curves[impl] = [trainer.step(i, watch) for i in range(20)]
    for a, b in zip(*curves.values()):
        for term in ("attention", "gram", "tokens"):
            # AdamW divides by a root of squared gradients: rounding grows to some 4e-5 in 20 steps.
            assert a[term] == pytest.approx(b[term], rel=2e-4), term
    assert loss_terms(trainer)["attention"].requires_grad


@pytest.mark.parametrize(
    ("impl", "n", "message"),
    [
        ("fast", 64, "got 'fast'; .*allowed: auto, eager, sdpa, small, flash"),
        (
            "small",
            64,
            "got 'small', but the tensors are on the cpu: it needs a CUDA device; use auto",
        ),
        ("flash", 196, "got 'flash', but the tensors are on the cpu"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused_with_the_reason(impl, n, message):
    with pytest.raises(UserError, match=message):
        ops.choose(impl, CPU, n, 64)


def test_the_choice_on_a_gpu_follows_tokens_and_generation(monkeypatch):
    cuda = torch.device("cuda")
    for capability, n, expected in (
        ((9, 0), 64, "small"),
        ((9, 0), 196, "sdpa"),
        ((8, 6), 64, "sdpa"),
        ((10, 0), 49, "small"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ops.choose("auto", cuda, n, 64)[0] == expected
    with pytest.raises(UserError, match="there are 65 tokens: it takes 64 at most"):
        ops.choose("small", cuda, 65, 64)
    with pytest.raises(UserError, match="a head is 160 wide: it takes 128 at most"):
        ops.choose("flash", cuda, 65, 160)
