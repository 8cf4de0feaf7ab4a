"""Proof that the continuous map `x -> x + u(x)` of a control grid is invertible, or the cells where it is not proven.

Determinants at voxels say nothing about what lies between them. Here u is a polynomial on each knot cell, and three
tests hold at every point of the domain, the box between the centres of the corner voxels. Each yields a positive lower
bound of the Jacobian determinant; lengths are counted in cells, component c in cells of axis c.

Size. Written in uniform cubic B-splines (`uniform_weights`), every component of every coefficient is below `1 / K`,
0.4033 of a cell (Choi and Lee, Graphical Models 62, 2000). K is the largest sum of `|dB/dv|` over the basis functions B
for directions v in the cube of half side 1, so u is a contraction in the maximum norm: the map is one-to-one on the
box, and its determinant is at least the cube of 1 minus the contraction's factor.

Dominance. At every point each diagonal entry of the Jacobian matrix exceeds the sum of the absolute values of its row's
other entries; u need not be a contraction, but every contraction in the maximum norm passes. If two points had one
image, then in the row of the component in which they differ most, the mean of the matrix along the segment between them
could not be dominant: the map is one-to-one on the box. The determinant is at least the product of the excesses
(Ostrowski, Comment. Math. Helv. 10, 1937).

Bernstein. On a cell the determinant is a polynomial of degree 8 an axis for the cubic spline, 2 for the trilinear grid,
and lies above its smallest Bernstein coefficient (Farouki, Computer Aided Geometric Design 29, 2012). Cells whose bound
is not positive are halved along each axis a few times. This is the sharpest of the three, but proves only that the map
is locally one-to-one (inverse function theorem; where trilinear cells meet, because no more than four share an edge:
Kuntz and Scholtes, J. Math. Anal. Appl. 188, 1994). It is one-to-one on the whole box if it is also one-to-one on the
box's surface (Meisters and Olech, Duke Math. J. 30, 1963), which is not tested.

For the cubic spline there is evidence, but no proof, that coefficients shorter than 2/3 of a cell (Euclidean length)
are enough too: in numerical searches the largest sum of `|dB/dv|` over unit vectors v was 3/2. It is reported and
proves nothing by itself.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Float64, Int

from gridreg_jax.errors import InputError, check_known
from gridreg_jax.transforms.interpolation import bspline_weights, check_grid_size, control_positions

# Choi and Lee's constant in three dimensions, 2.479472335, rounded up.
CHOI_LEE = 2.4795
DEGREES = {"bspline": 3, "trilinear": 1}
SUBDIVISIONS = 3
# Cells at a time: few enough that 729 coefficients of nine derivatives stay in the cache.
CHUNK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` has proven about a map; `str` gives it as one line.

    Attributes:
      invertible: the map is locally one-to-one at every point of its domain: `lower_bound` is positive.
      one_to_one: it is one-to-one on the domain as a whole.
      lower_bound: no Jacobian determinant is below this (no unit).
      tests: those passed everywhere, of "size", "dominance", "Bernstein" (not tried in cells where another one proves
        more than `lower_bound`) and, no proof, "Euclidean size".
      cells: (i, j, k) of the knot cells where nothing is proven, the lowest bound first.
      cell_counts: cells an axis.
      folds: a point with a determinant that is not positive was found: the map is not invertible.
    """

    invertible: bool
    one_to_one: bool
    lower_bound: float
    tests: tuple[str, ...]
    cells: Int[np.ndarray, "K 3"]
    cell_counts: tuple[int, int, int]
    folds: bool

    def __str__(self) -> str:
        # Rounded down, so that what is printed is proven too.
        small = 0 < self.lower_bound < 1e-3
        scale = 10.0 ** (2 - math.floor(math.log10(self.lower_bound))) if small else 1e3
        bound = math.floor(scale * self.lower_bound) / scale
        if self.invertible:
            return (
                f"{'' if self.one_to_one else 'locally '}invertible everywhere: Jacobian determinant at least {bound:g}"
            )
        where = f"{len(self.cells)} of {math.prod(self.cell_counts)} cells, e.g. cell {tuple(self.cells[0].tolist())}"
        return f"{'folds; ' if self.folds else ''}not proven in {where}: determinant may reach {bound:g}"


