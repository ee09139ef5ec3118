"""The kernels on a GPU: parity with float64, the same bits each time, no wait for the host, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from pipeline.distill.kernels import gl, pca, reference
from pipeline.distill.kernels.philox import Key
from pipeline.distill.projectors import token_groups
from tests.bounds import BOUNDS, bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GRIDS = [(5, 4), (7, 7), (8, 8), (13, 5), (14, 14)]
IMPLS = ["sdpa", "small", "flash"]
KINDS = [getattr(torch, name) for name in BOUNDS]


def qkv(grid: tuple[int, int], kind: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, grid[0] * grid[1], 3, 3, 64, generator=draw).to("cuda", kind)


def key(step: int = 4) -> Key:
    return Key(2**40 + 5, torch.tensor([11, 900, 3, 8], device="cuda"), step)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def name_of(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_attention_and_gram_are_the_reference(impl, grid, kind):
    if impl == "small" and grid[0] * grid[1] > 64:
        pytest.skip("small takes 64 tokens at most")
    s, t = qkv(grid, kind, 0).requires_grad_(), qkv(grid, kind, 1)
    exact_s = s.detach().double().requires_grad_()
    found = dict(zip(("attention", "gram"), pca.pca_loss(s, t, key(), impl=impl), strict=True))
    exact = dict(
        zip(("attention", "gram"), reference.pca_loss(exact_s, t.double(), key()), strict=True)
    )
    for name, loss in found.items():
        assert relative(loss, exact[name]) <= bound(name, name_of(kind)), name
        (ours,) = torch.autograd.grad(loss * 2.0**20, s)  # so that float16 keeps its gradient
        (theirs,) = torch.autograd.grad(exact[name] * 2.0**20, exact_s)
        assert relative(ours, theirs) <= bound(f"{name} gradient", name_of(kind)), name


@pytest.mark.parametrize("granularity", ["element", "token", "matrix"])
def test_masks_are_bit_by_bit_those_of_the_cpu(granularity):
    s, t = qkv((7, 7), torch.float32, 0), qkv((7, 7), torch.float32, 1)
    on_cpu = Key(key().seed, key().ids.cpu(), key().step)
    ours = pca.swap_mix_op(s, t, key().ids, key().stream(), 0.3, granularity)
    assert torch.equal(ours.cpu(), reference.swap_mix(s.cpu(), t.cpu(), on_cpu, 0.3, granularity))
    x = torch.ones(4, 49, 200)
    dropped = gl.dropout_op(x.cuda(), key().ids, key().stream(), 0.1)
    assert torch.equal(dropped.cpu() == 0, reference.dropout(x, on_cpu, 0.1) == 0)


def operands(grid: tuple[int, int], kind: torch.dtype) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(2)
    n, groups = grid[0] * grid[1], token_groups(*grid)
    sizes = ((4, n, 160), (len(groups), 96, 160), (len(groups), 96), (4, n, 96))
    made = [torch.randn(size, generator=draw).to("cuda", kind) for size in sizes]
    return [v.requires_grad_() for v in made[:3]], made[3]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("impl", ["eager", "grouped", "triton"])
def test_the_token_term_is_the_reference(impl, grid, kind, monkeypatch):
    if impl == "grouped" and kind != torch.bfloat16:
        pytest.skip("grouped_mm takes bfloat16")
    monkeypatch.setattr(gl, "choose_gl", lambda *_: (impl, "as the test asks"))
    leaves, target = operands(grid, kind)
    exact = [v.detach().double().requires_grad_() for v in leaves]
    groups = token_groups(*grid)
    loss, out = gl.gl_mse(*leaves, target, groups, 0.0, key())
    exact_loss, exact_out = reference.gl_mse(*exact, target.double(), groups, 0.0, key())
    assert relative(loss, exact_loss) <= bound("gl", name_of(kind))
    assert relative(out, exact_out) <= bound("gl out", name_of(kind))
    scale = 2.0**12
    ours = torch.autograd.grad(loss * scale + out.float().sin().sum(), leaves)
    theirs = torch.autograd.grad(exact_loss * scale + exact_out.sin().sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) <= 2 * bound("gl gradient", name_of(kind))


def step(impl: str) -> list[Tensor]:
    """Both projector losses and every gradient, in bfloat16."""
    grid = (8, 8)
    s, t = qkv(grid, torch.bfloat16, 0).requires_grad_(), qkv(grid, torch.bfloat16, 1)
    leaves, target = operands(grid, torch.bfloat16)
    drawn = key()

    def once() -> list[Tensor]:
        terms = [
            *pca.pca_loss(s, t, drawn, impl=impl),
            gl.gl_mse(*leaves, target, token_groups(*grid), 0.1, drawn, impl)[0],
        ]
        return [*terms, *torch.autograd.grad(sum(terms), [s, *leaves])]

    once()  # compiles, and copies the tables of the groups
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["auto", "small", "flash"])
def test_three_runs_have_the_same_bits_and_never_wait_for_the_device(impl):
    runs = [step(impl) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("impl", ["small", "flash"])
def test_captured_in_a_cuda_graph_the_step_is_still_read_on_the_device(impl):
    s, t = qkv((8, 8), torch.bfloat16, 0).requires_grad_(), qkv((8, 8), torch.bfloat16, 1)
    drawn = key().on(torch.device("cuda"))
    weights = [torch.tensor(w, device="cuda") for w in (1.0, 0.05)]

    def once(at: Key) -> list[Tensor]:
        losses = pca.pca_loss(s, t, at, impl=impl)
        return [*losses, *torch.autograd.grad(losses, s, weights)]

    once(drawn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once(drawn)
    for now in (4, 5, 6):  # the counter of arrivals is 0 again each time
        drawn.stream()[1] = now
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, once(key(now)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("impl", "grid", "launches"), [("small", (8, 8), 2), ("flash", (14, 14), 3)]
)
def test_a_device_starts_as_many_kernels_as_the_operators_ask_for(impl, grid, launches):
    s, t = qkv(grid, torch.bfloat16, 0).requires_grad_(), qkv(grid, torch.bfloat16, 1)
    leaves, target = operands(grid, torch.bfloat16)
    drawn = key().on(torch.device("cuda"))
    weights = [torch.tensor(w, device="cuda") for w in (1.0, 0.05)]
    upstream = weights[0], torch.ones_like(target)

    def attention() -> None:
        torch.autograd.grad(pca.pca_loss(s, t, drawn, impl=impl), s, weights)

    def tokens() -> None:
        outputs = gl.gl_mse(*leaves, target, token_groups(*grid), 0.1, drawn, impl)
        torch.autograd.grad(outputs, leaves, upstream)

    for call, expected in ((attention, launches), (tokens, 3)):
        call()
        assert kernels.profiled(call)["launches"] == expected
