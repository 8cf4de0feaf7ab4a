"""What is certified against dense sampling, exact fractions, scipy's splines and maps whose determinant is known."""

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline, RegularGridInterpolator

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import bspline, certificate
from gridreg_jax.transforms.certificate import certify, uniform_weights
from gridreg_jax.transforms.interpolation import bspline_weights, control_positions, interpolate
from gridreg_jax.transforms.jacobian import jacobian_determinant

determinant_on_lattice = jax.jit(bspline.jacobian_determinant_on_lattice, static_argnums=1)


def cell_size(grid_size, shape, degree=3):
    return (np.array(shape) - 1) / (np.array(grid_size) - degree)


def random_grid(seed, grid_size, shape, amplitude):
    """Independent control values, up to `amplitude` cells a component."""
    values = np.random.default_rng(seed).uniform(-1, 1, (*grid_size, 3))
    return values * amplitude * cell_size(grid_size, shape)


def dense_determinant(control_grid, shape):
    """Determinants at 8 points a cell and axis, cell corners included: those of the same map on a finer lattice."""
    finer = tuple(8 * (g - 3) + 1 for g in control_grid.shape[:3])
    scaled = control_grid * (np.array(finer) - 1) / (np.array(shape) - 1)
    return np.asarray(determinant_on_lattice(jnp.asarray(scaled[None], jnp.float32), finer)[0])


def fit(function, grid_size, shape, method="bspline"):
    """Control grid whose map takes the voxels of the control positions where `function` takes them."""
    positions = [control_positions(method, g) * (size - 1) for g, size in zip(grid_size, shape, strict=True)]
    points = np.stack(np.meshgrid(*positions, indexing="ij"), axis=-1)
    values = function(points) - points
    if method == "bspline":
        for g in grid_size:
            inverse = np.linalg.inv(bspline_weights(g, control_positions("bspline", g)))
            values = np.tensordot(values, inverse, (0, 1))
        values = np.moveaxis(values, 0, -1)
    return values


def from_uniform(coefficients):
    for g in coefficients.shape[:3]:
        coefficients = np.tensordot(coefficients, np.linalg.inv(uniform_weights(g)), (0, 1))
    return np.moveaxis(coefficients, 0, -1)


GRIDS = [((7, 9, 6), (31, 37, 29)), ((4, 5, 8), (9, 40, 23))]


@pytest.mark.parametrize(("grid_size", "shape"), GRIDS)
@pytest.mark.parametrize("amplitude", [0.05, 0.15, 0.25])
def test_the_bound_holds_at_every_sample_and_folds_are_found(grid_size, shape, amplitude):
    certified = 0
    for seed in range(12):
        control_grid = random_grid(seed, grid_size, shape, amplitude)
        found, lowest = certify(control_grid, shape), dense_determinant(control_grid, shape).min()
        assert found.lower_bound <= lowest + 1e-4
        assert found.invertible == (found.lower_bound > 0) == (len(found.cells) == 0)
        if abs(lowest) > 1e-4:
            # Folds are looked for at the points of the dense sampling.
            assert found.folds == (lowest < 0)
        assert not (found.folds and found.invertible)
        certified += found.invertible
    assert certified == 12 if amplitude == 0.05 else certified < 12
    assert amplitude != 0.15 or certified > 4


@pytest.mark.parametrize(("grid_size", "shape"), [((10, 10, 10), (64, 64, 64)), ((7, 9, 6), (31, 37, 29))])
def test_the_bound_of_a_smooth_map_is_close(grid_size, shape):
    def waves(points):
        phases = 2 * np.pi * points / (np.array(shape) - 1)
        return points + 0.07 * (np.array(shape) - 1) * np.sin(np.roll(phases, 1, axis=-1)) * np.cos(phases)

    control_grid = fit(waves, grid_size, shape)
    found, lowest = certify(control_grid, shape), dense_determinant(control_grid, shape).min()
    assert 0.1 < lowest < 0.8
    assert lowest - 0.03 < found.lower_bound <= lowest + 1e-5


