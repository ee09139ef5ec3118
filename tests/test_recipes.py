"""Every recipe is a correct params.yaml, teacher and student fit, training begins; a merge loses nothing."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporters.ort.export import BEST, Export
from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared
from pipeline.distill import settings
from pipeline.distill.trainer import build, train_step
from pipeline.models import checkpoint, probe, teacher
from pipeline.models.student import Taps, find_tap
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.project import recipes
from pipeline.store import shards, writing
from pipeline.store.policy import Cache
from pipeline.teach import Teach, _build
from pipeline.training import stopwatch
from stages.check import CHECKED, SECTIONS, check_models, main
from tests import containers
from tests.house import ROOT

FOLDER = ROOT / "recipes"
NAMES = recipes.names(FOLDER)
TAPS = {
    "digits": "layer4 4x4 for 8x8 tokens",
    "students": "layer4 4x4 for 8x8 tokens",
    "few-labels": "layer4 4x4 for 8x8 tokens",
    "function-matching": "no method reads a tap",
    "cifar10-mini": "layer4 4x4 for 8x8 tokens",
    "cifar100": "layer4 4x4 for 8x8 tokens",
    "cifar100-all": "layer4 4x4 for 8x8 tokens",
    "cifar100-few": "layer4 4x4 for 8x8 tokens",
    "cifar100-guide": "layer4 4x4 for 4x4 tokens",
    "cifar100-vit": "layer4 4x4 for 8x8 tokens",
    "cifar100-ofa": "layer4 7x7 for 14x14 tokens",
    "imagefolder": "layer4 4x4 for 8x8 tokens",
    "imagefolder-mini": "layer4 8x8 for 8x8 tokens",
    "imagenet": "layer3 14x14 for 14x14 tokens",
    "imagenette": "layer4 4x4 for 8x8 tokens",
}
OFFLINE = ("digits", "students")  # the images come with scikit-learn
QUICK = ("digits", "cifar10-mini")
FREE = (
    "teach.kwargs",
    "distill.student_kwargs",
    "distill.students",
    "distill.tuned",
    "report.budgets",
)
CLASSES = {"cifar100": 100, "imagenet": 1000, None: 10}
LARGE = ("cifar100-ofa", "imagenet")  # 224 px
BY_CNN = ("cifar100-guide",)  # no attention to read
TERMS = {
    "plain": {"cross_entropy"},
    "cakd+logits": {"cross_entropy", "logits", "attention", "gram", "tokens", "adversarial"},
    "gl+logits": {"cross_entropy", "logits", "tokens"},
}
FOLDERS = ("imagefolder", "imagefolder-mini")  # class folders without a split


def whole(name, path="/data/pictures"):
    """The recipe's parameters, with the path that a user would give."""
    return recipes.merged(name, FOLDER, SECTIONS, None if name in OFFLINE else path)


def section(kind, name, path="/data/pictures"):
    return config.parse(kind, whole(name, path)[kind.__name__.lower()], name)


def leaves(values, where=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}"


def test_the_recipes_are_these():
    assert set(NAMES) == set(TAPS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fills_every_dataclass(name):
    found = {s: config.parse(kind, whole(name)[s], s) for s, kind in SECTIONS.items()}
    assert list(found) == list(config.SECTIONS)
    assert section(Export, name).method in (BEST, *section(settings.Distill, name).methods)


def test_digits_restores_the_committed_params_yaml_byte_for_byte(tmp_path):
    params = tmp_path / "params.yaml"
    recipes.apply("digits", FOLDER, params, SECTIONS)
    same = params.read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert same, "a key of params.yaml belongs into recipes/digits.yaml too, at the same place"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "digits"])
