"""The LightCRCF-style network: exact fusion, its fixed operators, sizes and the identity it starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax.errors import InputError
from gridreg_jax.models import build
from gridreg_jax.models.lightcrcf import OPERATORS, GroupFlow, TextureConv, fuse
from gridreg_jax.transforms.pyramid import double, halve
from gridreg_jax.transforms.warp import compose, warp

SHAPE = (13, 11, 9)
SIZES = {
    "three": dict(encoder=(8, 16, 16), decoder=(16, 8)),
    "one shared": dict(encoder=(8, 16, 24, 32), decoder=(24, 16, 8), shared=True),
}
TINY = dict(encoder=(3, 4), decoder=(3,), stages=2)


def images(cases=1, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


def shapes_of_params(shape=SHAPE, **fields):
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return jax.eval_shape(build("lightcrcf", **fields).init, jax.random.key(0), image, image)


@functools.cache
def random_params(**fields):
    rng = np.random.default_rng(1)
    shapes = shapes_of_params(**fields)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@functools.cache
def compiled(**fields):
    return jax.jit(lambda params, *pair: build("lightcrcf", **fields).apply(params, *pair).displacement)


def assert_equal_to_their_scale(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def correlated(x, kernel):
    """In double precision, one channel after the other, with zeros outside."""
    x, kernel = np.float64(x), np.float64(kernel)
    return np.stack(
        [
            sum(ndimage.correlate(x[..., i], kernel[..., i, o], mode="constant") for i in range(x.shape[-1]))
            for o in range(kernel.shape[-1])
        ],
        axis=-1,
    )


@pytest.mark.parametrize(("size", "expected"), [("three", 91_569), ("one shared", 94_523)])
def test_number_of_parameters_once_fused(size, expected):
    fused = shapes_of_params(**SIZES[size], fused=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(fused)) == expected
    assert jax.eval_shape(fuse, shapes_of_params(**SIZES[size])) == fused


@pytest.mark.parametrize("stride", [1, 2])
def test_the_branches_one_by_one(stride):
    """The block against its branches as they are drawn, each padded at its own input."""
    x = np.random.default_rng(0).normal(size=(6, 5, 7, 2)).astype(np.float32)
    block = TextureConv(3, stride=stride)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.asarray(x[None]))["params"]
    params = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    found = block.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x[None]))[0]

    expected = sum(correlated(x, params[name]) for name in ("cube", "plane0", "plane1", "plane2"))
    wide = np.float64(x @ params["widen"])
    expected = expected + correlated(wide[..., :6], params["narrow"])
    for number, (operator, scales) in enumerate(zip(OPERATORS, params["scales"], strict=True)):
        seen = np.moveaxis(wide[..., 6 + 3 * number : 9 + 3 * number], -1, 0)
        filtered = [ndimage.correlate(feature, np.float64(operator), mode="constant") for feature in seen]
        expected = expected + scales * np.stack(filtered, axis=-1)
    expected = params["gain"] * expected + params["bias"]
    assert_equal_to_their_scale(found, expected[::stride, ::stride, ::stride])


def test_group_flow_is_a_mixture_of_flows():
    x = np.random.default_rng(0).normal(size=(6, 5, 7, 4)).astype(np.float32)
    rng, head = np.random.default_rng(1), GroupFlow(3)
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.asarray(x[None]))["params"]
    params = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    found = head.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x[None]))[0]
    groups = [correlated(x, params["groups"][..., 3 * g : 3 * g + 3]) for g in range(3)]
    assert_equal_to_their_scale(found, np.concatenate(groups, axis=-1) @ params["mix"] + params["bias"])


def test_the_fixed_operators_are_scipys():
    volume = np.random.default_rng(0).normal(size=(7, 6, 8))
    for axis in range(3):
        found = ndimage.correlate(volume, np.float64(OPERATORS[axis]), mode="constant")
        np.testing.assert_allclose(found, ndimage.sobel(volume, axis, mode="constant"), atol=1e-10)
    found = ndimage.correlate(volume, np.float64(OPERATORS[3]), mode="constant")
    np.testing.assert_allclose(found, ndimage.laplace(volume, mode="constant"), atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_fused_parameters_are_the_same_function(size):
    params = random_params(**SIZES[size])
    found = compiled(**SIZES[size], fused=True)(fuse(params), *images())
    assert_equal_to_their_scale(found, compiled(**SIZES[size])(params, *images()))
    assert jax.tree.all(jax.tree.map(np.array_equal, fuse(fuse(params)), fuse(params)))


def test_stages_are_composed_coarse_to_fine():
    fixed, moving = images()
    params = random_params(**TINY)["params"]
    once = compiled(**TINY | dict(stages=1))
    coarse = double(once({"params": {"unet0": params["unet0"]}}, halve(fixed), halve(moving)), SHAPE)
    residual = once({"params": {"unet0": params["unet1"]}}, fixed, warp(moving, coarse))
    found = compiled(**TINY)({"params": params}, fixed, moving)
    assert_equal_to_their_scale(found, compose(coarse, residual))


def test_a_shared_network_has_the_parameters_of_one():
    params = random_params(**TINY, shared=True)["params"]
    assert list(params) == ["unet0"]
    twice = {"params": {"unet0": params["unet0"], "unet1": params["unet0"]}}
    found = compiled(**TINY, shared=True)({"params": params}, *images())
    np.testing.assert_array_equal(found, compiled(**TINY)(twice, *images()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(97, 115, 83), (16, 16, 16), (1, 5, 2)])
def test_any_image_size(size, shape):
    def predict(fixed, moving):
        return build("lightcrcf", **SIZES[size]).init_with_output(jax.random.key(0), fixed, moving)[0].displacement

    image = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
    found = jax.eval_shape(predict, image, image)
    assert (found.shape, found.dtype) == ((2, *shape, 3), jnp.float32)


def test_starts_at_the_identity():
    model = build("lightcrcf", **TINY)
    start = jax.jit(lambda *pair: model.init_with_output(jax.random.key(0), *pair)[0].displacement)(*images())
    assert 0 < np.abs(start).max() < 1e-2


def test_gradient_is_finite_and_reaches_every_parameter():
    pair = images()

    def loss(params):
        return jnp.square(build("lightcrcf", **TINY).apply(params, *pair).displacement - 1).mean()

    slopes = jax.tree.leaves(jax.jit(jax.grad(loss))(random_params(**TINY)))
    assert all(jnp.isfinite(slope).all() and jnp.abs(slope).max() > 0 for slope in slopes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(stages=0), "model.stages is 0"),
        (dict(decoder=(8,)), "model.encoder has 3 levels and model.decoder 1: the decoder needs one fewer"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        shapes_of_params(**fields)
