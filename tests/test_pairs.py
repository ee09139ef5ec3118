"""Any teacher with any student: what a family stores is its own computation, and a pair trains or says why not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import set_fused_attn

from benchmarks import pairs
from benchmarks.pairs import STUDENTS, TEACHERS
from benchmarks.store import random_images
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.distill import distill, settings
from pipeline.distill.kernels.reference import attention, heads
from pipeline.distill.trainer import build
from pipeline.evaluate import accuracy
from pipeline.evaluate.evaluate import evaluate
from pipeline.models import checkpoint, probe, teacher
from pipeline.models.student import Taps, find_tap
from pipeline.store import policy, writing
from pipeline.store.reading import Store
from tests.house import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core-pairs.json"
REFUSED = {
    "dinov2 at 64 px": "got 14, which does not divide 64 px; .*; or set .*img_size to 56 or 70",
    "hiera": "got Hiera, whose token order is unknown; expected one of timm",
    "maxvit": "got MaxxVit, whose token order is unknown",
}
WITHOUT = {  # teachers that give tokens and logits alone, and why
    "beit": "position bias",
    "vit, relpos": "position bias",
    "vit, parallel": "2 attention calls",
    "cait": "2 attention calls",
    "swin": "no sequence of blocks",
    "swinv2": "no sequence of blocks",
    "pvt_v2": "no sequence of blocks",
    "resnet": "it is a CNN",
    "mobilenetv3": "it is a CNN",
}
WITH = [name for name in TEACHERS if name not in {*WITHOUT, *REFUSED}]
SAMPLE = [  # about ten pairs that differ in what they need
    ("vit", "resnet18"),
    ("dinov2", "mobilenetv3_small_100"),
    ("eva02", "regnetx_002"),
    ("dinov3", "repvgg_a0"),
    ("siglip", "efficientnet_lite0"),
    ("flexivit", "ghostnet_050"),
    ("vit, rope mixed", "lcnet_050"),
    ("beit", "mnasnet_small"),
    ("swin", "convnext_atto"),
    ("pvt_v2", "dla46_c"),
    ("resnet", "lcnet_050"),
]
QUICK = (("vit", "resnet18"), ("eva02", "regnetx_002"), ("pvt_v2", "dla46_c"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("swin")`: that teacher after one step with its float32 store, made once."""
    folder, known, images = tmp_path_factory.mktemp("pairs"), {}, {}

    def make(name):
        family = TEACHERS[name]
        if family.size not in images:
            count = pairs.IMAGES + pairs.HELD_OUT
            images[family.size] = random_images(folder / str(family.size), count, family.size)
        if name not in known:
            known[name] = pairs.train_teacher(family, images[family.size], folder / name)
        return known[name]

    return make


def seen(made):
    """The stored records of the first images, the same views as normalised pixels, and the whole timm model."""
    opened = Store(made.features, made.prepared, made.path)
    rows = made.prepared.rows("train")[:4]
    found = opened.read(opened.records(rows, [0] * 4))
    batch = views.view_batch(
        made.prepared.images, opened.geometry, opened.seed, rows, [0] * 4, rows
    )
    vit, description = checkpoint.load(made.path)
    return found, views.normalise(batch, description["preprocess"]), vit


def into_projection(vit, pixels):
    """What the last block's attention hands to its norm or out-projection, (B, P+N, D); and the logits."""
    kept = []
    attn = vit.blocks[-1].attn
    norm = getattr(attn, "norm", None)
    behind = attn.proj if norm is None or isinstance(norm, torch.nn.Identity) else norm
    handle = behind.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        logits = vit(pixels)
    handle.remove()
    return kept[0], logits


@pytest.mark.parametrize("name", [n for n in WITH if TEACHERS[n].layout == "block_input"])
def test_attention_and_logits_recomputed_from_the_store_are_the_models_own(name, made):
    taught = made(name)
    found, pixels, vit = seen(taught)
    own, logits = into_projection(vit, pixels)
    tail = teacher.load_tail(taught.path)
    with probe.AttentionRecorder(tail.vit.blocks[-1]) as witness, torch.no_grad():
        tail.vit.blocks[-1](found.features["x"], **tail.spec.extra)
    everything = attention(*heads(witness.qkv(prefix=0)))  # eq. 2 before the prefix is cut off
    torch.testing.assert_close(everything.transpose(1, 2).flatten(2), own, rtol=1e-4, atol=1e-5)
    tokens, cut = found.tokens(tail), witness.qkv(taught.spec.prefix)
    assert torch.equal(tokens.qkv, cut) and cut.shape[1] == pairs_of(taught.spec.grid)
    torch.testing.assert_close(tokens.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tail(found.features["x"]).logits, logits, rtol=1e-4, atol=1e-5)


