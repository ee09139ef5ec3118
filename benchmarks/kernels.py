"""The projector losses, measured: `python -m benchmarks.kernels`. A table and its JSON; on a GPU the ceilings too.

Three parts: `attention` (both terms of eq. 4), `tokens` (eq. 5 and 6) and `step` (a whole step of a student with
both projectors). Every provider computes losses and gradients. Times are medians of a call; on a GPU in
milliseconds, with the L2 cache flushed, beside peak memory, launches and the share of the roofline; on a CPU as
ratios, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from pipeline import cli, files, projectors, runtime
from pipeline.errors import UserError
from pipeline.kernels import choice, gl, pca, reference
from pipeline.kernels.philox import Key
from pipeline.methods.cakd import CakdConfig
from pipeline.methods.logits import LogitsConfig
from pipeline.methods.objective import Objective
from pipeline.methods.table import Terms, settings
from pipeline.methods.term import Seen, Sizes, TeacherSpace
from pipeline.students import Taps, anatomy, find_tap
from pipeline.teacher import Tokens

SCHEMA = "cakd.benchmark.kernels/2"
PARTS = ("attention", "tokens", "step")
TURNS = 7
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """B samples, a grid of N tokens, H heads, d wide; c channels of the student's tap."""

    batch: int
    grid: tuple[int, int]
    n_heads: int
    width: int
    channels: int = 0

    def __str__(self) -> str:
        heads = f"H {self.n_heads} d {self.width}"
        return f"B {self.batch} N {self.n} {heads} c {self.channels}"

    @property
    def n(self) -> int:
        """Tokens."""
        return self.grid[0] * self.grid[1]


ON_GPU = (
    Shape(256, (14, 14), 12, 64, 1024),
    Shape(512, (7, 7), 12, 64, 2048),
    Shape(512, (8, 8), 6, 64, 512),
    Shape(1024, (8, 8), 3, 64, 512),
)
ON_CPU = (
    Shape(16, (14, 14), 12, 64, 256),
    Shape(32, (7, 7), 12, 64, 512),
    Shape(64, (8, 8), 4, 16, 64),
)
STUDENTS = (  # of a training step: timm's name, image size, output stride, and the teacher's shape
    ("resnet50", 224, 32, Shape(256, (14, 14), 12, 64)),
    ("resnet18", 32, 8, Shape(512, (8, 8), 6, 64)),
)
STUDENTS_ON_CPU = (("resnet18", 32, 8, Shape(32, (8, 8), 3, 16)),)


@dataclass
class Work:
    """One row group of the table: who computes it, and the least it could take."""

    title: str
    flops: float = 0.0
    bytes: float = 0.0
    providers: dict[str, Call] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, call: Call) -> None:
        """A provider, called once; one that cannot run here is a row with the reason."""
        try:
            call()
        except (UserError, RuntimeError) as error:
            self.refused[name] = str(error).splitlines()[0]
            return
        self.providers[name] = call


def naive_attention(s: Tensor, t: Tensor, _: Key) -> tuple[Tensor, Tensor]:
    """Both terms as most would write them: masks of torch.rand, softmax, N x N Gram matrices, autograd."""
    mixed = torch.where(torch.rand_like(s) < 0.5, t, s)
    ours, theirs = (reference.attention(*reference.heads(v)) for v in (mixed, t))
    v_s, v_t = (reference.heads(v)[2] for v in (s, t))
    gram_s, gram_t = (v @ v.mT / v.shape[-1] ** 0.5 for v in (v_s, v_t))
    return F.mse_loss(ours, theirs), F.mse_loss(gram_s, gram_t)


def naive_tokens(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, groups: projectors.Groups
) -> tuple[Tensor, Tensor]:
    """The token term group by group: tokens picked out of x, answers put into place."""
    x = F.dropout(x, 0.1)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for group, w, b in zip(groups, weight, bias, strict=True):
        out[:, list(group)] = F.linear(x[:, list(group)], w, b)
    return F.mse_loss(out, target), out


