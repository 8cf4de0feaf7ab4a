import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax.transforms.pyramid import double, halve

SHAPES = [(8, 6, 4), (7, 5, 9), (1, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_coarse_voxel_is_the_mean_of_its_block(shape):
    volume = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    found = halve(jnp.asarray(volume))
    coarse = [-(-size // 2) for size in shape]
    assert found.shape == (2, *coarse, 3)
    for i, j, k in np.ndindex(*coarse):
        block = volume[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found[:, i, j, k], block, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_displacement_is_interpolated_at_the_fine_voxels_and_doubled(shape):
    coarse = np.random.default_rng(0).normal(size=(2, *[-(-size // 2) for size in shape], 3)).astype(np.float32)
    found = double(jnp.asarray(coarse), shape)
    at = (np.indices(shape) - 0.5) / 2
    for case, axis in np.ndindex(2, 3):
        expected = 2 * ndimage.map_coordinates(coarse[case, ..., axis], at, order=1, mode="nearest")
        np.testing.assert_allclose(found[case, ..., axis], expected, atol=1e-5)


def test_a_linear_displacement_of_halved_images_is_that_of_the_images():
    # u(x) = x / 10 on the fine lattice; seen from a coarse voxel at 2 i + 1/2, in coarse voxels, half of that.
    place = 2 * np.indices((6, 7, 5)).transpose(1, 2, 3, 0)[None] + 0.5
    found = double(jnp.asarray(place / 10 / 2, jnp.float32), (12, 14, 10))
    expected = np.indices((12, 14, 10)).transpose(1, 2, 3, 0) / 10
    np.testing.assert_allclose(found[0, 1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-5)