def certify(
    control_grid: Float[np.ndarray, "gx gy gz 3"] | Float[Array, "gx gy gz 3"],
    shape: tuple[int, int, int],
    *,
    method: str = "bspline",
) -> Certificate:
    """Lower bound of the Jacobian determinant of `x -> x + u(x)` over the continuous domain, and what follows from it.

    The module's text says what is proven, and by whom. Bounds are in float64, less a margin for its rounding: 6e-7 for
    the cubic spline and 3e-12 for the trilinear grid where u is small, growing with the cube of its derivatives. An
    affine map A applied after this one changes nothing but the determinant, by the factor det A.

    Source: Choi and Lee, Graphical Models 2000; Ostrowski, Comment. Math. Helv. 1937; Farouki, Computer Aided Geometric
    Design 2012.

    Args:
      control_grid: displacements in voxels.
      shape: (X, Y, Z), the lattice that the control grid spans.
      method: "bspline" or "trilinear".

    Raises:
      InputError: another method, too few control points, an axis of a single voxel, another shape of the control grid,
        or values that are not finite.
    """
    check_known("certify's method", method, DEGREES)
    if control_grid.ndim != 4 or control_grid.shape[3] != 3:
        raise InputError(f"certify needs one control grid of shape (gx, gy, gz, 3), not {control_grid.shape}")
    check_grid_size(control_grid.shape[:3], method)
    if min(shape) < 2:
        raise InputError(f"derivatives need at least 2 voxels an axis, not {shape}")
    control_grid = np.asarray(control_grid, np.float64)
    if not np.isfinite(control_grid).all():
        raise InputError("certify: the control grid has values that are not finite")
    degree = DEGREES[method]
    cell_counts = tuple(g - degree for g in control_grid.shape[:3])
    control_grid = control_grid * (np.array(cell_counts) / (np.array(shape) - 1))  # in cells

    size, euclidean = _size(control_grid) if method == "bspline" else (-np.inf, False)
    bounds = np.empty((cell_counts[0], math.prod(cell_counts[1:])))
    dominance, bernstein, lowest, folds = np.inf, np.inf, np.inf, False
    workspace = np.empty((3, 3, *[3 * degree] * 3, CHUNK))
    for layer, of_layer in enumerate(bounds):
        slopes, margin = _slopes(control_grid, layer, degree)
        dominant = _dominance(slopes, margin)
        dominance = min(dominance, dominant.min())
        of_layer[:] = np.maximum(dominant, size)
        # The costly test begins where the others prove least, and ends where they prove more than what holds so far.
        order = np.argsort(of_layer, kind="stable")
        for cells in np.split(order, range(CHUNK, len(order), CHUNK)):
            if of_layer[cells[0]] >= lowest:
                break
            of_cells = [part.take(cells, axis=-1) for part in slopes]
            found, surely = _bernstein_bounds(of_cells, margin[cells], degree, workspace[..., : len(cells)])
            of_layer[cells] = np.maximum(of_layer[cells], found)
            lowest, bernstein = min(lowest, of_layer[cells].min()), min(bernstein, found.min())
            folds |= bool(surely.any())
    bounds = bounds.ravel()
    failed = np.flatnonzero(bounds <= 0)
    failed = failed[np.argsort(bounds[failed], kind="stable")]
    passed = {
        "size": size > 0,
        "dominance": dominance > 0,
        "Bernstein": bernstein > 0,
        "Euclidean size": euclidean,
    }
    return Certificate(
        invertible=len(failed) == 0,
        one_to_one=bool(passed["size"] or passed["dominance"]),
        lower_bound=float(bounds.min()),
        tests=tuple(name for name, holds in passed.items() if holds),
        cells=np.stack(np.unravel_index(failed, cell_counts), axis=1),
        cell_counts=cell_counts,
        folds=folds,
    )


@functools.lru_cache
def uniform_weights(grid_size: int) -> Float64[np.ndarray, "g g"]:
    """Matrix from the clamped cubic spline's coefficients along an axis to those of uniform cubic B-splines.

    Both describe the same spline on positions 0 to 1. Uniform B-spline i is centred at cell boundary i - 1, so that the
    first and the last one are centred a cell outside. Exact: the knots inside are the same, hence so are the splines.
    The entries have no unit.

    Source: the uniform cubic B-spline, Unser, IEEE Signal Processing Magazine 1999; the clamped ones, de Boor, A
    Practical Guide to Splines, 2001.

    Raises:
      InputError: fewer than 4 coefficients.
    """
    positions = control_positions("bspline", grid_size)
    distance = np.abs(positions[:, None] * (grid_size - 3) - (np.arange(grid_size) - 1))
    uniform = np.maximum(0, 2 - distance) ** 3 / 6 - np.maximum(0, 1 - distance) ** 3 * 2 / 3
    weights = np.linalg.solve(uniform, bspline_weights(grid_size, positions))
    weights.setflags(write=False)
    return weights