def exact_determinant_coefficients(control_grid):
    """Bernstein coefficients of the determinant on the one cell of a 4 x 4 x 4 grid in cells, as fractions."""

    def product(a, b):
        out = np.full([m + n - 1 for m, n in zip(a.shape, b.shape, strict=True)], Fraction(0))
        for index in np.ndindex(a.shape):
            out[tuple(slice(i, i + n) for i, n in zip(index, b.shape, strict=True))] += a[index] * b
        return out

    def binomials(shape):
        factors = [np.array([math.comb(n - 1, k) for k in range(n)], dtype=object) for n in shape]
        return factors[0][:, None, None] * factors[1][:, None] * factors[2]

    fractions = np.vectorize(Fraction, otypes=[object])(control_grid)
    entries = {}
    for component, axis in itertools.product(range(3), range(3)):
        slopes = 3 * np.diff(fractions[..., component], axis=axis) + Fraction(component == axis)
        entries[component, axis] = slopes * binomials(slopes.shape)
    total = 0
    for i, j, k in itertools.permutations(range(3)):
        sign = 1 if (i, j, k) in {(0, 1, 2), (1, 2, 0), (2, 0, 1)} else -1
        total = total + sign * product(product(entries[0, i], entries[1, j]), entries[2, k])
    return total / binomials(total.shape)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_the_smallest_bernstein_coefficient(seed):
    control_grid = np.random.default_rng(seed).integers(-12, 12, (4, 4, 4, 3)) / 128
    expected = float(exact_determinant_coefficients(control_grid).min())
    found = certify(control_grid * [4, 8, 2], (5, 9, 3))
    assert found.tests[0] == "Bernstein" and 0 < expected
    assert expected - 1e-4 < found.lower_bound < expected


def two_thirds_pattern(size):
    """A map of one cell: along x, u' of the uniform coefficients (s, s, -s, -s) is lowest in the middle, -3/2 s."""
    coefficients = np.zeros((4, 4, 4, 3))
    coefficients[..., 0] = np.array([size, size, -size, -size])[:, None, None]
    return from_uniform(coefficients) * 6


def test_subdivision_proves_more(monkeypatch):
    control_grid = two_thirds_pattern(0.65)
    bounds = []
    for subdivisions in range(4):
        monkeypatch.setattr(certificate, "SUBDIVISIONS", subdivisions)
        bounds.append(certify(control_grid, (7, 7, 7)).lower_bound)
    assert bounds[0] < 0 < bounds[1] <= 1 - 1.5 * 0.65


def test_a_fold_between_voxels_is_not_missed():
    # Zero near the surface, so that the fold is inside, where central differences at voxels could have seen it.
    grid_size, shape = (10, 10, 10), (24, 24, 24)
    missed = 0
    for seed in range(6):
        control_grid = np.zeros((*grid_size, 3))
        control_grid[3:-3, 3:-3, 3:-3] = random_grid(seed, grid_size, shape, 1.0)[3:-3, 3:-3, 3:-3]
        while dense_determinant(control_grid, shape).min() > -0.01:  # Just folds.
            control_grid = control_grid * 1.02
        displacement = interpolate(jnp.asarray(control_grid[None], jnp.float32), shape, method="bspline")
        missed += bool(jacobian_determinant(displacement).min() > 0)
        found = certify(control_grid, shape)
        assert found.folds and not found.invertible and len(found.cells) > 0
        assert found.lower_bound < -0.01
    assert missed > 0


@pytest.mark.parametrize("method", ["bspline", "trilinear"])
def test_linear_maps_have_their_determinant_and_dominance_is_exact(method):
    grid_size, shape = (5, 7, 6), (11, 22, 9)
    h = cell_size(grid_size, shape, certificate.DEGREES[method])
    outcomes = set()
    for seed in range(20):
        # In cells of the grid, where dominance is measured.
        matrix = np.eye(3) + np.random.default_rng(seed).normal(size=(3, 3)) * 0.5
        in_voxels = h[:, None] * matrix / h
        found = certify(
            fit(lambda points, m=in_voxels: points @ m.T + 40, grid_size, shape, method), shape, method=method
        )
        np.testing.assert_allclose(found.lower_bound, np.linalg.det(matrix), atol=3e-4 if method == "bspline" else 1e-9)
        dominant = (2 * np.diag(matrix) > np.abs(matrix).sum(axis=1)).all() and np.diag(matrix).min() > 0
        assert ("dominance" in found.tests) == found.one_to_one == dominant
        outcomes.add((found.invertible, dominant))
    assert outcomes == {(True, True), (True, False), (False, False)}


def test_a_large_expansion_is_one_to_one():
    found = certify(fit(lambda points: 3 * points - 7, (5, 6, 7), (9, 9, 9)), (9, 9, 9))
    assert found.one_to_one and "size" not in found.tests
    np.testing.assert_allclose(found.lower_bound, 27, atol=1e-3)