def test_a_recipe_holds_only_what_differs_from_the_default(name):
    overlay, default = config.read(FOLDER / f"{name}.yaml"), config.read(FOLDER / "digits.yaml")
    has_path = name in OFFLINE or overlay["prepare"].get("path")
    merged = whole(name, None if has_path else "/data/pictures")
    changed = set(recipes.differences(merged, default))
    for key in leaves(overlay):
        free = ".".join(key.split(".")[:2])
        if free in FREE:
            assert any(c.startswith(free) for c in changed), key
        else:
            assert key in changed, key


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_header_says_command_paper_and_hours(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("\n".join(header)) and max(map(len, header)) <= 120
    assert f"make repro RECIPE={name}" in "\n".join(header)
    for word in ("Paper", "easured", "Hours: not measured"):
        assert word in "\n".join(header), word
    asks = (
        name not in OFFLINE and config.read(FOLDER / f"{name}.yaml")["prepare"].get("path") is None
    )
    assert f"RECIPE={name} DATA=" in text or not asks
    assert "{" not in re.sub(r"(kwargs|tuned|students): {}", "", text)  # block style


@pytest.mark.parametrize("name", NAMES)
def test_the_command_writes_a_recipe_and_finds_it_correct(name, tmp_path, capsys):
    """The whole check, teacher and student built without weights."""
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    main(asked(params, name))
    wrote, correct = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"{params}: ") and str(FOLDER / f"{name}.yaml") in wrote
    assert correct.startswith(f"{params}: correct; ") and correct.endswith(TAPS[name])
    assert config.read(params) == whole(name)
    assert (tmp_path / "checked").read_text() == CHECKED


def asked(params, name, path="/data/pictures", force=False):
    given = {"recipe": name, "recipes": FOLDER, "force": force}
    given["data"] = None if name in OFFLINE else path
    return Namespace(params=params, out=params.with_name("checked"), **given)


def shallow_teacher(name):
    """What is known of the recipe's teacher, built one block deep."""
    teach = section(Teach, name)
    kwargs = {k: 1 if k == "depth" else v for k, v in teach.kwargs.items()}
    vit = checkpoint.create(teach.model, kwargs, 4)
    return probe.probe_teacher(vit, section(Prepare, name).image_size)


@pytest.mark.parametrize("name", NAMES)
def test_at_a_recipes_size_the_tap_leaves_no_more_than_a_fifth_of_the_backbone_out(name):
    """Decision 4: a term at the tap reaches at least 80 % of the parameters behind the head."""
    size, wanted = section(Prepare, name).image_size, section(settings.Distill, name)
    grid = shallow_teacher(name).grid
    student = checkpoint.create(wanted.student, wanted.student_kwargs, 4)
    tap = find_tap(student, size, grid, wanted.cakd.tap)
    with Taps(student, [tap.module]) as taps:
        student(torch.zeros(2, 3, size, size))
        taps.features[tap.module].square().sum().backward()
    backbone = {n: p for n, p in student.named_parameters() if not n.startswith("fc.")}
    reached = sum(p.grad is not None for p in backbone.values())
    assert reached >= 0.8 * len(backbone)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "digits"])
