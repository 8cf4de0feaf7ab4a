"""Thin-plate splines: smooth maps through pairs of points, or near them.

`f(x) = x + a + B x + sum_i w_i U(|x - p_i|)`, the weights `w` orthogonal to constants and linear functions.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from gridreg_jax.errors import check_known

_HIGHEST = jax.lax.Precision.HIGHEST
# Points that are evaluated together: their distances to all centres are in memory, not those of a whole lattice.
_CHUNK = 8192
# On the diagonal of the linear system, whose entries are about 1: coincident or coplanar points are no failure.
_RIDGE = 1e-6


def _r2_log_r(squared):
    return 0.5 * squared * jnp.log(squared + 1e-12)


def _minus_r(squared):
    return -jnp.sqrt(squared + 1e-12)


# Radial functions U of the squared distance, with the sign for which smoothing smooths. "r2logr" is the thin plate of
# two dimensions, which KeyMorph uses in three; "r" is the one of three dimensions (Duchon 1977).
KERNELS = {"r2logr": _r2_log_r, "r": _minus_r}


@struct.dataclass
class ThinPlate:
    """Thin-plate splines that `fit_thin_plate` has found, one a case.

    Source: Duchon, Lecture Notes in Mathematics 571, 1977; Bookstein, IEEE TPAMI 1989.

    Attributes:
      centers: the points p.
      weights: w.
      linear: a, then the three columns of B.
      kernel: a name in `KERNELS`.
    """

    centers: Float[Array, "N K 3"]
    weights: Float[Array, "N K 3"]
    linear: Float[Array, "N 4 3"]
    kernel: str = struct.field(pytree_node=False)

    def displacement_at(self, points: Float[Array, "P 3"]) -> Float[Array, "N P 3"]:
        """`f(x) - x` at points, the same for all cases; a chunk of them at a time, to bound the memory.

        In the unit of the points that the splines were fitted to. Source: the module's formula (Duchon 1977).
        """

        @jax.checkpoint  # else the gradient keeps every distance
        def at(point):
            def one(centers, weights, linear):
                direct = jnp.square(point - centers).sum(axis=-1)
                # The same with a matrix product: less accurate, but its gradient is one too, and five times faster.
                product = jnp.square(centers).sum(axis=-1) + jnp.square(point).sum()
                product -= 2 * jnp.matmul(centers, point, precision=_HIGHEST)
                squared = jax.lax.stop_gradient(direct - product) + product
                values = jnp.concatenate([KERNELS[self.kernel](squared), jnp.ones(1), point])
                return jnp.matmul(values, jnp.concatenate([weights, linear]), precision=_HIGHEST)

            return jax.vmap(one)(self.centers, self.weights, self.linear)

        return jnp.moveaxis(jax.lax.map(at, points, batch_size=_CHUNK), 0, 1)


def fit_thin_plate(
    points: Float[Array, "N K 3"],
    targets: Float[Array, "N K 3"],
    weights: Float[Array, "N K"] | None = None,
    *,
    smoothing: float | Float[Array, ""] = 0.0,
    kernel: str = "r2logr",
) -> ThinPlate:
    """The spline that takes points to targets, as closely as `smoothing` asks.

    It minimises `sum_i weight_i |f(p_i) - target_i|^2 + smoothing * bending`: with no smoothing it passes through the
    targets, and as smoothing grows it becomes the affine with the least squared distances. Equal points and targets
    give the identity exactly.

    Args:
      points: coordinates of about unit size, for accuracy and because the smoothing depends on the unit.
      weights: of the pairs, above 0; None: 1.
      smoothing: lambda, at least 0.
      kernel: a name in `KERNELS`.

    Raises:
      InputError: unknown kernel.

    Source: Wahba, Spline models for observational data, 1990, chapter 2; Wang et al., KeyMorph, Medical Image Analysis
    2023 (lambda / weight on the diagonal).
    """
    check_known("kernel", kernel, KERNELS)
    count = points.shape[1]
    squared = jnp.square(points[:, :, None] - points[:, None]).sum(axis=-1)
    slack = jnp.full(points.shape[:2], smoothing) if weights is None else smoothing / weights
    # The weights are solved for times `scale`, which keeps the system's entries about 1 as smoothing grows.
    scale = 1 + jnp.asarray(smoothing)
    curved = (KERNELS[kernel](squared) + slack[..., None] * jnp.eye(count)) / scale
    flat = jnp.concatenate([jnp.ones_like(points[..., :1]), points], axis=-1)
    system = jnp.concatenate(
        [
            jnp.concatenate([curved + _RIDGE * jnp.eye(count), flat], axis=2),
            jnp.concatenate([jnp.swapaxes(flat, 1, 2), jnp.zeros((len(flat), 4, 4)) - _RIDGE * jnp.eye(4)], axis=2),
        ],
        axis=1,
    )
    found = jnp.linalg.solve(system, jnp.pad(targets - points, [(0, 0), (0, 4), (0, 0)]))
    return ThinPlate(points, found[:, :count] / scale, found[:, count:], kernel)