def _size(control_grid: Float64[np.ndarray, "gx gy gz 3"]) -> tuple[float, bool]:
    """The bound that follows from the size of the uniform coefficients (else -inf), and whether they pass 2/3."""
    coefficients = control_grid[None]
    for g in control_grid.shape[:3]:
        coefficients = np.tensordot(coefficients, uniform_weights(g), (1, 1))
    # Components are on axis 1 now. What is added is more than the rounding of the change of basis.
    factor = CHOI_LEE * np.abs(coefficients).max() * (1 + 1e-9)
    bound = (1 - factor) ** 3 if factor < 1 else -np.inf
    return bound, bool(np.linalg.norm(coefficients, axis=1).max() < 2 / 3)


def _slopes(control_grid: Float64[np.ndarray, "gx gy gz 3"], layer: int, degree: int):
    """Bernstein coefficients of the derivatives of u on each cell of a layer across the first axis.

    Returns:
      For each axis the derivatives along it, [component, coefficient, coefficient, coefficient, cell].
      What rounding can do to a bound of the determinant, for each cell. With rows of absolute sum r, no sum of products
      of three entries exceeds r^3. The entries at the nodes, their products and the products with the inverse err by
      less than 200 unit roundings of that, times what the inverse can make of an error; extraction errs relative to the
      largest difference of neighbouring control values, and is multiplied by less.
    """
    window, slopes, largest = control_grid[layer : layer + degree + 1], [], 0.0
    for axis in range(3):
        part = np.diff(window, axis=axis)
        largest = max(largest, np.abs(part).max())
        for other, g in enumerate(control_grid.shape[:3]):
            matrices, rest = _extraction(g, degree, other == axis), part.shape[1:]
            if other == 0:
                matrices = matrices[layer : layer + 1]
            windows = np.lib.stride_tricks.sliding_window_view(part.reshape(len(part), -1), matrices.shape[2], axis=0)
            part = (matrices @ windows.swapaxes(1, 2)).reshape(*matrices.shape[:2], *rest)
            part = np.moveaxis(part, (0, 1), (-2, -1))  # The axis that comes next is the first one now.
        # Axes: component; then a cell's, and that of its coefficients, for each axis.
        part = part.transpose(0, 2, 4, 6, 1, 3, 5)
        slopes.append(part.reshape(*part.shape[:4], -1))
    rows = 1 + _reach(slopes).sum(axis=0).max(axis=0)
    amplification = np.abs(_basis(3 * degree - 1)[1]).sum(axis=1).max() ** 3
    return slopes, 200 * np.finfo(float).eps * amplification * rows**2 * (rows + largest)


def _reach(slopes: Sequence[np.ndarray]) -> Float64[np.ndarray, "axis component K"]:
    """Bounds of the sizes of the derivatives on each cell."""
    return np.stack([np.abs(part).max(axis=(1, 2, 3)) for part in slopes])


