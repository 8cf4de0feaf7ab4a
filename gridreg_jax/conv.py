"""The 3-D convolution of every model, native where the platform has a good one and rewritten on the CPU.

XLA's own 3-D convolution on the CPU is one to two orders of magnitude slower than the same arithmetic as convolutions
of slices in two dimensions, in the gradient above all. Sums over boxes, and what rests on them, are here too.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

# Channels that XLA's two-dimensional convolution takes at a time.
VECTOR = 8
# Products an output sums: up to here, a sum that is written out is faster than convolutions of slices.
WRITTEN_OUT = 128


def conv3d(
    x: Float[Array, "N X Y Z C"], kernel: Float[Array, "k k k C D"], *, stride: int = 1, in_loop: bool = False
) -> Float[Array, "N x y z D"]:
    """Cross-correlation with zero padding `k // 2` (odd k): output size `ceil(size / stride)` per axis.

    `stride` is in voxels; the output has the unit of x times that of the kernel. Source: Goodfellow et al., Deep
    Learning, 2016, section 9.1; the ways to compute it are this library's.

    Args:
      in_loop: for a convolution whose gradient a loop (`lax.scan` and the like) computes. On the CPU XLA runs the
        convolutions that yield the kernel's gradient ten to a hundred times slower there; products take their place.
    """
    size = kernel.shape[0]
    if size == 1:
        return x[:, ::stride, ::stride, ::stride] @ kernel[0, 0, 0]
    # With a stride, the gradient by slices is written for kernels of 3 voxels.
    sliced = stride == 1 or (stride, size) == (2, 3)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _slices(x, kernel, stride, in_loop) if sliced else _native(x, kernel, stride),
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _slices(x, kernel, stride, in_loop):
    """By slices, or written out where that is faster."""
    if kernel[..., 0].size > WRITTEN_OUT:
        return _by_slices(x, kernel, stride, kernel.shape[0] // 2)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    # Channel by channel: to interleave those that come as images of their own takes as long as the sum.
    padding = [(0, 0), *[(kernel.shape[0] // 2,) * 2] * 3]
    channels = [jnp.pad(x[..., channel].astype(dtype), padding) for channel in range(x.shape[-1])]
    # A call of its own: XLA would compute such a sum again for each of those who use it.
    with set_xla_metadata(inlineable="false"):
        return _written_out(channels, kernel.astype(dtype), stride=stride).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="stride")
def _written_out(channels, kernel, *, stride: int):
    """Sums of products, voxel of the kernel by voxel: XLA makes a single loop of them, over the features at once.

    A sum for every slice of the kernel: in a single one each product would wait for those before (a fifth slower).
    """
    size = kernel.shape[0]
    sums = [0] * size
    for place in itertools.product(range(size), repeat=3):
        spans = [slice(i, 1 - size + i + n, stride) for i, n in zip(place, channels[0].shape[1:], strict=True)]
        for padded, weights in zip(channels, kernel[place], strict=True):
            sums[place[0]] += padded[:, *spans, None] * weights
    return sum(sums)


def _by_slices(x, kernel, stride: int, padding: int):
    """Two-dimensional convolutions of all slices across axis 0, for each slice of the kernel; then their sums."""
    size, channels, features = kernel.shape[0], *kernel.shape[3:]
    if channels % VECTOR:
        # XLA gathers and multiplies what a kernel sees in two thirds of the time if the channels come in eights.
        spare = [(0, -channels % VECTOR)]
        x, kernel = jnp.pad(x, [(0, 0)] * 4 + spare), jnp.pad(kernel, [(0, 0)] * 3 + spare + [(0, 0)])
    count = -(-(x.shape[1] + 2 * padding - size + 1) // stride)
    # Slices of the kernel that see the same slices of x are one kernel, so that what they see is gathered once; but not
    # if all of them do, and have many features, since the sums then take longer than that.
    starts, step = (range(size), size) if stride == 1 and features > VECTOR else (range(stride), stride)
    total = 0
    for first in starts:
        slices = kernel[first::step]
        seen = _every(x, first - padding, stride, count + len(slices) - 1)
        given = jax.lax.conv_general_dilated(
            seen.reshape(-1, *x.shape[2:]),
            jnp.concatenate(list(slices), axis=-1),
            (stride,) * 2,
            [(padding,) * 2] * 2,
            dimension_numbers=("NYZC", "YZIO", "NYZC"),
        )
        given = given.reshape(*seen.shape[:2], *given.shape[1:])
        for place in range(len(slices)):
            total += given[:, place : place + count, ..., place * features : (place + 1) * features]
    return total


def _every(x, start: int, stride: int, count: int):
    """Slices `start`, `start + stride`, ... along axis 0 of a volume, `count` of them; zeros beyond the border."""
    before = min(count, max(0, -(start // stride)))
    there = x[:, start + before * stride :: stride][:, : count - before]
    return jnp.pad(there, [(0, 0), (before, count - before - there.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _slices_forward(x, kernel, stride, in_loop):
    return _slices(x, kernel, stride, in_loop), (x, kernel)


def _slices_backward(stride, in_loop, residuals, gradient):
    x, kernel = residuals
    if stride == 1:
        d_x = _slices(gradient, jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4), 1, in_loop)
    else:
        d_x = _gradient_of_strided(gradient, kernel, x.shape[1:4])
    of_kernel = _gradient_of_kernel_by_products if in_loop else _gradient_of_kernel
    return d_x, of_kernel(x, gradient, kernel.shape[0], stride)


def _gradient_of_kernel(x, gradient, size: int, stride: int):
    """Two-dimensional convolutions again: of what a slice of the kernel saw, by the gradient as a (dilated) kernel.

    A channel takes the part of a case and a slice that of a channel, so that the sum over the slices is in it.
    """
    padding, (count, *shape) = size // 2, gradient.shape[1:4]
    slopes = gradient.reshape(-1, *gradient.shape[2:])
    borders = [(padding, stride * (n - 1) + size - padding - m) for n, m in zip(shape, x.shape[2:4], strict=True)]

    def correlate(seen):
        return jax.lax.conv_general_dilated(
            seen, slopes, (1, 1), borders, rhs_dilation=(stride,) * 2, dimension_numbers=("CYZN", "IYZO", "YZNC")
        )

    seen = (_every(x, first - padding, stride, count) for first in range(size))
    return jnp.stack([correlate(slices.reshape(-1, *x.shape[2:])) for slices in seen])


def _gradient_of_kernel_by_products(x, gradient, size: int, stride: int):
    """A product for every voxel of the kernel, of two arrays of which one is moved: the narrower, if either may be."""
    if stride == 1 and x.shape[-1] > gradient.shape[-1]:
        return jnp.flip(_gradient_of_kernel_by_products(gradient, x, size, 1), (0, 1, 2)).swapaxes(3, 4)
    padded = jnp.pad(x, [(0, 0), *[(size // 2,) * 2] * 3, (0, 0)])
    products = []
    for place in itertools.product(range(size), repeat=3):
        spans = (slice(i, i + stride * (n - 1) + 1, stride) for i, n in zip(place, gradient.shape[1:4], strict=True))
        products.append(jnp.einsum("nxyzc,nxyzd->cd", padded[:, *spans], gradient))
    return jnp.stack(products).reshape(size, size, size, *products[0].shape)


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

    In the unit of the values. Source: box filters, McDonnell, Computer Graphics and Image Processing 1981.
    """
    for axis in (1, 2, 3):
        size, pad = [1] * 5, [(0, 0)] * 5
        size[axis], pad[axis] = window, padding
        values = jax.lax.reduce_window(values, 0.0, jax.lax.add, size, [1] * 5, pad)
    return values


def local_norm(x: Float[Array, "N X Y Z C"], window: int, *, epsilon: float = 0.05) -> Float[Array, "N X Y Z C"]:
    """Zero mean and about unit deviation in a box of `window`^3 voxels around every voxel.

    Faint structure inside an organ then weighs as much as its outline. `epsilon` is the deviation (intensities in
    [0, 1]) below which a region counts as flat, so that noise is not blown up. The result has no unit.

    Source: local contrast normalisation, Jarrett et al., ICCV 2009, with boxes for its Gaussian windows.
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
