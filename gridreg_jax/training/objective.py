"""What training minimises: similarity at image and grid level, overlap, and bending energy (paper, section 3.3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gridreg_jax.losses import SIMILARITIES, bending_energy, soft_dice
from gridreg_jax.models import Prediction
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.interpolation import control_positions
from gridreg_jax.transforms.warp import sample, warp


def objective(
    prediction: Prediction,
    batch: dict[str, jax.Array],
    *,
    interpolator: str,
    num_labels: int,
    similarity: str = "mse",
    image: float = 1.0,
    grid: float = 1.0,
    dice: float = 0.0,
    bending: float = 1.0,
) -> tuple[Float[Array, " N"], dict[str, Float[Array, " N"]]]:
    """Weighted sum of the terms, and the terms themselves, one value a case.

    Args:
      batch: `fixed`, `moving` `[N, X, Y, Z, 1]`; with `dice`, also compact `fixed_labels`, `moving_labels`.
      interpolator: of the control grid; the cubic spline's bending energy is taken in closed form.
      num_labels: labels that are scored.
      similarity: name in `losses.SIMILARITIES`, used at image level; at grid level the mean squared difference.
      image, grid, dice, bending: weights; a term of weight 0 is not computed. `bending` is in voxel units: the
        paper's 2e5, for displacements in half volumes, is `2e5 (2 / X)^2` here, 49 at 128 voxels an axis.
    """
    fixed, moving = batch["fixed"], batch["moving"]
    terms = {}
    if image:
        terms["image"] = SIMILARITIES[similarity](fixed, warp(moving, prediction.displacement))
    if grid and prediction.control_displacement is not None:
        terms["grid"] = _grid_similarity(prediction, fixed, moving, interpolator)
    if dice:
        terms["dice"] = soft_dice(
            batch["fixed_labels"], batch["moving_labels"], prediction.displacement, num_labels=num_labels
        )
    if bending:
        if interpolator == "bspline" and prediction.control_grid is not None:
            terms["bending"] = bspline.bending_energy(prediction.control_grid, fixed.shape[1:4])
        else:
            terms["bending"] = bending_energy(prediction.displacement)
    weights = dict(image=image, grid=grid, dice=dice, bending=bending)
    return sum(weights[name] * value for name, value in terms.items()), terms


def _grid_similarity(prediction, fixed, moving, interpolator):
    """Mean squared difference of the images at the control positions (paper: L_sim at grid level)."""
    axes = [
        control_positions(interpolator, g) * (size - 1)
        for g, size in zip(prediction.control_displacement.shape[1:4], fixed.shape[1:4], strict=True)
    ]
    points = jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1), jnp.float32)
    fixed_values = jax.vmap(lambda volume: sample(volume, points))(fixed)
    moving_values = jax.vmap(sample)(moving, points + prediction.control_displacement)
    return SIMILARITIES["mse"](fixed_values, moving_values)
