import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from gridreg_jax.transforms import warp as warping
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import identity_grid, sample

compose, warp_labels = jax.jit(warping.compose), jax.jit(warping.warp_labels)
invert = jax.jit(warping.invert, static_argnames=("iterations", "relaxation"))
warp = jax.jit(warping.warp, static_argnames=("origin", "stride"))
integrate = jax.jit(warping.integrate, static_argnames="steps")

SHAPE, CUBE = (9, 8, 7), (17, 17, 17)


def random_volume(channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *SHAPE, channels)).astype(np.float32)


def random_displacement(scale, seed=1, shape=SHAPE):
    return (scale * np.random.default_rng(seed).normal(size=(2, *shape, 3))).astype(np.float32)


def smooth_displacement(amplitude):
    """Smooth, and 0 on the border: the map takes the box onto itself. `[1, *CUBE, 3]`."""
    x, y, z = np.meshgrid(*(np.linspace(0, np.pi, size) for size in CUBE), indexing="ij")
    bump = amplitude * np.sin(x) * np.sin(y) * np.sin(z)
    return jnp.asarray(np.stack([bump, -0.5 * bump * np.cos(y), 0.7 * bump * np.cos(x)], axis=-1)[None], jnp.float32)


def test_identity_grid():
    np.testing.assert_array_equal(identity_grid((3, 4, 5))[2, 1, 3], [2, 1, 3])
    assert identity_grid((3, 4, 5)).shape == (3, 4, 5, 3)


@pytest.mark.parametrize("shape", [SHAPE, (9, 8, 1), (1, 1, 1)])
def test_zero_displacement_is_the_identity_at_the_border_too(shape):
    volume = np.random.default_rng(0).normal(size=(2, *shape, 2)).astype(np.float32)
    np.testing.assert_array_equal(warp(volume, jnp.zeros((2, *shape, 3))), volume)


@pytest.mark.parametrize("scale", [0.5, 10.0])
def test_agrees_with_scipy(scale):
    volume, displacement = random_volume(), random_displacement(scale)
    points = np.moveaxis(np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) + displacement, -1, 1)
    expected = np.stack(
        [
            np.stack([map_coordinates(one[..., c], where, order=1, mode="nearest") for c in range(2)], -1)
            for one, where in zip(volume.astype(np.float64), points.astype(np.float64), strict=True)
        ]
    )
    np.testing.assert_allclose(warp(volume, displacement), expected, atol=1e-5)


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_the_gradient_is_a_loop_on_the_cpu_alone(platform, loops):
    slope = jax.jit(jax.grad(lambda displacement, volume: warping.warp(volume, displacement).sum()))
    shapes = [jax.ShapeDtypeStruct((1, *SHAPE, channels), jnp.float32) for channels in (3, 1)]
    program = jax.export.export(slope, platforms=[platform])(*shapes).mlir_module()
    assert program.count("stablehlo.while") == loops


def test_a_lattice_may_begin_elsewhere():
    volume, zero = random_volume(), jnp.zeros((2, 4, 5, 6, 3))
    np.testing.assert_array_equal(warp(volume, zero, origin=(3, 2, 1)), volume[:, 3:7, 2:7, 1:])


def test_a_lattice_may_be_sparser():
    rng = np.random.default_rng(1)
    volume = rng.normal(size=(1, 8, 9, 7, 2)).astype(np.float32)
    displacement = rng.normal(size=(1, 6, 7, 5, 3)).astype(np.float32)
    sparse = (slice(None), *[slice(None, None, 2)] * 3)
    found = warp(volume, displacement[sparse], origin=(1, 0, 2), stride=2)
    np.testing.assert_allclose(found, np.array(warp(volume, displacement, origin=(1, 0, 2)))[sparse], atol=1e-6)


def test_integer_translation_pulls_back():
    volume = random_volume()
    displacement = np.broadcast_to(np.float32([2, -1, 0]), (2, *SHAPE, 3))
    rows, columns = np.minimum(np.arange(9) + 2, 8), np.maximum(np.arange(8) - 1, 0)
    np.testing.assert_array_equal(warp(volume, displacement), volume[:, rows][:, :, columns])


def test_volume_and_displacement_may_differ_in_shape():
    volume = random_volume()
    warped = warp(volume, jnp.ones((2, 4, 5, 3, 3)))
    np.testing.assert_array_equal(warped, volume[:, 1:5, 1:6, 1:4])


def test_sample_at_voxels_and_half_way():
    volume = jnp.asarray(random_volume()[0])
    values = sample(volume, jnp.asarray([[3.0, 2.0, 5.0], [3.5, 2.0, 5.0], [-4.0, 2.0, 99.0]]))
    expected = [volume[3, 2, 5], (volume[3, 2, 5] + volume[4, 2, 5]) / 2, volume[0, 2, 6]]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_gradient_with_respect_to_displacement():
    # Away from cell borders the warp is a polynomial of each coordinate of degree 1: differences are exact.
    volume = random_volume()
    displacement = np.random.default_rng(2).uniform(0.3, 0.7, size=(2, *SHAPE, 3)).astype(np.float32)
    weights = random_volume(seed=3)
    gradient = jax.jit(jax.grad(lambda u: jnp.sum(warp(volume, u) * weights)))(displacement)
    for component in range(3):
        step = 0.25 * np.eye(3, dtype=np.float32)[component]
        # A voxel's value depends on its own displacement alone, so one difference gives all entries.
        difference = (warp(volume, displacement + step) - warp(volume, displacement - step)) * 2
        expected = np.sum(difference * weights, axis=-1)
        inside = tuple(slice(0, size - 1) for size in SHAPE)
        np.testing.assert_allclose(gradient[(0, *inside)][..., component], expected[(0, *inside)], atol=2e-4)


