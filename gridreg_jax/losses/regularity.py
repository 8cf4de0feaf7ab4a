"""Smoothness of a displacement field: energies of its differences and derivatives, in voxels, and a bar to folding."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.jacobian import jacobian_determinant

# Jacobian determinants below this are penalised: above 0, since between the voxels they are lower still.
MARGIN = 0.25


def bending_energy(displacement: Float[Array, "N X Y Z 3"]) -> Float[Array, " N"]:
    """Mean squared second derivatives: zero exactly on affine fields.

    The mean over interior voxels (one voxel off every face) and the three components of
    `xx^2 + yy^2 + zz^2 + 2 (xy^2 + xz^2 + yz^2)`. A pure derivative is `f[i+1] - 2 f[i] + f[i-1]`, a mixed one the
    cross of four diagonal neighbours over 4. On a quadratic field this is exact: a component 0.01 x^2 (others zero)
    gives 0.02^2 / 3, and 0.01 x y gives 2 * 0.01^2 / 3.

    The authors' release takes the central difference twice instead, `(f[i+2] - 2 f[i] + f[i-2]) / 4`, over voxels two
    off every face. It cannot see a field that alternates from voxel to voxel; this one can. The release also measures
    displacements in half volumes: its weight w is `w (2 / X)^2` here, for component 0 and a volume X voxels long.

    Args:
      displacement: voxels.

    Returns:
      One value a case, in 1 / voxel^2.

    Raises:
      InputError: an axis has fewer than three voxels, so that no second difference exists.

    Source: Yan et al., Medical Physics 2026, §3.3; Rueckert et al., IEEE TMI 1999.
    """
    if min(displacement.shape[1:4]) < 3:
        raise InputError(f"bending_energy needs 3 voxels along every axis; the displacement is {displacement.shape}.")
    u = displacement.astype(jnp.float32)

    def at(x=0, y=0, z=0):
        """The field `(x, y, z)` voxels away from every interior voxel."""
        window = [slice(1 + offset, size - 1 + offset) for offset, size in zip((x, y, z), u.shape[1:4], strict=True)]
        return u[(slice(None), *window)]

    xx = at(x=1) - 2 * at() + at(x=-1)
    yy = at(y=1) - 2 * at() + at(y=-1)
    zz = at(z=1) - 2 * at() + at(z=-1)
    xy = (at(x=1, y=1) - at(x=1, y=-1) - at(x=-1, y=1) + at(x=-1, y=-1)) / 4
    xz = (at(x=1, z=1) - at(x=1, z=-1) - at(x=-1, z=1) + at(x=-1, z=-1)) / 4
    yz = (at(y=1, z=1) - at(y=1, z=-1) - at(y=-1, z=1) + at(y=-1, z=-1)) / 4
    energy = xx**2 + yy**2 + zz**2 + 2 * (xy**2 + xz**2 + yz**2)
    return jnp.mean(energy, axis=(1, 2, 3, 4))


def bending_energy_of_map(
    displacement: Float[Array, "N X Y Z 3"],
    control_grid: Float[Array, "N gx gy gz 3"] | None,
    interpolator: str,
    *,
    spacing: bspline.Spacing | None = None,
) -> Float[Array, " N"]:
    """Bending energy of a map, in closed form where it is a cubic spline (`interpolator` "bspline"), which costs next
    to nothing; otherwise of its dense displacement. Both in 1 / voxel^2, or, of a spline, in the unit of a spacing.

    Raises:
      InputError: a spacing without a cubic spline.

    Source: Yan et al., Medical Physics 2026, §3.3; Rueckert et al., IEEE TMI 1999.
    """
    if interpolator == "bspline" and control_grid is not None:
        return bspline.bending_energy(control_grid, displacement.shape[1:4], spacing=spacing)
    if spacing is not None:
        raise InputError(f"the spacing counts for cubic splines only, not for {interpolator!r}")
    return bending_energy(displacement)


def diffusion_energy(displacement: Float[Array, "N X Y Z 3"]) -> Float[Array, " N"]:
    """Mean squared first derivatives: zero exactly on translations.

    The sum over the three axes of the mean squared forward difference, the mean taken over the three components and
    over the voxels where that difference exists (an axis of a single voxel adds nothing).

    Args:
      displacement: voxels.

    Returns:
      One value a case, without unit.

    Source: Balakrishnan et al., IEEE TMI 2019 (which averages over the axes where this sums).
    """
    u = displacement.astype(jnp.float32)
    axes = [axis for axis in (1, 2, 3) if u.shape[axis] > 1]
    return sum((jnp.mean(jnp.diff(u, axis=axis) ** 2, axis=(1, 2, 3, 4)) for axis in axes), jnp.zeros(len(u)))


def diffusion_energy_of_map(
    displacement: Float[Array, "N X Y Z 3"], control_grid: Float[Array, "N gx gy gz 3"] | None, interpolator: str
) -> Float[Array, " N"]:
    """Diffusion energy of a map, without unit: in closed form where it is a cubic spline (`interpolator` "bspline"),
    otherwise of its dense displacement (voxels).

    Source: as `diffusion_energy` and `bspline.diffusion_energy`.
    """
    if interpolator == "bspline" and control_grid is not None:
        return bspline.diffusion_energy(control_grid, displacement.shape[1:4])
    return diffusion_energy(displacement)


def folding_penalty(
    displacement: Float[Array, "N X Y Z 3"], control_grid: Float[Array, "N gx gy gz 3"] | None, interpolator: str
) -> Float[Array, " N"]:
    """Mean square by which Jacobian determinants of a map fall short of `MARGIN`; 0 where none does.

    Of a cubic spline (`interpolator` "bspline") they are exact, at every voxel; otherwise by central differences, at
    every interior voxel.

    Args:
      displacement: voxels.
      control_grid: what `displacement` was interpolated from, voxels; None if nothing.
      interpolator: with which it was.

    Returns:
      One value a case, without unit.

    Raises:
      InputError: an axis has fewer than three voxels (two for a cubic spline).

    Source: Chun & Fessler, IEEE J. Sel. Topics Signal Process. 2009, who let a quadratic begin beyond a bound too, but
    on differences of control points.
    """
    if interpolator == "bspline" and control_grid is not None:
        determinant = bspline.jacobian_determinant_on_lattice(control_grid, displacement.shape[1:4])
    else:
        determinant = jacobian_determinant(displacement.astype(jnp.float32))
    return jnp.mean(jnp.maximum(MARGIN - determinant, 0) ** 2, axis=(1, 2, 3))


def kl_to_smooth(
    velocity: Float[Array, "N X Y Z 3"], log_variance: Float[Array, "N X Y Z 3"], *, precision: float
) -> Float[Array, " N"]:
    """Divergence of a Gaussian posterior of the velocity, independent at every voxel, from a prior that is smooth.

    The prior's inverse covariance is `precision (D - A)`: D counts a voxel's neighbours along the axes, and A is 1
    between neighbours. The value, less a constant,

        3/2 mean(precision D exp(log_variance) - log_variance) + precision / 4 sum over axes of mean((difference)^2),

    is that of the authors' code: means over voxels and components, and forward differences of the mean velocity. The
    Kullback-Leibler divergence per voxel has the same first part, and six times the second.

    Args:
      velocity: mean of the posterior, voxels.
      log_variance: of the posterior, squared voxels.
      precision: of the prior (the authors' lambda), in 1 / voxel^2.

    Returns:
      One value a case, without unit.

    Source: Dalca et al., Medical Image Analysis 2019.
    """
    neighbours = 0.0
    for axis, size in zip((1, 2, 3), velocity.shape[1:4], strict=True):
        place = jnp.arange(size).reshape([-1 if a == axis else 1 for a in range(5)])
        neighbours += jnp.minimum(place, 1) + jnp.minimum(size - 1 - place, 1)
    log_variance = log_variance.astype(jnp.float32)
    spread = jnp.mean(precision * neighbours * jnp.exp(log_variance) - log_variance, axis=(1, 2, 3, 4))
    return 1.5 * spread + precision / 4 * diffusion_energy(velocity)
