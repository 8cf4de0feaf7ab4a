"""The segmenter, and the network that sees what it tells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax.models import build
from gridreg_jax.models.segmenter import Segmenter, _finer
from gridreg_jax.training.objective import objective
from gridreg_jax.transforms.warp import warp

SHAPE, GRID = (18, 21, 16), (4, 5, 4)
TINY = dict(levels=3, skips=(1,), width=4, projection=8, decoder=8, heads=2, window=1)
TINY |= dict(contrast_window=5, segmenter=4, labels=2)


def images(cases=1, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


def random_params(model, *inputs, **options):
    shapes = jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs, **options), *inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("shape", [(17, 19, 9), (16, 16, 16), (33, 8, 12)])
def test_any_image_size(shape):
    image = jax.ShapeDtypeStruct((3, *shape, 1), jnp.float32)
    logits = jax.eval_shape(lambda x: Segmenter(5, 4).init_with_output(jax.random.key(0), x)[0], image)
    assert (logits.shape, logits.dtype) == ((3, *shape, 6), jnp.float32)


@pytest.mark.parametrize(("size", "factor"), [(9, 2), (8, 2), (7, 1), (9, 4)])
def test_features_lie_where_they_were_computed(size, factor):
    """Feature i of a convolution with a stride sits at voxel `factor * i`: a ramp stays that ramp as far as they go."""
    places = np.arange(0, size, factor, dtype=np.float32)
    found = _finer(jnp.asarray(places).reshape(1, -1, 1, 1, 1), (size, 1, 1), factor)[0, :, 0, 0, 0]
    np.testing.assert_allclose(found, np.minimum(np.arange(size), places[-1]), atol=1e-5)


def layer_by_hand(x, params, step=1):
    """Convolution, instance norm and leaky rectifier."""
    kernels = np.moveaxis(np.float64(params["kernel"]), (3, 4), (1, 0))
    parts = [[ndimage.correlate(x[..., i], k, mode="constant") for i, k in enumerate(kernel)] for kernel in kernels]
    x = np.moveaxis(np.sum(parts, axis=1), 0, -1)[::step, ::step, ::step]
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return np.where(x > 0, x, 0.1 * x)


def finer_by_hand(x, params, shape, factor):
    """A linear map of the features, and those between them and beyond."""
    x = x @ params["kernel"] + params["bias"]
    grid = np.indices(shape) / factor
    return np.stack([ndimage.map_coordinates(x[..., c], grid, order=1, mode="nearest") for c in range(x.shape[-1])], -1)


def test_each_finer_level_joins_those_that_are_coarser():
    image = images(shape=(9, 8, 10))[0]
    model = Segmenter(labels=2, width=2)
    params = random_params(model, image)["params"]
    found = jax.jit(model.apply)({"params": params}, image)[0]
    levels = [np.float64(image[0])]
    for level, step in enumerate((2, 2, 2, 1)):
        levels.append(layer_by_hand(levels[-1], params["encoder"][f"level{level}"], step))
    _, *finer, x = levels
    for level, factor in ((2, 1), (1, 2), (0, 2)):
        x = finer_by_hand(x, params[f"projection{level}"], finer[level].shape[:3], factor) + finer[level]
        x = layer_by_hand(x, params[f"level{level}"])
    np.testing.assert_allclose(found, finer_by_hand(x, params["head"], (9, 8, 10), 2), atol=1e-4)


def test_it_learns_from_labels_alone_and_the_rest_sees_what_it_tells():
    fixed, moving = images()
    model = build("gridreg", **TINY)
    params = random_params(model, fixed, moving, grid_size=GRID)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 3, (2, 1, *SHAPE)), jnp.int32)
    batch = dict(fixed=fixed, moving=moving, fixed_labels=labels[0], moving_labels=labels[1])

    @jax.jit
    @jax.grad
    def gradient(params, of_labels):
        prediction = model.apply(params, fixed, moving, grid_size=GRID)
        options = dict(interpolator="trilinear", num_labels=2, dice=1.0, segmentation=1.0)
        total, terms = objective(prediction, batch, **options)
        segmentation = terms["segmentation"]
        return jnp.where(of_labels, segmentation, total - segmentation).sum()

    def moves(tree):
        return any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree))

    of_the_map, of_labels = (gradient(params, which)["params"] for which in (False, True))
    assert not moves(of_the_map.pop("segmenter")) and moves(of_the_map)
    assert moves(of_labels.pop("segmenter")) and not moves(of_labels)
    other = jax.tree.map(lambda leaf: leaf, params)
    other["params"]["segmenter"] = jax.tree.map(jnp.negative, params["params"]["segmenter"])
    control_grid = jax.jit(lambda params: model.apply(params, fixed, moving, grid_size=GRID).control_grid)
    one, two = map(control_grid, (params, other))
    assert jnp.abs(one - two).max() > 1e-3


def test_it_sees_one_image_at_a_time():
    fixed, moving = images()
    model = build("gridreg", **TINY)
    params = random_params(model, fixed, moving, grid_size=GRID)
    pairs = (fixed, moving), (moving, fixed)
    segment = jax.jit(lambda *pair: model.apply(params, *pair, grid_size=GRID).segmentation)
    there, back = (segment(*pair) for pair in pairs)
    for one, other in zip(there, back[::-1], strict=True):
        assert one.shape == (1, *SHAPE, 3)
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_second_iteration_sees_the_warped_maps():
    """The segmenter runs once: the second run of the network gets its maps under the first run's map."""
    fixed, moving = images()
    once, twice = (build("gridreg", iterations=iterations, **TINY) for iterations in (1, 2))
    params = random_params(once, fixed, moving, grid_size=GRID)
    first = jax.jit(functools.partial(once.apply, grid_size=GRID))(params, fixed, moving)
    of_fixed, of_moving = (jax.nn.softmax(logits)[..., 1:] for logits in first.segmentation)
    warped = warp(jnp.concatenate([moving, of_moving], axis=-1), first.displacement)
    run = jax.jit(functools.partial(once.apply, grid_size=GRID, method="_run"))
    second = run(params, jnp.concatenate([fixed, of_fixed], axis=-1), warped)
    both = jax.jit(functools.partial(twice.apply, grid_size=GRID))(params, fixed, moving).control_grid
    np.testing.assert_allclose(both, first.control_grid + second[0], atol=1e-4)
