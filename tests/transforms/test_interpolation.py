import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline, RegularGridInterpolator

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import interpolation
from gridreg_jax.transforms.interpolation import INTERPOLATORS, hat_weights

METHODS = tuple(INTERPOLATORS)
GRID_SIZE, SHAPE = (5, 6, 4), (11, 9, 8)


def random_grid(channels=3, seed=0, grid_size=GRID_SIZE):
    return np.random.default_rng(seed).normal(size=(2, *grid_size, channels)).astype(np.float32)


def scipy_basis(grid_size, positions, derivative=0):
    """The same basis by scipy, `[P, grid_size]` float64."""
    knots = np.r_[0, 0, 0, np.linspace(0, 1, grid_size - 2), 1, 1, 1]
    return BSpline(knots, np.eye(grid_size), 3)(positions, nu=derivative)


@pytest.mark.parametrize("grid_size", [4, 5, 10])
@pytest.mark.parametrize("derivative", [0, 1, 2, 3])
def test_bspline_weights_agree_with_scipy(grid_size, derivative):
    positions = np.linspace(0, 1, 57)
    ours = interpolation.bspline_weights(grid_size, positions, derivative=derivative)
    np.testing.assert_allclose(ours, scipy_basis(grid_size, positions, derivative), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid_size", [GRID_SIZE, (5, 6, interpolation.JOINED)])
def test_dense_bspline_agrees_with_scipy(grid_size):
    control_grid = random_grid(grid_size=grid_size)
    bases = [scipy_basis(g, np.linspace(0, 1, size)) for g, size in zip(grid_size, SHAPE, strict=True)]
    expected = np.einsum("xi,yj,zk,nijkc->nxyzc", *bases, control_grid.astype(np.float64))
    dense = interpolation.interpolate(jnp.asarray(control_grid), SHAPE, method="bspline")
    assert dense.dtype == jnp.float32
    np.testing.assert_allclose(dense, expected, atol=2e-6)


def test_dense_trilinear_agrees_with_scipy():
    control_grid = random_grid()
    axes = [np.linspace(0, size - 1, g) for g, size in zip(GRID_SIZE, SHAPE, strict=True)]
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    expected = [RegularGridInterpolator(axes, one.astype(np.float64))(voxels) for one in control_grid]
    np.testing.assert_allclose(interpolation.interpolate(jnp.asarray(control_grid), SHAPE), expected, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_hat_functions_interpolate_linearly_and_hold_the_ends(size):
    places, values = np.linspace(-1.5, size + 0.5, 23), np.random.default_rng(size).normal(size=size)
    expected = np.interp(places, np.arange(size), values)
    np.testing.assert_allclose(hat_weights(size, places) @ values, expected, atol=1e-12)


def test_trilinear_hits_control_values_where_voxels_and_control_points_meet():
    control_grid = random_grid()
    dense = interpolation.interpolate(jnp.asarray(control_grid), tuple(3 * (g - 1) + 1 for g in GRID_SIZE))
    np.testing.assert_allclose(dense[:, ::3, ::3, ::3], control_grid, atol=1e-6)


def test_gaussian_is_a_normalised_transposed_convolution():
    stride, reach = 4, 20
    control_grid = random_grid(channels=1)[:1]
    offsets = np.arange(-reach, reach + 1) / stride
    line = np.exp(-0.5 * (offsets / interpolation.GAUSSIAN_SIGMA) ** 2)
    kernel = np.einsum("i,j,k->ijk", line, line, line)[..., None, None].astype(np.float32)

    def transposed(values):
        return jax.lax.conv_transpose(
            jnp.asarray(values),
            kernel,
            strides=(stride,) * 3,
            # Padding of the dilated input: output voxel 0 is centred on control point 0, the last on the last.
            padding=[(reach, reach)] * 3,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision="highest",
        )

    expected = transposed(control_grid) / transposed(np.ones_like(control_grid))
    shape = tuple(stride * (g - 1) + 1 for g in GRID_SIZE)
    dense = interpolation.interpolate(jnp.asarray(control_grid), shape, method="gaussian")
    assert dense.shape == expected.shape
    np.testing.assert_allclose(dense, expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_weights_are_a_partition_of_unity(method, size):
    weights = interpolation.axis_weights(method, 7, size)
    assert weights.shape == (size, 7) and weights.dtype == np.float64
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-14)


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
@pytest.mark.parametrize("grid_size", [4, 5, 10])
def test_linear_control_values_reproduce_a_linear_field(method, grid_size):
    weights = interpolation.axis_weights(method, grid_size, 41)
    values = weights @ interpolation.control_positions(method, grid_size)
    np.testing.assert_allclose(values, np.linspace(0, 1, 41), atol=1e-14)


def test_gaussian_keeps_its_promises_on_linear_and_periodic_fields():
    grid_size = 17
    positions = np.linspace(0, 1, 1601)
    weights = interpolation.gaussian_weights(grid_size, positions)
    scaled = positions * (grid_size - 1)
    error = np.abs(weights @ np.arange(grid_size) - scaled)
    assert error[(scaled >= 1) & (scaled <= grid_size - 2)].max() < 0.006
    assert 0.18 < error.max() < 0.19
    for period, kept in ((2, 0.39), (8, 0.91)):
        pattern = np.cos(2 * np.pi * np.arange(grid_size) / period)
        assert (weights @ pattern)[800] == pytest.approx(kept, abs=0.006)


@pytest.mark.parametrize("method", METHODS)
def test_constants_and_corners(method):
    constant = jnp.full((1, *GRID_SIZE, 3), 2.5)
    np.testing.assert_allclose(interpolation.interpolate(constant, SHAPE, method=method), 2.5, atol=1e-6)
    if method != "gaussian":
        control_grid = jnp.asarray(random_grid())
        dense = interpolation.interpolate(control_grid, SHAPE, method=method)
        np.testing.assert_allclose(dense[:, ::10, ::8, ::7], control_grid[:, ::4, ::5, ::3], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_values_at_controls(method):
    control_grid = jnp.asarray(random_grid())
    at_controls = interpolation.interpolate_at_controls(control_grid, method=method)
    assert at_controls.shape == control_grid.shape
    if method == "trilinear":
        np.testing.assert_array_equal(at_controls, control_grid)
    elif method == "bspline":
        bases = [scipy_basis(g, interpolation.control_positions(method, g)) for g in GRID_SIZE]
        expected = np.einsum("xi,yj,zk,nijkc->nxyzc", *bases, np.asarray(control_grid, np.float64))
        np.testing.assert_allclose(at_controls, expected, atol=2e-6)
    else:
        # Gaussian control points sit on voxels of this lattice.
        dense = interpolation.interpolate(control_grid, tuple(2 * g - 1 for g in GRID_SIZE), method=method)
        np.testing.assert_allclose(at_controls, dense[:, ::2, ::2, ::2], atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_variance_agrees_with_the_diagonal_of_the_full_covariance(method):
    variance = np.abs(random_grid(channels=1)[:1]) + 0.1
    shape = (3, 5, 2)
    # The whole linear map, column by column: interpolation of every unit control grid.
    units = np.eye(np.prod(GRID_SIZE), dtype=np.float32).reshape(-1, *GRID_SIZE, 1)
    columns = np.asarray(interpolation.interpolate(jnp.asarray(units), shape, method=method), np.float64)
    expected = np.einsum("m,mxyzc->xyzc", variance.ravel().astype(np.float64), columns**2)
    found = interpolation.interpolate_variance(jnp.asarray(variance), shape, method=method)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_interpolation_under_jit_and_its_gradient():
    # interpolate is linear: the gradient of <interpolate(c), d> is its transpose applied to d.
    control_grid = jnp.asarray(random_grid())
    direction = np.random.default_rng(1).normal(size=(2, *SHAPE, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda c: jnp.sum(interpolation.interpolate(c, SHAPE, method="bspline") * direction)))
    bases = [scipy_basis(g, np.linspace(0, 1, size)) for g, size in zip(GRID_SIZE, SHAPE, strict=True)]
    expected = np.einsum("xi,yj,zk,nxyzc->nijkc", *bases, direction.astype(np.float64))
    np.testing.assert_allclose(gradient(control_grid), expected, atol=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match="did you mean 'trilinear'"):
        interpolation.check_grid_size((5, 5, 5), "trilinar")
    with pytest.raises(InputError, match="5x3x5 is too small: bspline needs at least 4"):
        interpolation.check_grid_size((5, 3, 5), "bspline")
    with pytest.raises(InputError, match="at least 2"):
        interpolation.interpolate(jnp.zeros((1, 4, 1, 4, 3)), SHAPE)
    interpolation.check_grid_size((2, 2, 2), "gaussian")


def test_cached_weights_cannot_be_changed():
    with pytest.raises(ValueError):
        interpolation.axis_weights("trilinear", 4, 8)[0, 0] = 2.0