def pairs_of(grid):
    return grid[0] * grid[1]


def test_the_stored_q_k_v_of_a_block_that_is_not_replayed_are_the_models_own(made):
    taught = made("vit, rope mixed")
    found, pixels, vit = seen(taught)
    own, logits = into_projection(vit, pixels)
    with probe.AttentionRecorder(vit.blocks[-1]) as witness, torch.no_grad():
        vit(pixels)
    everything = attention(*heads(witness.qkv(prefix=0)))
    torch.testing.assert_close(everything.transpose(1, 2).flatten(2), own, rtol=1e-4, atol=1e-5)
    tokens = found.tokens(None)
    torch.testing.assert_close(tokens.qkv, witness.qkv(taught.spec.prefix), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_teacher_without_q_k_v_gives_the_tokens_and_logits_that_timm_gives(name, made):
    taught = made(name)
    assert WITHOUT[name] in taught.spec.no_attention and taught.spec.n_heads == 0
    assert WITHOUT[name] in taught.manifest["no_attention"]
    found, pixels, vit = seen(taught)
    tokens = found.tokens(teacher.load_tail(taught.path))
    with torch.no_grad():
        (last,) = vit.forward_intermediates(pixels, 1, norm=True, intermediates_only=True)
        rows = last.flatten(2).mT  # timm's own map, whatever order it computes in
        if isinstance(getattr(vit, "norm", None), torch.nn.Identity):
            rows = vit.fc_norm(rows)
        logits = vit(pixels)
    assert tokens.qkv is None and taught.spec.grid == tuple(last.shape[2:])
    torch.testing.assert_close(tokens.h, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.logits, logits, rtol=1e-4, atol=1e-5)
    replayed = teacher.load_tail(taught.path)(found.features["x"])
    torch.testing.assert_close(replayed.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_before_it_is_taught(name, made, monkeypatch):
    monkeypatch.setattr(pairs.teach, "_train", None)
    with pytest.raises(UserError, match=REFUSED[name]):
        made(name)


@pytest.mark.parametrize(
    "pair",
    [p if p in QUICK else pytest.param(p, marks=pytest.mark.ci) for p in SAMPLE],
    ids=" to ".join,
)
def test_a_pair_trains_and_every_term_reaches_the_students_backbone(pair, made):
    name, student = pair
    cell = pairs.pair_result(made(name), student)
    assert cell["verdict"] == "works", cell
    json.dumps(cell)  # the record takes it
    alone, terms = (
        ("gl", {"tokens"})
        if name in WITHOUT
        else ("cakd", {"attention", "gram", "tokens", "adversarial"})
    )
    assert cell["methods"] == [alone, f"{alone}+logits"]
    assert set(cell["losses_with_logits"]) >= terms | {"cross_entropy", "logits"}
    assert set(cell["terms"]) == terms and cell["reached"] >= pairs.REACHED


@pytest.mark.parametrize("method", ["cakd", "gl+pca", "minilm+logits"])
def test_attention_terms_are_refused_to_a_teacher_without_q_k_v_before_any_step(
    method, made, monkeypatch
):
    monkeypatch.setattr(pairs, "train_step", None)
    term = "minilm" if "minilm" in method else "pca"
    with pytest.raises(UserError) as told:
        pairs.train_pair(made("swin"), "resnet18", method)
    assert f"method: '{method}' reads the teacher's queries, keys and values ({term})" in str(
        told.value
    )
    assert "it has no sequence of blocks over one grid of tokens; choose another teacher" in str(
        told.value
    )
    assert str(told.value).endswith(
        "a sum of plain, control, logits, dkd, fitnet, at, rkd, irg, crd, ofa, rsd, queue, affinity, ofd, "
        "reviewkd, afd, ab, ft, deit, scalekd, gl, robust, trans"
    )


def test_a_store_of_q_k_v_is_refused_for_a_teacher_without(made, tmp_path):
    taught = made("pvt_v2")
    wanted = policy.Cache(layout="qkvh", views=1)
    given = (wanted, taught.prepared, teacher.load(taught.path), tmp_path / "s", tmp_path / "w")
    with pytest.raises(
        UserError, match="got qkvh for a teacher without Q, K, V .* set it to block_input"
    ):
        writing.write(*given, lambda _: None)
    assert not (tmp_path / "s").exists()


def test_a_teacher_without_q_k_v_goes_through_training_and_evaluation(made, tmp_path):
    taught = made("mobilenetv3")
    recipe = settings.Distill(("gl+robust+logits",), "resnet18", batch=8, steps=4)
    given = (taught.prepared, taught.path, taught.features, tmp_path / "student", tmp_path / "work")
    curves = distill.distill(recipe, "gl+robust+logits", *given)["curves"]
    assert {"tokens", "adversarial", "logits"} <= set(curves)
    paths = [tmp_path / "student" / "student.safetensors"]
    found, shown = evaluate(accuracy.Evaluate(), taught.prepared, taught.path, paths)
    assert set(found["models"]) == {"teacher", "gl+robust+logits"}
    assert shown["attention"]["received"] == {}


def test_attention_is_seen_where_timm_is_told_not_to_fuse_it():
    set_fused_attn(False)
    try:
        vit = timm.create_model("vit_tiny_patch16_224", **pairs.VIT)
    finally:
        set_fused_attn(True)
    assert not vit.blocks[-1].attn.fused_attn
    assert probe.probe_teacher(vit).no_attention is None


def test_a_map_with_its_channels_last_is_read_channels_first():
    student = timm.create_model("mambaout_femto", num_classes=10).eval()
    tap = find_tap(student, 64, (8, 8))
    assert (tap.module, tap.channels, tap.grid) == ("stages.2", 192, (4, 4))
    raw = []
    student.get_submodule(tap.module).register_forward_hook(lambda *a: raw.append(a[2]))
    with Taps(student, [tap.module]) as taps, torch.no_grad():
        student(torch.randn(2, 3, 64, 64))
        assert torch.equal(taps.features[tap.module], raw[0].permute(0, 3, 1, 2))


STUDENTS_REFUSED = {
    "hrnet_w18_small": "got HighResolutionNet, for which timm names no feature maps .* such as logits",
    "inception_v3": "InceptionV3 does not take an RGB image of 64 px .*, or set another prepare.image_size",
    "efficientvit_m0": "stages.2 1x1 at 64 px; expected one of the last two .* the teacher's 8x8 tokens",
}


@pytest.mark.parametrize("student", STUDENTS_REFUSED)
def test_a_student_that_cannot_be_tapped_is_refused_by_name_and_reason(student, made, monkeypatch):
    monkeypatch.setattr(pairs, "train_step", None)
    cell = pairs.pair_result(made("vit"), student)
    assert cell["verdict"] == "refused"
    with pytest.raises(UserError, match=STUDENTS_REFUSED[student]):
        raise UserError(cell["reason"])


def test_a_student_without_maps_still_learns_from_logits(made):
    taught = made("vit")
    recipe = settings.Distill(("logits",), "hrnet_w18_small", batch=8, steps=4)
    trainer = build(recipe, "logits", taught.prepared, taught.path, taught.features)
    assert trainer.reader.tap is None and trainer.objective.terms == ("logits",)
    with pytest.raises(UserError, match="HighResolutionNet, for which timm names no feature maps"):
        build(
            replace(recipe, methods=("ofa",)), "ofa", taught.prepared, taught.path, taught.features
        )


def test_the_page_shows_the_committed_matrix():
    found = json.loads(RESULTS.read_text())
    page = (ROOT / "docs" / "pairs.md").read_text()
    assert pairs.table(found) == page.split(pairs.START)[1].split(pairs.END)[0].strip()
    assert set(found["teachers"]) == set(TEACHERS) and set(found["onnx"]) == set(STUDENTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix_is_what_is_committed(tmp_path):
    args = pairs.parser().parse_args(["--out", str(tmp_path / "pairs")])
    pairs.main(args)
    now, then = (json.loads(p.read_text()) for p in (tmp_path / "pairs.json", RESULTS))
    assert verdicts(now) == verdicts(then)
    assert "broken" not in verdicts(now).values()


def verdicts(found):
    """(teacher, student) -> works or refused; a teacher refused as a whole stands alone."""
    told = {("", student): made["verdict"] for student, made in found["onnx"].items()}
    for name, whole in found["teachers"].items():
        told[name, ""] = "refused" if "refused" in whole else "teaches"
        for student, cell in whole.get("students", {}).items():
            told[name, student] = cell["verdict"]
    return told
