import functools

import jax
import jax.numpy as jnp
import numpy as np

from gridreg_jax.ncf import CorrespondenceField, optimise
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import warp

SHAPE = (34, 30, 37)
optimised = functools.partial(jax.jit(optimise, static_argnames=("steps", "stride")), key=jax.random.key(0))


@jax.jit
def pair(seed=0):
    """An image, and the same under a smooth map that is known: (fixed, moving, displacement)."""
    smooth = interpolate(jax.random.normal(jax.random.key(seed), (1, 8, 8, 8, 1)), SHAPE, method="bspline")
    moving = jax.nn.sigmoid(3 * smooth)
    control_grid = 3.0 * jax.random.normal(jax.random.key(seed + 100), (1, 5, 5, 5, 3))
    displacement = interpolate(control_grid, SHAPE, method="bspline")
    return warp(moving, displacement), moving, displacement


def of_two(change=lambda array: array, mask=None, learning_rate=5e-3):
    """What is found of two pairs after few steps, the fixed images changed: one program for all tests."""
    fixed, moving, _ = (jnp.concatenate(parts) for parts in zip(pair(0), pair(1), strict=True))
    mask = jnp.ones(fixed.shape[:4], bool) if mask is None else mask
    return optimised(change(fixed), moving, steps=3, learning_rate=learning_rate, mask=mask)


def test_number_of_parameters():
    shapes = jax.eval_shape(lambda: CorrespondenceField().init(jax.random.key(0), SHAPE))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 60_262


def test_the_field_is_a_perceptron_of_encoded_coordinates_and_a_smoother():
    shape, field = (4, 3, 5), CorrespondenceField(frequencies=3, width=7, layers=4, smoother=2)
    shapes = jax.eval_shape(lambda: field.init(jax.random.key(0), shape))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"), -1)
    hidden = params["params"]["axis0"]["bias"]
    for axis in range(3):
        phases = np.pi * grid[..., axis, None] * [1, 2, 4]
        waves = np.stack([np.sin(phases), np.cos(phases)], axis=-2) / [1, 2, 4]
        codes = np.concatenate([grid[..., axis, None], waves.reshape(*shape, -1)], axis=-1)
        hidden = hidden + codes @ params["params"][f"axis{axis}"]["kernel"]
    for layer in ("layer1", "layer2", "coarse"):
        weights = params["params"][layer]
        hidden = np.maximum(hidden, 0) @ weights["kernel"] + weights["bias"]
    apply = jax.jit(field.apply, static_argnums=1)
    np.testing.assert_allclose(apply(_without(params, "smooth"), shape)[0], hidden, rtol=1e-3, atol=1e-3)
    # The smoother alone, on no displacement: the same everywhere, two voxels off the border.
    smoothed = np.asarray(apply(_without(params, "coarse"), (7, 6, 8))[0])
    inner = smoothed[2:-2, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, np.broadcast_to(inner[0, 0, 0], inner.shape), atol=1e-5)
    between = np.maximum(params["params"]["smoother"]["bias"], 0)
    weights = params["params"]["smooth"]
    expected = weights["bias"] + np.einsum("c,xyzcd->d", between, weights["kernel"])
    np.testing.assert_allclose(inner[0, 0, 0], expected, rtol=1e-4, atol=1e-4)


def _without(params, layer):
    zeros = jax.tree.map(jnp.zeros_like, params["params"][layer])
    return {"params": {**params["params"], layer: zeros}}


def test_starts_at_the_identity():
    found = of_two(learning_rate=0.0)
    assert found.shape == (2, *SHAPE, 3) and 0 < jnp.abs(found).max() < 0.05


def test_a_known_map_is_found():
    fixed, moving, true = pair()
    found = optimised(fixed, moving, steps=150)
    inside = (0, *[slice(3, -3)] * 3)  # at the border the images hold too little

    def mean_length(vectors):
        return float(jnp.linalg.norm(vectors[inside], axis=-1).mean())

    assert mean_length(true) > 1
    assert mean_length(found - true) < 0.5 * mean_length(true)


def test_every_slice_of_few_is_compared():
    fixed, moving, _ = (part[:, :, :, :11] for part in pair())
    changed = fixed.at[:, :, :, 5].set(0.9)  # no second slice
    assert jnp.abs(optimised(fixed, moving, steps=3) - optimised(changed, moving, steps=3)).max() > 1e-3


def test_pairs_of_a_batch_do_not_influence_each_other():
    both, other = of_two(), of_two(lambda fixed: fixed.at[1].set(0.5))
    np.testing.assert_allclose(both[0], other[0], atol=1e-5)
    assert jnp.abs(both[1] - other[1]).max() > 1e-3


def test_what_is_masked_has_no_influence():
    mask = jnp.ones((2, *SHAPE), bool).at[:, 16:].set(False)
    plain, other = of_two(mask=mask), of_two(lambda fixed: fixed.at[:, 16:].set(0.9), mask)
    np.testing.assert_allclose(plain, other, atol=1e-5)
    assert jnp.abs(plain - of_two()).max() > 1e-3
