"""From the control grid to a dense displacement: three small matrix products, one an axis.

Every method is a tensor product of one-dimensional basis functions (Yan et al., Medical Physics 2026, section 3.2),
so what tells the methods apart is one weight matrix an axis, `[size, grid_size]`. The matrices depend on shapes alone:
they are computed in numpy float64 and are constants under `jit`.

Positions along an axis run from 0 (centre of the first voxel) to 1 (centre of the last); values keep the unit of the
control grid (voxels for displacements).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from gridreg_jax.errors import InputError, check_known

# In control-point spacings. A cubic B-spline kernel has variance 1/3: with this width the Gaussian approximates it.
GAUSSIAN_SIGMA = 3**-0.5
# Numbers along the last axis of a control grid, all channels together, that are multiplied at once.
JOINED = 64


def hat_weights(size: int, places: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "P size"]:
    """Linear interpolation between values at 0, 1, ..., `size - 1`, at places on that scale; constant beyond them.

    The weights have no unit. Source: the hat function of Yan et al., Medical Physics 2026, section 3.2, item 1.
    """
    return np.maximum(0.0, 1.0 - np.abs(np.clip(places, 0, size - 1)[:, None] - np.arange(size)))


def trilinear_weights(grid_size: int, positions: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "P g"]:
    """Hat functions of control points at `linspace(0, 1, grid_size)`, without unit; `grid_size >= 2`.

    Source: Yan et al., Medical Physics 2026, section 3.2, item 1.
    """
    return hat_weights(grid_size, positions * (grid_size - 1))


def bspline_knots(grid_size: int) -> Float64[np.ndarray, " knots"]:
    """Clamped uniform knots of a cubic spline with `grid_size` coefficients: `grid_size - 3` cells of equal length.

    Positions in [0, 1]. Source: Yan et al., Medical Physics 2026, section 3.2, item 2 (the knot vector).
    """
    return np.concatenate([np.zeros(3), np.linspace(0.0, 1.0, grid_size - 2), np.ones(3)])


def bspline_weights(
    grid_size: int, positions: Float64[np.ndarray, " P"], *, derivative: int = 0
) -> Float64[np.ndarray, "P g"]:
    """Clamped cubic B-splines, or a derivative of them with respect to position; `grid_size >= 4`.

    The first and last coefficients are the values at positions 0 and 1; the weights at a position are non-negative,
    sum to 1, and at most four are not 0. The third derivative is piecewise constant: at a knot it is the one to the
    right (at position 1, to the left).

    Source: Yan et al., Medical Physics 2026, section 3.2, item 2 (Cox-de Boor recursion, knots clamped).

    Args:
      grid_size: coefficients along the axis.
      positions: in [0, 1].
      derivative: 0 to 3; per unit of position, so divide by the axis length once per order.
    """
    knots = bspline_knots(grid_size)
    # The last cell is closed on both sides.
    cell = np.clip(np.searchsorted(knots, positions, side="right") - 1, 3, grid_size - 1)
    weights = np.eye(len(knots) - 1)[cell]
    for degree in range(1, 4):
        width = knots[degree:] - knots[:-degree]
        inverse = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
        scaled = weights * inverse
        if degree > 3 - derivative:
            weights = degree * (scaled[:, :-1] - scaled[:, 1:])
        else:
            rising = (positions[:, None] - knots[: -degree - 1]) * scaled[:, :-1]
            weights = rising + (knots[degree + 1 :] - positions[:, None]) * scaled[:, 1:]
    return weights


def gaussian_weights(grid_size: int, positions: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "P g"]:
    """Gaussians of standard deviation `GAUSSIAN_SIGMA` about `linspace(0, 1, grid_size)`, normalised to sum to 1.

    Where the voxels refine the control points a whole number of times this is the transposed convolution of the
    control grid with a Gaussian kernel, divided by the transposed convolution of ones (a normalised convolution).
    Like the cubic B-spline it smooths rather than interpolates: a pattern that alternates from one control point to
    the next keeps 0.39 of its amplitude, one with a period of eight control points 0.91. Constants are reproduced
    exactly; linear fields to 0.006 spacings between the second and the last but one control point, but the border
    ones are pulled inwards by up to 0.19 spacings.

    Source: Yan et al., Medical Physics 2026, section 3.2, item 3.
    """
    scaled = positions[:, None] * (grid_size - 1)
    weights = np.exp(-0.5 * ((scaled - np.arange(grid_size)) / GAUSSIAN_SIGMA) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


INTERPOLATORS = {"trilinear": trilinear_weights, "bspline": bspline_weights, "gaussian": gaussian_weights}


def check_grid_size(grid_size: Sequence[int], method: str) -> None:
    """Raise `InputError` unless `method` is known and every axis has enough control points (bspline 4, others 2)."""
    check_known("interpolator", method, INTERPOLATORS)
    least = 4 if method == "bspline" else 2
    if min(grid_size) < least:
        sizes = "x".join(map(str, grid_size))
        raise InputError(f"control grid {sizes} is too small: {method} needs at least {least} control points an axis")


@functools.lru_cache
def control_positions(method: str, grid_size: int) -> Float64[np.ndarray, " g"]:
    """Where the control points of an axis sit, in [0, 1].

    `linspace(0, 1, grid_size)`, except for the clamped cubic spline: its Greville abscissae, the means of three
    consecutive knots, closer together towards both ends. The values of a linear field at these positions, taken as
    control values, reproduce it: exactly for trilinear and bspline, roughly for gaussian. Cached and read-only.

    Source: Yan et al., Medical Physics 2026, section 3.1 (a regular grid); de Boor, A Practical Guide to Splines, 1978
    (Greville abscissae).

    Raises:
      InputError: unknown method, or too few control points.
    """
    check_grid_size((grid_size,), method)
    if method == "bspline":
        positions = np.lib.stride_tricks.sliding_window_view(bspline_knots(grid_size)[1:-1], 3).mean(axis=1)
    else:
        positions = np.linspace(0.0, 1.0, grid_size)
    return _frozen(positions)


@functools.lru_cache
def axis_weights(method: str, grid_size: int, size: int) -> Float64[np.ndarray, "size g"]:
    """Weights of the control points of an axis at its `size` voxel centres, `linspace(0, 1, size)`; rows sum to 1.

    An axis of a single voxel has position 0. The array is cached and read-only; the weights have no unit.

    Source: Yan et al., Medical Physics 2026, section 3.2 (the basis functions along an axis).

    Raises:
      InputError: unknown method, or too few control points.
    """
    check_grid_size((grid_size,), method)
    return _frozen(INTERPOLATORS[method](grid_size, np.linspace(0.0, 1.0, size)))


def lattice_weights(grid_size: Sequence[int], shape: Sequence[int], method: str) -> list[np.ndarray]:
    """`axis_weights` of each axis of the lattice `shape`, for `contract`."""
    check_grid_size(grid_size, method)
    return [axis_weights(method, g, size) for g, size in zip(grid_size, shape, strict=True)]


def contract(
    control_grid: Float[Array, "N gx gy gz C"], matrices: Sequence[Float[Array | np.ndarray, "_ _"]]
) -> Float[Array, "N x y z C"]:
    """Apply one matrix an axis, `[x, gx]`, `[y, gy]` and `[z, gz]`, to axes 1, 2 and 3.

    With matrices of weights, which have no unit, the result keeps the unit of the control grid. Source: the tensor
    product of Yan et al., Medical Physics 2026, section 3.2.

    In full float32, where accelerators would otherwise round the operands: at TF32 a displacement of 20 voxels would
    be off by a hundredth of a voxel. From x to z: of the six orders the fastest or within noise of it, forwards and
    backwards (CPU, 128 to 224 voxels).
    """
    along_x, along_y, along_z = (jnp.asarray(matrix, dtype=control_grid.dtype) for matrix in matrices)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    result = product("bj,nijkc->nibkc", along_y, product("ai,nijkc->najkc", along_x, control_grid))
    channels = control_grid.shape[-1]
    if along_z.shape[1] * channels > JOINED:
        return product("ck,nabkd->nabcd", along_z, result)
    # The last and costliest product takes all channels at once, each times zeros for the others: more multiplications,
    # but nothing has to change places, which takes longer.
    joined = product("ck,de->kdce", along_z, jnp.eye(channels)).reshape(-1, len(along_z) * channels)
    result = product("nabi,io->nabo", result.reshape(*result.shape[:3], -1), joined)
    return result.reshape(*result.shape[:3], -1, channels)


def interpolate(
    control_grid: Float[Array, "N gx gy gz C"], shape: tuple[int, int, int], *, method: str = "trilinear"
) -> Float[Array, "N X Y Z C"]:
    """Dense field of a control grid: its values at the voxel centres of the lattice `shape`.

    Source: Yan et al., Medical Physics 2026, section 3.2.

    Args:
      control_grid: values at the control points, any unit; displacements in voxels.
      shape: (X, Y, Z); an axis may be shorter than the control grid, and may be 1.
      method: a name in `INTERPOLATORS`.

    Raises:
      InputError: unknown method, or too few control points along an axis.
    """
    return contract(control_grid, lattice_weights(control_grid.shape[1:4], shape, method))


def interpolate_at_controls(
    control_grid: Float[Array, "N gx gy gz C"], *, method: str = "trilinear"
) -> Float[Array, "N gx gy gz C"]:
    """Values of the interpolated field, in its unit, where the control points sit (`control_positions`).

    The control grid itself for trilinear; a smoothed one for bspline and gaussian, which do not pass through their
    control values. For similarities at grid level (Yan et al., Medical Physics 2026, section 3.3).

    Raises:
      InputError: unknown method, or too few control points along an axis.
    """
    check_grid_size(control_grid.shape[1:4], method)
    if method == "trilinear":
        return control_grid
    return contract(
        control_grid, [INTERPOLATORS[method](g, control_positions(method, g)) for g in control_grid.shape[1:4]]
    )


def interpolate_variance(
    variance: Float[Array, "N gx gy gz C"], shape: tuple[int, int, int], *, method: str = "trilinear"
) -> Float[Array, "N X Y Z C"]:
    """Variance of the dense field when the control values are independent with the given variances.

    Exact, and separable too: `Var u(x) = sum_k w_k(x)^2 variance_k`, with the weights of `interpolate`. Between control
    points it is smaller than at them, because independent errors average out.

    Source: the variance of a weighted sum of independent values, for the variances that Yan et al., Medical Physics
    2026, section 3.2, predict at the control points.

    Args:
      variance: squared unit of the control grid (voxels squared).
      shape: (X, Y, Z).
      method: a name in `INTERPOLATORS`.

    Raises:
      InputError: unknown method, or too few control points along an axis.
    """
    return contract(variance, [np.square(matrix) for matrix in lattice_weights(variance.shape[1:4], shape, method)])


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
