"""The 3-D convolution of every model, native where the platform has a good one and matrix products on CPU.

And sums over boxes, with what rests on them.

XLA's own 3-D convolution on the CPU is one to two orders of magnitude slower than the same arithmetic written as
strided slices and a matrix product, in the gradient above all.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float


def conv3d(
    x: Float[Array, "N X Y Z C"], kernel: Float[Array, "k k k C D"], *, stride: int = 1
) -> Float[Array, "N x y z D"]:
    """Cross-correlation with zero padding `k // 2` (odd k): output size `ceil(size / stride)` per axis."""
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _patches(x, kernel, stride),
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


def local_norm(x: Float[Array, "N X Y Z C"], window: int, *, epsilon: float = 0.05) -> Float[Array, "N X Y Z C"]:
    """Zero mean and about unit deviation in a box of `window`^3 voxels around every voxel.

    Faint structure inside an organ then weighs as much as its outline. `epsilon` is the deviation (intensities in
    [0, 1]) below which a region counts as flat, so that noise is not blown up.
    """

    def box_mean(values):
        values = box_sum(values, window, (window // 2, window // 2))
        for axis in (1, 2, 3):
            size = values.shape[axis]
            place = np.arange(size)
            # Cut at the borders: how many voxels of the box exist.
            count = np.minimum(place, window // 2) + np.minimum(size - 1 - place, window // 2) + 1
            values = values / count.reshape([size if a == axis else 1 for a in range(5)]).astype(np.float32)
        return values

    mean = box_mean(x)
    variance = jnp.maximum(box_mean(x * x) - mean**2, 0)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon**2)


class Conv3D(nn.Module):
    """Convolution with bias: `features` outputs, odd cubic kernel, zero padding."""

    features: int
    kernel_size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "N X Y Z C"]) -> Float[Array, "N x y z D"]:
        shape = (self.kernel_size,) * 3 + (x.shape[-1], self.features)
        # He initialisation: every convolution here feeds a rectifier.
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return conv3d(x, kernel.astype(x.dtype), stride=self.stride) + bias.astype(x.dtype)
