"""Closed forms for the clamped cubic spline: energies, Jacobian and refinement of the continuous map itself.

The displacement is a tensor product of cubic splines, so its derivatives and their integrals follow exactly from the
control grid, with no dense field: from one small matrix an axis. The domain is the box between the centres of the
corner voxels, X-1 voxels long along axis 0; positions 0 and 1 of `interpolation` are its ends.

Integrals of squares are computed as sums of squares of coefficients in an orthonormal basis, not as quadratic forms
with a Gram matrix: the same number, but never negative, and 0 to rounding where it should be 0, also in float32.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from gridreg_jax.errors import InputError
from gridreg_jax.transforms.interpolation import axis_weights, bspline_weights, check_grid_size, contract
from gridreg_jax.transforms.jacobian import determinant

Spacing = Sequence[float] | Float[np.ndarray, "3"] | Float[Array, "3"]

# Orders of differentiation along x, y, z, and how often the term occurs in the sum.
_BENDING = {(2, 0, 0): 1, (0, 2, 0): 1, (0, 0, 2): 1, (1, 1, 0): 2, (1, 0, 1): 2, (0, 1, 1): 2}
_DIFFUSION = {(1, 0, 0): 1, (0, 1, 0): 1, (0, 0, 1): 1}


def gram(grid_size: int, length: float, derivative: int | tuple[int, int]) -> Float64[np.ndarray, "g g"]:
    """Integrals over [0, length] of products of derivatives of the cubic B-splines along an axis. Exact.

    In the unit of `length` to the power 1 - d - e. Source: the definition of a Gram matrix; B-splines and their
    derivatives, de Boor, A Practical Guide to Splines, 2001; their products integrated by Gauss-Legendre quadrature.

    Args:
      grid_size: coefficients along the axis, at least 4.
      length: of the axis, in the unit in which positions are to be measured (voxels: size - 1).
      derivative: d for the integrals of `B_i^(d) B_j^(d)`, (d, e) for those of `B_i^(d) B_j^(e)`; orders 0 to 3.

    Raises:
      InputError: fewer than 4 coefficients.
    """
    check_grid_size((grid_size,), "bspline")
    first, second = derivative if isinstance(derivative, tuple) else (derivative, derivative)
    left, right = _coordinates((grid_size, first), (grid_size, second))
    return left.T @ right * length ** (1 - first - second)


def bending_energy(
    control_grid: Float[Array, "N gx gy gz 3"],
    shape: tuple[int, int, int],
    *,
    spacing: Spacing | None = None,
) -> Float[Array, " N"]:
    """Bending energy of the continuous displacement, a mean over the domain: 0 for affine maps only.

    `u_xx^2 + u_yy^2 + u_zz^2 + 2 u_xy^2 + 2 u_xz^2 + 2 u_yz^2`, averaged over the three components as in the paper's
    released code (a third of the usual sum). Unlike a mean over voxels it has no discretisation error.

    Source: Yan et al., Medical Physics 2026, section 3.3; Rueckert et al., IEEE Trans. Med. Imaging 1999.

    Args:
      control_grid: displacements in voxels, at least 4 control points an axis.
      shape: (X, Y, Z), the lattice that the control grid spans.
      spacing: mm per voxel and axis; then the energy is that of the displacement in mm, in mm^-2. Otherwise voxel^-2.

    Raises:
      InputError: too few control points, or an axis of a single voxel.
    """
    return _energy(control_grid, shape, spacing, _BENDING)


def diffusion_energy(
    control_grid: Float[Array, "N gx gy gz 3"],
    shape: tuple[int, int, int],
    *,
    spacing: Spacing | None = None,
) -> Float[Array, " N"]:
    """`u_x^2 + u_y^2 + u_z^2` of the continuous displacement: mean over the domain and the three components. No unit.

    0 for translations only. Arguments and errors as for `bending_energy`; `spacing` matters where it differs by axis.

    Source: Fischer and Modersitzki, Contemporary Mathematics 313, 2002.
    """
    return _energy(control_grid, shape, spacing, _DIFFUSION)


def elastic_energy(
    control_grid: Float[Array, "N gx gy gz 3"],
    shape: tuple[int, int, int],
    *,
    mu: float,
    lam: float,
    spacing: Spacing | None = None,
) -> Float[Array, " N"]:
    """Linear elastic energy `mu |E|^2 + lam / 2 (div u)^2` with the strain `E = (grad u + grad u^T) / 2`.

    A mean over the domain, in the unit of `mu` and `lam`; 0 for translations and infinitesimal rotations only. It
    couples the components, so they are summed, not averaged. Other arguments and errors as for `bending_energy`.

    Source: Broit, PhD thesis, University of Pennsylvania 1981; Modersitzki, Numerical Methods for Image Registration,
    2004, chapter 9.

    Args:
      mu, lam: the Lame constants (shear modulus, first parameter).
    """
    lengths = _lengths(control_grid, shape)
    spacing = jnp.ones(3) if spacing is None else jnp.asarray(spacing)
    bases = [_coordinates((g, 0), (g, 1)) for g in control_grid.shape[1:4]]
    gradient = []
    for axis in range(3):
        matrices = [basis[axis == other] for other, basis in enumerate(bases)]
        gradient.append(contract(control_grid, matrices) * spacing / (lengths[axis] * spacing[axis]))
    gradient = jnp.stack(gradient, axis=-1)
    strain = (gradient + jnp.swapaxes(gradient, -1, -2)) / 2
    divergence = jnp.trace(gradient, axis1=-2, axis2=-1)
    return mu * jnp.sum(strain**2, axis=(1, 2, 3, 4, 5)) + lam / 2 * jnp.sum(divergence**2, axis=(1, 2, 3))


def jacobian(
    control_grid: Float[Array, "N gx gy gz 3"], points: Float[Array, "P 3"], shape: tuple[int, int, int]
) -> Float[Array, "N P 3 3"]:
    """Jacobian matrix of the continuous map `x -> x + u(x)` at any points: entry (c, a) is `delta_ca + d u_c / d x_a`.

    Closed form, from the 64 control points around each point. No unit; differentiable in both arguments.

    Source: derivatives of B-splines, de Boor, A Practical Guide to Splines, 2001; their tensor product as a map,
    Rueckert et al., IEEE Trans. Med. Imaging 1999.

    Args:
      control_grid: displacements in voxels, at least 4 control points an axis.
      points: voxel coordinates in the box from 0 to X-1, Y-1, Z-1; outside, the polynomials of the border cells go on.
      shape: (X, Y, Z), the lattice that the control grid spans.

    Raises:
      InputError: too few control points, or an axis of a single voxel.
    """
    lengths = _lengths(control_grid, shape)
    points = jnp.asarray(points)
    indices, values, slopes = [], [], []
    for axis, (g, length) in enumerate(zip(control_grid.shape[1:4], lengths, strict=True)):
        scaled = points[:, axis] * ((g - 3) / length)
        cell = jnp.clip(jnp.floor(scaled), 0, g - 4).astype(jnp.int32)
        pieces = jnp.asarray(_pieces(g), dtype=control_grid.dtype)[cell]
        constant, linear, quadratic, cubic = jnp.moveaxis(pieces, 1, 0)
        s = (scaled - cell)[:, None]
        indices.append(cell[:, None] + jnp.arange(4))
        values.append(constant + s * (linear + s * (quadratic + s * cubic)))
        slopes.append((linear + s * (2 * quadratic + s * 3 * cubic)) * ((g - 3) / length))
    i, j, k = indices
    local = control_grid[:, i[:, :, None, None], j[:, None, :, None], k[:, None, None, :]]
    columns = []
    for axis in range(3):
        weights = [slopes[other] if other == axis else values[other] for other in range(3)]
        columns.append(jnp.einsum("npijkc,pi,pj,pk->npc", local, *weights, precision=jax.lax.Precision.HIGHEST))
    return jnp.stack(columns, axis=-1) + jnp.eye(3)


def jacobian_determinant_on_lattice(
    control_grid: Float[Array, "N gx gy gz 3"], shape: tuple[int, int, int]
) -> Float[Array, "N X Y Z"]:
    """Jacobian determinant of the continuous map `x -> x + u(x)` at every voxel centre, borders included.

    Exact derivatives, not differences: nine interpolations with derivative weights. No unit. Arguments and errors as
    for `jacobian`.

    Source: Yan et al., Medical Physics 2026, section 4.4 (the determinant); de Boor, A Practical Guide to Splines,
    2001 (the derivatives).
    """
    lengths = _lengths(control_grid, shape)
    values = [axis_weights("bspline", g, size) for g, size in zip(control_grid.shape[1:4], shape, strict=True)]
    # The components apart, as cases of their own: their determinant then runs through memory in order.
    components = jnp.moveaxis(control_grid, -1, 0).reshape(-1, *control_grid.shape[1:4], 1)
    gradient = []
    for axis, (g, size) in enumerate(zip(control_grid.shape[1:4], shape, strict=True)):
        matrices = list(values)
        matrices[axis] = bspline_weights(g, np.linspace(0.0, 1.0, size), derivative=1) / lengths[axis]
        gradient.append(contract(components, matrices).reshape(3, -1, *shape))
    return determinant(*gradient)


def refine(
    control_grid: Float[Array, "N gx gy gz C"], grid_size: tuple[int, int, int]
) -> tuple[Float[Array, "N hx hy hz C"], Float[Array, " N"]]:
    """The same spline on another control grid, by orthogonal (least-squares) projection over the continuous domain.

    Exact where the new knots contain the old ones, that is where the new number of cells, `grid_size - 3`, is a
    multiple of the old one along every axis: the projection is then knot insertion. Otherwise, and for a coarser
    grid, it is the field closest to the old one in the mean square, and the error says how close.

    Source: de Boor, A Practical Guide to Splines, 2001, chapters XI and XIV.

    Args:
      control_grid: at least 4 control points an axis.
      grid_size: (hx, hy, hz), at least 4 each.

    Returns:
      The new control grid, and per case the root mean square over the domain of the length of the difference of the
      two fields, in the unit of the control grid (voxels); 0 to float32 rounding where exact.

    Raises:
      InputError: too few control points, old or new.
    """
    check_grid_size(control_grid.shape[1:4], "bspline")
    check_grid_size(grid_size, "bspline")
    pairs = [_coordinates((new, 0), (old, 0)) for new, old in zip(grid_size, control_grid.shape[1:4], strict=True)]
    refined = contract(control_grid, [np.linalg.lstsq(new, old)[0] for new, old in pairs])
    difference = contract(refined, [new for new, _ in pairs]) - contract(control_grid, [old for _, old in pairs])
    return refined, jnp.sqrt(jnp.sum(difference**2, axis=(1, 2, 3, 4)))


def _lengths(control_grid: Array, shape: tuple[int, int, int]) -> list[int]:
    check_grid_size(control_grid.shape[1:4], "bspline")
    if min(shape) < 2:
        raise InputError(f"derivatives need at least 2 voxels an axis, not {shape}")
    return [size - 1 for size in shape]


def _energy(control_grid, shape, spacing, terms: dict[tuple[int, int, int], int]) -> Float[Array, " N"]:
    """Mean over domain and components of the sum of squared derivatives listed in `terms`."""
    spacing = jnp.ones(3) if spacing is None else jnp.asarray(spacing)
    lengths = jnp.asarray(_lengths(control_grid, shape)) * spacing
    total = 0.0
    for orders, count in terms.items():
        matrices = [_coordinates((g, d))[0] for g, d in zip(control_grid.shape[1:4], orders, strict=True)]
        scale = spacing / jnp.prod(lengths ** jnp.asarray(orders))
        total += count * jnp.sum((contract(control_grid, matrices) * scale) ** 2, axis=(1, 2, 3, 4))
    return total / 3


@functools.lru_cache
def _coordinates(*functions: tuple[int, int]) -> list[np.ndarray]:
    """Coordinates of B-splines in a basis orthonormal in L2 of [0, 1]: integrals of products become dot products.

    Args:
      *functions: (grid_size, derivative) of each family; the basis spans them all.

    Returns:
      A matrix for each, with a column for each B-spline: `a.T @ b` holds the integrals of their products.
    """
    # Gauss-Legendre with 4 points integrates degree 7 exactly, and products of cubics have degree 6 in every cell.
    nodes, weights = np.polynomial.legendre.leggauss(4)
    breaks = np.unique(np.concatenate([np.linspace(0.0, 1.0, grid_size - 2) for grid_size, _ in functions]))
    widths = np.diff(breaks)[:, None]
    positions = (breaks[:-1, None] + widths * (nodes + 1) / 2).ravel()
    roots = np.sqrt(widths * weights / 2).reshape(-1, 1)
    columns = [roots * bspline_weights(g, positions, derivative=derivative) for g, derivative in functions]
    coordinates = np.linalg.qr(np.concatenate(columns, axis=1), mode="r")
    return np.split(coordinates, np.cumsum([g for g, _ in functions])[:-1], axis=1)


@functools.lru_cache
def _pieces(grid_size: int) -> Float64[np.ndarray, "cells 4 4"]:
    """The four B-splines of every cell as polynomials: `[cell, power, B-spline]`, in the cell's own coordinate 0..1."""
    cells = grid_size - 3
    starts = np.linspace(0.0, 1.0, cells + 1)[:-1]
    pieces = np.empty((cells, 4, 4))
    for power in range(4):
        taylor = bspline_weights(grid_size, starts, derivative=power) / (math.factorial(power) * cells**power)
        for cell in range(cells):
            pieces[cell, power] = taylor[cell, cell : cell + 4]
    return pieces