def _dominance(slopes: Sequence[np.ndarray], margin: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K"]:
    """The bound of each cell's determinant by dominance, else -inf."""
    reach, excess = _reach(slopes), 1 - margin[None]
    for axis, part in enumerate(slopes):
        own = np.arange(3)[:, None] == axis
        excess = excess - np.where(own, -part.min(axis=(1, 2, 3)), reach[axis])
    return np.where(excess.min(axis=0) > 0, excess.prod(axis=0), -np.inf)


def _bernstein_bounds(slopes: Sequence[np.ndarray], margin: Float64[np.ndarray, " K"], degree: int, jacobian):
    """The bound of each cell's determinant by its Bernstein coefficients, and whether it surely folds.

    Args:
      jacobian: [axis, component, node, node, node, cell], overwritten; new memory each time would cost as much again.
    """
    for axis, part in enumerate(slopes):
        degrees = [degree - (other == axis) for other in range(3)]
        _contract(part, [_values(d, 3 * degree - 1) for d in degrees], out=jacobian[axis])
        jacobian[axis, axis] += 1
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = jacobian
    determinant = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
    return _subdivide(_contract(determinant, [_basis(3 * degree - 1)[1]] * 3), margin)


def _subdivide(boxes: Float64[np.ndarray, "n n n K"], margin: Float64[np.ndarray, " K"]):
    """Lower bounds of polynomials given by Bernstein coefficients, and whether a value is surely not positive."""
    lowest, owners = np.full(len(margin), np.inf), np.arange(len(margin))
    hopeless, folds = np.zeros((2, len(margin)), bool)
    left = _left_half(len(boxes) - 1)
    halves = np.concatenate([left, left[::-1, ::-1]])
    for depth in range(SUBDIVISIONS + 1):
        bounds = boxes.min(axis=(0, 1, 2)) - margin[owners]
        # The coefficients at a box's corners are values of the polynomial: no subdivision lifts the bound above them.
        corners = boxes[:: len(left) - 1, :: len(left) - 1, :: len(left) - 1].min(axis=(0, 1, 2))
        hopeless[owners[corners <= margin[owners]]] = True
        folds[owners[corners <= -margin[owners]]] = True
        final = (bounds > 0) | hopeless[owners] | (depth == SUBDIVISIONS)
        np.minimum.at(lowest, owners[final], bounds[final])
        boxes, owners = boxes[..., ~final], np.tile(owners[~final], 8)
        for _ in range(3):
            # The other axes come to the front, and the halves to the boxes: eight where there was one.
            n, _, _, count = boxes.shape
            parts = (halves @ boxes.reshape(n, -1)).reshape(2, n, n, n, count)
            boxes = parts.transpose(2, 3, 1, 0, 4).reshape(n, n, n, 2 * count)
    return lowest, folds


def _contract(values: Float64[np.ndarray, "*C _ _ _ K"], matrices: Sequence[np.ndarray], out=None):
    """One matrix for each of the three axes before the last. Cells come last: products of small matrices are slow."""
    first, second, third = matrices
    *others, a, b, c, cells = values.shape
    values = (first @ values.reshape(*others, a, -1)).reshape(*others, len(first), b, -1)
    values = (second @ values).reshape(*others, len(first), len(second), c, cells)
    return np.matmul(third, values, out=out)


@functools.lru_cache
def _basis(degree: int) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, "n n"]]:
    """Chebyshev nodes in (0, 1), and the matrix from values of a polynomial there to its Bernstein coefficients."""
    nodes = (1 - np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))) / 2
    return nodes, np.linalg.inv(_bernstein(degree, nodes))


def _bernstein(degree: int, positions: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, "P n"]:
    k = np.arange(degree + 1)
    binomials = [math.comb(degree, i) for i in k]
    return binomials * positions[:, None] ** k * (1 - positions[:, None]) ** (degree - k)


@functools.lru_cache
def _values(degree: int, node_degree: int) -> Float64[np.ndarray, "P n"]:
    """From Bernstein coefficients of a degree to values at the nodes of another."""
    return _bernstein(degree, _basis(node_degree)[0])


@functools.lru_cache
def _left_half(degree: int) -> Float64[np.ndarray, "n n"]:
    """From Bernstein coefficients on [0, 1] to those on [0, 1/2] (de Casteljau)."""
    return np.array([[math.comb(row, k) / 2**row for k in range(degree + 1)] for row in range(degree + 1)])


@functools.lru_cache
def _extraction(grid_size: int, degree: int, differences: bool) -> Float64[np.ndarray, "cells n w"]:
    """From the control values around each cell of an axis to Bernstein coefficients on it; or from the differences of
    neighbouring ones, where a translation costs no digits, to those of the derivative."""
    nodes, inverse = _basis(degree)
    cells = np.arange(grid_size - degree)
    if degree == 1:
        matrices = np.broadcast_to(np.eye(2), (len(cells), 2, 2))
    else:
        weights = [bspline_weights(grid_size, (cell + nodes) / len(cells))[:, cell : cell + 4] for cell in cells]
        matrices = inverse @ np.stack(weights)
    # A control value is the first one and the differences up to it, so that a difference counts in all that follow.
    return degree * np.diff(matrices[..., :0:-1].cumsum(axis=2)[..., ::-1], axis=1) if differences else matrices
