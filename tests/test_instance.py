import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.instance import refine, refine_recorded
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.transforms.bspline import jacobian_determinant_on_lattice
from gridreg_jax.transforms.interpolation import INTERPOLATORS, interpolate
from gridreg_jax.transforms.warp import warp

SHAPE, GRID = (20, 24, 18), (5, 5, 5)
OPTIONS = dict(bending=1.0, learning_rate=0.1)


def pair(seed):
    """A rough image, and the same under a smooth map that is known: (fixed, moving, control grid of the map)."""
    moving = interpolate(jax.random.normal(jax.random.key(seed), (1, 9, 9, 9, 1)), SHAPE, method="bspline")
    control_grid = 1.5 * jax.random.normal(jax.random.key(seed + 100), (1, *GRID, 3))
    return warp(moving, interpolate(control_grid, SHAPE, method="bspline")), moving, control_grid


@pytest.mark.parametrize("interpolator", INTERPOLATORS)
def test_it_comes_closer_to_the_true_map(interpolator):
    fixed, moving, control_grid = pair(0)
    true = interpolate(control_grid, SHAPE, method="bspline")
    found = refine(0 * control_grid, fixed, moving, steps=60, interpolator=interpolator, **OPTIONS)
    inside = (slice(None), *[slice(3, -3)] * 3)  # at the border the images hold too little
    error = interpolate(found, SHAPE, method=interpolator) - true
    assert jnp.abs(error[inside]).mean() < 0.5 * jnp.abs(true[inside]).mean()


def test_pairs_of_a_batch_do_not_influence_each_other():
    fixed, moving, control_grid = (jnp.concatenate(parts) for parts in zip(pair(0), pair(1), strict=True))
    options = dict(steps=5, interpolator="bspline", **OPTIONS)
    both = refine(0 * control_grid, fixed, moving, **options)
    for i in range(2):
        alone = refine(0 * control_grid[i : i + 1], fixed[i : i + 1], moving[i : i + 1], **options)
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-4)


def test_without_steps_nothing_changes():
    fixed, moving, control_grid = pair(0)
    found = refine(control_grid, fixed, moving, steps=0, interpolator="bspline", **OPTIONS)
    np.testing.assert_array_equal(found, control_grid)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_falls(similarity):
    fixed, moving, control_grid = pair(0)
    found, history = refine_recorded(
        0 * control_grid, fixed, moving, steps=15, interpolator="bspline", similarity=similarity, **OPTIONS
    )
    assert history.shape == (15, 1) and history[-1, 0] < history[0, 0]
    assert jnp.isfinite(found).all()


def test_what_is_masked_has_no_influence():
    fixed, moving, control_grid = pair(0)
    mask = jnp.ones(fixed.shape[:4]).at[:, 12:].set(0)
    options = dict(steps=5, interpolator="bspline", mask=mask, **OPTIONS)
    plain = refine(0 * control_grid, fixed, moving, **options)
    other = refine(0 * control_grid, fixed.at[:, 12:].set(7.0), moving, **options)
    np.testing.assert_allclose(plain, other, atol=1e-5)


def test_the_penalty_on_folding_unfolds():
    fixed, moving, control_grid = pair(0)
    folded = 1.5 * control_grid
    before = jacobian_determinant_on_lattice(folded, SHAPE).min()
    options = dict(steps=60, interpolator="bspline", bending=1.0, learning_rate=0.2)
    plain, penalised = (refine(folded, fixed, moving, folding=weight, **options) for weight in (None, 100.0))
    without, after = (jacobian_determinant_on_lattice(found, SHAPE).min() for found in (plain, penalised))
    assert before < 0 < without + 0.1 < after
    with pytest.raises(InputError, match="needs the cubic spline, not 'trilinear'"):
        refine(folded, fixed, moving, folding=1.0, **(options | {"interpolator": "trilinear"}))
