"""The 3-D convolution of every model, native where the platform has a good one and rewritten on the CPU.

XLA's own 3-D convolution on the CPU is one to two orders of magnitude slower than the same arithmetic as convolutions
of slices in two dimensions, in the gradient above all. Sums over boxes, and what rests on them, are here too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

VECTOR = 8


def conv3d(
    x: Float[Array, "N X Y Z C"], kernel: Float[Array, "k k k C D"], *, stride: int = 1
) -> Float[Array, "N x y z D"]:
    """Cross-correlation with zero padding `k // 2` (odd k): output size `ceil(size / stride)` per axis."""
    size = kernel.shape[0]
    if size == 1:
        return x[:, ::stride, ::stride, ::stride] @ kernel[0, 0, 0]
    # With a stride, the gradient by slices is written for kernels of 3 voxels.
    sliced = stride == 1 or (stride, size) == (2, 3)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: (_slices if sliced else _native)(x, kernel, stride),
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _slices(x, kernel, stride):
    """For each slice across axis 0, two-dimensional convolutions of the slices around it.

    What one slice needs stays in the cache, and memory does not grow with the kernel.
    """
    return _by_slices(x, kernel, stride, kernel.shape[0] // 2)


def _by_slices(x, kernel, stride: int, padding: int):
    size, channels = kernel.shape[0], x.shape[-1]

    def convolve(slices, kernel):
        return jax.lax.conv_general_dilated(
            slices, kernel, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=("NYZC", "YZIO", "NYZC")
        )

    # XLA takes two thirds of the time to gather and multiply what a kernel sees if the channels come in eights.
    near, count = _near_slices(x, size, stride, padding)
    if channels % VECTOR == 0:

        def one(index):
            parts = jnp.split(near(index), size, axis=1)
            return sum(convolve(part[:, 0], kernel[i]) for i, part in enumerate(parts))
    else:
        spare = -size * channels % VECTOR
        flat = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
        flat = jnp.pad(flat, [(0, 0), (0, 0), (0, spare), (0, 0)])

        def one(index):
            return convolve(jnp.pad(_side_by_side(near(index)), [(0, 0)] * 3 + [(0, spare)]), flat)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(count)), 0, 1)


def _near_slices(x, size: int, stride: int, padding: int):
    """From an index along axis 0 to the `size` slices that it sees `[N, size, Y, Z, C]`; and how many there are."""
    padded = jnp.pad(x, [(0, 0), (padding, padding)] + [(0, 0)] * 3)

    def near(index):
        return jax.lax.dynamic_slice_in_dim(padded, stride * index, size, axis=1)

    return near, (padded.shape[1] - size) // stride + 1


def _side_by_side(slices):
    """`[N, k, Y, Z, C]` to `[N, Y, Z, k C]`."""
    return jnp.moveaxis(slices, 1, 3).reshape(len(slices), *slices.shape[2:4], -1)


def _slices_forward(x, kernel, stride):
    return _slices(x, kernel, stride), (x, kernel)


def _slices_backward(stride, residuals, gradient):
    x, kernel = residuals
    if stride == 1:
        d_x = _slices(gradient, jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4), 1)
    else:
        d_x = _gradient_of_strided(gradient, kernel, x.shape[1:4])
    return d_x, _gradient_of_kernel(x, gradient, kernel.shape[0], stride)


def _gradient_of_kernel(x, gradient, size: int, stride: int):
    """One product a slice: what its outputs saw, all of it side by side, times their gradient."""
    padding = size // 2
    near, count = _near_slices(x, size, stride, padding)
    shape = gradient.shape[2:4]

    def add(total, index):
        around = jnp.pad(_side_by_side(near(index)), [(0, 0), *[(padding, padding)] * 2, (0, 0)])
        slopes = jax.lax.dynamic_index_in_dim(gradient, index, axis=1, keepdims=False)
        seen = [
            around[:, j : j + stride * (shape[0] - 1) + 1 : stride, k : k + stride * (shape[1] - 1) + 1 : stride]
            for j in range(size)
            for k in range(size)
        ]
        # In this order: of the two, the product transposes the first, and that is the smaller.
        return total + jnp.einsum("nyzd,nyzc->dc", slopes, jnp.concatenate(seen, axis=-1)), None

    channels, features = x.shape[-1], gradient.shape[-1]
    total, _ = jax.lax.scan(add, jnp.zeros((features, size**3 * channels), gradient.dtype), jnp.arange(count))
    return jnp.moveaxis(total.T.reshape(size, size, size, channels, features), 2, 0)


def _gradient_of_strided(gradient, kernel, shape):
    """Gradient for the input of a convolution of stride 2 with kernels of 3 voxels.

    On each axis, an even voxel (of the padded input) was seen by two outputs, through the kernel's last and first
    voxel, an odd one by a single output, through the middle. So the eight kinds of voxels are eight convolutions of
    the gradient with kernels of 2 voxels, which are one with eight times the features.
    """
    channels, features = kernel.shape[3:]
    for axis in range(3):
        first, middle, last = jnp.split(kernel, 3, axis=axis)
        even, odd = jnp.concatenate([last, first], axis), jnp.concatenate([jnp.zeros_like(middle), middle], axis)
        kernel = jnp.stack([even, odd], axis=-1)
    kernel = jnp.moveaxis(kernel, 3, -1).reshape(2, 2, 2, features, 8 * channels)
    found = _by_slices(gradient, kernel, 1, 1)
    cells = found.shape[1:4]
    found = found.reshape(len(gradient), *cells, 2, 2, 2, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    found = found.reshape(len(gradient), *(2 * n for n in cells), channels)
    return found[:, 1 : 1 + shape[0], 1 : 1 + shape[1], 1 : 1 + shape[2]]


_slices.defvjp(_slices_forward, _slices_backward)


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
