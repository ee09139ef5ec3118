"""Every teacher family with every student family: `python -m benchmarks.pairs`. A matrix and its JSON.

Weights are random and the teachers small, the code paths are the families' own. A teacher is trained for one step,
its features are stored. A pair works where two steps of `cakd` and one of `cakd+logits` by the real trainer, or of
`gl` and `gl+logits` where the teacher has no Q, K, V, leave finite losses, and in the second step each term gives
the tap a finite gradient that is not zero, and all of them a third of the student's backbone or more. Each student
is also exported to ONNX and compared with it. `--docs FILE` writes the matrix between the markers of that page.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.exporters import checkpoint, timed
from benchmarks.store import random_images
from exporters.ort import export
from pipeline import teach
from pipeline.core import artifacts, cli
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared
from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.objective import Losses
from pipeline.distill.settings import Distill
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.models import probe, teacher
from pipeline.store import writing
from pipeline.store.policy import Cache
from pipeline.training import stopwatch

SCHEMA = "cakd.benchmark.pairs/1"
START, END = "<!-- pairs: python -m benchmarks.pairs -->", "<!-- end of pairs -->"
IMAGES, HELD_OUT, BATCH = 16, 20, 8
REACHED = 1 / 3  # of the tensors of a backbone, at least
BY_LABEL = ("cross_entropy", "logits")  # what reaches a backbone through the head


@dataclass(frozen=True)
class Family:
    """A teacher: the property it covers, timm's name and kwargs, the size of the images."""

    shows: str
    model: str
    kwargs: Mapping[str, Any]
    size: int = 64
    layout: Literal["block_input", "qkvh"] = "block_input"


VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
FOURTEEN = VIT | {"img_size": 70, "patch_size": 14}
SWIN = {
    **{"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 16},
    **{"depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
}
TEACHERS = {
    "vit": Family("class token", "vit_tiny_patch16_224", VIT),
    "vit, qk-norm": Family(
        "qk-norm, LayerScale", "vit_tiny_patch16_224", VIT | {"qk_norm": True, "init_values": 0.1}
    ),
    "vit, mean": Family(
        "no prefix, average pool",
        "vit_tiny_patch16_224",
        VIT | {"class_token": False, "global_pool": "avg"},
    ),
    "deit": Family("distillation token", "deit_tiny_distilled_patch16_224", VIT),
    "deit3": Family("LayerScale", "deit3_small_patch16_224", VIT),
    "dinov2": Family("patch 14, four registers", "vit_small_patch14_reg4_dinov2", FOURTEEN, 70),
    "dinov3": Family("rotary, four registers", "vit_small_patch16_dinov3", VIT),
    "eva": Family("q, k, v biases apart", "eva_giant_patch14_224", FOURTEEN, 70),
    "eva02": Family("patch 14, rotary, SwiGLU", "eva02_tiny_patch14_224", FOURTEEN, 70),
    "beit3": Family("sub-norms", "beit3_base_patch16_224", VIT),
    "beit, no bias": Family(
        "BEiT without its position bias",
        "beit_base_patch16_224",
        VIT | {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    ),
    "siglip": Family("no class token, attention pool", "vit_base_patch16_siglip_224", VIT),
    "clip": Family("pre-norm", "vit_base_patch32_clip_224", VIT),
    "pe": Family("rotary, attention pool", "vit_pe_core_tiny_patch16_384", VIT),
    "aimv2": Family("RMS norm, SwiGLU", "aimv2_large_patch14_224", FOURTEEN, 70),
    "flexivit": Family("patches of any size", "flexivit_small", VIT | {"patch_size": 16}),
    "vit, rope mixed": Family(
        "a rotary embedding of each block", "vit_small_patch16_rope_mixed_224", VIT, 64, "qkvh"
    ),
    "beit": Family("position bias", "beit_base_patch16_224", VIT),
    "vit, relpos": Family("position bias", "vit_relpos_small_patch16_224", VIT),
    "vit, parallel": Family("two attentions a block", "vit_small_patch16_18x2_224", VIT),
    "cait": Family("talking heads, class attention", "cait_xxs24_224", VIT),
    "swin": Family("windows, pyramid", "swin_tiny_patch4_window7_224", SWIN),
    "swinv2": Family("windows, pyramid, cosine", "swinv2_tiny_window8_256", SWIN),
    "pvt_v2": Family("pyramid", "pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "resnet": Family("a CNN", "resnet18", {"output_stride": 8}),
    "mobilenetv3": Family("a CNN, a convolution in its head", "mobilenetv3_small_100", {}),
    "dinov2 at 64 px": Family(
        "patch 14 does not divide", "vit_small_patch14_reg4_dinov2", FOURTEEN | {"img_size": 64}
    ),
    "hiera": Family("tokens in units", "hiera_tiny_224", {"img_size": 64}),
    "maxvit": Family("blocks and grids", "maxvit_tiny_rw_224", {"img_size": 64}, 64),
}
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnext26ts": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_100": {},
    "mobilenetv4_conv_small": {},
    "efficientnet_lite0": {},
    "repvgg_a0": {},
    "convnext_atto": {"ls_init_value": 1.0},  # timm's 1e-6 would answer every image alike
    "regnetx_002": {},
    "densenet121": {},
    "ghostnet_050": {},
    "mnasnet_small": {},
    "lcnet_050": {},
    "dla46_c": {},
    "efficientvit_m0": {},
    "inception_v3": {},
    "hrnet_w18_small": {},
}


@dataclass
class TrainedTeacher:
    """A teacher trained here, and the store of its features."""

    prepared: Prepared
    path: Path
    features: Path
    manifest: dict[str, Any]
    spec: probe.TeacherSpec


@dataclass
class Reach:
    """A forward hook on the objective: terms that reach the tap, and their share of the backbone.

    `terms` are those that give the tap a gradient, finite and not zero; `share` the tensors of the backbone that
    get one from all of them, over all its tensors.
    """

    backbone: list[nn.Parameter]
    terms: list[str] = field(default_factory=list)
    share: float = 0.0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], result: Losses) -> None:
        """Take the gradients after the objective's forward pass."""
        feature = args[2].feature  # of the student's outputs
        losses = [loss for t, loss in result.terms.items() if t not in BY_LABEL]
        for term, loss in result.terms.items():
            if term not in BY_LABEL:
                (gradient,) = torch.autograd.grad(loss, feature, retain_graph=True)
                self.terms += [term] if _moves(gradient) else []
        every = torch.stack(losses).sum()
        gradients = torch.autograd.grad(every, self.backbone, retain_graph=True, allow_unused=True)
        self.share = sum(g is not None and _moves(g) for g in gradients) / len(self.backbone)


def _moves(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all() and gradient.any())


def train_teacher(family: Family, prepared: Prepared, folder: Path) -> TrainedTeacher:
    """Train the family's teacher for one step and store its features. Raises UserError: not fit to teach."""
    made = teach.Teach(family.model, kwargs=dict(family.kwargs), epochs=1, batch=IMAGES)
    teach.teach(made, prepared, folder / "teacher", folder / "work")
    path = folder / "teacher" / "teacher.safetensors"
    live = teacher.load(path)
    cache = Cache(layout=family.layout, dtype="float32", views=1, batch=BATCH)
    features = folder / "features"
    manifest = writing.write(cache, prepared, live, features, folder / "work", lambda _: None)
    return TrainedTeacher(prepared, path, features, manifest, live.spec)


def trainer(made: TrainedTeacher, student: str, method: str) -> Trainer:
    """Build the trainer that the stage distill builds. Raises UserError: the pair is refused."""
    config = Distill(
        methods=(method,),
        student=student,
        student_kwargs=STUDENTS[student],
        batch=BATCH,
        steps=4,
        cakd=CakdConfig(warmup=0.0),  # else every term of the first step weighs 0
    )
    return build(config, method, made.prepared, made.path, made.features)


def train_pair(made: TrainedTeacher, student: str, method: str) -> dict[str, Any]:
    """Train two steps of one method; the losses, the tap, its terms and the share of the backbone of the second.

    Many families start with residual branches of weight 0, which pass no gradient in the first step.
    Raises UserError: the pair is refused, before any step.
    """
    training = trainer(made, student, method)
    head: Any = training.student.get_classifier()  # type: ignore[operator]
    behind = {id(p) for p in head.parameters()}
    reach = Reach([p for p in training.student.parameters() if id(p) not in behind])
    train_step(training, 0, stopwatch.Stopwatch())
    training.objective.register_forward_hook(reach)
    losses = read(train_step(training, 1, stopwatch.Stopwatch()))
    assert training.reader.tap is not None
    return {
        "losses": losses,
        "tap": asdict(training.reader.tap),
        "terms": reach.terms,
        "reached": reach.share,
    }


def read(losses: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The losses of a step as numbers."""
    return {name: float(value) for name, value in losses.items()}


def pair_result(made: TrainedTeacher, student: str) -> dict[str, Any]:
    """A cell of the matrix: `verdict` works, broken or refused, with the reason or the figures of the steps."""
    alone, with_logits = ("gl", "gl+logits") if made.spec.no_attention else ("cakd", "cakd+logits")
    try:
        figures = train_pair(made, student, alone)
        losses = read(train_step(trainer(made, student, with_logits), 0, stopwatch.Stopwatch()))
    except UserError as error:
        return {"verdict": "refused", "reason": str(error)}
    finite = all(math.isfinite(v) for v in (*figures["losses"].values(), *losses.values()))
    expected = {"tokens"} if alone == "gl" else {"attention", "gram", "tokens", "adversarial"}
    works = finite and set(figures["terms"]) == expected and figures["reached"] >= REACHED
    return {
        "verdict": "works" if works else "broken",
        "methods": [alone, with_logits],
        **figures,
        "losses_with_logits": losses,
    }


def row(family: Family, students: list[str], folder: Path) -> dict[str, Any]:
    """One teacher beside every student; `refused` where the teacher itself is."""
    shared = folder / f"images-{family.size}"
    if not shared.exists():
        random_images(shared, IMAGES + HELD_OUT, family.size)
    prepared = Prepared.open(shared / "prepared")
    description = asdict(family) | {"kwargs": dict(family.kwargs)}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        try:
            made = train_teacher(family, prepared, Path(work))
        except UserError as error:
            return description | {"refused": str(error)}
        refused = None
        if made.spec.no_attention:
            try:
                trainer(made, students[0], "cakd")
            except UserError as error:
                refused = str(error)
        return description | {
            "prefix": made.spec.prefix,
            "grid": made.spec.grid,
            "n_heads": made.spec.n_heads,
            "store_error": max(made.manifest["error"].values()),
            "cakd_refused": refused,
            "students": {student: pair_result(made, student) for student in students},
        }


def exported(students: list[str], folder: Path, size: int = 64) -> dict[str, dict[str, Any]]:
    """Export each student to fp32 ONNX and check parity, once for all teachers."""
    rows = {}
    for student in students:
        source, out = folder / f"{student}.safetensors", folder / f"{student}.onnx"
        try:
            checkpoint(student, STUDENTS[student], size, source)
        except RuntimeError as error:
            rows[student] = {"verdict": "refused", "reason": str(error)}
            continue
        rows[student] = timed(partial(export.export, source, out), out)
        source.unlink()
        out.unlink(missing_ok=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """The matrix, the students' exports, and every reason in full, numbered in order of appearance."""
    reasons: list[str] = []
    students = list(result["onnx"])
    lines = [
        "| teacher | what it shows | " + " | ".join(f"`{s}`" for s in students) + " |",
        "|---|---|" + ":-:|" * len(students),
    ]
    for name, whole in result["teachers"].items():
        cells = [_cell(whole, student, reasons) for student in students]
        lines.append(
            f"| {name}: `{whole['model']}` | {_description(whole)} | {' | '.join(cells)} |"
        )
    cells = [_reach(result, student) for student in students]
    lines.append(f"| | backbone reached (%) | {' | '.join(cells)} |")
    cells = [_export(result["onnx"][student], reasons) for student in students]
    lines.append(f"| | ONNX fp32, parity | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))])


def _description(whole: dict[str, Any]) -> str:
    if "refused" in whole:
        return str(whole["shows"])
    rows, columns = whole["grid"]
    return f"{whole['shows']}; {whole['prefix']} + {rows}x{columns} tokens"


def _cell(whole: dict[str, Any], student: str, reasons: list[str]) -> str:
    if "refused" in whole:
        return _numbered(whole["refused"], reasons)
    cell = whole["students"][student]
    if cell["verdict"] == "refused":
        return _numbered(cell["reason"], reasons)
    mark = (
        "A" if whole["cakd_refused"] is None else f"G {_numbered(whole['cakd_refused'], reasons)}"
    )
    return mark if cell["verdict"] == "works" else "broken"


def _reach(result: dict[str, Any], student: str) -> str:
    """The least share of the student's backbone that the terms reached, over all teachers."""
    cells = [
        whole["students"][student] for whole in result["teachers"].values() if "students" in whole
    ]
    shares = [cell["reached"] for cell in cells if "reached" in cell]
    return f"{100 * min(shares):.0f}" if shares else ""


def _export(made: dict[str, Any], reasons: list[str]) -> str:
    return (
        _numbered(made["reason"], reasons) if made["verdict"] == "refused" else str(made["verdict"])
    )


def _numbered(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


def publish(matrix: str, page: Path) -> None:
    """Write the matrix between the two markers of a page. Raises UserError: they are not there."""
    text = page.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UserError(f"{page}: got no markers; expected {START!r} and {END!r}; restore them")
    before, after = text.split(START)[0], text.split(END)[1]
    with atomic(page) as temporary:
        temporary.write_text(f"{before}{START}\n{matrix}\n{END}{after}", encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    """Try every pair, print the matrix, write `<out>.json` and `<out>.md`, and the page where one is named."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "onnx": exported(args.students, folder),
            "teachers": {t: row(TEACHERS[t], args.students, folder) for t in args.teachers},
        }
    matrix = table(result)
    print(matrix)
    if args.out is not None:
        params = {"teachers": args.teachers, "students": args.students}
        command = "python -m benchmarks.pairs"
        record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, matrix)
    if args.docs is not None:
        publish(matrix, args.docs)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.pairs", description=__doc__)
    made.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    made.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    made.add_argument("--docs", type=Path, help="the page whose matrix is replaced")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
