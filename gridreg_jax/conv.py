"""The 3-D convolution of every model, native where the platform has a good one and rewritten on CPU; box sums.

XLA's own 3-D convolution on the CPU is one to two orders of magnitude slower than the same arithmetic written as
two-dimensional convolutions or a matrix product, in the gradient above all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def conv3d(
    x: Float[Array, "N X Y Z C"], kernel: Float[Array, "k k k C D"], *, stride: int = 1
) -> Float[Array, "N x y z D"]:
    """Cross-correlation with zero padding `k // 2` (odd k): output size `ceil(size / stride)` per axis."""
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=_slices if stride == 1 else lambda x, kernel: _patches(x, kernel, stride),
        default=lambda x, kernel: _native(x, kernel, stride),
    )


def _native(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,) * 3,
        padding=[(kernel.shape[0] // 2,) * 2] * 3,
        dimension_numbers=("NXYZC", "XYZIO", "NXYZC"),
    )


def _patches(x, kernel, stride):
    """One matrix product: all that an output sees, side by side, times the kernel. For strides, which leave few."""
    size, channels, features = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    pad = size // 2
    out = [-(-n // stride) for n in x.shape[1:4]]
    x = jnp.pad(x, [(0, 0)] + [(pad, pad)] * 3 + [(0, 0)])
    taps = [
        jax.lax.slice(
            x,
            (0, i, j, k, 0),
            (x.shape[0], *(o + (n - 1) * stride + 1 for o, n in zip((i, j, k), out, strict=True)), channels),
            (1, stride, stride, stride, 1),
        )
        for i in range(size)
        for j in range(size)
        for k in range(size)
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, features)


@jax.custom_vjp
def _slices(x, kernel):
    """With stride 1: for each slice across axis 0, a two-dimensional convolution of the slices around it, side by side.

    A slice stays in the cache, and memory does not grow with the kernel.
    """
    size, channels, features = kernel.shape[0], x.shape[-1], kernel.shape[-1]
    flat = jnp.moveaxis(kernel, 0, 2).reshape(size, size, size * channels, features)
    padding = [(size // 2, size // 2)] * 2
    near, numbers = _near_slices(x, size), ("NYZC", "YZIO", "NYZC")

    def one(index):
        return jax.lax.conv_general_dilated(near(index), flat, (1, 1), padding, dimension_numbers=numbers)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(x.shape[1])), 0, 1)


def _slices_forward(x, kernel):
    return _slices(x, kernel), (x, kernel)


def _slices_backward(residuals, gradient):
    x, kernel = residuals
    size, (_, depth, *shape, _) = kernel.shape[0], x.shape
    near = _near_slices(x, size)

    def add(total, index):
        around = jnp.pad(near(index), [(0, 0), *[(size // 2, size // 2)] * 2, (0, 0)])
        slopes = jax.lax.dynamic_index_in_dim(gradient, index, axis=1, keepdims=False)
        taps = [around[:, j : j + shape[0], k : k + shape[1]] for j in range(size) for k in range(size)]
        return total + jnp.stack([jnp.einsum("nyzc,nyzd->cd", tap, slopes) for tap in taps]), None

    start = jnp.zeros((size**2, size * x.shape[-1], gradient.shape[-1]), gradient.dtype)
    total, _ = jax.lax.scan(add, start, jnp.arange(depth))
    d_kernel = jnp.moveaxis(total.reshape(size, size, size, *kernel.shape[3:]), 2, 0)
    return _slices(gradient, jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)), d_kernel


_slices.defvjp(_slices_forward, _slices_backward)


def _near_slices(x: Float[Array, "N X Y Z C"], size: int) -> Callable:
    """A function from an index along axis 0 to the `size` slices around it, side by side `[N, Y, Z, size C]`."""
    padded = jnp.pad(x, [(0, 0), (size // 2, size // 2)] + [(0, 0)] * 3)

    def near(index):
        slices = jax.lax.dynamic_slice_in_dim(padded, index, size, axis=1)
        return jnp.moveaxis(slices, 1, 3).reshape(*slices.shape[:1], *slices.shape[2:4], -1)

    return near


def box_sum(values: Float[Array, "N X Y Z C"], window: int, padding: tuple[int, int]) -> Float[Array, "N x y z C"]:
    """Sums over cubes of `window` voxels, one axis after the other; zeros beyond the border.

    Of the ways tried on CPU (shifted additions, cumulative sums, banded matrices, one three-dimensional window) this
    is the fastest, forward and gradient, and unlike a difference of cumulative sums it cancels nothing.
    """
    for axis in (1, 2, 3):
        size, pad = [1] * 5, [(0, 0)] * 5
        size[axis], pad[axis] = window, padding
        values = jax.lax.reduce_window(values, 0.0, jax.lax.add, size, [1] * 5, pad)
    return values


class Conv3D(nn.Module):
    """Convolution: `features` outputs, odd cubic kernel, zero padding; He initialisation, which suits a rectifier."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z D"]:
        shape = (self.kernel_size,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = conv3d(x, kernel.astype(x.dtype), stride=self.stride)
        if not self.use_bias:
            return x
        return x + self.param("bias", self.bias_init, (self.features,)).astype(x.dtype)
