"""How a dense displacement stretches and folds space: the determinant of the Jacobian of `x -> x + displacement(x)`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gridreg_jax.errors import InputError


def determinant(
    dx: Float[Array, "3 N X Y Z"], dy: Float[Array, "3 N X Y Z"], dz: Float[Array, "3 N X Y Z"]
) -> Float[Array, "N X Y Z"]:
    """`det(I + grad u)` from the derivatives of a displacement u along the three axes, without forming the matrices.

    Args:
      dx, dy, dz: the columns of grad u: derivatives along axes 0, 1 and 2, component c first; no unit.

    Source: the rule of Sarrus.
    """
    xx, yx, zx = dx[0] + 1, dx[1], dx[2]
    xy, yy, zy = dy[0], dy[1] + 1, dy[2]
    xz, yz, zz = dz[0], dz[1], dz[2] + 1
    return xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)


def jacobian_determinant(displacement: Float[Array, "N X Y Z 3"]) -> Float[Array, "N X-2 Y-2 Z-2"]:
    """Jacobian determinant of `x -> x + displacement(x)` at the interior voxels, by central differences.

    1 keeps volume, below 1 shrinks, 0 or less folds. No unit: displacement and distances are both in voxels. Central
    differences do not see what happens within a voxel; `bspline.jacobian` is exact at any point.

    Raises:
      InputError: an axis has fewer than three voxels, hence no interior.

    Source: Yan et al., Medical Physics 2026, section 4.4 (folding).
    """
    if min(displacement.shape[1:4]) < 3:
        raise InputError(f"central differences need 3 voxels an axis, not {displacement.shape[1:4]}")
    u = jnp.moveaxis(displacement, -1, 0)
    inner = slice(1, -1)
    dx = (u[:, :, 2:, inner, inner] - u[:, :, :-2, inner, inner]) / 2
    dy = (u[:, :, inner, 2:, inner] - u[:, :, inner, :-2, inner]) / 2
    dz = (u[:, :, inner, inner, 2:] - u[:, :, inner, inner, :-2]) / 2
    return determinant(dx, dy, dz)
