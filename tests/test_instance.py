import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import instance
from gridreg_jax.errors import InputError
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.transforms.bspline import jacobian_determinant_on_lattice
from gridreg_jax.transforms.interpolation import INTERPOLATORS, interpolate
from gridreg_jax.transforms.jacobian import jacobian_determinant
from gridreg_jax.transforms.warp import compose, identity_grid, warp

SHAPE, GRID = (20, 24, 18), (5, 5, 5)
OPTIONS = dict(bending=1.0, learning_rate=0.1)
# Tests share programs: those of the same static options, with or without a mask.
static = ("steps", "interpolator", "similarity", "method")
refine, refine_recorded = (
    jax.jit(function, static_argnames=static) for function in (instance.refine, instance.refine_recorded)
)
flow = jax.jit(instance.flow, static_argnames=("shape", "method"))
EVERYWHERE = jnp.ones((1, *SHAPE))


@functools.cache
@jax.jit
def pair(seed):
    """A rough image, and the same under a smooth map that is known: (fixed, moving, control grid of the map)."""
    moving = interpolate(jax.random.normal(jax.random.key(seed), (1, 9, 9, 9, 1)), SHAPE, method="bspline")
    control_grid = 1.5 * jax.random.normal(jax.random.key(seed + 100), (1, *GRID, 3))
    return warp(moving, interpolate(control_grid, SHAPE, method="bspline")), moving, control_grid


@pytest.mark.parametrize("interpolator", INTERPOLATORS)
def test_it_comes_closer_to_the_true_map(interpolator):
    fixed, moving, control_grid = pair(0)
    true = interpolate(control_grid, SHAPE, method="bspline")
    options = dict(steps=20, interpolator=interpolator, mask=EVERYWHERE, bending=1.0, learning_rate=0.3)
    found = refine(0 * control_grid, fixed, moving, **options)
    inside = (slice(None), *[slice(3, -3)] * 3)  # at the border the images hold too little
    error = interpolate(found, SHAPE, method=interpolator) - true
    assert jnp.abs(error[inside]).mean() < 0.5 * jnp.abs(true[inside]).mean()


def test_pairs_of_a_batch_do_not_influence_each_other():
    fixed, moving, control_grid = (jnp.concatenate(parts) for parts in zip(pair(0), pair(1), strict=True))
    options = dict(steps=20, interpolator="bspline", **OPTIONS)
    both = refine(0 * control_grid, fixed, moving, **options)
    for i in range(2):
        alone = refine(0 * pair(i)[2], *pair(i)[:2], mask=EVERYWHERE, **options)
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-4)


def test_without_steps_nothing_changes():
    fixed, moving, control_grid = pair(0)
    found = refine(control_grid, fixed, moving, steps=0, interpolator="bspline", **OPTIONS)
    np.testing.assert_array_equal(found, control_grid)


def test_a_pair_that_is_alike_stays_as_it_is_whatever_the_others_of_its_batch_do():
    fixed, moving, control_grid = (jnp.concatenate(parts) for parts in zip(pair(0), pair(1), strict=True))
    fixed = fixed.at[0].set(moving[0])
    found = refine(0 * control_grid, fixed, moving, steps=5, interpolator="bspline", **OPTIONS)
    assert not found[0].any() and found[1].any()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_falls(similarity):
    fixed, moving, control_grid = pair(0)
    found, history = refine_recorded(
        0 * control_grid, fixed, moving, steps=20, interpolator="bspline", similarity=similarity, **OPTIONS
    )
    assert history.shape == (20, 1) and history[-1, 0] < history[0, 0]
    assert jnp.isfinite(found).all()


def test_steps_and_bending_are_in_the_unit_of_the_spacing():
    fixed, moving, control_grid = pair(0)
    options = dict(steps=5, interpolator="bspline")
    in_voxels = refine(0 * control_grid, fixed, moving, **options, **OPTIONS)
    # In half voxels displacements are twice as long, and their second derivatives half as large.
    halves = dict(spacing=jnp.full(3, 2.0), bending=4.0, learning_rate=0.2)
    np.testing.assert_allclose(refine(0 * control_grid, fixed, moving, **options, **halves), in_voxels, atol=1e-3)


def test_a_step_is_as_long_along_thick_slices_as_within_them():
    fixed, moving, control_grid = pair(0)
    options = dict(steps=1, interpolator="bspline", spacing=jnp.array([1.0, 2.0, 4.0]), **OPTIONS)
    found = refine(0 * control_grid, fixed, moving, **options)
    np.testing.assert_allclose(np.abs(found).max(axis=(0, 1, 2, 3)), [0.1, 0.05, 0.025], rtol=1e-3)


def test_what_bends_in_the_start_stays_in_the_refined_map():
    fixed, moving, control_grid = pair(0)
    # There is nothing to gain: the start is the true map, and only its own bending could change it.
    options = dict(steps=20, interpolator="bspline", bending=100.0, learning_rate=0.1)
    kept = refine(control_grid, fixed, moving, mask=EVERYWHERE, **options)
    straightened, _ = refine_recorded(control_grid, fixed, moving, similarity="lncc", **options)
    assert jnp.abs(kept - control_grid).mean() < 0.1 * jnp.abs(straightened - control_grid).mean()


