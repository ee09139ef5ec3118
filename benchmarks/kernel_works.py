"""What the kernel benchmark measures: every provider of the projector losses as a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_floors import attention_floor, tokens_floor
from benchmarks.shapes import Shape
from pipeline.distill import projectors
from pipeline.distill.kernels import choice, gl, pca, reference
from pipeline.distill.kernels.philox import Key
from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.methods.term import Sizes, StudentOutputs, TeacherSpace
from pipeline.distill.objective import Objective, Targets
from pipeline.distill.settings import Distill
from pipeline.models.student import Taps, find_tap, probe_student
from pipeline.models.teacher import TeacherOutputs
from pipeline.training import stopwatch

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Call = Callable[[], Any]


Student = tuple[str, int, int, Shape]  # timm's name, image size, output stride, the teacher's shape
STUDENTS: tuple[Student, ...] = (  # of a training step
    ("resnet50", 224, 32, Shape(256, (14, 14), 12, 64)),
    ("resnet18", 32, 8, Shape(512, (8, 8), 6, 64)),
)
STUDENTS_ON_CPU: tuple[Student, ...] = (("resnet18", 32, 8, Shape(32, (8, 8), 3, 16)),)


@dataclass
class Work:
    """One row group of the table: its providers, and the FLOPs and bytes of its roofline."""

    title: str
    flops: float = 0.0
    bytes: float = 0.0
    providers: dict[str, Call] = field(default_factory=dict)
    capturable: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, call: Call, captured: bool = True) -> None:
        """Add a provider, called once; one that cannot run here, for whatever reason, is a row with the reason.

        One that waits for the device, or has graphs of its own, is not `captured` as a CUDA graph.
        """
        try:
            call()
        except Exception as error:  # Triton and the compilers raise classes of their own
            self.refused[name] = (str(error).splitlines() or [type(error).__name__])[0]
            return
        self.providers[name] = call
        if captured:
            self.capturable.add(name)


def naive_attention(s: Tensor, t: Tensor, _: Key) -> tuple[Tensor, Tensor]:
    """Both terms in plain PyTorch: masks of torch.rand, softmax, N x N Gram matrices, autograd."""
    mixed = torch.where(torch.rand_like(s) < 0.5, t, s)
    ours, theirs = (reference.attention(*reference.heads(v)) for v in (mixed, t))
    v_s, v_t = (reference.heads(v)[2] for v in (s, t))
    gram_s, gram_t = (v @ v.mT / v.shape[-1] ** 0.5 for v in (v_s, v_t))
    return F.mse_loss(ours, theirs), F.mse_loss(gram_s, gram_t)


def naive_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, groups: projectors.Groups
) -> tuple[Tensor, Tensor]:
    """The token term group by group: tokens indexed out of x, outputs indexed into the result."""
    x = F.dropout(x, 0.1)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for group, w, b in zip(groups, weight, bias, strict=True):
        out[:, list(group)] = F.linear(x[:, list(group)], w, b)
    return F.mse_loss(out, target), out


@torch.library.custom_op("cakd::nothing", mutates_args=())
def nothing_op(x: Tensor) -> Tensor:
    """An operator with no body, to see what torch takes for one call of it."""
    return torch.empty_like(x)


@nothing_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


nothing_op.register_autograd(lambda _, upstream: nothing_op(upstream))


def host_work(where: torch.device) -> Work:
    """What the host takes for a call that does nothing: operators of torch and of ours, an empty Triton kernel."""
    x = torch.ones(16, device=where, requires_grad=True)
    plain = x.detach()
    work = Work("host, nothing to do")
    work.add("torch, add", lambda: plain + 1)
    work.add("torch, add with its gradient", lambda: torch.autograd.grad(x + 1, x, plain))
    work.add("custom operator", lambda: nothing_op(plain))
    work.add(
        "custom operator with its gradient", lambda: torch.autograd.grad(nothing_op(x), x, plain)
    )
    if where.type == "cuda":
        from benchmarks.kernel_nothing import launch

        work.add("Triton kernel, 24 arguments", lambda: launch(plain))
    return work


def attention_work(shape: Shape, kind: torch.dtype, where: torch.device, compiled: bool) -> Work:
    """PCA and Gram with their gradient."""
    size = (shape.batch, shape.n, 3, shape.n_heads, shape.width)
    s, t = (torch.randn(size, device=where, dtype=kind) for _ in range(2))
    s.requires_grad_()
    key = Key(1, torch.arange(shape.batch), 3).on(where)
    floor = attention_floor(shape, s.element_size())
    work = Work(f"attention, {shape}", floor.flops, floor.bytes)

    def call(loss: Callable[..., tuple[Tensor, Tensor]]) -> None:
        s.grad = None
        attention, gram = loss(s, t, key)
        (attention + 0.05 * gram).backward()

    def forced(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            call(partial(pca.pca_loss, impl="sdpa"))

    work.add("plain PyTorch", partial(call, naive_attention))
    if compiled:
        naive = torch.compile(naive_attention, dynamic=False)
        work.add("plain, torch.compile", partial(call, naive), captured=False)
    for impl in choice.IMPLS:
        loss = partial(pca.pca_loss, impl=impl)
        work.add(impl, partial(call, loss), captured=impl != "eager")
    if where.type == "cuda":
        for name, backend in BACKENDS.items():
            work.add(f"sdpa, {name}", partial(forced, backend))
    return work


def tokens_work(shape: Shape, kind: torch.dtype, where: torch.device, compiled: bool) -> Work:
    """Dropout, group-wise linear and mse with all gradients."""
    groups = projectors.token_groups(*shape.grid)
    width = shape.n_heads * shape.width
    make = partial(torch.randn, device=where, dtype=kind)
    x, target = make(shape.batch, shape.n, shape.channels), make(shape.batch, shape.n, width)
    weight, bias = make(len(groups), width, shape.channels), make(len(groups), width)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    key = Key(1, torch.arange(shape.batch), 3).on(where)
    floor = tokens_floor(shape, x.element_size())
    work = Work(f"tokens, {shape} G {len(groups)}", floor.flops, floor.bytes)

    def call(loss: Callable[..., tuple[Tensor, Tensor]]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(x, weight, bias, target, groups)[0].backward()

    def ours(impl: str) -> None:
        call(partial(gl.gl_mse, dropout_p=0.1, key=key, impl=impl))

    work.add("loop over groups", partial(call, naive_tokens))
    if compiled:
        naive = torch.compile(naive_tokens, dynamic=False)
        work.add("loop, torch.compile", partial(call, naive), captured=False)
    impls = {"auto": "auto", "eager": "eager"}
    if (
        where.type == "cuda"
    ):  # as the switch names them: PyTorch's grouped_mm, and the Triton kernels
        impls |= {"grouped_mm": "sdpa", "triton": "flash"}
    for name, impl in impls.items():
        work.add(name, partial(ours, impl))
    return work


def step_work(
    student: Student,
    kind: torch.dtype,
    where: torch.device,
    compiled: bool,
) -> Work:
    """Forward and backward of student and all terms, without the optimiser. No roofline: that is the student's."""
    name, size, stride, shape = student
    batch, n = shape.batch, shape.n
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=100, output_stride=stride)
    tap = find_tap(net, size, shape.grid)
    width = shape.n_heads * shape.width
    space = TeacherSpace(shape.n_heads, width, torch.zeros(width), torch.ones(width))
    labels = torch.randint(100, (batch,), device=where)
    spec = probe_student(net, size)
    sizes = Sizes(100, spec, tap, shape.grid, space, labels=labels.cpu(), views=1)
    images = torch.randn(batch, 3, size, size, device=where)
    targets = Targets(labels, labels, None, float(batch))
    make = partial(torch.randn, device=where, dtype=kind)
    qkv = make(batch, n, 3, shape.n_heads, shape.width)
    teacher = TeacherOutputs(qkv, make(batch, n, width), make(batch, 100))
    key = Key(1, torch.arange(batch), 3).on(where)
    net = net.to(where).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    work = Work(f"step, {name} {size} px B {batch} N {n} D {width}")

    def call(objective: Any, weights: dict[str, float], taps: Taps) -> None:
        half = torch.autocast(where.type, kind) if kind != torch.float32 else nullcontext()
        with half:
            logits = net(images)
            feature = taps.features[tap.module]
            outputs = StudentOutputs(logits, taps.embedding, feature, [], labels, key, 1.0)
            losses = objective(logits, targets, outputs, teacher, stopwatch.Stopwatch())
        sum(weights[t] * v for t, v in losses.terms.items()).backward()
        net.zero_grad()
        objective.zero_grad()

    taps = Taps(net, [tap.module])

    def make_objective(impl: Literal["eager", "auto"]) -> Objective:
        config = Distill(("cakd+logits",), name, steps=1, cakd=CakdConfig(impl=impl))
        return Objective("cakd+logits", config, sizes).to(where)

    impls: tuple[Literal["eager", "auto"], ...] = ("eager", "auto")
    for impl in impls:
        objective = make_objective(impl)
        measured = partial(call, objective, objective.weights(1.0), taps)
        work.add(f"impl {impl}", measured, captured=False)
    if compiled:
        plain = make_objective("auto")
        compiled_terms = partial(call, torch.compile(plain), plain.weights(1.0), taps)
        work.add("impl auto, torch.compile", compiled_terms, captured=False)
    return work
