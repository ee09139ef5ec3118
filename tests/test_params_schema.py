"""params.schema.json, by which editors complete params.yaml: current, and of one mind with our reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from benchmarks import schemas
from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.project import recipes
from stages.check import SECTIONS
from tests.house import ROOT

SCHEMA = json.loads((ROOT / schemas.PARAMS).read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
MISTAKES = {  # dotted key -> a value that must be refused
    "distil": {},
    "distill.step": 600,
    "distill.cakd.swap": 0.5,
    "distill.cakd.trans.color": 0.2,
    "distill.terms.fitnets": {},
    "teach.geometry.mix.mixups": 0.5,
    "cache.compute": {},
    "report.budget": {},
    "report.budgets": {"top_min": 0.9},
    "bench.enable": ["ort-fp32"],
    "bench.enabled": ["ort-fp23"],
    "bench.threads": [0],
    "prepare.source": "digit",
    "prepare.student_labels": "some",
    "prepare.val": 1.5,
    "teach.lr": 0,
    "teach.geometry.crop": [0.7],
    "cache.mode": True,
    "cache.dtype": "fp16",
    "distill.methods": ["plian"],
    "distill.steps": "600",
    "distill.batch": 3,
    "distill.optimizer": "adam",
    "distill.momentum": 1.0,
    "distill.labelled_share": 1.5,
    "build.trt_shapes": [1, 8],
}


def test_the_committed_schema_is_that_of_the_settings() -> None:
    assert (ROOT / schemas.PARAMS).read_text(encoding="utf-8") == schemas.schema_of_params()
    Draft202012Validator.check_schema(SCHEMA)


def test_no_section_takes_a_key_that_it_does_not_have() -> None:
    for name, section in {"params.yaml": SCHEMA, **SCHEMA["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        assert section["description"], name


def test_the_comment_of_a_field_is_its_description() -> None:
    cache, distill = SCHEMA["$defs"]["Cache"], SCHEMA["$defs"]["Distill"]
    assert cache["properties"]["views"]["description"] == "V views an image"
    assert distill["properties"]["balance"]["description"].startswith("of every balanced term")
    assert cache["properties"]["views"]["default"] == 4


def test_params_yaml_names_the_schema_and_keeps_to_it() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8").startswith(recipes.SCHEMA)
    assert recipes.SCHEMA.endswith(f"$schema={schemas.PARAMS}\n")
    VALIDATOR.validate(config.read(ROOT / "params.yaml"))


@pytest.mark.parametrize("name", recipes.names(ROOT / "recipes"))
def test_every_recipe_keeps_to_the_schema(name: str) -> None:
    data = None if name in ("digits", "students") else "images"  # these come with scikit-learn
    VALIDATOR.validate(recipes.merged(name, ROOT / "recipes", SECTIONS, data))


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_flagged_by_the_schema_and_refused_by_our_reader(key: str) -> None:
    params = config.read(ROOT / "params.yaml")
    *above, last = key.split(".")
    section: dict[str, Any] = params
    for part in above:
        section = section[part]
    section[last] = MISTAKES[key]
    assert list(VALIDATOR.iter_errors(params))
    if above:
        with pytest.raises(UserError):
            config.parse(SECTIONS[above[0]], params[above[0]], above[0])