def test_a_reflection_folds_in_every_cell():
    found = certify(fit(lambda points: points * [1, -1, 1], (5, 6, 7), (9, 9, 9)), (9, 9, 9))
    assert found.folds and not found.invertible and len(found.cells) == 2 * 3 * 4
    assert str(found).startswith("folds; not proven in 24 of 24 cells")


def test_a_collapse_is_neither_certified_nor_called_a_fold_by_rounding():
    found = certify(fit(lambda points: points * [1, 0, 1], (5, 6, 7), (9, 9, 9)), (9, 9, 9))
    assert not found.invertible and -1e-4 < found.lower_bound < 0


def test_a_local_proof_is_not_a_global_one():
    # A ring of 450 degrees, unrolled: the determinant is positive, and the ends lie on one another.
    shape = (9, 61, 5)

    def ring(points):
        radius, angle = 4 + points[..., 0], points[..., 1] / 60 * 2.5 * np.pi
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle), points[..., 2]], axis=-1)

    control_grid = fit(ring, (4, 23, 4), shape)
    found = certify(control_grid, shape)
    assert found.invertible and not found.one_to_one and found.tests == ("Bernstein",)
    assert str(found).startswith("locally invertible everywhere")
    displacement = interpolate(jnp.asarray(control_grid[None], jnp.float32), shape, method="bspline")
    ends = [np.array([2, y, 2]) + displacement[0, 2, y, 2] for y in (6, 54)]
    np.testing.assert_allclose(*ends, atol=0.01)


def test_size_is_measured_in_uniform_coefficients():
    shape = (31, 37, 29)
    signs = np.sign(np.random.default_rng(0).normal(size=(7, 9, 6, 3)))
    for size, passes in ((1 / certificate.CHOI_LEE - 1e-6, True), (1 / certificate.CHOI_LEE + 1e-6, False)):
        control_grid = from_uniform(signs * size) * cell_size((7, 9, 6), shape)
        found = certify(control_grid, shape)
        assert ("size" in found.tests) == passes
        if passes:
            assert (
                found.one_to_one
                and found.invertible
                and 0 < found.lower_bound < dense_determinant(control_grid, shape).min()
            )


@pytest.mark.parametrize("size", [0.4, 0.6, 0.66, 0.67])
def test_a_pattern_along_one_axis_folds_at_two_thirds_of_a_cell(size):
    found = certify(two_thirds_pattern(size), (7, 7, 7))
    assert 1 - 1.6 * size < found.lower_bound <= 1 - 1.5 * size
    assert ("Euclidean size" in found.tests) == (size < 2 / 3)
    assert found.invertible == (size < 2 / 3) and ("size" in found.tests) == (size == 0.4)


def test_the_constant_of_choi_and_lee():
    t = np.linspace(0, 0.5, 51)
    values = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    slopes = np.stack([-((1 - t) ** 2), 3 * t**2 - 4 * t, -3 * t**2 + 2 * t + 1, t**2]) / 2
    largest = 0.0
    x, y = (slopes[:, None, :, None] * values[:, None]), (values[:, None, :, None] * slopes[:, None])
    for index in range(len(t)):
        flat, slope = values[:, None, None, None, None, index], slopes[:, None, None, None, None, index]
        for signs in itertools.product((1, -1), repeat=2):
            total = np.abs(flat * (signs[0] * x + signs[1] * y) + slope * values[:, None, :, None] * values[:, None])
            largest = max(largest, total.sum(axis=(0, 1, 2)).max())
    assert certificate.CHOI_LEE - 1e-3 < largest < certificate.CHOI_LEE


@pytest.mark.parametrize("grid_size", [4, 5, 6, 11])
def test_uniform_coefficients_describe_the_same_spline(grid_size):
    cells = grid_size - 3
    clamped = BSpline(np.r_[0, 0, 0, np.linspace(0, 1, cells + 1), 1, 1, 1], np.eye(grid_size), 3)
    uniform = BSpline(np.arange(-3, cells + 4) / cells, uniform_weights(grid_size), 3)
    positions = np.linspace(0, 1, 57)
    np.testing.assert_allclose(uniform(positions), clamped(positions), atol=1e-12)


def trilinear_determinant(control_grid, shape, seed=0, count=4000):
    """Determinants at random points: within a cell, a difference along an axis is exact for a trilinear map."""
    grid_size = control_grid.shape[:3]
    axes = [np.linspace(0, size - 1, g) for g, size in zip(grid_size, shape, strict=True)]
    displacement = RegularGridInterpolator(axes, control_grid)
    h, rng = cell_size(grid_size, shape, 1), np.random.default_rng(seed)
    cells = np.stack([rng.integers(0, g - 1, count) for g in grid_size], axis=-1)
    points = (cells + np.concatenate([rng.uniform(0, 1, (count - 800, 3)), rng.choice([0, 1], (800, 3))])) * h
    columns = []
    for axis in range(3):
        low, high = points.copy(), points.copy()
        low[:, axis], high[:, axis] = cells[:, axis] * h[axis], (cells[:, axis] + 1) * h[axis]
        columns.append((displacement(high) - displacement(low)) / h[axis])
    return np.linalg.det(np.stack(columns, axis=-1) + np.eye(3))


