"""Local normalisation of intensities, and where the features of an encoder lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax.models.layers import Encoder, FeatureMap, feature_coordinates, instance_norm, local_norm


def test_local_norm_is_the_deviation_from_the_box_mean_over_the_box_deviation():
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, 9, 8, 7, 2)).astype(np.float32)
    found = np.asarray(local_norm(jnp.asarray(image), 5))
    # The box is cut at the borders: sums over the voxels that exist, by their number.
    for channel in range(2):
        values = image[0, ..., channel].astype(float)

        def box(array):
            return ndimage.uniform_filter(array, 5, mode="constant") / ndimage.uniform_filter(
                np.ones(array.shape), 5, mode="constant"
            )

        mean = box(values)
        variance = box(values**2) - mean**2
        np.testing.assert_allclose(found[0, ..., channel], (values - mean) / np.sqrt(variance + 0.05**2), atol=1e-4)


def test_local_norm_leaves_a_flat_image_at_zero():
    assert np.abs(local_norm(jnp.full((1, 6, 6, 6, 1), 0.7), 3)).max() < 1e-5


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
    for features, stride, origin in encoder.apply({"params": params}, blob):
        mass = np.maximum(np.asarray(features[0, ..., 0]), 0)
        index = np.stack(np.meshgrid(*map(np.arange, mass.shape), indexing="ij"), -1)
        center = (mass[..., None] * index).sum((0, 1, 2)) / mass.sum()
        np.testing.assert_allclose(origin + stride * center, place, atol=0.3 * stride)


def test_coordinates_among_features_invert_where_they_lie():
    level = FeatureMap(jnp.zeros((1, 4, 4, 4, 1)), stride=4, origin=1.5)
    (found, *_) = feature_coordinates(level, [np.array([1.5, 5.5, 13.5]) / 15] * 3, (16, 16, 16))
    np.testing.assert_allclose(found, [0, 1, 3], atol=1e-6)


def test_instance_norm_is_that_of_numpy():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 6, 7, 3)).astype(np.float32)
    expected = (x - x.mean((1, 2, 3), keepdims=True)) / np.sqrt(x.var((1, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(instance_norm(jnp.asarray(x)), expected, atol=1e-4)
