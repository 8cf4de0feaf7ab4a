"""The 3-D convolution: both formulations against XLA's own and against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate

from gridreg_jax import conv


def slices(x, kernel, stride):
    """It has stride 1; what a stride leaves out is cut here."""
    return conv._slices(x, kernel)[:, ::stride, ::stride, ::stride]


FORMULATIONS = {
    name: jax.jit(function, static_argnums=2)
    for name, function in (("patches", conv._patches), ("slices", slices), ("native", conv._native))
}
each_formulation = pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)
each_stride = pytest.mark.parametrize("stride", [1, 2])


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
@pytest.mark.parametrize("shape", [(8, 6, 4), (7, 5, 9), (1, 2, 3)])
def test_values_and_output_size_for_even_odd_and_tiny_inputs(formulation, stride, shape):
    x, kernel = random_input(shape), random_kernel()
    found = formulation(x, kernel, stride)
    assert found.shape == (2, *(-(-n // stride) for n in shape), 4)
    np.testing.assert_allclose(found, reference(x, kernel, stride), rtol=2e-6, atol=1e-5)


@each_formulation
@each_stride
@pytest.mark.parametrize("argument", [0, 1], ids=["input", "kernel"])
def test_gradients(formulation, stride, argument):
    x, kernel = random_input(), random_kernel()
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


def test_a_layer_without_bias_has_only_its_kernel():
    layer = conv.Conv3D(features=4, use_bias=False)
    assert layer.init(jax.random.key(0), random_input())["params"].keys() == {"kernel"}


def test_layer_starts_without_bias_and_adds_the_one_it_learns():
    layer, x = conv.Conv3D(features=4, stride=2), random_input()
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["kernel"].shape == (3, 3, 3, 3, 4)
    np.testing.assert_array_equal(params["bias"], np.zeros(4))
    shifted = layer.apply({"params": {**params, "bias": jnp.arange(4.0)}}, x)
    expected = reference(x, params["kernel"], 2) + np.arange(4.0)
    np.testing.assert_allclose(shifted, expected, atol=1e-5)