@pytest.mark.parametrize("amplitude", [0.1, 0.3, 0.5])
def test_trilinear_bounds_hold_at_every_sample(amplitude):
    shape, outcomes = (21, 17, 9), []
    for seed in range(15):
        control_grid = np.random.default_rng(seed).uniform(-1, 1, (5, 3, 2, 3)) * amplitude
        control_grid *= cell_size((5, 3, 2), shape, 1)
        found, lowest = (
            certify(control_grid, shape, method="trilinear"),
            trilinear_determinant(control_grid, shape).min(),
        )
        assert lowest - 0.3 < found.lower_bound <= lowest + 1e-9
        assert not found.invertible or lowest > 0
        outcomes.append(found.invertible)
    assert all(outcomes) if amplitude == 0.1 else not all(outcomes)


def test_a_trilinear_corner():
    # One corner of a cube of 4 voxels goes inwards along the diagonal by t of it: at that corner the determinant is
    # 1 - 3 t, at its neighbours 1 - t, elsewhere 1.
    for t, invertible in ((0.3, True), (0.34, False)):
        control_grid = np.zeros((2, 2, 2, 3))
        control_grid[1, 1, 1] = -4 * t
        found = certify(control_grid, (5, 5, 5), method="trilinear")
        assert found.invertible == invertible
        assert found.folds != invertible
        assert found.cell_counts == (1, 1, 1)
        lowest = trilinear_determinant(control_grid, (5, 5, 5)).min()
        np.testing.assert_allclose(lowest, 1 - 3 * t, atol=1e-9)
        assert found.lower_bound <= lowest


def test_identity_of_the_smallest_grids():
    for method, g in (("bspline", 4), ("trilinear", 2)):
        found = certify(np.full((g, g, g, 3), 12.5, np.float32), (2, 2, 2), method=method)
        assert found.one_to_one and 1 - 1e-5 < found.lower_bound <= 1


def test_cells_are_listed_worst_first_where_they_are():
    grid_size, shape = (9, 10, 8), (61, 71, 51)
    control_grid = np.zeros((*grid_size, 3))
    control_grid[3, 6, 4, 0] = 50.0  # Reaches the cells 0 to 3, 3 to 6 and 1 to 4.
    control_grid[4, 6, 4, 0] = -50.0
    found = certify(jnp.asarray(control_grid, jnp.float32), shape)
    assert len(found.cells) > 1
    assert (found.cells >= [0, 3, 1]).all() and (found.cells <= [4, 6, 4]).all()
    i, j, k = found.cells[0]
    assert str(found).startswith(f"folds; not proven in {len(found.cells)} of 210 cells, e.g. cell ({i}, {j}, {k}): ")
    determinant = dense_determinant(control_grid, shape)
    worst = np.array(np.unravel_index(determinant.argmin(), determinant.shape)) / 8
    assert (found.cells[0] <= worst).all() and (worst <= found.cells[0] + 1).all()


def test_what_is_printed_is_rounded_down():
    found = certify(np.zeros((4, 4, 4, 3)), (9, 9, 9), method="trilinear")
    assert str(found) == "invertible everywhere: Jacobian determinant at least 0.999"
    small = dataclasses.replace(found, lower_bound=1.2999999e-5)
    assert str(small).endswith("at least 1.29e-05")


@pytest.mark.parametrize(
    ("grid_shape", "shape", "method", "message"),
    [
        ((5, 5, 5, 3), (9, 9, 9), "gaussian", "known are bspline, trilinear"),
        ((5, 3, 5, 3), (9, 9, 9), "bspline", "at least 4"),
        ((5, 5, 5, 3), (9, 1, 9), "bspline", "2 voxels"),
    ],
)
def test_wrong_arguments_are_named(grid_shape, shape, method, message):
    with pytest.raises(InputError, match=message):
        certify(np.zeros(grid_shape), shape, method=method)


def test_values_that_are_not_finite_are_refused():
    control_grid = np.zeros((5, 5, 5, 3))
    control_grid[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        certify(control_grid, (9, 9, 9))
