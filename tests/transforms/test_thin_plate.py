"""Thin-plate splines against SciPy's, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import thin_plate
from gridreg_jax.transforms.thin_plate import KERNELS, fit_thin_plate

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
SCIPY_KERNEL = {"r2logr": "thin_plate_spline", "r": "linear"}


def random_pairs(count=40, amplitude=0.1, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (2, count, 3)).astype(np.float32)
    return points, points + amplitude * rng.normal(size=points.shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="kernel")
def mapped(points, targets, at, weights=None, *, kernel, smoothing=0.0):
    return at + fit_thin_plate(points, targets, weights, kernel=kernel, smoothing=smoothing).displacement_at(at)


def somewhere(count, reach=1.0):
    return np.random.default_rng(1).uniform(-reach, reach, (count, 3)).astype(np.float32)


@each_kernel
@pytest.mark.parametrize("count", [64, 256])
def test_it_passes_through_its_keypoints(kernel, count):
    points, targets = random_pairs(count, amplitude=0.03)
    np.testing.assert_allclose(mapped(points, targets, points[0], kernel=kernel)[0], targets[0], atol=1e-4)


@each_kernel
@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.1, 10.0])
def test_it_is_scipys(kernel, smoothing):
    points, targets = random_pairs()
    at = somewhere(200, reach=1.2)
    found = mapped(points, targets, at, kernel=kernel, smoothing=smoothing)
    for case in range(2):
        spline = RBFInterpolator(
            *np.float64([points[case], targets[case]]), kernel=SCIPY_KERNEL[kernel], smoothing=smoothing, degree=1
        )
        np.testing.assert_allclose(found[case], spline(np.float64(at)), atol=1e-4)


@each_kernel
@pytest.mark.parametrize("weighted", [False, True])
def test_the_limit_of_much_smoothing_is_the_affine_fit(kernel, weighted):
    points, targets = random_pairs()
    weights = np.random.default_rng(2).uniform(0.1, 3, (2, 40)).astype(np.float32) if weighted else None
    found = mapped(points, targets, points[0], weights, kernel=kernel, smoothing=1e7)
    root = np.sqrt(weights[0])[:, None] if weighted else 1.0
    ends = np.hstack([points[0], np.ones((40, 1))])
    expected = ends @ np.linalg.lstsq(root * ends, root * targets[0])[0]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@each_kernel
def test_a_heavier_pair_is_fitted_more_closely(kernel):
    points, targets = random_pairs()
    error = []
    for weight in (1, 3, 10):
        weights = np.full((2, 40), weight, np.float32)
        found = mapped(points, targets, points[0], weights, kernel=kernel, smoothing=1.0)
        error.append(np.linalg.norm(found[0] - targets[0]))
    assert error[0] > error[1] > error[2]
    unweighted = mapped(points, targets, points[0], kernel=kernel, smoothing=1.0)[0] - targets[0]
    assert error[0] == pytest.approx(np.linalg.norm(unweighted), rel=1e-4)


@each_kernel
def test_affine_pairs_give_the_affine_and_equal_ones_the_identity(kernel):
    points, _ = random_pairs()
    linear = np.eye(3) + 0.2 * np.random.default_rng(3).normal(size=(3, 3))
    at = somewhere(50, reach=3)
    found = mapped(points, (points @ linear.T + 0.1).astype(np.float32), at, kernel=kernel)
    np.testing.assert_allclose(found[0], at @ linear.T + 0.1, atol=1e-4)
    np.testing.assert_array_equal(mapped(points, points, at, kernel=kernel)[0], at)


@each_kernel
def test_gradient_is_the_slope_of_scipys(kernel):
    points, targets = (one[:1] for one in random_pairs(12))
    at = somewhere(9)
    weights = np.random.default_rng(2).normal(size=(9, 3))

    def oracle(points, targets):
        spline = RBFInterpolator(points, targets, kernel=SCIPY_KERNEL[kernel], smoothing=0.01, degree=1)
        return np.sum(weights * spline(np.float64(at)))

    def found(points, targets):
        return jnp.sum(weights * mapped(points, targets, at, smoothing=0.01, kernel=kernel)[0])

    slopes = jax.jit(jax.grad(found, (0, 1)))(points, targets)
    pair = np.float64([points[0], targets[0]])
    direction, step = np.random.default_rng(4).normal(size=pair.shape), 1e-6
    expected = (oracle(*(pair + step * direction)) - oracle(*(pair - step * direction))) / (2 * step)
    total = sum(np.sum(slope[0] * part) for slope, part in zip(slopes, direction, strict=True))
    assert total == pytest.approx(expected, rel=1e-3)


DEGENERATE = {"coincident": np.zeros((1, 6, 3)), "twice each": np.repeat(np.eye(3)[None], 2, axis=1)}


@each_kernel
@pytest.mark.parametrize("points", DEGENERATE.values(), ids=DEGENERATE)
def test_value_and_gradient_are_finite_whatever_the_points(kernel, points):
    points = jnp.asarray(points, jnp.float32)

    def norm(points, targets):
        return jnp.square(mapped(points, targets, points[0], kernel=kernel) - points).sum()

    value, slopes = jax.jit(jax.value_and_grad(norm, (0, 1)))(points, points + 0.1)
    assert value == pytest.approx(6 * 3 * 0.01, rel=1e-3)  # a shift, and nothing else
    assert all(jnp.isfinite(slope).all() for slope in slopes)


def test_chunks_change_nothing_but_the_memory(monkeypatch):
    points, targets = random_pairs()
    at = somewhere(100)
    whole = mapped(points, targets, at, kernel="r2logr")
    monkeypatch.setattr(thin_plate, "_CHUNK", 7)
    mapped.clear_cache()
    np.testing.assert_allclose(mapped(points, targets, at, kernel="r2logr"), whole, atol=1e-5)


def test_an_unknown_kernel_is_refused():
    points, targets = random_pairs()
    with pytest.raises(InputError, match="kernel: 'r3' is not known; known are r2logr, r"):
        mapped(points, targets, points[0], kernel="r3")
