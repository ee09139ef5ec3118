"""Views as a pure function of (seed, image, view), and the check that they are the teacher's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.mixing import Mix, mixture
from pipeline.data.pixels import Packed, Squares
from pipeline.data.resident import Resident, resident_where_it_fits
from pipeline.data.views import Geometry

NONE = np.array([], dtype=np.int64)  # nothing is mixed
POOL = np.arange(6)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)


@pytest.fixture
def images(pixels) -> Squares:
    return Squares(pixels)


def test_a_view_has_the_same_bits_in_any_batch_and_order(images):
    geometry = Geometry(rotate=20)
    together = views.view_batch(images, geometry, 3, [0, 1, 2, 5], [0, 1, 2, 3], NONE)
    turned = views.view_batch(images, geometry, 3, [5, 2, 1, 0], [3, 2, 1, 0], NONE)
    alone = views.view_batch(images, geometry, 3, [2], [2], NONE)
    assert torch.equal(together.flip(0), turned)
    assert torch.equal(together[2:3], alone)


def test_seed_image_and_view_each_change_the_geometry():
    base = views.parameters(Geometry(), 0, [4], [1])
    for seed, row, view in ((1, 4, 1), (0, 5, 1), (0, 4, 2)):
        assert not np.array_equal(base, views.parameters(Geometry(), seed, [row], [view]))


def test_the_teachers_own_training_views_are_none_of_the_cached_ones():
    cached = views.parameters(Geometry(), 0, [4] * 50, range(50))
    own = views.parameters(Geometry(), 0, [4] * 50, [-1 - epoch for epoch in range(50)])
    assert not {a.tobytes() for a in cached} & {b.tobytes() for b in own}


def test_the_whole_image_without_any_freedom_is_itself(images, pixels):
    still = Geometry(crop=(1.0, 1.0), aspect=1.0, rotate=0.0, flip=False)
    assert torch.equal(
        views.view_batch(images, still, 0, range(6), [0] * 6, NONE), views.whole(pixels)
    )


def test_flip_mirrors_half_of_the_views_left_to_right(images, pixels):
    mirror = Geometry(crop=(1.0, 1.0), aspect=1.0, rotate=0.0, flip=True)
    rows = [0] * 200
    batch = views.view_batch(images, mirror, 0, rows, range(200), NONE)
    whole = views.whole(pixels)[0]
    kinds = [torch.equal(v, whole) for v in batch]
    assert all(
        torch.equal(v, whole.flip(2)) for v, same in zip(batch, kinds, strict=True) if not same
    )
    assert 70 < sum(kinds) < 130


def test_a_half_crop_shows_a_quarter_of_the_image_at_twice_the_scale():
    ramp = np.broadcast_to(
        np.arange(0, 240, 10, dtype=np.uint8)[None, None, :, None], (1, 24, 24, 3)
    )
    geometry = Geometry(crop=(0.25, 0.25), aspect=1.0, flip=False)
    view = views.view_batch(Squares(ramp), geometry, 0, [0], [0], NONE)[0, 0, 0].float()
    steps = view.diff()
    assert steps[2:-2].mean().item() == pytest.approx(5, abs=0.3)


def test_normalise_matches_the_numpy_preprocessing_of_the_exporters(pixels):
    from pipeline.data import prepared

    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    ours = views.normalise(views.whole(pixels), preprocess).numpy()
    np.testing.assert_allclose(ours, prepared.normalised(pixels, preprocess), rtol=1e-6, atol=1e-6)


def test_a_changed_pixel_is_refused_by_its_hash_naming_the_row(images):
    batch = views.view_batch(images, Geometry(), 0, [3, 4], [0, 0], NONE)
    hashes = views.view_hashes(batch)
    views.check_hashes(batch, hashes, [3, 4])
    batch[1, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"got 1 of 2 views.*image row 4"):
        views.check_hashes(batch, hashes, [3, 4])


ROWS = np.arange(200) % 6


def mixed(mix, rows=ROWS, views_=None, pool=POOL):
    numbers = np.arange(len(rows)) if views_ is None else views_
    return mixture(mix, 3, rows, numbers, pool, 16)


def test_a_mix_is_a_function_of_seed_image_and_view():
    mix = Mix(mixup=0.8, cutmix=1.0)
    whole, some = mixed(mix), mixed(mix, ROWS[50:60], np.arange(50, 60))
    for name, column in vars(whole).items():
        assert np.array_equal(column[50:60], getattr(some, name)), name
    other = mixture(mix, 4, ROWS, np.arange(200), POOL, 16)
    assert not np.array_equal(whole.shares, other.shares)


def test_shares_are_uniform_with_alpha_1_and_near_the_ends_with_a_small_one():
    even, steep = mixed(Mix(mixup=1.0)).shares, mixed(Mix(mixup=0.1)).shares
    assert abs(even.mean() - 0.5) < 0.07 and abs(even.std() - 12**-0.5) < 0.03
    assert steep.std() > 0.4
    off = mixed(Mix(cutmix=1.0, probability=0.0)).shares
    assert (off == 1).all() and not Mix(probability=1.0).on


def test_the_share_of_a_cut_view_is_the_area_it_keeps():
    found = mixed(Mix(cutmix=1.0))
    top, bottom, left, right = found.boxes.T
    assert np.allclose(found.shares, 1 - (bottom - top) * (right - left) / 256)
    assert set(found.partners) == set(POOL) and (found.shares < 1).mean() > 0.9


def test_a_mixed_view_holds_both_images_in_their_shares(images):
    still = Geometry(crop=(1.0, 1.0), aspect=1.0, flip=False, mix=Mix(mixup=1.0))
    flat = np.stack([np.full((16, 16, 3), 40 * i, np.uint8) for i in range(6)])
    rows, ks = np.arange(6), np.arange(6)
    batch = views.view_batch(Squares(flat), still, 0, rows, ks, POOL)
    found = views.mixed_with(still, 0, rows, ks, POOL, 16)
    expected = 40 * (rows * found.shares + found.partners * (1 - found.shares))
    assert np.abs(batch.float().mean(dim=(1, 2, 3)).numpy() - expected).max() <= 0.5
    cut = replace(still, mix=Mix(cutmix=1.0))
    batch = views.view_batch(Squares(flat), cut, 0, rows, ks, POOL)
    found = views.mixed_with(cut, 0, rows, ks, POOL, 16)
    expected = 40 * (rows * found.shares + found.partners * (1 - found.shares))
    assert np.allclose(batch.float().mean(dim=(1, 2, 3)).numpy(), expected, atol=1e-3)


def test_a_mixed_view_has_the_same_bits_in_any_batch(images):
    geometry = Geometry(rotate=20, mix=Mix(mixup=1.0, cutmix=1.0))
    together = views.view_batch(images, geometry, 3, [0, 1, 2, 5], [0, 1, 2, 3], POOL)
    alone = views.view_batch(images, geometry, 3, [2], [2], POOL)
    assert torch.equal(together[2], alone[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"mixup": -1.0}, "mix.mixup: got -1.0"), ({"probability": 1.5}, "mix.probability: got 1.5")],
)
def test_impossible_mixes_are_refused_with_the_value(kwargs, message):
    with pytest.raises(UserError, match=message):
        parse(Mix, kwargs, "mix")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"crop": [0.0, 1.0]}, r"crop: got \[0.0, 1.0\]; expected 0 < low"),
        ({"crop": [0.9, 0.5]}, r"crop: got \[0.9, 0.5\]; expected 0 < low"),
        ({"aspect": 0.5}, "aspect: got 0.5; expected 1 or more"),
        ({"rotate": 200.0}, "rotate: got 200.0; expected 180 or less"),
    ],
)
def test_impossible_geometries_are_refused_with_the_value(kwargs, message):
    with pytest.raises(UserError, match=message):
        parse(Geometry, kwargs, "geometry")


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(rotate=20),
        Geometry(mix=Mix(mixup=1.0)),
        Geometry(mix=Mix(mixup=0.8, cutmix=1.0), rotate=5),
    ],
)
def test_images_on_a_device_are_rendered_and_mixed_there_to_the_same_pixels(geometry, images):
    """The device's own path, run on the CPU, where it must give the CPU's pixels."""
    there = Resident(images, torch.device("cpu"))
    rows, numbers = np.array([0, 1, 2, 5, 3]), np.arange(5)
    expected = views.view_batch(images, geometry, 3, rows, numbers, POOL)
    found = views.view_batch(there, geometry, 3, rows, numbers, POOL)
    assert torch.equal(found, expected)
    assert views.backend(there) == f"{views.BACKEND} on cpu" != views.backend(images)
    drawn = views.mixed_with(geometry, 3, rows, numbers, POOL, 24)
    if drawn is not None:
        own, partner = views.whole(images.array[rows]), views.whole(images.array[rows[::-1]])
        assert torch.equal(drawn.blend_on_device(own, partner), drawn.blend(own, partner))


def test_images_lie_on_a_gpu_only_where_they_fit(prepared, monkeypatch):
    made = []
    monkeypatch.setattr("pipeline.data.resident.resident", lambda *args: made.append(args))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**12))
    free = prepared.images.array.nbytes * 4
    assert resident_where_it_fits(prepared, torch.device("cpu")) is prepared and not made
    resident_where_it_fits(prepared, torch.device("cuda"))
    assert len(made) == 1
    free -= 8
    assert resident_where_it_fits(prepared, torch.device("cuda")) is prepared and len(made) == 1
    other = replace(prepared, images=Packed("images.bin", np.empty(0, np.uint8), [], 32, "center"))
    assert resident_where_it_fits(other, torch.device("cuda")) is other
