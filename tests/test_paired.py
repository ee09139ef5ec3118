"""The interval of a paired difference: its properties, how often it covers, and which models are compared."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from pipeline.evaluate import paired

SMALL = [(b, c, n) for n in (1, 2, 7, 30) for b, c in product(range(n + 1), repeat=2) if b + c <= n]


@pytest.mark.parametrize("scale", [1, 10])
def test_an_interval_holds_its_difference_within_bounds_and_turns_with_the_sides(scale):
    for better, worse, n in SMALL:
        counts = (scale * better, scale * worse, scale * n)
        low, high = paired.interval(*counts)
        assert -1 <= low < high <= 1
        assert low <= (better - worse) / n <= high
        back = paired.interval(counts[1], counts[0], counts[2])
        assert back == pytest.approx((-high, -low), abs=1e-12)


def test_an_interval_narrows_with_images_and_with_agreement():
    width = [np.diff(paired.interval(n // 5, n // 10, n))[0] for n in (50, 200, 800, 3200)]
    assert all(a > 1.5 * b for a, b in zip(width, width[1:], strict=False))
    width = [np.diff(paired.interval(d + 10, d, 400))[0] for d in (0, 5, 50, 150)]
    assert width == sorted(width) and width[0] > 0
    assert paired.interval(0, 0, 400)[1] == pytest.approx(1.96 / 402, rel=1e-3)


def test_an_interval_is_that_of_the_authors_formula():
    """By hand, of the 2 x 2 table with half an image more in each cell, for 26 and 7 of 100."""
    b, c, n = 26.5, 7.5, 102
    p, q = b / n, c / n
    spread = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / n)
    assert paired.interval(26, 7, 100) == pytest.approx((p - q - spread, p - q + spread))


@pytest.mark.parametrize("n", [40, 150])
@pytest.mark.parametrize(("p", "q"), [(0.05, 0.05), (0.1, 0.02), (0.3, 0.1), (0.02, 0.02)])
def test_an_interval_covers_as_often_as_it_says(n, p, q):
    """Exactly, by the probability of every pair of counts (b, c) under a trinomial."""
    covered = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            log = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1)
            log += b * math.log(p) + c * math.log(q)
            log += (n - b - c) * math.log(1 - p - q) - math.lgamma(n - b - c + 1)
            low, high = paired.interval(b, c, n)
            covered += math.exp(log) * (low <= p - q <= high)
    assert 0.935 <= covered <= 0.999


def test_a_difference_counts_images_that_one_model_alone_gets_right():
    own = np.array([True, True, False, True, False])
    other = np.array([True, False, True, False, False])
    found = paired.difference(own, other)
    assert (found["better"], found["worse"], found["points"]) == (2, 1, pytest.approx(20))
    assert found["low"] < 20 < found["high"]


def test_a_method_is_compared_with_plain_and_with_the_control_of_its_batches_and_transform():
    hits = dict.fromkeys(
        ("teacher", "plain", "control", "trans+control", "logits", "cakd", "plain+trans"),
        np.ones(4, dtype=bool),
    )
    found = {name: list(others) for name, others in paired.against(hits).items()}
    assert found == {
        "teacher": ["plain"],
        "plain": [],
        "control": ["plain"],
        "trans+control": ["plain"],
        "logits": ["plain", "control"],
        "cakd": ["plain", "trans+control"],
        "plain+trans": ["plain"],
    }
    del hits["plain"], hits["trans+control"]
    assert list(paired.against(hits)["cakd"]) == []
