"""Affines, against nibabel."""

import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry


@pytest.fixture
def oblique():
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    return nib.affines.from_matvec(rotation * [0.5, 1.0, 4.0], [10.0, -20.0, 30.0])


def test_voxel_to_world_is_the_affine(oblique):
    points = np.random.default_rng(1).normal(size=(4, 5, 3))
    world = geometry.voxel_to_world(points, oblique)
    np.testing.assert_allclose(world, nib.affines.apply_affine(oblique, points), atol=1e-12)


def test_voxel_to_world_by_hand():
    affine = np.array([[-2.0, 0, 0, 90], [0, 0, 3, -126], [0, 1, 0, -72], [0, 0, 0, 1]])
    np.testing.assert_array_equal(geometry.voxel_to_world(np.array([[10, 20, 30]]), affine), [[70, -36, -52]])


def test_world_to_voxel_inverts(oblique):
    points = np.random.default_rng(2).normal(size=(7, 3)) * 100
    back = geometry.world_to_voxel(geometry.voxel_to_world(points, oblique), oblique)
    np.testing.assert_allclose(back, points, atol=1e-10)


def test_spacing_follows_the_array_axes(oblique):
    np.testing.assert_allclose(geometry.spacing(oblique), [0.5, 1.0, 4.0])
