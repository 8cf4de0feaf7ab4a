import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import jacobian
from gridreg_jax.transforms.warp import identity_grid

SHAPE = (7, 8, 6)


def affine_displacement(matrix, shape=SHAPE):
    """`u(x) = (matrix - I) x`, `[1, *shape, 3]`."""
    return identity_grid(shape)[None] @ jnp.asarray(matrix - np.eye(3), jnp.float32).T


def test_determinant_agrees_with_numpy():
    gradient = np.random.default_rng(0).normal(size=(2, 5, 4, 3, 3, 3))
    found = jacobian.determinant(*(jnp.asarray(np.moveaxis(gradient[..., a], -1, 0), jnp.float32) for a in range(3)))
    np.testing.assert_allclose(found, np.linalg.det(np.eye(3) + gradient), rtol=1e-4, atol=1e-5)


def test_random_field_agrees_with_numpy_gradient():
    displacement = np.random.default_rng(1).normal(size=(2, *SHAPE, 3))
    gradient = np.stack(np.gradient(displacement, axis=(1, 2, 3)), axis=-1)[:, 1:-1, 1:-1, 1:-1]
    expected = np.linalg.det(np.eye(3) + gradient)
    found = jacobian.jacobian_determinant(jnp.asarray(displacement, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_affine_map_has_its_own_determinant_everywhere():
    matrix = np.array([[1.1, 0.2, 0.0], [-0.1, 0.9, 0.1], [0.05, 0.0, 1.3]])
    displacement = affine_displacement(matrix)
    found = jacobian.jacobian_determinant(displacement)
    assert found.shape == (1, 5, 6, 4)
    np.testing.assert_allclose(found, np.linalg.det(matrix), rtol=1e-5)


def test_no_interior():
    with pytest.raises(InputError, match="3 voxels"):
        jacobian.jacobian_determinant(jnp.zeros((1, 5, 2, 5, 3)))
