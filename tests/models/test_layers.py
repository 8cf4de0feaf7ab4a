"""Local normalisation of intensities."""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from gridreg_jax.models.layers import local_norm


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
