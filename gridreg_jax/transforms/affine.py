"""Affine and rigid maps from pairs of points, in closed form and with gradients that stay finite.

An affine is 4x4 and acts on columns: `target = affine[:3, :3] @ point + affine[:3, 3]`. The unit is that of the points.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gridreg_jax.transforms.warp import identity_grid

Points = Float[Array, "N K 3"]
_HIGHEST = jax.lax.Precision.HIGHEST
# Ridge, as a share of the points' mean variance: at the rounding of float32, and points on a plane are no failure.
_RIDGE = 1e-6


def fit_affine(points: Points, targets: Points, weights: Float[Array, "N K"] | None = None) -> Float[Array, "N 4 4"]:
    """The affine A with the smallest `sum_i weight_i |A points_i - targets_i|^2`.

    Equal points and targets give the identity exactly. Where the points lie on a plane, a line or a single point, what
    they leave open is as in the identity.

    Args:
      weights: of the pairs, at least 0; None: equal.

    Source: Wang et al., KeyMorph, Medical Image Analysis 2023 (closed form of the affine).
    """
    shares = _shares(points, weights)
    centre, centred = _centred(points, shares)
    # Of the displacements rather than the targets, so that the ridge leaves the identity where it is.
    shift, moved = _centred(targets - points, shares)
    spread = _product(shares * centred, centred)
    ridge = _RIDGE * jnp.trace(spread, axis1=1, axis2=2) / 3 + 1e-12
    change = jnp.linalg.solve(spread + ridge[:, None, None] * jnp.eye(3), _product(shares * centred, moved))
    return _assembled(jnp.eye(3) + jnp.swapaxes(change, 1, 2), centre, centre + shift)


def fit_rigid(points: Points, targets: Points, weights: Float[Array, "N K"] | None = None) -> Float[Array, "N 4 4"]:
    """The rotation and shift A with the smallest `sum_i weight_i |A points_i - targets_i|^2`; never a reflection.

    Args:
      weights: of the pairs, at least 0; None: equal.

    Source: Kabsch, Acta Cryst. A 1976; Umeyama, IEEE TPAMI 1991.
    """
    shares = _shares(points, weights)
    centre, centred = _centred(points, shares)
    target_centre, target_centred = _centred(targets, shares)
    return _assembled(nearest_rotation(_product(shares * target_centred, centred)), centre, target_centre)


@jax.custom_jvp
def nearest_rotation(matrix: Float[Array, "N 3 3"]) -> Float[Array, "N 3 3"]:
    """The rotation R (no unit) with the largest `trace(R^T matrix)`, for a matrix in any unit.

    The derivative is that of the rotation, not of the singular vectors: it exists where singular values coincide.

    Source: Kabsch, Acta Cryst. A 1976; Umeyama, IEEE TPAMI 1991; the derivative was worked out for this library.
    """
    left, _, right = jnp.linalg.svd(matrix)
    sign = jnp.sign(jnp.linalg.det(_dot(left, right)))
    return _dot(left.at[:, :, 2].multiply(sign[:, None]), right)


@nearest_rotation.defjvp
def _nearest_rotation_jvp(primals, tangents):
    (matrix,), (change,) = primals, tangents
    rotation = nearest_rotation(matrix)
    # matrix = R S with S symmetric. Differentiated, with R^T dR = [w]x: R^T dM - dM^T R = [(trace(S) I - S) w]x.
    symmetric, turned = (_dot(jnp.swapaxes(rotation, 1, 2), one) for one in (matrix, change))
    trace = jnp.trace(symmetric, axis1=1, axis2=2)[:, None, None]
    system = (trace * (1 + _RIDGE) + 1e-12) * jnp.eye(3) - symmetric
    skew = turned - jnp.swapaxes(turned, 1, 2)
    axis = jnp.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], axis=-1)
    x, y, z = jnp.moveaxis(jnp.linalg.solve(system, axis[..., None])[..., 0], 1, 0)
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(-1, 3, 3)
    return rotation, _dot(rotation, cross)


def apply_affine(
    points: Float[Array, "*P 3"], linear: Float[Array, "3 3"], shift: Float[Array, "3"] | float = 0.0
) -> Float[Array, "*P 3"]:
    """`linear @ point + shift` for each of some points, in the precision of float32 on every platform.

    The shift and the result are in the unit of the points. Source: the definition of an affine map.
    """
    # Sums, which XLA fuses with what makes the points and what samples there; the CPU is slow at products so narrow.
    moved = [sum(points[..., j] * linear[i, j] for j in range(3)) for i in range(3)]
    return jnp.stack(moved, axis=-1) + shift


def affine_displacement(affine: Float[Array, "N 4 4"], shape: tuple[int, int, int]) -> Float[Array, "N X Y Z 3"]:
    """Displacement (voxels) of an affine from voxels to voxels: `A x - x`, by the definition of a displacement."""
    change = affine[:, :3] - jnp.eye(4)[:3]
    return jax.vmap(lambda one: apply_affine(identity_grid(shape), one[:, :3], one[:, 3]))(change)


def _shares(points: Points, weights) -> Float[Array, "N K 1"]:
    if weights is None:
        return jnp.full((*points.shape[:2], 1), 1 / points.shape[1], points.dtype)
    return (weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-12))[..., None]


def _centred(points: Points, shares):
    """The weighted mean, and the points relative to it."""
    centre = (shares * points).sum(axis=1, keepdims=True)
    return centre, points - centre


def _assembled(linear, centre, target_centre) -> Float[Array, "N 4 4"]:
    """The affine with a linear part that takes one point to another."""
    change = linear - jnp.eye(3)  # so that no rounding is left in the shift of the identity
    shift = target_centre - centre - jnp.einsum("nij,nkj->nki", change, centre, precision=_HIGHEST)
    rows = jnp.concatenate([linear, jnp.swapaxes(shift, 1, 2)], axis=2)
    return jnp.concatenate([rows, jnp.broadcast_to(jnp.eye(4)[3:], (len(rows), 1, 4))], axis=1)


def _product(one: Points, other: Points) -> Float[Array, "N 3 3"]:
    """`sum_k one_k other_k^T`."""
    return jnp.einsum("nki,nkj->nij", one, other, precision=_HIGHEST)


def _dot(one, other):
    return jnp.matmul(one, other, precision=_HIGHEST)
