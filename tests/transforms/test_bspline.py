import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.interpolate import BSpline, insert

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.interpolation import control_positions, interpolate

GRID_SIZE, SHAPE, SPACING = (5, 6, 4), (12, 10, 9), (0.8, 1.0, 2.5)
LENGTHS = np.array(SHAPE) - 1.0

jacobian = jax.jit(bspline.jacobian, static_argnums=2)
refine = jax.jit(bspline.refine, static_argnums=1)


def basis(grid_size):
    """The B-splines of an axis of length 1, by scipy."""
    return BSpline(np.r_[0, 0, 0, np.linspace(0, 1, grid_size - 2), 1, 1, 1], np.eye(grid_size), 3)


def random_grid(seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(2, *GRID_SIZE, 3))).astype(np.float32)


def fit(function):
    """Control grid `[1, gx, gy, gz, 3]` of a polynomial field (at most cubic), by collocation; `function` in voxels."""
    positions = [control_positions("bspline", g) for g in GRID_SIZE]
    points = np.meshgrid(*(p * length for p, length in zip(positions, LENGTHS, strict=True)), indexing="ij")
    control_grid = np.stack([value + np.zeros(GRID_SIZE) for value in function(*points)], axis=-1)
    for axis, (g, p) in enumerate(zip(GRID_SIZE, positions, strict=True)):
        control_grid = np.moveaxis(np.tensordot(np.linalg.inv(basis(g)(p)), control_grid, (1, axis)), 0, axis)
    return jnp.asarray(control_grid[None], jnp.float32)


# The plain mean over these is the two-point Gauss rule in each of 30 intervals: its error is of fourth order.
FINE = ((np.arange(30) + 0.5)[:, None] + np.array([-0.5, 0.5]) / np.sqrt(3)).ravel() / 30


def dense_derivative(control_grid, orders=(0, 0, 0), spacing=(1.0, 1.0, 1.0)):
    """A derivative of the field, in units of spacing, at the FINE lattice: float64 `[N, 60, 60, 60, 3]`."""
    result = np.asarray(control_grid, np.float64) * np.asarray(spacing)
    for axis, d in enumerate(orders):
        matrix = basis(control_grid.shape[axis + 1])(FINE, nu=d) / (LENGTHS[axis] * spacing[axis]) ** d
        result = np.moveaxis(np.tensordot(matrix, result, (1, axis + 1)), 0, axis + 1)
    return result


def mean_square(field):
    return np.mean(field**2, axis=(1, 2, 3, 4))