@pytest.mark.parametrize("longer", [-2, 1])
def test_a_moving_lattice_that_is_not_around_the_fixed_one_is_named(longer):
    fixed, moving, control_grid = pair(0)
    moving = jnp.resize(moving, (1, moving.shape[1] + longer, *moving.shape[2:]))
    with pytest.raises(InputError, match="as many more at either end"):
        refine(control_grid, fixed, moving, steps=1, interpolator="bspline", **OPTIONS)


@pytest.mark.parametrize("wrong", [dict(method="grids"), dict(similarity="mes")])
def test_what_is_not_known_is_named(wrong):
    fixed, moving, control_grid = pair(0)
    with pytest.raises(InputError, match="is not known; known are (grid|mse), .*did you mean '(grid|mse)'"):
        refine_recorded(control_grid, fixed, moving, steps=1, interpolator="bspline", **OPTIONS | wrong)


def test_a_spacing_without_a_cubic_spline_is_refused():
    fixed, moving, control_grid = pair(0)
    options = dict(steps=1, interpolator="trilinear", spacing=jnp.ones(3), **OPTIONS)
    with pytest.raises(InputError, match="for cubic splines only, not for 'trilinear'"):
        refine_recorded(control_grid, fixed, moving, **options)


def test_what_is_masked_has_no_influence():
    fixed, moving, control_grid = pair(0)
    mask = jnp.ones(fixed.shape[:4]).at[:, 12:].set(0)
    options = dict(steps=20, interpolator="bspline", mask=mask, **OPTIONS)
    plain = refine(0 * control_grid, fixed, moving, **options)
    other = refine(0 * control_grid, fixed.at[:, 12:].set(7.0), moving, **options)
    np.testing.assert_allclose(plain, other, atol=1e-5)
    assert jnp.abs(plain - refine(0 * control_grid, fixed, moving, **options | dict(mask=EVERYWHERE))).max() > 1e-3


def test_maps_of_labels_guide_where_the_images_say_nothing():
    _, _, control_grid = pair(0)
    flat = jnp.zeros((1, *SHAPE, 1))
    center = (np.array(SHAPE) - 1) / 2
    blob = jnp.exp(-jnp.sum(((identity_grid(SHAPE) - center) / 5) ** 2, axis=-1))[None, ..., None]
    shift = np.array([1.5, -1.0, 0.5], np.float32)
    shifted = warp(blob, jnp.broadcast_to(-shift, (1, *SHAPE, 3)))
    options = OPTIONS | dict(steps=80, interpolator="bspline", bending=0.01)

    def found(mask=EVERYWHERE, overlap=1.0):
        told = dict(label_maps=(blob, shifted), mask=mask, overlap=overlap)
        grid = refine(0 * control_grid, flat, flat, **options, **told)
        return interpolate(grid, SHAPE, method="bspline")[(0, *map(int, center))]

    np.testing.assert_allclose(found(), shift, atol=0.2)
    np.testing.assert_allclose(found(overlap=0.0), 0, atol=1e-3)
    # Nothing is known there.
    np.testing.assert_allclose(found(mask=0 * EVERYWHERE), 0, atol=1e-3)


@pytest.mark.parametrize("interpolator", ["bspline", "trilinear"])
def test_the_penalty_on_folding_unfolds(interpolator):
    @jax.jit
    def least(control_grid):
        if interpolator == "bspline":
            return jacobian_determinant_on_lattice(control_grid, SHAPE).min()
        return jacobian_determinant(interpolate(control_grid, SHAPE)).min()

    folded = 1.5 * pair(0)[2]
    blank = jnp.zeros((1, *SHAPE, 1))
    options = dict(steps=60, interpolator=interpolator, bending=0.0, learning_rate=0.2)
    plain, penalised = (refine_recorded(folded, blank, blank, folding=weight, **options)[0] for weight in (0.0, 100.0))
    np.testing.assert_allclose(plain, folded, atol=1e-5)
    assert least(folded) < 0 < 0.1 < least(penalised)


def test_the_flow_of_a_linear_velocity_is_an_exponential():
    center, rates = (np.array(SHAPE) - 1) / 2, np.array([-0.3, -0.1, -0.6])
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in SHAPE), indexing="ij"), axis=-1)
    velocity = jnp.asarray(rates * (corners - center), jnp.float32)
    found = flow(velocity[None], SHAPE, method="trilinear")[0]
    # 64 Euler steps in place of the exponential.
    np.testing.assert_allclose(found, np.expm1(rates) * (identity_grid(SHAPE) - center), atol=0.02, rtol=0.01)


def test_the_flow_of_the_negative_velocity_is_the_inverse():
    _, _, control_grid = pair(0)
    forth, back = flow(control_grid, SHAPE), flow(-control_grid, SHAPE)
    inside = (slice(None), *[slice(4, -4)] * 3)
    assert jnp.abs(compose(forth, back)[inside]).mean() < 0.02 * jnp.abs(forth[inside]).mean()


def test_symmetric_means_that_the_order_of_the_images_does_not_matter():
    fixed, moving, control_grid = pair(0)
    options = dict(steps=5, interpolator="bspline", **OPTIONS)
    found, swapped = (
        refine(0 * control_grid, *images, method="symmetric", **options)
        for images in ((fixed, moving), (moving, fixed))
    )
    np.testing.assert_allclose(found, -swapped, atol=1e-3)
    one_way = refine(0 * control_grid, moving, fixed, method="velocity", **options)
    assert jnp.abs(found + one_way).max() > 0.05
