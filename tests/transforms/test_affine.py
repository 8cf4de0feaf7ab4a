"""Closed-form affine and rigid fits against NumPy's least squares and SciPy's rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gridreg_jax.transforms import affine
from gridreg_jax.transforms.affine import affine_displacement, apply_affine, nearest_rotation
from gridreg_jax.transforms.warp import identity_grid

fit_affine, fit_rigid = jax.jit(affine.fit_affine), jax.jit(affine.fit_rigid)
FITS = {"affine": fit_affine, "rigid": fit_rigid}
each_fit = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
weighted = pytest.mark.parametrize("weighted", [False, True])


def random_pairs(count=30, noise=0.2, seed=0):
    """Points and their noisy images under a rotation with scale and shift, `[2, count, 3]` each (two cases)."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(10, 90, (2, count, 3))
    linear = 1.2 * Rotation.random(2, random_state=seed).as_matrix()
    targets = (
        np.einsum("nij,nkj->nki", linear, points) + rng.normal(size=(2, 1, 3)) + noise * rng.normal(size=(2, 1, 3))
    )
    return points, targets + noise * rng.normal(size=targets.shape), rng.uniform(0.1, 3, (2, count))


def as_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def apply(affine, points):
    return np.einsum("nij,nkj->nki", affine[:, :3, :3], points) + np.asarray(affine)[:, None, :3, 3]


def test_points_are_mapped_as_by_a_product_of_matrices():
    rng = np.random.default_rng(0)
    points, linear, shift = rng.normal(size=(4, 5, 3)), rng.normal(size=(3, 3)), rng.normal(size=3)
    found = apply_affine(*as_float32(points, linear, shift))
    np.testing.assert_allclose(found, points @ linear.T + shift, atol=1e-5)


@weighted
def test_the_affine_is_the_least_squares_fit(weighted):
    points, targets, weights = random_pairs()
    found = fit_affine(*as_float32(points, targets, *([weights] if weighted else [])))
    root = np.sqrt(weights)[..., None] if weighted else np.ones((2, 1, 1))
    for case in range(2):
        ends = np.hstack([points[case], np.ones((30, 1))])
        expected = np.linalg.lstsq(root[case] * ends, root[case] * targets[case])[0].T
        np.testing.assert_allclose(found[case, :3, :3], expected[:, :3], atol=1e-5)
        np.testing.assert_allclose(found[case, :3, 3], expected[:, 3], atol=1e-3)
        np.testing.assert_array_equal(found[case, 3], [0, 0, 0, 1])


@weighted
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_rigid_map_is_scipys(weighted, mirrored):
    points, targets, weights = random_pairs()
    if mirrored:
        targets = targets * [1, 1, -1]
    weights = weights if weighted else np.ones((2, 30))
    found = np.asarray(fit_rigid(*as_float32(points, targets, *([weights] if weighted else []))))
    for case in range(2):
        centre, target_centre = (np.average(x[case], axis=0, weights=weights[case]) for x in (points, targets))
        expected, _ = Rotation.align_vectors(targets[case] - target_centre, points[case] - centre, weights[case])
        np.testing.assert_allclose(found[case, :3, :3], expected.as_matrix(), atol=1e-5)
        np.testing.assert_allclose(found[case, :3, :3] @ centre + found[case, :3, 3], target_centre, atol=1e-3)


@each_fit
def test_equal_points_give_the_identity(fit):
    points, _, weights = as_float32(*random_pairs())
    found = fit(points, points, weights)
    if fit is fit_affine:
        np.testing.assert_array_equal(found, np.broadcast_to(np.eye(4), (2, 4, 4)))
    else:  # a rotation by singular vectors is rounded, and its shift by as much times the size of the points
        np.testing.assert_allclose(found[:, :3, :3], np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-6)
        np.testing.assert_allclose(apply(found, points), points, atol=1e-6 * np.abs(points).max())


@each_fit
def test_only_the_ratios_of_weights_count(fit):
    points, targets, weights = as_float32(*random_pairs())
    np.testing.assert_allclose(fit(points, targets, weights), fit(points, targets, 7 * weights), rtol=1e-4, atol=1e-4)
    equal = fit(points, targets, jnp.full_like(weights, 3))
    np.testing.assert_allclose(equal, fit(points, targets), rtol=1e-4, atol=1e-4)


DEGENERATE = {
    "point": np.zeros((1, 5, 3)),
    "line": np.linspace(0, 4, 5)[None, :, None] * np.ones(3),
    "plane": np.random.default_rng(0).uniform(size=(1, 5, 3)) * [1, 1, 0],
    "octahedron": np.concatenate([np.eye(3), -np.eye(3)])[None],
}


@each_fit
@pytest.mark.parametrize("points", DEGENERATE.values(), ids=DEGENERATE)
def test_value_and_gradient_are_finite_whatever_the_points(fit, points):
    points = jnp.asarray(points, jnp.float32)
    turned = points @ jnp.asarray(Rotation.from_rotvec([0.1, 0.2, -0.3]).as_matrix().T, jnp.float32) + 0.5
    found = jax.jit(fit)(points, turned)
    np.testing.assert_allclose(apply(found, points), turned, atol=1e-3)
    for target in (points, turned):
        slopes = jax.jit(jax.grad(lambda *both: jnp.square(fit(*both)).sum(), (0, 1)))(points, target)
        assert all(jnp.isfinite(slope).all() for slope in slopes)


MATRICES = {
    "any": np.random.default_rng(1).normal(size=(3, 3)),
    "mirrored": np.diag([3.0, 2.0, -1.0]) @ Rotation.random(random_state=0).as_matrix(),
    "equal singular values": 2 * Rotation.random(random_state=1).as_matrix(),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_derivative_of_the_nearest_rotation(matrix):
    def oracle(matrix):
        left, _, right = np.linalg.svd(matrix)
        return left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right

    direction = np.random.default_rng(2).normal(size=(3, 3))
    value, slope = jax.jvp(nearest_rotation, *([one] for one in as_float32(matrix[None], direction[None])))
    step = 1e-6
    expected = (oracle(matrix + step * direction) - oracle(matrix - step * direction)) / (2 * step)
    np.testing.assert_allclose(value[0], oracle(matrix), atol=1e-5)
    np.testing.assert_allclose(slope[0], expected, atol=1e-4)


def test_displacement_of_an_affine():
    shape = (5, 7, 4)
    affine = np.stack([np.eye(4), np.eye(4)]) + 0.1 * np.random.default_rng(0).normal(size=(2, 4, 4))
    found = affine_displacement(jnp.asarray(affine, jnp.float32), shape)
    grid = np.asarray(identity_grid(shape), np.float64).reshape(-1, 3)
    expected = apply(affine, np.stack([grid, grid])) - grid
    np.testing.assert_allclose(found.reshape(2, -1, 3), expected, atol=1e-5)
    np.testing.assert_array_equal(affine_displacement(jnp.eye(4)[None], shape), np.zeros((1, *shape, 3)))