def test_gradient_with_respect_to_volume_is_the_transpose():
    volume, displacement, weights = random_volume(), random_displacement(2.0), random_volume(seed=3)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(warp(v, displacement) * weights)))(volume)
    np.testing.assert_allclose(jnp.vdot(gradient, volume), jnp.vdot(warp(volume, displacement), weights), rtol=1e-3)


@pytest.mark.parametrize(("planes", "method"), [(1, "bspline"), (3, "trilinear"), (9, "gaussian")])
def test_warp_by_grid_is_the_warp_by_its_displacement(planes, method, monkeypatch):
    monkeypatch.setattr(warping, "SLAB", planes * 2 * 8 * 7)
    volumes = [jnp.asarray(random_volume(1, seed)[..., 0]) for seed in (0, 1)]
    control_grid = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 4, 6, 3)), jnp.float32)
    weights = jnp.asarray(random_volume(2, seed=3))

    def dense(control_grid, volumes):
        displacement = interpolate(control_grid, SHAPE, method=method)
        return warping.warp(jnp.stack(volumes, -1), displacement)

    def by_grid(control_grid, volumes):
        return jnp.stack(warping.warp_by_grid(volumes, control_grid, SHAPE, method=method), -1)

    def with_gradient(function):
        warped, pull = jax.vjp(function, control_grid, volumes)
        return warped, pull(weights)

    found, expected = jax.jit(lambda: (with_gradient(by_grid), with_gradient(dense)))()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_composition_is_two_warps_of_coordinates():
    outer, inner = random_displacement(0.8, seed=4), random_displacement(0.8, seed=5)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).astype(np.float64)
    middle = grid + inner
    expected = np.empty_like(middle)
    for n in range(2):
        for c in range(3):
            carried = map_coordinates(
                outer[n, ..., c].astype(np.float64), np.moveaxis(middle[n], -1, 0), order=1, mode="nearest"
            )
            expected[n, ..., c] = middle[n, ..., c] + carried - grid[..., c]
    np.testing.assert_allclose(compose(outer, inner), expected, atol=1e-5)


def test_composition_of_translations_adds():
    outer, inner = (jnp.broadcast_to(jnp.asarray(t), (1, *SHAPE, 3)) for t in ([1.5, 0, -2], [0.25, 3, 1.0]))
    np.testing.assert_allclose(compose(outer, inner), jnp.broadcast_to(jnp.asarray([1.75, 3, -1]), (1, *SHAPE, 3)))


def test_integral_of_a_constant_velocity_is_itself():
    velocity = jnp.broadcast_to(jnp.asarray([1.5, -0.5, 2.0]), (1, *CUBE, 3))
    np.testing.assert_allclose(integrate(velocity), velocity, atol=1e-6)


def test_integral_of_a_linear_velocity_is_the_matrix_exponential():
    matrix = np.array([[-0.3, 0.2, 0.0], [-0.2, -0.2, 0.1], [0.0, -0.1, -0.25]])
    centred = identity_grid(CUBE) - 8
    velocity = (centred @ jnp.asarray(matrix, jnp.float32).T)[None]
    expected = centred @ (expm(matrix) - np.eye(3)).T
    inside = (slice(None), *(slice(4, 13),) * 3)
    coarse, fine = (np.abs(integrate(velocity, steps=s)[inside] - expected[inside[1:]]).max() for s in (4, 8))
    assert fine < 5e-3
    # First order in the step: sixteen times shorter steps leave about a sixteenth of the error.
    assert 10 < coarse / fine < 22


def test_integral_of_the_negative_velocity_is_the_inverse():
    velocity = smooth_displacement(1.7)
    forward, backward = integrate(velocity), integrate(-velocity)
    assert np.abs(forward).max() > 1
    assert np.abs(compose(forward, backward)).max() < 0.05


def test_inverse_undoes_the_map():
    displacement = smooth_displacement(1.7)
    lattice = identity_grid(CUBE)[None]
    inverse = invert(displacement, lattice, 0 * lattice)
    # As invert is defined, `v(y) + u(y + v(y)) = 0` holds at every voxel.
    assert np.abs(compose(displacement, inverse)).max() < 1e-4
    # In the other order only up to the linear interpolation of v.
    assert np.abs(compose(inverse, displacement)).max() < 0.05


def test_inverse_at_some_points_with_shorter_steps():
    displacement = smooth_displacement(1.7)
    points = np.random.default_rng(5).uniform(0, 16, (1, 40, 3)).astype(np.float32)
    inverse = np.asarray(invert(displacement, points, np.ones_like(points), iterations=60, relaxation=0.5))
    there = (points + inverse)[0].T
    for axis in range(3):
        moved = map_coordinates(displacement[0, ..., axis], there, order=1, mode="nearest")
        np.testing.assert_allclose(inverse[0, :, axis], -moved, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_labels_are_the_winners_of_one_hot_votes(scale):
    labels = np.random.default_rng(6).choice([0, 1, 5, 7], size=(2, *SHAPE))
    displacement = random_displacement(scale)
    known = np.array([0, 1, 5, 7])
    votes = np.asarray(warp((labels[..., None] == known).astype(np.float32), displacement))
    winners = known[np.argmax(votes, axis=-1)]
    ranked = np.sort(votes, axis=-1)
    clear = ranked[..., -1] - ranked[..., -2] > 1e-4
    warped = warp_labels(labels, displacement)
    assert warped.dtype == jnp.asarray(labels).dtype and clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(warped)[clear], winners[clear])


def test_labels_survive_a_zero_displacement():
    labels = np.random.default_rng(7).integers(0, 40, size=(1, *SHAPE))
    np.testing.assert_array_equal(warp_labels(labels, jnp.zeros((1, *SHAPE, 3))), labels)
