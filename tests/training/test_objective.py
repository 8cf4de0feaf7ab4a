"""The objective: weights, and the expectation over maps drawn from a Bayesian head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.models import Prediction
from gridreg_jax.training.objective import objective
from gridreg_jax.transforms.interpolation import (
    control_positions,
    interpolate,
    interpolate_at_controls,
    interpolate_variance,
)

SHAPE, GRID = (14, 12, 13), (5, 4, 6)
PLAIN = dict(interpolator="trilinear", num_labels=2)


def predict(control_grid, log_variance=None):
    return Prediction(
        displacement=interpolate(control_grid, SHAPE),
        control_grid=control_grid,
        control_displacement=interpolate_at_controls(control_grid),
        log_variance=log_variance,
        variance=None if log_variance is None else interpolate_variance(jnp.exp(log_variance), SHAPE),
    )


def random_case(cases=2, seed=0):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(size=(2, cases, *SHAPE, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, (2, cases, *SHAPE)), jnp.int32)
    batch = dict(fixed=images[0], moving=images[1], fixed_labels=labels[0], moving_labels=labels[1])
    return batch, jnp.asarray(rng.normal(size=(cases, *GRID, 3)), jnp.float32)


def keys(cases=2):
    return jax.random.split(jax.random.key(0), cases)


def test_the_total_is_the_weighted_sum_and_a_weight_of_zero_saves_the_term():
    batch, control_grid = random_case()
    weights = dict(image=2.0, grid=0.5, dice=0.7, bending=3.0, folding=9.0)
    total, terms = objective(predict(control_grid), batch, **PLAIN, **weights)
    assert terms.keys() == weights.keys()
    expected = sum(weight * terms[name] for name, weight in weights.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    _, terms = objective(predict(control_grid), batch, **PLAIN, image=1.0, grid=0.0, dice=0.0, bending=0.0)
    assert terms.keys() == {"image"}


def test_the_grid_similarity_is_that_of_the_images_at_the_control_points():
    batch, _ = random_case()
    rng = np.random.default_rng(3)
    # A grid of the size of the lattice has its control points on the voxels.
    control_grid = jnp.asarray(rng.normal(size=(2, *SHAPE, 3)), jnp.float32)
    for name in ("mse", "ncc"):
        _, terms = objective(
            predict(control_grid), batch, **PLAIN, similarity=name, grid_similarity=name, dice=0.0, bending=0.0
        )
        np.testing.assert_allclose(terms["grid"], terms["image"], rtol=1e-4)


def test_maps_of_a_certain_posterior_are_its_mean():
    batch, control_grid = random_case()
    certain = predict(control_grid, jnp.full_like(control_grid, -40.0))
    plain, terms = objective(predict(control_grid), batch, **PLAIN)
    drawn, bayesian_terms = objective(certain, batch, **PLAIN, samples=3, keys=keys())
    np.testing.assert_allclose(plain, drawn, rtol=1e-5)
    for name in terms:
        np.testing.assert_allclose(bayesian_terms[name], terms[name], rtol=1e-5)


def test_the_expected_squared_difference_of_a_ramp_is_the_propagated_variance():
    """For M(x) = a x, E (F - M(x + u))^2 = (F - M(x + mean))^2 + a^2 Var u(x)."""
    ramp = 0.1 * jnp.broadcast_to(jnp.arange(float(SHAPE[0])).reshape(1, -1, 1, 1, 1), (1, *SHAPE, 1))
    batch = dict(fixed=ramp, moving=ramp)
    # The border is certain: there the ramp ends.
    log_variance = jnp.full((1, *GRID, 3), -30.0).at[:, 1:-1, :, :, 0].set(-1.0)
    prediction = predict(jnp.zeros((1, *GRID, 3)), log_variance)
    options = PLAIN | dict(image=1.0, grid=0.0, bending=0.0, samples=4)
    image = jax.jit(lambda keys: objective(prediction, batch, **options, keys=keys)[1]["image"][0])
    found = np.mean([image(jax.random.split(jax.random.key(seed), 1)) for seed in range(100)])
    expected = 0.1**2 * float(interpolate_variance(jnp.exp(log_variance), SHAPE)[..., 0].mean())
    assert found == pytest.approx(expected, rel=0.05)


def test_draws_depend_on_the_example_and_not_on_its_batch():
    batch, control_grid = random_case()
    log_variance = jnp.zeros_like(control_grid)
    options = PLAIN | dict(samples=2, uncertainty=0.1)
    both, _ = objective(predict(control_grid, log_variance), batch, **options, keys=keys())
    for case in range(2):
        part = {name: array[case : case + 1] for name, array in batch.items()}
        alone = predict(control_grid[case : case + 1], log_variance[case : case + 1])
        one, _ = objective(alone, part, **options, keys=keys()[case : case + 1])
        np.testing.assert_allclose(one[0], both[case], rtol=1e-5)


def test_draws_and_uncertainty_teach_the_mean_and_the_variance():
    batch, control_grid = random_case()

    def loss(control_grid, log_variance, **weights):
        options = PLAIN | dict(image=0.0, grid=0.0, bending=0.0, samples=2) | weights
        return objective(predict(control_grid, log_variance), batch, **options, keys=keys())[0].sum()

    start, h = jnp.zeros_like(control_grid), 1e-2
    for weights in (dict(image=1.0), dict(uncertainty=1.0)):

        @functools.partial(jax.jit, static_argnums=1)
        def with_gradient(log_variance, penalty=1.0, weights=weights):
            found = functools.partial(loss, **weights, penalty=penalty)
            return jax.value_and_grad(found, argnums=(0, 1))(control_grid, log_variance)

        _, (of_mean, of_variance) = with_gradient(start)
        assert np.all(np.abs(of_mean) > 0) and np.all(np.abs(of_variance) > 0)
        slope = (with_gradient(start + h)[0] - with_gradient(start - h)[0]) / (2 * h)
        assert slope == pytest.approx(float(of_variance.sum()), rel=0.05)
        # A dearer variance is a smaller one.
        _, (_, dearer) = with_gradient(start, 10.0)
        assert np.all(dearer > of_variance) == ("uncertainty" in weights)


def test_first_differences_are_those_of_the_velocity_if_there_is_one():
    batch, _ = random_case()
    displacement, velocity = (
        np.random.default_rng(seed).normal(size=(2, *shape, 3)) for seed, shape in ((0, SHAPE), (1, (7, 6, 6)))
    )
    options = PLAIN | dict(image=0.0, bending=0.0, gradient=3.0)
    for field, prediction in (
        (displacement, Prediction(jnp.float32(displacement))),
        (velocity, Prediction(jnp.float32(displacement), velocity=jnp.float32(velocity))),
    ):
        expected = np.mean([(np.diff(field, axis=axis) ** 2).mean((1, 2, 3, 4)) for axis in (1, 2, 3)], axis=0)
        total, terms = objective(prediction, batch, **options)
        assert terms.keys() == {"gradient"}
        np.testing.assert_allclose(terms["gradient"], expected, rtol=1e-5)
        np.testing.assert_allclose(total, 3.0 * expected, rtol=1e-5)


def test_with_both_directions_each_image_is_warped_onto_the_other():
    batch, _ = random_case()
    there, back = (jnp.full((2, *SHAPE, 3), shift) for shift in (1.0, -2.0))
    swapped = dict(fixed=batch["moving"], moving=batch["fixed"])
    options = PLAIN | dict(bending=0.0)
    both = objective(Prediction(there, inverse_displacement=back), batch, **options)[0]
    halves = [objective(Prediction(there), batch, **options)[0], objective(Prediction(back), swapped, **options)[0]]
    assert np.abs(halves[0] - halves[1]).min() > 1e-4
    np.testing.assert_allclose(both, (halves[0] + halves[1]) / 2, rtol=1e-5)


def test_a_divergence_without_a_posterior_is_refused():
    batch, control_grid = random_case()
    with pytest.raises(InputError, match="loss.kl is 0.1, but the model predicts no posterior of a velocity"):
        objective(predict(control_grid), batch, **PLAIN, kl=0.1)


def test_keypoints_are_compared_in_half_lattices():
    rng = np.random.default_rng(0)
    true, errors = rng.uniform(0, 5, (2, 2, 6, 3)), rng.normal(size=(2, 2, 6, 3))
    image = jnp.zeros((2, 5, 9, 7, 1))
    batch = {"fixed": image, "moving": image}
    batch |= {f"{side}_points": jnp.asarray(points, jnp.float32) for side, points in zip(batch, true, strict=True)}
    found = tuple(jnp.asarray(points, jnp.float32) for points in true + errors)
    prediction = Prediction(displacement=jnp.zeros((2, 5, 9, 7, 3)), keypoints=found)
    options = dict(interpolator="", num_labels=0, image=0.0, grid=0.0, bending=0.0, keypoints=3.0)
    total, terms = objective(prediction, batch, **options)
    expected = np.mean((errors / [2, 4, 3]) ** 2, axis=(0, 2, 3))
    np.testing.assert_allclose(terms["keypoints"], expected, rtol=1e-4)
    np.testing.assert_allclose(total, 3 * expected, rtol=1e-4)
    with pytest.raises(InputError, match="loss.keypoints is 3.0, but the model predicts no keypoints"):
        objective(prediction.replace(keypoints=None), batch, **options)


def test_energies_of_a_cubic_spline_are_those_of_its_affine_part():
    """On an affine map u = A x the mean squared derivatives and the strain are those of A, wherever they are taken."""
    batch, _ = random_case()
    matrix = np.array([[0.1, 0.03, 0.0], [-0.02, -0.05, 0.04], [0.01, 0.0, 0.02]])
    axes = [control_positions("bspline", g) * (size - 1) for g, size in zip(GRID, SHAPE, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    control_grid = jnp.asarray(np.stack([places @ matrix.T] * 2), jnp.float32)
    prediction = Prediction(interpolate(control_grid, SHAPE, method="bspline"), control_grid=control_grid)
    options = dict(interpolator="bspline", num_labels=2, image=0.0, grid=0.0, bending=0.0)
    total, terms = objective(prediction, batch, **options, gradient=2.0, elastic=(3.0, 5.0))
    assert terms.keys() == {"gradient", "elastic"}
    strain = (matrix + matrix.T) / 2
    np.testing.assert_allclose(terms["gradient"], (matrix**2).sum() / 9, rtol=1e-4)
    np.testing.assert_allclose(terms["elastic"], 3 * (strain**2).sum() + 2.5 * np.trace(matrix) ** 2, rtol=1e-4)
    np.testing.assert_allclose(total, 2 * terms["gradient"] + terms["elastic"], rtol=1e-5)
    with pytest.raises(InputError, match="loss.elastic is .*, but the map is no cubic spline"):
        objective(prediction, batch, **options | dict(interpolator="trilinear"), elastic=(1.0, 0.0))


def test_an_uncertainty_of_weight_zero_is_not_computed():
    batch, control_grid = random_case()
    prediction = predict(control_grid, jnp.zeros_like(control_grid))
    assert objective(prediction, batch, **PLAIN, bending=0.0, keys=keys())[1].keys() == {"image", "grid"}