def test_a_recipes_header_says_how_large_its_store_gets(name):
    """Its logits are counted with the classes of its data, or said for each class."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    said = int(re.search(r"views x ([\d,]+) bytes", text)[1].replace(",", ""))
    images = re.search(r"cifar100|imagenet(?!te)", name)
    classes = 0 if "bytes, and 4 a class" in text else CLASSES[images[0] if images else None]
    cache, spec = section(Cache, name), shallow_teacher(name)
    fields = shards.layout_fields(cache.layout, cache.dtype, spec, classes)
    assert said == shards.record_bytes(fields)
    total = re.search(r"Store: ([\d,.]+) ([GM])B \(([\d,]+) pictures x (\d+) views", text)
    if total:
        size, unit, pictures, views = (part.replace(",", "") for part in total.groups())
        assert int(views) == cache.views
        exact = int(pictures) * cache.views * said / {"G": 1e9, "M": 1e6}[unit]
        assert float(size) == round(exact, len(size.partition(".")[2]))


def made_pictures(name, root):
    """A few pictures in the source's own layout, of the recipe's size where nothing else is said; their path."""
    source, size = section(Prepare, name).source, section(Prepare, name).image_size
    if source == "digits":
        return None
    if source == "parquet":  # 32 px, as CIFAR's, whatever the recipe enlarges them to
        splits = {"train": containers.pictures(12, 0), "test": containers.pictures(8, 1)}
        containers.as_parquet(root, splits)
        return str(root)
    held_out = "test" if name == "cifar10-mini" else "val"
    counts = {"train": 60} if name in FOLDERS else {"train": 12, held_out: 8}
    splits = {split: containers.pictures(n, n) for split, n in counts.items()}
    times = size // 32
    containers.as_folder(
        root, {s: (p.repeat(times, 1).repeat(times, 2), y) for s, (p, y) in splits.items()}
    )
    return str(root / "train" if name in FOLDERS else root)


def begin(name, folder, steps):
    """The first `steps` steps of the recipe by two methods, its batch and its store made small -> their terms."""
    path = made_pictures(name, folder / "pictures")
    wanted = section(Prepare, name, path)
    if name not in (*OFFLINE, *FOLDERS):
        labels = wanted.student_labels if wanted.student_labels == "all" else 1
        wanted = replace(wanted, val=4, student_labels=labels)
    prepare(wanted, folder / "prepared")
    prepared = Prepared.open(folder / "prepared")
    teach = replace(section(Teach, name), weights="scratch", epochs=1, guide=None)
    torch.manual_seed(0)  # an unlucky teacher is over the gate of a float16 store
    vit, described = _build(teach, prepared)
    weights = folder / "teacher.safetensors"
    checkpoint.save(weights, vit.eval(), described)
    policy = replace(section(Cache, name), views=1, batch=4)
    live, store = teacher.load(weights), folder / "store"
    writing.write(policy, prepared, live, store, folder / "work", lambda _: None)
    batch = 4
    distill = replace(section(settings.Distill, name), batch=batch, workers=0)
    found = {}
    for method in ("plain", "gl+logits" if name in BY_CNN else "cakd+logits"):
        own = distill.of_method(method)
        trainer = build(own, method, prepared, weights, store, policy)
        before = [p.detach().clone() for p in trainer.student.parameters()]
        timer = stopwatch.Stopwatch()
        found[method] = [train_step(trainer, step, timer) for step in range(steps)]
        after = trainer.student.parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), method
    return found


def check_beginning(found, steps):
    for method, seen in found.items():
        assert set(seen[1]) == TERMS[method]
        assert len(seen) == steps
        assert all(math.isfinite(v) for step in seen for v in step.values()), method


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.ci) for n in NAMES]
)
def test_the_training_of_a_recipe_begins(name, tmp_path):
    steps = 3 if name in LARGE else 20
    check_beginning(begin(name, tmp_path, steps), steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_training_of_a_recipe_at_224_px_goes_on(name, tmp_path):
    check_beginning(begin(name, tmp_path, 20), 20)


@pytest.fixture
def mine(tmp_path):
    """`mine("teach:\\n  lr: 0.1")`: a folder of the default and a recipe `mine` with this text."""

    def write(text):
        shutil.copy(FOLDER / "digits.yaml", tmp_path)
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path

    return write


def test_free_keys_and_lists_are_replaced_as_a_whole_and_other_keys_one_by_one(mine):
    folder = mine(
        "teach:\n  kwargs:\n    depth: 2\n  geometry:\n    flip: true\n"
        "distill:\n  methods:\n  - plain\n  cakd:\n    trans:\n      noise: 0.3\n"
    )
    found = recipes.merged("mine", folder, SECTIONS)
    default = config.read(FOLDER / "digits.yaml")
    assert found["teach"]["kwargs"] == {"depth": 2}
    assert found["teach"]["geometry"] == {**default["teach"]["geometry"], "flip": True}
    assert found["distill"]["methods"] == ["plain"]
    assert found["distill"]["cakd"]["trans"]["noise"] == 0.3
    assert found["distill"]["cakd"]["trans"]["patch"] == 0.4
    assert len(list(recipes.differences(found, default))) == 10
    assert found["prepare"] == default["prepare"]


WRONG = {
    "a section": (
        "teech:\n  lr: 1\n",
        "mine.yaml: unknown section 'teech:'; did you mean 'teach'?",
    ),
    "a key": ("teach:\n  lrr: 1\n", "mine.yaml: teach: unknown key 'lrr'; did you mean 'lr'?"),
    "a deep key": (
        "distill:\n  cakd:\n    trans:\n      noize: 1\n",
        "mine.yaml: distill.cakd.trans: unknown key 'noize'; did you mean 'noise'?",
    ),
    "a value": ("teach:\n  lr: fast\n", "mine.yaml: teach.lr: got 'fast'; expected a number"),
    "no keys": ("teach: 3\n", "mine.yaml: teach: got 3; expected keys and values"),
    "no path": (
        "prepare:\n  source: parquet\n",
        "recipe mine: prepare.path: got None; expected the path of the images; run `make repro RECIPE=mine DATA=",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_a_recipe_is_told_and_nothing_is_written(mistake, mine):
    text, message = WRONG[mistake]
    folder = mine(text)
    with pytest.raises(UserError) as told:
        recipes.apply("mine", folder, folder / "out" / "params.yaml", SECTIONS)
    assert message in str(told.value)
    assert not (folder / "out").exists()


def test_an_unknown_recipe_is_told_with_the_names_that_there_are(command, tmp_path):
    done = command("stages.check", "--recipe", "cifar", "--params", tmp_path / "params.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        f"recipe: got 'cifar'; did you mean 'cifar100'? allowed: {', '.join(NAMES)}" in done.stderr
    )


def test_force_without_a_recipe_is_told():
    with pytest.raises(UserError, match="--force: got --recipe None and --data None"):
        main(asked(ROOT / "params.yaml", None, None, force=True))


def test_what_was_edited_by_hand_is_not_replaced_unless_forced(tmp_path):
    params = tmp_path / "params.yaml"

    def apply(name, **kwargs):
        return recipes.apply(name, FOLDER, params, SECTIONS, **kwargs)

    assert apply("imagenette", data="/data/a b") == (
        f"{params}: written from {FOLDER / 'imagenette.yaml'}, 49 values differ from the default; "
        "images: /data/a b"
    )
    assert config.read(params)["prepare"]["path"] == "/data/a b"
    assert apply("imagenette", data="/data/a b").endswith("imagenette.yaml already")
    apply("cifar100")  # what a recipe wrote may be replaced
    edited = params.read_text().replace("epochs: 300", "epochs: 3")
    params.write_text(edited)
    with pytest.raises(
        UserError,
        match=r"got edits by hand \(teach.epochs\); expected none.*; to lose them, FORCE=1",
    ):
        apply("digits")
    assert params.read_text() == edited
    apply("digits", force=True)
    assert params.read_bytes() == (ROOT / "params.yaml").read_bytes()
    params.write_text("not: [yaml")
    with pytest.raises(UserError, match="not YAML"):
        apply("digits")
    apply("digits", force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"params.yaml", ".work"}


def test_make_hands_recipe_data_and_force_on():
    def line(*given):
        done = subprocess.run(
            ["make", "-n", "repro", *given], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return next(
            row for row in done.stdout.splitlines() if "python -m stages.check" in row
        ).split()

    assert line()[1:] == ["-m", "stages.check"]
    asked = line("RECIPE=imagenet", "DATA=/data/a", "FORCE=1")
    assert asked[3:] == ["--recipe", '"$RECIPE"', "--data", '"$DATA"', "--force"]
    assert line("RECIPE=digits")[3:] == ["--recipe", '"$RECIPE"']


def test_the_page_lists_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [n for n in NAMES if f"| [`{n}`](../recipes/{n}.yaml) |" not in page] == []
    assert Path(FOLDER / f"{recipes.DEFAULT}.yaml").is_file()


@pytest.mark.parametrize(
    ("recipe", "changes", "warned"),
    [
        ("digits", {}, False),
        ("digits", {"global_pool": "token"}, True),
        ("cifar10-mini", {}, False),
        ("cifar100-ofa", {}, True),
    ],
)
def test_a_teacher_whose_patch_tokens_are_not_trained_is_named_once(
    recipe, changes, warned, capsys
):
    params = whole(recipe)
    kinds = ("prepare", "teach", "cache", "distill")
    params["teach"]["kwargs"] = {
        k: v
        for k, v in (params["teach"]["kwargs"] | changes).items()
        if k != "fc_norm" or not changes
    }
    check_models(*(config.parse(SECTIONS[kind], params[kind], kind) for kind in kinds))
    warning = capsys.readouterr().err
    assert warning.count("warning: teach.model") == warned
    assert ("pools by its class token" in warning) == warned
