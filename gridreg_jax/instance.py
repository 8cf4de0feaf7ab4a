"""Instance optimisation: gradient steps that fit the control grid of a pair to its own two images, without labels."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gridreg_jax.losses import bending_energy_of_map, lncc
from gridreg_jax.transforms.interpolation import interpolate
from gridreg_jax.transforms.warp import warp

# Voxels an axis of the box in which intensities are correlated: small, so that thin structures count.
WINDOW = 5


def refine(
    control_grid: Float[Array, "N gx gy gz 3"],
    fixed: Float[Array, "N X Y Z 1"],
    moving: Float[Array, "N x y z 1"],
    *,
    steps: int,
    bending: float,
    learning_rate: float,
    interpolator: str,
) -> Float[Array, "N gx gy gz 3"]:
    """Lower `lncc(fixed, warped) + bending * bending energy` by Adam, from a control grid that is good already.

    A network gives every pair the map that is right on average; what it leaves, a fraction of a voxel here and there,
    the pair's own local correlation shows. Pairs of a batch do not influence each other.

    Args:
      control_grid: the start, displacements in voxels.
      steps: of Adam (0: the start is returned), its step size falling to 0 along a cosine; static under jit.
      bending: weight of the bending energy (per squared voxel).
      learning_rate: largest change of a control point in the first step, voxels.
      interpolator: of the control grid.

    Source: instance-specific optimisation, Balakrishnan et al., IEEE Trans. Med. Imaging 2019.
    """
    if steps == 0:
        return control_grid
    shape = fixed.shape[1:4]

    def loss(grid):
        displacement = interpolate(grid, shape, method=interpolator)
        return jnp.sum(
            lncc(fixed, warp(moving, displacement), window=WINDOW)
            + bending * bending_energy_of_map(displacement, grid, interpolator)
        )

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(_, carried):
        grid, state = carried
        updates, state = optimizer.update(jax.grad(loss)(grid), state)
        return optax.apply_updates(grid, updates), state

    return jax.lax.fori_loop(0, steps, step, (control_grid, optimizer.init(control_grid)))[0]
