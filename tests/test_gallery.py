"""The pictures and tables of the report: right counts, right names, no other file needed."""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.data.prepared import Prepared
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.report import gallery
from pipeline.report.charts import classes as charts_classes
from pipeline.report.charts.classes import BARS
from tests import artefacts


def evidence(prepared: Prepared, shipped: str = "cakd") -> dict:
    """Made-up evidence on real rows: the first class is taken for the second three times in ten."""
    rows = prepared.rows("test")
    labels = prepared.labels[rows]
    entries = [[c, c, int((labels == c).sum())] for c in range(len(prepared.classes))]
    entries[0][2] -= 3
    entries.insert(1, [0, 1, 3])
    firsts = rows[labels == 0][:3].tolist()
    mistakes = [
        {"row": r, "label": 0, "predicted": 1, "confidence": c}
        for r, c in zip(firsts, (0.99, 0.9, 0.7), strict=True)
    ]
    found = {"confusion": entries, "mistakes": mistakes}
    ramp = np.linspace(0, 2, 64).tolist()
    return {
        "schema": "cakd.evidence/1",
        "split": "test",
        "classes": list(prepared.classes),
        "models": {"teacher": found, shipped: found},
        "attention": {
            "grid": [8, 8],
            "rows": firsts,
            "received": {name: [ramp] * 3 for name in ("teacher", shipped)},
        },
        **artefacts.head(),
    }


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_small_pictures_are_kept_exactly_and_large_ones_made_small():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(gallery.uri(pixels))), pixels)
    large = gallery.uri(np.zeros((400, 400, 3), np.uint8))
    assert opened(large).size == (160, 160) and len(large) < 20_000


def test_the_counts_are_those_of_the_index(prepared):
    found = gallery.counts(prepared)
    assert found["train, label seen"] == [5] * 10
    assert sum(found["train, label hidden"]) == 1247
    assert (sum(found["val"]), sum(found["test"])) == (100, 400)
    page = gallery.data_page(prepared)
    assert [name for name, _ in page["samples"]] == list(prepared.classes)
    assert all(len(pictures) == gallery.SAMPLES for _, pictures in page["samples"])


def test_the_surest_mistakes_are_shown_with_the_file_they_came_from(prepared):
    made = evidence(prepared)
    found = gallery.mistakes(made, prepared, "cakd")
    first, row = found["surest"][0], made["models"]["cakd"]["mistakes"][0]["row"]
    assert np.array_equal(np.asarray(opened(first["image"])), prepared.images.squares([row])[0])
    assert first["origin"] == prepared.origins()[row] and first["confidence"] == 0.99
    assert (first["label"], first["predicted"]) == ("0", "1")
    assert found["wrong"] == 3 and found["total"] == 400 and found["pairs"] == [("0", "1", 3)]
    assert found["matrix"][0][1] == 3 and len(found["names"]) == 10


def test_above_twenty_classes_the_matrix_keeps_the_worst_and_every_image():
    classes = [f"class {i}" for i in range(100)]
    entries = [[i, i, 9] for i in range(100)] + [[i, (i + 1) % 100, i % 7] for i in range(100)]
    entries += [[77, 3, 500]]
    matrix, names = gallery.confusion(entries, classes)
    assert len(names) == len(matrix) == 20 and names[-1] == gallery.OTHER and "class 77" in names
    assert sum(map(sum, matrix)) == sum(n for _, _, n in entries)
    at = names.index("class 77")
    assert sum(matrix[at]) == 9 + 0 + 500


def test_heat_is_bright_where_the_attention_is_and_dark_where_it_is_not():
    received = np.zeros(64)
    received[:8] = 3.0  # the top row of patches
    found = gallery.heated(np.full((32, 32, 3), 128, np.uint8), received, (8, 8), 3.0)
    assert found.shape == (96, 96, 3)
    assert found[:6].mean() > found[40:].mean() + 60


def test_attention_that_is_uniform_everywhere_is_not_bright(prepared):
    made = evidence(prepared)
    for name in made["attention"]["received"]:
        made["attention"]["received"][name] = [[1.0] * 64] * 3
    assert gallery.attention(made, prepared, "cakd")["top"] == 2.0


def test_the_names_of_many_classes_gathered_are_counted(prepared):
    assert gallery.mistakes(evidence(prepared), prepared, "cakd")["gathered"] == 0
    classes = tuple(f"class {i}" for i in range(100))
    many = replace(prepared, classes=classes)
    assert gallery.mistakes(evidence(prepared), many, "cakd")["gathered"] == 81


def test_equal_counts_make_a_histogram_that_begins_at_nothing_and_script_of_any_kind_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts_classes.draw({"train": [3, 4]}, ["教会", "äpfel"], "c")
        picture = charts_classes.draw({"train": [100] * 40}, [str(i) for i in range(40)], "c")
    said = re.findall(r">([^<>]+)</text>", picture)
    assert {"0", "100", "40"} <= set(said) and not [s for s in said if "." in s]


def test_without_projectors_there_is_no_attention_to_show(prepared):
    made = evidence(prepared)
    del made["attention"]["received"]["cakd"]
    assert gallery.attention(made, prepared, "cakd") is None
    made["attention"]["received"]["other"] = made["attention"]["received"]["teacher"]
    assert gallery.attention(made, prepared, "cakd")["student"] == "other"


@pytest.mark.parametrize("n", [3, 30, 100])
def test_the_chart_of_the_classes_has_a_unit_on_every_axis(n):
    draw = np.random.default_rng(0)
    series = {"train, label seen": draw.integers(1, 90, n).tolist(), "val": [0] * n}
    picture = charts_classes.draw(
        series, [f"a rather long name of class {i}" for i in range(n)], "c"
    )
    said = re.findall(r">([^<>]+)</text>", picture)
    assert ({"images", "class"} <= set(said)) == (n <= BARS)
    assert ("images per class" in said and "classes" in said) == (n > BARS)
    assert "val" not in picture.partition(">")[0] and not re.findall(
        r"(?:fill|stroke): ?#", picture
    )


def test_skipped_and_doubled_pictures_stand_on_the_data_page(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            colour = (i * 20, 50, 100 * (name == "cat"))
            Image.new("RGB", (9, 9), colour).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"")
    Image.new("RGB", (9, 9), (20, 50, 100)).save(tmp_path / "images" / "dog" / "twin.png")
    config = Prepare("imagefolder", str(tmp_path / "images"), image_size=9, on_error="skip")
    prepare(config, tmp_path / "p")
    page = gallery.data_page(Prepared.open(tmp_path / "p"))
    assert page["skipped"][0]["origin"] == "cat/broken.png"
    assert sorted(page["duplicates"][0]["origins"]) == ["cat/1.png", "dog/twin.png"]
