"""params.yaml is read strictly: what is wrong is named with what was got and what is allowed."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from pipeline.core import config
from pipeline.core.errors import UserError


@dataclass(frozen=True, config=config.STRICT)
class Inner:
    low: float = 0.0


@dataclass(frozen=True, config=config.STRICT)
class Sample:
    epochs: NonNegativeInt
    lr: float = 0.1
    mode: Literal["on", "off"] = "on"
    labels: int | str = "all"
    path: str | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    kwargs: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, float] = Field(default_factory=dict)


def load(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return config.load(Sample, path)


def test_a_section_becomes_its_dataclass_with_yaml_1_2_numbers(tmp_path):
    found = load(
        tmp_path,
        "sample: {epochs: 3, lr: 1e-3, mode: off, labels: 5, pair: [1, 2], names: [a], inner: {low: 2},"
        " kwargs: {a: [1]}, limits: {b: 1}}",
    )
    assert found == Sample(
        3, 1e-3, "off", 5, None, (1.0, 2.0), ("a",), Inner(2.0), {"a": [1]}, {"b": 1.0}
    )
    assert isinstance(found.lr, float) and isinstance(found.inner.low, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: {epoch: 3}", "sample: unknown key 'epoch'; did you mean 'epochs'?"),
        ("sample: {lr: 1}", "sample: got lr; expected the key 'epochs' too; add it"),
        ("sample: {epochs: 3, lr: fast}", "sample.lr: got 'fast'; expected a number"),
        ("sample: {epochs: 1, lr: .nan}", "sample.lr: got nan; expected a finite number"),
        ("sample: {epochs: 2.5}", "sample.epochs: got 2.5; expected a whole number"),
        ("sample: {epochs: true}", "sample.epochs: got True; expected a whole number"),
        ("sample: {epochs: -1}", "sample.epochs: got -1; expected 0 or more"),
        (
            "sample: {epochs: 1, mode: of}",
            "sample.mode: got 'of'; did you mean 'off'? allowed: on, off",
        ),
        ("sample: {epochs: 1, pair: [1]}", "sample.pair: got [1]; expected a list of 2"),
        ("sample: {epochs: 1, names: a}", "sample.names: got 'a'; expected a list"),
        (
            "sample: {epochs: 1, inner: {lo: 1}}",
            "sample.inner: unknown key 'lo'; did you mean 'low'?",
        ),
        ("sample: {epochs: 1, inner: 3}", "sample.inner: got 3; expected keys and values"),
        (
            "sample: {epochs: 1, kwargs: {50: 1}}",
            "sample.kwargs: got the key 50; expected text; write '50'",
        ),
        (
            "sample: {epochs: 1, limits: {a: 1, null: 1}}",
            "sample.limits: got the key null; expected text; write 'null'",
        ),
        ("sample: {epochs: 1, limits: {b: x}}", "sample.limits.b: got 'x'; expected a number"),
        (
            "distil: {epochs: 1}",
            "unknown section 'distil:'; did you mean 'distill'? allowed: prepare",
        ),
        ("teach: {epochs: 1}", "no section 'sample:'; it has: teach; add the section"),
        ("- 1", "expected sections at the top level, got list"),
        ("sample: {epochs: 1", "not YAML"),
        ("sample: {epochs: 1, epochs: 2}", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(text, message, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="params.yaml: no such file"):
        config.load(Sample, tmp_path / "params.yaml")


def test_one_value_of_another_section(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("bench: {enabled: [a, b]}")
    assert config.value("bench.enabled", path) == ["a", "b"]
    with pytest.raises(UserError, match="no key 'bench.threads'"):
        config.value("bench.threads", path)
