"""The layers' parameters, and where the features of an encoder lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax.conv import conv3d
from gridreg_jax.models.layers import Conv3D, Encoder, FeatureMap, feature_coordinates, instance_norm


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_convolution_starts_without_bias_and_adds_the_one_it_learns_if_it_has_one(use_bias):
    layer = Conv3D(features=4, stride=2, use_bias=use_bias)
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 9, 3))
    params = layer.init(jax.random.key(1), x)["params"]
    plain = conv3d(x, params["kernel"], stride=2)
    assert params["kernel"].shape == (3, 3, 3, 3, 4)
    np.testing.assert_allclose(layer.apply({"params": params}, x), plain, atol=1e-6)
    assert set(params) - {"kernel"} == ({"bias"} if use_bias else set())
    if use_bias:
        shifted = layer.apply({"params": params | {"bias": jnp.arange(4.0)}}, x)
        np.testing.assert_allclose(shifted, plain + jnp.arange(4.0), atol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_feature_sits_where_its_level_says(pooled):
    """The centre of what the features see of a blob lies on the blob."""
    shape, place = (32, 32, 32), np.array([12.0, 17.0, 20.0])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    blob = jnp.asarray(np.exp(-((grid - place) ** 2).sum(-1) / 18)[None, ..., None], jnp.float32)
    encoder = Encoder(levels=3, width=1, downsampled=3, pooled=pooled)
    params = encoder.init(jax.random.key(0), blob)["params"]
    # Kernels that average, so that no level moves the blob.
    params = {name: {"kernel": jnp.ones_like(level["kernel"]), "bias": level["bias"]} for name, level in params.items()}
    for level in encoder.apply({"params": params}, blob):
        features, stride, origin = level.features, level.stride, level.origin
        mass = np.maximum(np.asarray(features[0, ..., 0]), 0)
        index = np.stack(np.meshgrid(*map(np.arange, mass.shape), indexing="ij"), -1)
        center = (mass[..., None] * index).sum((0, 1, 2)) / mass.sum()
        np.testing.assert_allclose(origin + stride * center, place, atol=0.3 * stride)


def test_coordinates_among_features_invert_where_they_lie():
    level = FeatureMap(jnp.zeros((1, 4, 4, 4, 1)), stride=4, origin=1.5)
    (found, *_) = feature_coordinates(level, [np.array([1.5, 5.5, 13.5]) / 15] * 3, (16, 16, 16))
    np.testing.assert_allclose(found, [0, 1, 3], atol=1e-6)


def test_features_may_lie_otherwise_along_each_axis():
    level = FeatureMap(jnp.zeros((1, 4, 4, 8, 1)), stride=(4, 4, 2), origin=(1.5, 0, 0.5))
    found = feature_coordinates(level, [np.array([1.5, 5.5, 13.5]) / 15] * 3, (16, 16, 16))
    np.testing.assert_allclose(found, [[0, 1, 3], [0.375, 1.375, 3.375], [0.5, 2.5, 6.5]], atol=1e-6)


def test_instance_norm_is_that_of_numpy():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 6, 7, 3)).astype(np.float32)
    expected = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(instance_norm(jnp.asarray(x)), expected, atol=1e-4)
