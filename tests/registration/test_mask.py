from pathlib import Path

import numpy as np
import pytest

from gridreg_jax.data.nifti import Volume, corner_to_corner
from gridreg_jax.registration import affine as affine_start
from gridreg_jax.registration.deformable import on_lattice
from gridreg_jax.registration.mask import kept

SHAPE = (30, 26, 22)


def masked(index, lattice, turn, shape=SHAPE):
    array = np.zeros(shape, np.int32)
    array[index] = 1
    return Volume(array, lattice(shape, (1.0, 1.2, 2.0), turn(20, 2)), Path("mask"))


@pytest.mark.parametrize("coarse", [(30, 26, 22), (29, 13, 12), (15, 20, 5), (12, 7, 22)])
def test_each_slice_is_kept_on_a_coarser_lattice_and_grows_by_half_a_voxel_at_most(lattice, turn, coarse):
    for axis, (size, fewer) in enumerate(zip(SHAPE, coarse, strict=True)):
        step = (size - 1) / (fewer - 1)
        for place in range(size):
            mask = masked((slice(None),) * axis + (place,), lattice, turn)
            found = kept(mask, corner_to_corner(mask, coarse), coarse)
            profile = found.any(axis=tuple({0, 1, 2} - {axis}))
            gap = np.abs(np.arange(fewer) * step - place)[profile] - (1 + step) / 2
            assert profile.any() and (gap < 1e-6).all(), (axis, place)


def test_on_its_own_lattice_or_a_finer_one_a_mask_is_what_it_is(lattice, turn):
    mask = masked(np.random.default_rng(0).uniform(size=SHAPE) > 0.5, lattice, turn)
    np.testing.assert_array_equal(kept(mask, mask.affine, SHAPE), mask.array != 0)
    finer = tuple(2 * n - 1 for n in SHAPE)
    np.testing.assert_array_equal(kept(mask, corner_to_corner(mask, finer), finer)[::2, ::2, ::2], mask.array != 0)


def test_a_thin_mask_counts_in_every_part(phantom, lattice, turn, monkeypatch):
    shape = (40, 41, 42)
    image = phantom().volume(shape, masked(0, lattice, turn, shape).affine)
    weights = []

    def search(fixed, moving, weight, *_, **__):
        weights.append(weight)
        return np.zeros(1), np.zeros((1, 6), np.float32)

    monkeypatch.setattr(affine_start, "_search", search)
    for place in (13, 14):
        mask = masked((slice(None), slice(None), place), lattice, turn, shape)
        assert on_lattice(image, image, mask, np.eye(4), 2)[2].any()
        affine_start.align(image, image, mask, kind="rigid")
    assert len(weights) == 6 and all(weight.any() for weight in weights)
