"""The operators as torch sees them: schema, fake, autograd, compile; what they keep and what they move."""

from __future__ import annotations

import importlib
import runpy
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernel_floors, shapes
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.distill.kernels import (
    choice,
    eager,
    fused_gl,
    fused_pca,
    gl,
    measured,
    pca,
    reference,
)
from pipeline.distill.kernels.philox import Key
from pipeline.distill.projectors import token_groups
from pipeline.distill.trainer import build, train_step
from pipeline.training import stopwatch
from tests.conftest import ROOT
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
    got = pca.pca_loss(s, t, key(), p, granularity, impl)
    exact = reference.pca_loss(s, t, key(), p, granularity)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    weighted = [torch.autograd.grad(2 * a + 3 * b, s)[0] for a, b in (got, exact)]
    torch.testing.assert_close(*weighted, rtol=1e-9, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    s, t = packed(0, shape=(2, 6, 3, 2, 4)).requires_grad_(), packed(1, shape=(2, 6, 3, 2, 4))
    assert torch.autograd.gradcheck(lambda x: pca.pca_loss(x, t, key(), impl="eager"), (s,))


def operands():
    s, t = packed(0, torch.float32).requires_grad_(), packed(1, torch.float32)
    drawn = (key().ids, key().stream(), 0.5, "element")
    return {
        "swap_mix": (pca.swap_mix_op, (s, t, *drawn)),
        "swap_mix without a teacher": (pca.swap_mix_op, (s, None, *drawn)),
        "attention_loss": (pca.attention_loss_op, (s, t, *drawn)),
        "gram_loss": (pca.gram_loss_op, (s[:, :, 2], t[:, :, 2])),
        "dropout": (gl.dropout_op, (tokens(), *drawn[:2], 0.25)),
        "group_linear": (gl.group_linear_op, grouped()),
        "group_linear without a target": (
            gl.group_linear_op,
            (*grouped()[:3], None, *grouped()[4:]),
        ),
        "group_linear, grouped_mm": (gl.group_linear_op, (*grouped()[:-1], True)),
        "group_linear_backward": (
            gl.group_linear_backward_op,
            tuple(
                v.detach() if isinstance(v, Tensor) else v for v in (*grouped()[:2], *grouped()[3:])
            ),
        ),
    }


GROUPS = token_groups(5, 4)  # of 16 and 4 tokens


def tokens(dtype=torch.float32):
    return packed(2, dtype, (B, N, 8)).requires_grad_()


def grouped(dtype=torch.float32):
    """x, weight, bias, target, order, sizes, grouped."""
    weight, bias = packed(3, dtype, (2, 16, 8)), packed(4, dtype, (2, 16))
    leaves = (tokens(dtype), weight.requires_grad_(), bias.requires_grad_())
    order = [t for g in GROUPS for t in g]
    return (*leaves, packed(5, dtype, (B, N, 16)), order, [len(g) for g in GROUPS], False)


@pytest.mark.parametrize("name", operands())
def test_an_operator_keeps_the_contract_of_torch(name):
    op, arguments = operands()[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("impl", ["eager", "grouped"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_token_term_has_the_references_loss_projection_and_gradients(impl, p, monkeypatch):
    monkeypatch.setattr(gl, "choose_gl", lambda *_: (impl, "as the test asks"))
    dtype, tolerance = (torch.float64, 1e-10) if impl == "eager" else (torch.float32, 1e-5)
    operands, twins = grouped(dtype)[:3], grouped(dtype)[:3]
    target = grouped(dtype)[3]
    got = gl.gl_mse(*operands, target, GROUPS, p, key())
    exact = reference.gl_mse(*twins, target, GROUPS, p, key())
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 100)
    for loss, projected in (got, exact):
        (2 * loss + projected.sin().sum()).backward()
    for a, b in zip(operands, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
    alone = gl.gl_project(*operands, GROUPS)
    torch.testing.assert_close(
        alone, reference.gl_project(*twins, GROUPS), rtol=tolerance, atol=tolerance
    )


def test_gradients_of_the_token_term_are_those_of_finite_differences():
    *leaves, target, _, _, _ = grouped(torch.float64)

    def both(x, weight, bias):
        return gl.gl_mse(x, weight, bias, target, GROUPS, 0.25, key())

    assert torch.autograd.gradcheck(both, leaves)
    for chosen in (0, 1):  # the loss alone, the projection alone: the other sends nothing back
        assert torch.autograd.gradcheck(lambda *v, c=chosen: both(*v)[c], leaves)


def test_drop_out_as_an_operator_sends_back_through_its_own_mask():
    x = tokens()
    out = gl.dropout_op(x, key().ids, key().stream(), 0.25)
    assert torch.equal(out, reference.dropout(x, key(), 0.25))
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad == 0, out == 0)
    torch.testing.assert_close(x.grad[out != 0], torch.full_like(x.grad[out != 0], 1 / 0.75))


def test_under_autocast_the_operators_take_bfloat16_and_give_a_float32_loss():
    s, t = packed(0, torch.float32).requires_grad_(), packed(1, torch.float32)
    x, weight, bias, target, *_ = grouped()
    with torch.autocast("cpu", torch.bfloat16):
        attention, gram = pca.pca_loss(s, t, key())
        loss, projected = gl.gl_mse(x, weight, bias, target, GROUPS, 0.0, key())
    assert [v.dtype for v in (attention, gram, loss)] == [torch.float32] * 3
    assert projected.dtype == torch.bfloat16
    (attention + gram + loss).backward()
    assert s.grad.dtype == weight.grad.dtype == torch.float32
    exact = reference.pca_loss(s.detach(), t, key())
    for a, b in zip((attention, gram), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("impl", "dynamic"),
    [
        ("sdpa", False),
        *(
            pytest.param(*c, marks=pytest.mark.ci)
            for c in (("sdpa", True), ("eager", False), ("eager", True))
        ),
    ],
)
def test_compiled_as_one_graph_the_losses_are_the_same(impl, dynamic):
    t = packed(1, torch.float32)
    x, weight, bias, target, *_ = grouped()

    def step(qkv, tokens, ids, at):
        drawn = Key(5, ids, at)
        found = pca.pca_loss(qkv, t[: len(qkv)], drawn, 0.5, "element", impl)
        return (*found, *gl.gl_mse(tokens, weight, bias, target, GROUPS, 0.25, drawn, impl))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for at in (3, 4):
        ours, theirs = (
            (packed(0, torch.float32).requires_grad_(), x.detach().clone().requires_grad_())
            for _ in range(2)
        )
        found = compiled(*ours, key().ids, at), step(*theirs, key().ids, at)
        for losses in found:
            sum(losses[:3]).backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("impl", "n", "saved"), [("small", 64, 0), ("flash", 196, 4 * 12 * 196)])
def test_on_the_meta_device_shapes_come_out_without_a_number(impl, n, saved):
    s = torch.empty(4, n, 3, 12, 64, device="meta", dtype=torch.bfloat16).requires_grad_()
    ids, stream = (torch.empty(n, device="meta", dtype=torch.int64) for n in (4, 2))
    *losses, doubled, log_sums, deltas = fused_pca.fused_pca_op(
        s, s, ids, stream, 0.5, "element", impl
    )
    assert [(v.shape, v.dtype) for v in losses] == [((), torch.float32)] * 2
    assert doubled.numel() == 64 * saved and doubled.dtype == torch.bfloat16
    assert log_sums.numel() == deltas.numel() == saved and deltas.dtype == torch.float32
    sum(losses).backward()
    assert s.grad.shape == s.shape and s.grad.dtype == torch.bfloat16


def test_flops_are_counted_by_formula():
    s, t = packed(0, torch.float32), packed(1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        pca.pca_loss(s, t, key(), impl="eager")
    attention, gram = 2 * 8 * B * H * N * N * D, 2 * 5 * B * H * N * D * D
    assert counter.get_total_flops() == attention + gram
    *operands, target, _, _, _ = grouped()
    with FlopCounterMode(display=False) as counter:
        gl.gl_mse(*operands, target, GROUPS, 0.0, key())[0].backward()
    assert counter.get_total_flops() == 3 * 2 * B * N * 8 * 16


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
                pca.pca_loss(s, t, Key(5, ids, 1), impl=impl)
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
    """Counted inside the operators, which a dispatch mode sees as one each: so their bodies are called here."""
    groups = token_groups(14, 14)
    order, sizes = [t for g in groups for t in g], [len(g) for g in groups]
    x, weight, bias = torch.randn(64, 196, 128), torch.randn(16, 96, 128), torch.randn(16, 96)
    target = torch.randn(64, 196, 96)
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    with Largest() as loop:
        torch.nn.functional.mse_loss(by_the_loop(*leaves, groups), target).backward()
    with Largest() as ours:
        _, _, residual = eager.group_linear(x, weight, bias, target, order, sizes, False)
        upstream = residual * (2 / residual.numel())
        found = eager.group_linear_backward(x, weight, upstream, order, sizes, False)
    for a, b in zip(leaves, found, strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-4, atol=1e-7)
    assert ours.bytes <= loop.bytes / 4, (ours.bytes, loop.bytes)


def test_twenty_steps_of_training_are_the_same_by_either_implementation(
    prepared, teacher_path, features, monkeypatch
):
    # AdamW divides by a root of squared gradients: rounding grows by itself. Plain descent
    # shows the losses; there too rounding grows, tenfold in four steps.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr))
    curves = {}
    for impl in ("auto", "sdpa"):
        config = replace(QUICK, cakd=replace(QUICK.cakd, impl=impl))
        trainer = build(config, "cakd", prepared, teacher_path, features)
        timer = stopwatch.Stopwatch()
        curves[impl] = [train_step(trainer, i, timer) for i in range(20)]
    for a, b in zip(*curves.values(), strict=True):
        for term in ("attention", "gram", "tokens"):
            grown = pytest.approx(float(b[term]), rel=1e-3)  # rounding
            assert float(a[term]) == grown, term
    assert loss_terms(trainer)["attention"].requires_grad


class CountedKernel:
    """In the place of a Triton kernel: its launches, by name."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *_, **__: self.launches.append(self.name)


class Launches(TorchDispatchMode):
    """Every operation that would start something on a device; our operators are followed into their bodies."""

    WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "detach", "alias")

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cakd":
            body = getattr(FUSED[func._opname.startswith("fused_gl")], f"{func._opname}_op")
            with self:
                return body._init_fn(*args, **(kwargs or {}))
        if not func.is_view and func._opname not in self.WITHOUT_KERNEL:
            self.launches.append(func._opname)
        return func(*args, **(kwargs or {}))


FUSED = (fused_pca, fused_gl)
KERNELS = {
    "small": ("small_losses_kernel", "small_gradient_kernel"),
    "flash": ("flash_losses_kernel",),
    "flash_gradient": ("flash_queries_kernel", "flash_keys_kernel"),
    "dropout": ("dropout_kernel",),
    "group_linear": ("project_kernel", "gradients_kernel"),
}


@pytest.fixture
def launches(monkeypatch):
    """What a call starts, with every kernel stubbed; the choice is made as on a device."""
    pytest.importorskip("triton")
    found: list[str] = []
    for module, names in KERNELS.items():
        loaded = importlib.import_module(f"pipeline.distill.kernels.{module}")
        for name in names:
            assert hasattr(loaded, name)
            monkeypatch.setattr(loaded, name, CountedKernel(name, found))
    monkeypatch.setattr(choice, "_cannot", lambda *_: None)
    monkeypatch.setattr(gl, "choose_gl", lambda *_: ("triton", "as the test asks"))
    return found


def counted(call, launches):
    """The launches of a second call: the first makes what stays on the device."""
    call()
    launches.clear()
    with Launches(launches):
        call()
    return launches


@pytest.mark.parametrize(
    ("impl", "n", "expected"),
    [
        ("small", 64, ["small_losses_kernel", "small_gradient_kernel"]),
        ("flash", 196, ["flash_losses_kernel", "flash_queries_kernel", "flash_keys_kernel"]),
    ],
)
def test_attention_and_gram_take_two_launches_with_their_gradient_or_three(
    impl, n, expected, launches
):
    s, t = (packed(i, torch.bfloat16, (B, n, 3, H, 64)) for i in (0, 1))
    s.requires_grad_()
    weights, drawn = (torch.tensor(1.0), torch.tensor(0.05)), key().on(CPU)

    def call():
        torch.autograd.grad(pca.pca_loss(s, t, drawn, impl=impl), s, weights)

    assert counted(call, launches) == expected


@pytest.mark.parametrize("weighted", [(1.0, None), (None, 0.05)])
def test_a_term_that_nobody_derives_starts_nothing(weighted, launches):
    s, t = (packed(i, torch.bfloat16, (B, N, 3, H, 64)) for i in (0, 1))
    s.requires_grad_()
    drawn = key().on(CPU)

    def call():
        losses = pca.pca_loss(s, t, drawn, impl="small")
        (loss, up), *_ = [
            (a, torch.tensor(w)) for a, w in zip(losses, weighted, strict=True) if w is not None
        ]
        torch.autograd.grad(loss, s, up)

    assert counted(call, launches) == ["small_losses_kernel", "small_gradient_kernel"]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_token_term_takes_three_launches_with_all_gradients(p, launches):
    x, weight, bias, target, *_ = grouped(torch.bfloat16)
    drawn, upstream = key().on(CPU), (torch.tensor(1.0), torch.ones(B, N, 16).bfloat16())

    def call():
        outputs = gl.gl_mse(x, weight, bias, target, GROUPS, p, drawn)
        torch.autograd.grad(outputs, (x, weight, bias), upstream)

    expected = ["dropout_kernel"] * (p > 0) + ["project_kernel", "gradients_kernel"]
    assert counted(call, launches) == expected


def test_196_tokens_of_12_heads_keep_at_most_350_mb_beside_the_inputs():
    """By arithmetic, from the shapes made on the meta device: the gradient, 2 E, two numbers a row."""
    s, t = (torch.empty(256, 196, 3, 12, 64, device="meta", dtype=torch.bfloat16) for _ in "st")
    s.requires_grad_()
    ids, stream = (torch.empty(n, device="meta", dtype=torch.int64) for n in (256, 2))
    *losses, doubled, log_sums, deltas = fused_pca.fused_pca_op(
        s, t, ids, stream, 0.5, "element", "flash"
    )
    (gradient,) = torch.autograd.grad(losses, s, [torch.empty((), device="meta")] * 2)
    kept = sum(v.numel() * v.element_size() for v in (gradient, doubled, log_sums, deltas))
    assert kept == 256 * 196 * 12 * (4 * 64 * 2 + 2 * 4) == 313_098_240
    partial = 2 * 256 * 12 * 3 * 4  # of the sums, two to three blocks a head
    assert kept + partial <= 350e6


def test_the_documented_arithmetic_is_that_of_the_operators():
    assert kernel_floors.table(3.0, 720.0) in (ROOT / "docs/kernels.md").read_text()
    for shape in (shapes.ON_GPU[0], shapes.ON_GPU[1]):
        size = (shape.batch, shape.n, 3, shape.n_heads, shape.width)
        s, t = (torch.empty(size, device="meta", dtype=torch.bfloat16) for _ in "st")
        s.requires_grad_()
        ids, stream = (torch.empty(n, device="meta", dtype=torch.int64) for n in (shape.batch, 2))
        impl = "small" if shape.n <= 64 else "flash"
        with FlopCounterMode(display=False) as counter:
            losses = fused_pca.fused_pca_op(s, t, ids, stream, 0.5, "element", impl)[:2]
            torch.autograd.grad(losses, s, [torch.empty((), device="meta")] * 2)
        ours = kernel_floors.attention_ours(shape)
        assert counter.get_total_flops() == ours.flops
        floor = kernel_floors.attention_floor(shape)
        assert floor.bytes == 9 * s.numel() // 3 * 2 and floor.bytes < ours.bytes
        assert floor.ms(3.0, 720.0) < ours.ms(3.0, 720.0)
        make = partial(torch.empty, device="meta", dtype=torch.bfloat16)
        groups, width = token_groups(*shape.grid), shape.n_heads * shape.width
        leaves = [
            make(size).requires_grad_()
            for size in (
                (shape.batch, shape.n, shape.channels),
                (len(groups), width, shape.channels),
                (len(groups), width),
            )
        ]
        layout = [t for g in groups for t in g], [len(g) for g in groups]
        with FlopCounterMode(display=False) as counter:
            target = make(shape.batch, shape.n, width)
            outputs = fused_gl.fused_gl_op(*leaves, target, ids, stream, *layout, 0.1)[:2]
            upstream = torch.empty((), device="meta"), torch.empty_like(outputs[1])
            torch.autograd.grad(outputs, leaves, upstream)
        assert counter.get_total_flops() == kernel_floors.tokens_ours(shape).flops


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
        choice.choose_pca(impl, CPU, n, 64)


def test_the_choice_on_a_gpu_follows_tokens_and_generation(monkeypatch):
    cuda = torch.device("cuda")
    for capability, n, expected in (
        ((9, 0), 64, "small"),
        ((9, 0), 196, "sdpa"),
        ((8, 6), 64, "sdpa"),
        ((10, 0), 49, "small"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choice.choose_pca("auto", cuda, n, 64)[0] == expected
    for capability, dtype, channels, impl, expected in (
        ((9, 0), torch.bfloat16, 512, "auto", "triton"),
        ((10, 0), torch.bfloat16, 512, "sdpa", "grouped"),
        ((9, 0), torch.bfloat16, 512, "small", "triton"),
        ((9, 0), torch.bfloat16, 20, "sdpa", "eager"),
        ((9, 0), torch.float32, 512, "auto", "triton"),
        ((8, 6), torch.bfloat16, 512, "auto", "triton"),
        ((8, 6), torch.bfloat16, 512, "sdpa", "eager"),
        ((9, 0), torch.bfloat16, 512, "eager", "eager"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choice.choose_gl(impl, cuda, dtype, channels, 768, 196)[0] == expected
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    assert choice.choose_gl("auto", cuda, torch.float32, 512, 768, 64)[0] == "eager"
    monkeypatch.undo()
    with pytest.raises(UserError, match="there are 65 tokens: it takes 64 at most"):
        choice.choose_pca("small", cuda, 65, 64)
    with pytest.raises(UserError, match="a head is 160 wide: it takes 128 at most"):
        choice.choose_pca("small", cuda, 64, 160)
    with pytest.raises(UserError, match="a head is 80 wide: it takes 64 at most"):
        choice.choose_pca("flash", cuda, 65, 80)


def test_auto_takes_what_was_fastest_in_the_committed_table():
    table = artifacts.read_json(ROOT / "benchmarks/results/h100-kernels.json")["work"]
    names = {"grouped": "grouped_mm"}
    for part, by_tokens in (("attention", measured.ATTENTION), ("tokens", measured.TOKENS)):
        for n, times in by_tokens[90].items():
            (rows,) = (
                r for title, r in table.items() if title.startswith(part) and f"N {n} " in title
            )
            for impl, ms in times.items():
                assert ms == pytest.approx(rows[names.get(impl, impl)]["ms"]["median"], abs=5e-4)
            name, why = measured.fastest(by_tokens, 90, n, lambda _: True)
            assert times[name] == min(times.values()) and f"at {n} tokens, the least" in why
    assert measured.fastest(measured.ATTENTION, 86, 64, lambda _: True) is None
    assert measured.fastest(measured.ATTENTION, 100, 300, lambda name: name != "sdpa")[0] == "flash"


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ((), 0, "pca_loss on cpu: eager ("),
        (("--impl", "sdpa", "--tokens", "64"), 0, "pca_loss on cpu: sdpa ("),
        (("--impl", "cuda"), 2, "got 'cuda'"),
    ],
)
def test_the_command_tells_who_computes_the_losses_here(asked, code, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pipeline.distill.kernels", *asked])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("pipeline.distill.kernels", run_name="__main__", alter_sys=True)
    shown = capsys.readouterr()
    assert left.value.code == code and said in shown.out + shown.err
    assert ("gl_mse on cpu: " in shown.out) == (code == 0)