@pytest.mark.parametrize("derivative", [0, 1, 2, (1, 0), (0, 2)])
def test_gram_agrees_with_quadrature(derivative):
    grid_size, length = 6, 7.5
    first, second = derivative if isinstance(derivative, tuple) else (derivative, derivative)
    knots = np.r_[0, 0, 0, np.linspace(0, length, grid_size - 2), length, length, length]
    splines = [BSpline(knots, unit, 3) for unit in np.eye(grid_size)]

    def product(x, a, b):
        return a(x, nu=first) * b(x, nu=second)

    expected = [[quad(product, 0, length, args=(a, b), points=knots[4:-4])[0] for b in splines] for a in splines]
    np.testing.assert_allclose(bspline.gram(grid_size, length, derivative), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spacing", [None, SPACING])
def test_bending_energy_agrees_with_a_fine_mean(spacing):
    control_grid = random_grid()
    step = spacing or (1.0, 1.0, 1.0)
    pure = sum(mean_square(dense_derivative(control_grid, o, step)) for o in [(2, 0, 0), (0, 2, 0), (0, 0, 2)])
    mixed = sum(mean_square(dense_derivative(control_grid, o, step)) for o in [(1, 1, 0), (1, 0, 1), (0, 1, 1)])
    found = bspline.bending_energy(jnp.asarray(control_grid), SHAPE, spacing=spacing)
    np.testing.assert_allclose(found, pure + 2 * mixed, rtol=1e-4)


@pytest.mark.parametrize("spacing", [None, SPACING])
def test_bending_energy_agrees_with_the_gram_matrices(spacing):
    control_grid = random_grid().astype(np.float64)
    step = np.asarray(spacing or (1.0, 1.0, 1.0))
    lengths = LENGTHS * step
    expected = 0.0
    for orders, count in {(2, 0, 0): 1, (0, 2, 0): 1, (0, 0, 2): 1, (1, 1, 0): 2, (1, 0, 1): 2, (0, 1, 1): 2}.items():
        grams = [bspline.gram(g, length, d) / length for g, length, d in zip(GRID_SIZE, lengths, orders, strict=True)]
        scaled = control_grid * step
        expected += count * np.einsum("ia,jb,kc,nijkd,nabcd->n", *grams, scaled, scaled, optimize=True) / 3
    found = bspline.bending_energy(jnp.asarray(control_grid, jnp.float32), SHAPE, spacing=spacing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("spacing", [None, SPACING])
def test_diffusion_and_elastic_energy_agree_with_a_fine_mean(spacing):
    control_grid = random_grid()
    step = spacing or (1.0, 1.0, 1.0)
    gradient = np.stack([dense_derivative(control_grid, tuple(o), step) for o in np.eye(3, dtype=int)], axis=-1)
    found = bspline.diffusion_energy(jnp.asarray(control_grid), SHAPE, spacing=spacing)
    np.testing.assert_allclose(found, np.mean(np.sum(gradient**2, axis=-1), axis=(1, 2, 3, 4)), rtol=1e-4)
    strain = (gradient + np.swapaxes(gradient, -1, -2)) / 2
    divergence = np.trace(gradient, axis1=-2, axis2=-1)
    density = 0.7 * np.sum(strain**2, axis=(-1, -2)) + 1.3 / 2 * divergence**2
    found = bspline.elastic_energy(jnp.asarray(control_grid), SHAPE, mu=0.7, lam=1.3, spacing=spacing)
    np.testing.assert_allclose(found, np.mean(density, axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize(
    ("function", "energy"),
    [
        (lambda x, y, z: (0.01 * x**2, 0, 0), 0.02**2 / 3),
        (lambda x, y, z: (0, 0.01 * x * y, 0), 2 * 0.01**2 / 3),
        (lambda x, y, z: (0.01 * x**2, 0.01 * y**2, 0.01 * x * z), (2 * 0.02**2 + 2 * 0.01**2) / 3),
    ],
)
def test_bending_energy_of_quadratic_fields(function, energy):
    np.testing.assert_allclose(bspline.bending_energy(fit(function), SHAPE), [energy], rtol=1e-4)


def test_energies_of_a_quadratic_field_in_mm():
    # Component x, 0.01 x^2 voxels: in mm 0.01 sx (x_mm / sx)^2, hence u_xx = 0.02 / sx per mm.
    found = bspline.bending_energy(fit(lambda x, y, z: (0.01 * x**2, 0, 0)), SHAPE, spacing=SPACING)
    np.testing.assert_allclose(found, [(0.02 / SPACING[0]) ** 2 / 3], rtol=1e-4)
    # Component z grows by 0.1 voxels per voxel along x: 0.1 sz / sx mm per mm.
    found = bspline.diffusion_energy(fit(lambda x, y, z: (0, 0, 0.1 * x)), SHAPE, spacing=SPACING)
    np.testing.assert_allclose(found, [(0.1 * SPACING[2] / SPACING[0]) ** 2 / 3], rtol=1e-4)


def test_null_spaces():
    affine = fit(lambda x, y, z: (5 + 0.3 * x - 0.2 * y, 0.1 * z - 8, 0.2 * x + 0.1 * y - 0.4 * z))
    assert bspline.bending_energy(affine, SHAPE)[0] < 1e-10
    assert bspline.diffusion_energy(fit(lambda x, y, z: (5, -8, 3)), SHAPE)[0] < 1e-10
    rotation = fit(lambda x, y, z: (0.3 * y - 0.2 * z + 1, -0.3 * x + 0.1 * z, 0.2 * x - 0.1 * y))
    assert bspline.elastic_energy(rotation, SHAPE, mu=1.0, lam=1.0)[0] < 1e-10
    assert bspline.diffusion_energy(rotation, SHAPE)[0] > 0.01


def test_gradient_of_the_bending_energy():
    # A quadratic form: the gradient along a direction is the difference of two energies, exactly.
    control_grid, direction = jnp.asarray(random_grid(0)), jnp.asarray(random_grid(1))
    gradient = jax.jit(jax.grad(lambda c: bspline.bending_energy(c, SHAPE).sum()))(control_grid)
    ahead, behind = (bspline.bending_energy(control_grid + s * direction, SHAPE).sum() for s in (1, -1))
    np.testing.assert_allclose(jnp.vdot(gradient, direction), (ahead - behind) / 2, rtol=1e-4)


def test_jacobian_agrees_with_scipy():
    control_grid = random_grid()
    random = np.random.default_rng(1).uniform(size=(50, 3)) * LENGTHS
    points = np.concatenate([random, np.zeros((1, 3)), LENGTHS[None]]).astype(np.float32)
    expected = np.empty((2, len(points), 3, 3))
    for axis in range(3):
        weights = [
            basis(g)(points[:, a].astype(np.float64) / LENGTHS[a], nu=int(a == axis)) for a, g in enumerate(GRID_SIZE)
        ]
        expected[..., axis] = np.einsum("pi,pj,pk,nijkc->npc", *weights, control_grid, optimize=True) / LENGTHS[axis]
    found = jacobian(jnp.asarray(control_grid), jnp.asarray(points), SHAPE)
    np.testing.assert_allclose(found, expected + np.eye(3), atol=1e-5)


def test_jacobian_of_a_polynomial_map_agrees_with_automatic_differentiation():
    def displacement(x, y, z):
        return 0.01 * x**2 - 0.1 * y, 0.02 * x * y + 0.1 * z, 0.001 * z**3 - 0.01 * x * z

    points = jnp.asarray(np.random.default_rng(2).uniform(size=(20, 3)) * LENGTHS, jnp.float32)
    expected = jax.vmap(jax.jacfwd(lambda p: p + jnp.stack(displacement(*p))))(points)
    found = jacobian(fit(displacement), points, SHAPE)
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


def test_jacobian_is_differentiable_in_the_points():
    # Third derivatives of a cubic spline: of 0.001 z^3 along z, d/dz (0.003 z^2) = 0.006 z.
    control_grid = fit(lambda x, y, z: (0, 0, 0.001 * z**3))
    points = jnp.asarray([[1.0, 2.0, 3.5]])
    slope = jax.jacfwd(lambda p: jacobian(control_grid, p, SHAPE)[0, 0, 2, 2])(points)
    np.testing.assert_allclose(slope, [[0, 0, 0.021]], atol=1e-5)


def test_determinant_on_the_lattice_agrees_with_the_matrices():
    control_grid = jnp.asarray(random_grid(scale=2.0))
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    matrices = jacobian(control_grid, jnp.asarray(voxels, jnp.float32), SHAPE)
    expected = np.linalg.det(np.asarray(matrices, np.float64)).reshape(2, *SHAPE)
    assert expected.min() < 0
    determinant = jax.jit(bspline.jacobian_determinant_on_lattice, static_argnums=1)(control_grid, SHAPE)
    np.testing.assert_allclose(determinant, expected, atol=1e-4)


@pytest.mark.parametrize("new_size", [(7, 9, 4), (5, 6, 4), (9, 12, 7)])
def test_refinement_is_exact_where_knots_are_nested(new_size):
    control_grid = jnp.asarray(random_grid(scale=5.0))
    refined, error = refine(control_grid, new_size)
    assert refined.shape == (2, *new_size, 3) and error.shape == (2,)
    shape = (23, 19, 17)
    before, after = (interpolate(c, shape, method="bspline") for c in (control_grid, refined))
    np.testing.assert_allclose(after, before, atol=2e-5)
    assert error.max() < 2e-5


def test_nested_refinement_is_knot_insertion():
    # One axis varies: scipy inserts the knots 1/4 and 3/4 into those of 5 coefficients (two cells).
    coefficients = np.random.default_rng(3).normal(size=5)
    spline = (np.r_[0, 0, 0, 0, 0.5, 1, 1, 1, 1], coefficients, 3)
    expected = insert(0.75, insert(0.25, spline))[1][:7]
    control_grid = jnp.asarray(np.broadcast_to(coefficients[None, :, None, None, None], (1, 5, 4, 4, 1)), jnp.float32)
    refined, _ = refine(control_grid, (7, 4, 4))
    np.testing.assert_allclose(refined[0, :, 1, 2, 0], expected, atol=2e-6)


@pytest.mark.parametrize("new_size", [(8, 7, 6), (4, 4, 4)])
def test_other_refinements_state_their_error_and_are_the_closest(new_size):
    control_grid = jnp.asarray(random_grid(scale=5.0))
    refined, error = refine(control_grid, new_size)
    dense = dense_derivative(control_grid)

    def rms(candidate):
        return np.sqrt(3 * mean_square(dense_derivative(candidate) - dense))

    np.testing.assert_allclose(error, rms(refined), rtol=1e-3)
    rng = np.random.default_rng(4)
    for _ in range(3):
        assert (rms(np.asarray(refined) + 0.1 * rng.normal(size=refined.shape)) > rms(refined)).all()


def test_a_polynomial_survives_any_change_of_grid():
    control_grid = fit(lambda x, y, z: (0.01 * x**3, 0.1 * x * y, 3 - 0.02 * z**2))
    refined, error = refine(control_grid, (4, 8, 5))
    assert error[0] < 1e-5
    back, error = refine(refined, GRID_SIZE)
    np.testing.assert_allclose(back, control_grid, atol=5e-5)


def test_wrong_arguments_are_named():
    small, good = jnp.zeros((1, 5, 3, 5, 3)), jnp.zeros((1, 4, 4, 4, 3))
    with pytest.raises(InputError, match="at least 4"):
        bspline.bending_energy(small, SHAPE)
    with pytest.raises(InputError, match="at least 4"):
        bspline.refine(good, (4, 3, 4))
    with pytest.raises(InputError, match="2 voxels"):
        bspline.jacobian_determinant_on_lattice(good, (8, 8, 1))
