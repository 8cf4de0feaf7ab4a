"""The 3-D convolution: the formulations against XLA's own and against SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.ndimage import correlate

from gridreg_jax import conv

FORMULATIONS = {
    "slices": jax.jit(functools.partial(conv._slices, in_loop=False), static_argnums=2),
    "slices in a loop": jax.jit(functools.partial(conv._slices, in_loop=True), static_argnums=2),
    "native": jax.jit(conv._native, static_argnums=2),
}
each_formulation = pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)
each_stride = pytest.mark.parametrize("stride", [1, 2])
# On the CPU: a sum that is written out; few features; channels that are filled up; neither.
each_width = pytest.mark.parametrize(("channels", "features"), [(3, 4), (8, 4), (5, 9), (8, 9)])


def random_input(shape=(7, 6, 9), channels=3):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape, channels)), jnp.float32)


def random_kernel(size=3, channels=3, features=4):
    return jnp.asarray(np.random.default_rng(1).normal(size=(size,) * 3 + (channels, features)), jnp.float32)


def reference(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 3,
        [(kernel.shape[0] // 2,) * 2] * 3,
        dimension_numbers=("NXYZC", "XYZIO", "NXYZC"),
        precision=jax.lax.Precision.HIGHEST,
    )


@each_formulation
@each_stride
@pytest.mark.parametrize("size", [1, 3, 5])
def test_one_channel_is_scipys_correlation(formulation, stride, size):
    x, kernel = random_input(channels=1), random_kernel(size, channels=1, features=1)
    x64, kernel64 = np.float64(x), np.float64(kernel)
    expected = np.stack([correlate(one[..., 0], kernel64[..., 0, 0], mode="constant") for one in x64])
    found = formulation(x, kernel, stride)[..., 0]
    np.testing.assert_allclose(found, expected[:, ::stride, ::stride, ::stride], atol=2e-5)


@each_formulation
@each_stride
@each_width
@pytest.mark.parametrize("shape", [(8, 6, 4), (7, 5, 9), (1, 2, 3)])
def test_values_and_output_size_for_even_odd_and_tiny_inputs(formulation, stride, channels, features, shape):
    x, kernel = random_input(shape, channels), random_kernel(channels=channels, features=features)
    found = formulation(x, kernel, stride)
    assert found.shape == (2, *(-(-n // stride) for n in shape), features)
    np.testing.assert_allclose(found, reference(x, kernel, stride), rtol=1e-5, atol=1e-5)


@each_formulation
@each_stride
@pytest.mark.parametrize(("size", "thin"), [(5, 1), (7, 2)])
def test_a_kernel_that_reaches_beyond_the_lattice(formulation, stride, size, thin):
    x, kernel = random_input((thin, 5, 3), 9), random_kernel(size, 9, 9)
    np.testing.assert_allclose(formulation(x, kernel, stride), reference(x, kernel, stride), rtol=1e-4, atol=1e-4)


@each_formulation
@each_stride
@each_width
@pytest.mark.parametrize("argument", [0, 1], ids=["input", "kernel"])
def test_gradients(formulation, stride, channels, features, argument):
    x, kernel = random_input(channels=channels), random_kernel(channels=channels, features=features)
    weights = np.random.default_rng(2).normal(size=reference(x, kernel, stride).shape).astype(np.float32)

    def gradient(function):
        return jax.grad(lambda *both: jnp.sum(function(*both, stride) * weights), argument)(x, kernel)

    np.testing.assert_allclose(gradient(formulation), gradient(reference), rtol=1e-4, atol=1e-4)


@each_stride
def test_conv3d_is_one_of_them_under_jit_and_gradient(stride):
    x, kernel = random_input(), random_kernel()
    loss = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(conv.conv3d(x, kernel, stride=stride)))))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(reference(x, kernel, stride))))(x)
    np.testing.assert_allclose(loss(x)[0], value, rtol=1e-4)
    np.testing.assert_allclose(loss(x)[1], gradient, rtol=1e-4, atol=1e-4)


def test_local_norm_is_the_deviation_from_the_box_mean_over_the_box_deviation():
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, 9, 8, 7, 2)).astype(np.float32)
    found = np.asarray(conv.local_norm(jnp.asarray(image), 5))
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
    assert np.abs(conv.local_norm(jnp.full((1, 6, 6, 6, 1), 0.7), 3)).max() < 1e-5
