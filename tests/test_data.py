"""A prepared folder is opened whole or refused; rows, spreads and permutations are what they say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared, spread
from pipeline.training import seeds


def test_damaged_pixels_are_refused(digits, tmp_path):
    copy = shutil.copytree(digits, tmp_path / "p")
    pixels = bytearray((copy / "images.npy").read_bytes())
    pixels[-1] ^= 1
    (copy / "images.npy").write_bytes(bytes(pixels))
    with pytest.raises(UserError, match="images.npy: damaged: SHA-256: got"):
        Prepared.open(copy).verify()
    Prepared.open(digits).verify()


def test_origins_say_where_each_record_was_read_from(digits):
    prepared = Prepared.open(digits)
    origins = prepared.origins()
    assert len(origins) == len(set(origins)) == 1797 and origins[0].startswith("digits/")
    first = origins.index("digits/0000")  # a nought, as scikit-learn's first picture is
    assert prepared.labels[first] == 0


def test_a_permutation_is_a_function_of_seed_stream_and_pass():
    base = seeds.permutation(50, 0, "a", 0)
    assert sorted(base) == list(range(50))
    assert np.array_equal(base, seeds.permutation(50, 0, "a", 0))
    for other in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert not np.array_equal(base, seeds.permutation(50, *other))


def test_spread_takes_the_first_the_last_and_even_steps_between():
    assert spread(np.arange(100), 4).tolist() == [0, 33, 66, 99]
    assert spread(np.arange(3), 4).tolist() == [0, 1, 2]