def attention_work(shape: Shape, kind: torch.dtype, where: torch.device, compiled: bool) -> Work:
    """PCA and Gram with their gradient. Least bytes: both qkv read, one gradient written."""
    size = (shape.batch, shape.n, 3, shape.n_heads, shape.width)
    s, t = (torch.randn(size, device=where, dtype=kind) for _ in range(2))
    s.requires_grad_()
    key = Key(1, torch.arange(shape.batch, device=where), 3)
    heads = shape.batch * shape.n_heads
    flops = 2.0 * heads * shape.n * shape.width * (8 * shape.n + 5 * shape.width)
    work = Work(f"attention, {shape}", flops, 3.0 * s.numel() * s.element_size())

    def call(loss: Callable[..., tuple[Tensor, Tensor]]) -> None:
        s.grad = None
        attention, gram = loss(s, t, key)
        (attention + 0.05 * gram).backward()

    def forced(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            call(partial(pca.pca_loss, impl="sdpa"))

    work.add("plain PyTorch", partial(call, naive_attention))
    if compiled:
        work.add(
            "plain, torch.compile", partial(call, torch.compile(naive_attention, dynamic=False))
        )
    for impl in choice.IMPLS[1:]:
        work.add(impl, partial(call, partial(pca.pca_loss, impl=impl)))
    if where.type == "cuda":
        for name, backend in BACKENDS.items():
            work.add(f"sdpa, {name}", partial(forced, backend))
    return work


def tokens_work(shape: Shape, kind: torch.dtype, where: torch.device, compiled: bool) -> Work:
    """Drop-out, group-wise linear and mse with all gradients. Least bytes: x, target in, the rest out."""
    groups = projectors.token_groups(*shape.grid)
    width = shape.n_heads * shape.width
    make = partial(torch.randn, device=where, dtype=kind)
    x, target = make(shape.batch, shape.n, shape.channels), make(shape.batch, shape.n, width)
    weight, bias = make(len(groups), width, shape.channels), make(len(groups), width)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    key = Key(1, torch.arange(shape.batch, device=where), 3)
    moved = 2.0 * x.numel() + 2 * target.numel() + 2 * weight.numel()
    flops = 6.0 * x.numel() * width
    work = Work(f"tokens, {shape} G {len(groups)}", flops, moved * x.element_size())

    def call(loss: Callable[..., tuple[Tensor, Tensor]]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(x, weight, bias, target, groups)[0].backward()

    def ours(impl: str) -> None:
        call(partial(gl.gl_mse, dropout_p=0.1, key=key, impl=impl))

    work.add("loop over groups", partial(call, naive_tokens))
    if compiled:
        work.add("loop, torch.compile", partial(call, torch.compile(naive_tokens, dynamic=False)))
    wanted = {"eager": "eager"}
    if (
        where.type == "cuda"
    ):  # as the switch names them: PyTorch's grouped_mm, and the Triton kernels
        wanted |= {"grouped_mm": "sdpa", "triton": "flash"}
    for name, impl in wanted.items():
        work.add(name, partial(ours, impl))
    return work


def step_work(
    student: tuple[str, int, int, Shape],
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
    sizes = Sizes(100, anatomy(net, size), tap, space, images=batch, views=1)
    images = torch.randn(batch, 3, size, size, device=where)
    labels = torch.randint(100, (batch,), device=where)
    make = partial(torch.randn, device=where, dtype=kind)
    qkv = make(batch, n, 3, shape.n_heads, shape.width)
    taught = Tokens(qkv, make(batch, n, width), make(batch, 100))
    key = Key(1, torch.arange(batch, device=where), 3)
    net = net.to(where).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    work = Work(f"step, {name} {size} px B {batch} N {n} D {width}")

    def call(objective: Any, weights: dict[str, float], taps: Taps) -> None:
        half = torch.autocast(where.type, kind) if kind != torch.float32 else nullcontext()
        with half:
            logits = net(images)
            feature = taps.features[tap.module]
            seen = Seen(logits, taps.embedding, feature, [], labels, key, 1.0)
            found = objective(seen, taught, float(batch), runtime.Stopwatch())
        sum(weights[t] * v for t, v in found.losses.items()).backward()
        net.zero_grad()
        objective.zero_grad()

    taps = Taps(net, [tap.module])

    def make_objective(impl: Literal["eager", "auto"]) -> Objective:
        chosen = settings(LogitsConfig(), CakdConfig(impl=impl), Terms())
        return Objective("cakd+logits", chosen, sizes).to(where)

    impls: tuple[Literal["eager", "auto"], ...] = ("eager", "auto")
    for impl in impls:
        objective = make_objective(impl)
        work.add(f"impl {impl}", partial(call, objective, objective.weights(1.0), taps))
    if compiled:
        plain = make_objective("auto")
        compiled_terms = partial(call, torch.compile(plain), plain.weights(1.0), taps)
        work.add("impl auto, torch.compile", compiled_terms)
    return work


def measure(work: Work, where: torch.device, ceilings: dict[str, float] | None) -> dict[str, Any]:
    """Of every provider milliseconds (median, p20, p80); on a GPU peak MB above the inputs, launches, roofline."""
    gpu = where.type == "cuda"
    times = _on_gpu(work.providers) if gpu else _in_turns(work.providers)
    rows: dict[str, Any] = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        row: dict[str, Any] = {
            "ms": {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
        }
        if gpu:
            row |= {
                "peak_mb": _peak_mb(work.providers[name]),
                "launches": _launches(work.providers[name]),
            }
        if ceilings and work.flops:
            least = max(
                work.flops / ceilings["tflop_per_s"] / 1e9,
                work.bytes / ceilings["copy_gb_per_s"] / 1e6,
            )
            row["roofline_percent"] = 100 * least / row["ms"]["median"]
        rows[name] = row
    return rows | {name: {"reason": why} for name, why in work.refused.items()}


def _in_turns(providers: dict[str, Call]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(TURNS):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _on_gpu(providers: dict[str, Call]) -> dict[str, list[float]]:
    from triton.testing import do_bench

    return {name: do_bench(call, return_mode="all") for name, call in providers.items()}


def _peak_mb(call: Call) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _launches(call: Call) -> int:
    """Kernels started on the device in one call."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events() or ())


def measured_ceilings(kind: torch.dtype) -> dict[str, float]:
    """GB/s of a large copy and TFLOP/s of a large product in this dtype on this GPU."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / do_bench(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=kind) for _ in range(2))
    return {"copy_gb_per_s": copied, "tflop_per_s": 2 * 8192**3 / do_bench(lambda: a @ b) / 1e9}


def table(found: dict[str, Any]) -> str:
    """The Markdown table: ratios to the first provider; on a GPU milliseconds, memory, launches, roofline too."""
    ceilings = found["ceilings"]
    more = " ms | peak MB | launches | % of roofline |" if ceilings else ""
    lines = [f"| work | provider | speed |{more}", "|---|---|--:|" + "--:|" * more.count("|")]
    for title, rows in found["work"].items():
        base = next(row["ms"]["median"] for row in rows.values() if "ms" in row)
        for name, row in rows.items():
            if "reason" in row:
                cells = " |" * more.count("|")
                lines.append(f"| {title} | {name} | not measured: {row['reason']} |{cells}")
                continue
            ms, cells = row["ms"]["median"], ""
            if ceilings:
                share = f"{row['roofline_percent']:.0f}" if "roofline_percent" in row else ""
                cells = f" {ms:.3f} | {row['peak_mb']:.0f} | {row['launches']} | {share} |"
            lines.append(f"| {title} | {name} | {base / ms:.2f}× |{cells}")
    if ceilings:
        rate, products = ceilings["copy_gb_per_s"], ceilings["tflop_per_s"]
        lines += [
            "",
            f"Ceilings measured: {rate:.0f} GB/s (copy), {products:.0f} TFLOP/s (product).",
        ]
    else:
        lines += ["", "GPU: not measured."]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = where.type == "cuda"
    kind = torch.bfloat16 if gpu else torch.float32
    ceilings = measured_ceilings(kind) if gpu else None
    compiled = gpu or args.compile
    losses = {"attention": attention_work, "tokens": tokens_work}
    shapes = (ON_GPU if gpu else ON_CPU)[: args.shapes]
    students = (STUDENTS if gpu else STUDENTS_ON_CPU)[: args.shapes]
    found: dict[str, Any] = {
        "dtype": str(kind).removeprefix("torch."),
        "ceilings": ceilings,
        "work": {},
    }
    for part in args.parts:
        makers = (
            [partial(step_work, one) for one in students]
            if part == "step"
            else [partial(losses[part], one) for one in shapes]
        )
        for make in makers:
            work = make(kind, where, compiled)
            found["work"][work.title] = measure(work, where, ceilings)
            del work
    shown = table(found)
    print(shown)
    if args.out is None:
        return
    made_by = files.provenance(
        {"parts": args.parts, "shapes": args.shapes, "compile": args.compile}
    )
    command = "python -m benchmarks.kernels" + (" --compile" if args.compile else "")
    record.write(args.out, SCHEMA, found, made_by, command, f"{found['dtype']}\n\n{shown}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--shapes", type=int, help="only the first so many")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, on a CPU (needs g++)"
    )
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
